//! The channels of one sandbox's agent connection: all of their state, and no I/O.
//!
//! Handlers open channels and wait on them; the connection's task ([`super::connection`]) feeds
//! [`Link::receive`] with what the agent says and takes what is to be written. Nothing that the
//! agent says is trusted: whatever breaks the protocol is a [`Violation`] and ends the connection,
//! and what can be buffered for a reader is bounded by the stream's window.

use super::problem::Problem;
use super::stream;
use bytes::{Buf as _, Bytes, BytesMut};
use shoal_wire::{
    DATA_CHUNK, DETACH, DecodeError, EOF, ExecAttach, Exited, Failure, HEADER_LEN, Header, Kind, MAX_PAYLOAD,
    PORT_WINDOW, STDERR, Started, WINDOW, Window,
};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::timeout;

/// Calls and streams that one sandbox may have under way.
pub const MAX_CHANNELS: usize = 1024;

/// How many of them may be connections to ports: a public port is open to strangers, and the sandbox's owner shall
/// still get a call through.
pub const MAX_PORTS: usize = MAX_CHANNELS / 4 * 3;

/// Bytes that an agent may have to keep for all servers in its sandbox together that do not read what strangers send
/// them, beside [`LEAST_AHEAD`] for each. It lives in few megabytes.
const AHEAD: u64 = 4 << 20;

/// What each connection to a port may always have on its way. When so much was consumed, the agent tells.
const LEAST_AHEAD: u64 = 8 << 10;

/// The agent is told of progress in steps of this many bytes.
const WINDOW_STEP: u64 = WINDOW / 8;

/// And in steps of this many when it has nothing more under way: an agent that is short of memory
/// may keep less than a whole window, and wait for every bit of it.
const WINDOW_STEP_IDLE: u64 = 8 << 10;

/// Bytes waiting to be written to the agent above which uploads wait.
const OUT_LIMIT: usize = 1 << 20;

/// Shorter payloads are copied together, so that many small ones cost no more than their bytes. Longer ones stay in the
/// buffer that they were read into, which holds little else.
const COPY_BELOW: usize = super::connection::LARGE_READ / 2;

/// Small payloads are gathered up to about this size.
const GATHER: usize = 64 << 10;

/// What can wait goes out with the next frame that cannot, or after this time.
const LAZY: Duration = Duration::from_millis(10);

/// Largest payload of a frame that answers no listing; all of these are small.
const SMALL_PAYLOAD: usize = 64 << 10;

/// The agent broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

impl From<DecodeError> for Violation {
    fn from(error: DecodeError) -> Self {
        Self(error.0)
    }
}

/// How a sandbox's connection ended for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The node ended the sandbox, for this reason.
    Gone(Option<String>),
    /// It broke, for this reason.
    Lost(String),
}

/// Whether calls can be made.
enum Phase {
    /// The connection is being made, or made again.
    Connecting,
    /// The agent serves.
    Up,
    /// It never will again.
    Ended(Ending),
}

/// What a channel is for; which frames the agent may send on it follows from that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// An exec's output; the id resumes it when the connection breaks.
    Exec(String),
    /// An exec's end; asked for again when the connection breaks.
    Wait,
    /// A request with a short answer.
    Call,
    /// A request with an answer of up to [`MAX_PAYLOAD`].
    Listing,
    /// A request whose answer is followed by bytes.
    Download,
    /// A request followed by bytes, then the answer.
    Upload,
    /// A request whose answer is followed by bytes both ways. One task reads and writes.
    Port,
}

/// Why nothing more comes on a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// All bytes came.
    Done,
    /// The command ended.
    Exited(Exited),
    /// The agent says no.
    Failed(Failure),
    /// The connection ended.
    Ended(Ending),
}

/// The first answer on a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Head {
    /// The command runs.
    Started(Started),
    /// The request succeeded; the payload depends on the request.
    Ok(Bytes),
}

/// A stretch of output, ready to be sent to the client.
struct Piece {
    bytes: BytesMut,
    /// Bytes of each stream in it.
    payload: [usize; 2],
    /// The last frame in it: stream and place of its header. `None`: raw bytes.
    last: Option<(usize, usize)>,
    /// Made here, by copying: more may be appended.
    gathered: bool,
}

/// One direction of one stream from the agent.
#[derive(Default)]
struct Inbound {
    /// Offset after the last byte received.
    received: u64,
    /// Offset after the last byte that the client's connection took.
    pulled: u64,
    /// Offset told to the agent.
    acknowledged: u64,
    /// Bytes that come again and that the client's connection has taken already.
    repeated: u64,
    ended: bool,
}

impl Inbound {
    fn at(offset: u64) -> Self {
        Self { received: offset, pulled: offset, acknowledged: offset, repeated: 0, ended: false }
    }
    /// After a break, when what the client's connection took may not have reached the client.
    fn again(&self) -> Self {
        let Self { pulled, acknowledged, .. } = *self;
        Self { pulled, repeated: pulled.saturating_sub(acknowledged), ..Self::at(acknowledged) }
    }
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts, no state machine")]
struct Entry {
    role: Role,
    /// The request; sent again while it is not answered, when a broken connection is back.
    request: Option<(Kind, Vec<u8>)>,
    head: Option<Head>,
    answered: bool,
    end: Option<End>,
    /// The agent has said its last word on this channel.
    over: bool,
    /// A new connection was asked to go on from these offsets.
    resuming: bool,
    /// The client itself says what it has consumed.
    by_client: bool,
    waker: Option<Waker>,
    queue: VecDeque<Piece>,
    inbound: [Inbound; 2],
    sent: u64,
    consumed: u64,
}

struct State {
    /// Channels that are connections to ports.
    ports: usize,
    /// Bytes that were sent on these and are not consumed.
    ahead: u64,
    phase: Phase,
    channels: HashMap<u32, Entry>,
    next_channel: u32,
    /// Channel numbers went round once, so every number has been in use.
    wrapped: bool,
    out: VecDeque<Bytes>,
    out_bytes: usize,
    /// Something in `out` cannot wait.
    urgent: bool,
    room: Vec<Waker>,
}

/// One sandbox's agent connection.
pub struct Link {
    state: Mutex<State>,
    /// Something is to be written.
    outgoing: Notify,
    /// The phase changed.
    settled: Notify,
}

impl Link {
    /// A link that waits for its connection.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(State {
                ports: 0,
                ahead: 0,
                phase: Phase::Connecting,
                channels: HashMap::new(),
                next_channel: 1,
                wrapped: false,
                out: VecDeque::new(),
                out_bytes: 0,
                urgent: false,
                room: Vec::new(),
            }),
            outgoing: Notify::new(),
            settled: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code under this lock panics half way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- for handlers -----------------------------------------------------------------------

    /// Opens a channel with its request, as soon as the connection stands.
    pub async fn open(self: &Arc<Self>, role: Role, kind: Kind, payload: Vec<u8>) -> Result<Channel, Problem> {
        if payload.len() > MAX_PAYLOAD {
            return Err(Problem::invalid(format!("request is longer than {MAX_PAYLOAD} bytes")));
        }
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            {
                let mut state = self.lock();
                match &state.phase {
                    Phase::Ended(ending) => return Err(ending.to_problem()),
                    Phase::Connecting => {}
                    Phase::Up => {
                        if state.channels.len() >= MAX_CHANNELS {
                            let detail = format!("{MAX_CHANNELS} calls are under way in this sandbox");
                            return Err(Problem::exhausted(detail).hint("let some of them finish first"));
                        }
                        if role == Role::Port {
                            if state.ports >= MAX_PORTS {
                                let detail = format!("{MAX_PORTS} connections to ports of this sandbox are open");
                                return Err(Problem::exhausted(detail).hint("close some of them"));
                            }
                            state.ports += 1;
                        }
                        let id = state.free_channel();
                        state.send(shoal_wire::frame(kind, 0, id, &payload));
                        let request = matches!(role, Role::Exec(_) | Role::Wait).then_some((kind, payload));
                        state.channels.insert(id, Entry::new(role, request));
                        self.outgoing.notify_one();
                        return Ok(Channel { link: Arc::clone(self), id });
                    }
                }
            }
            settled.await;
        }
    }

    // --- for the connection's task ------------------------------------------------------------

    /// The connection stands: goes on with the execs that were being read when the last one broke; other
    /// calls cannot be repeated blindly and end.
    pub fn up(&self) {
        let mut state = self.lock();
        let state = &mut *state;
        state.phase = Phase::Up;
        let mut frames = Vec::new();
        for (id, entry) in &mut state.channels {
            if entry.over || entry.end.is_some() {
                continue;
            }
            if entry.role == Role::Wait {
                entry.answered = false;
            } else if !matches!(entry.role, Role::Exec(_)) {
                entry.finish(End::Ended(Ending::Lost("the connection to the guest agent broke".to_owned())));
                continue;
            }
            if !entry.answered {
                if let Some((kind, payload)) = &entry.request {
                    frames.push(shoal_wire::frame(*kind, 0, *id, payload));
                }
                continue;
            }
            let Role::Exec(exec_id) = &entry.role else { continue };
            // What the client did not take yet comes again, so a resumed stream needs no more room.
            entry.queue.clear();
            for inbound in &mut entry.inbound {
                *inbound = if entry.by_client { inbound.again() } else { Inbound::at(inbound.pulled) };
            }
            entry.resuming = true;
            let [out, err] = &entry.inbound;
            let attach = ExecAttach {
                exec_id: exec_id.clone().into_bytes(),
                stdout_offset: out.received,
                stderr_offset: err.received,
            };
            frames.push(shoal_wire::frame(Kind::ExecAttach, 0, *id, &attach.encode()));
        }
        for frame in frames {
            state.send(frame);
        }
        self.outgoing.notify_one();
        self.settled.notify_waiters();
    }

    /// The connection broke; another may follow.
    pub fn broke(&self) {
        let mut state = self.lock();
        if matches!(state.phase, Phase::Up) {
            state.phase = Phase::Connecting;
        }
        state.out.clear();
        state.out_bytes = 0;
        state.urgent = false;
        for waker in state.room.drain(..) {
            waker.wake();
        }
    }

    /// No connection will follow: ends everything. The first ending stands.
    pub fn end(&self, ending: &Ending) {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Ended(_)) {
            state.phase = Phase::Ended(ending.clone());
        }
        for entry in state.channels.values_mut() {
            if !entry.over {
                entry.finish(End::Ended(ending.clone()));
            }
        }
        self.settled.notify_waiters();
    }

    /// Waits until [`Self::end`] was called.
    pub async fn ended(&self) {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            if self.is_ended() {
                return;
            }
            settled.await;
        }
    }

    /// [`Self::end`] was called.
    pub fn is_ended(&self) -> bool {
        matches!(self.lock().phase, Phase::Ended(_))
    }

    /// Checks a frame's header before its payload is given any memory.
    pub fn admit(&self, header: &Header) -> Result<(), Violation> {
        let length = header.len as usize;
        match header.kind {
            Kind::Data if length as u64 <= WINDOW => Ok(()),
            Kind::Data => Err(Violation("more data than the window allows")),
            _ if length <= SMALL_PAYLOAD => Ok(()),
            Kind::Ok => {
                let state = self.lock();
                // The answer to a listing that nobody waits for any more is read, too, and dropped.
                match state.channels.get(&header.channel) {
                    Some(entry) if entry.role == Role::Listing => Ok(()),
                    None if state.was_opened(header.channel) => Ok(()),
                    _ => Err(Violation("frame too long")),
                }
            }
            _ => Err(Violation("frame too long")),
        }
    }

    /// Takes a whole frame, header included.
    pub fn receive(&self, header: Header, frame: BytesMut) -> Result<(), Violation> {
        let mut state = self.lock();
        if !state.was_opened(header.channel) {
            return Err(Violation("frame on a channel that was never opened"));
        }
        match header.kind {
            Kind::Started | Kind::Exited | Kind::Data | Kind::Window | Kind::Ok | Kind::Error => {}
            _ => return Err(Violation("frame that an agent does not send")),
        }
        // Nobody may listen any more: what was under way when the channel was cancelled is dropped.
        let state = &mut *state;
        let Some(entry) = state.channels.get_mut(&header.channel) else { return Ok(()) };
        if entry.end.is_some() && !entry.over {
            return Ok(());
        }
        let consumed = entry.consumed;
        entry.receive(header, frame)?;
        if entry.role == Role::Port {
            state.ahead = state.ahead.saturating_sub(entry.consumed - consumed);
        }
        entry.wake();
        Ok(())
    }

    /// Takes a client's word for how far it has consumed an exec's output; false when nobody reads it now.
    pub fn consumed(&self, exec_id: &str, offsets: [u64; 2]) -> bool {
        let mut state = self.lock();
        let next = state.next_channel;
        let reads = |entry: &Entry| {
            let over = matches!(entry.end, Some(End::Failed(_) | End::Ended(_)));
            !over && matches!(&entry.role, Role::Exec(id) if id == exec_id)
        };
        let open = state.channels.iter().filter(|(_, entry)| reads(entry)).map(|(id, _)| *id);
        // The newest has the output; one that it has taken over from may not have been told yet.
        let Some(id) = open.min_by_key(|id| next.wrapping_sub(*id)) else { return false };
        if state.consumed(id, offsets, true) {
            self.outgoing.notify_one();
        }
        true
    }

    /// Takes everything that is to be written; waits until there is something.
    pub async fn outgoing(&self) -> VecDeque<Bytes> {
        let mut waited = false;
        loop {
            let lazy = {
                let mut state = self.lock();
                if state.urgent || (waited && !state.out.is_empty()) {
                    state.urgent = false;
                    return std::mem::take(&mut state.out);
                }
                !state.out.is_empty()
            };
            if lazy {
                waited = timeout(LAZY, self.outgoing.notified()).await.is_err();
            } else {
                self.outgoing.notified().await;
            }
        }
    }

    /// So many bytes of what was taken are written.
    pub fn written(&self, bytes: usize) {
        let mut state = self.lock();
        state.out_bytes = state.out_bytes.saturating_sub(bytes);
        if state.out_bytes < OUT_LIMIT {
            for waker in state.room.drain(..) {
                waker.wake();
            }
        }
    }
}

impl State {
    fn free_channel(&mut self) -> u32 {
        loop {
            let id = self.next_channel;
            self.next_channel = id.checked_add(1).unwrap_or_else(|| {
                self.wrapped = true;
                1
            });
            if !self.channels.contains_key(&id) {
                return id;
            }
        }
    }

    fn was_opened(&self, channel: u32) -> bool {
        channel != 0 && (self.wrapped || channel < self.next_channel)
    }

    fn send(&mut self, frame: impl Into<Bytes>) {
        self.send_lazily(frame);
        self.urgent = true;
    }

    /// Tells the agent that everything before these offsets is consumed: at once, or when it is worth a word.
    ///
    /// Returns whether it was told anything.
    fn consumed(&mut self, channel: u32, offsets: [u64; 2], at_once: bool) -> bool {
        // While the connection is down nothing is said; the attach to the next one says it all.
        if !matches!(self.phase, Phase::Up) {
            return false;
        }
        let Some(entry) = self.channels.get_mut(&channel) else { return false };
        // After a command's end the agent still keeps what is not consumed; after a file's end, nothing.
        let ended = matches!(entry.end, Some(End::Exited(_)));
        let half_closed = entry.role == Role::Port && entry.inbound[0].ended;
        if !entry.answered || entry.resuming || (entry.over && !ended) || half_closed {
            return false;
        }
        let mut frames = [None, None];
        for (((inbound, consumed), frame), flags) in
            entry.inbound.iter_mut().zip(offsets).zip(&mut frames).zip([0, STDERR])
        {
            // A client cannot have what was not handed to it.
            let consumed = consumed.min(inbound.pulled);
            let step = match consumed == inbound.received {
                true if ended => 1,
                _ if at_once => 1,
                true => WINDOW_STEP_IDLE,
                false => WINDOW_STEP,
            };
            if consumed >= inbound.acknowledged.saturating_add(step) {
                inbound.acknowledged = consumed;
                *frame = Some(shoal_wire::frame(Kind::Window, flags, channel, &Window { consumed }.encode()));
            }
        }
        let mut told = false;
        for frame in frames.into_iter().flatten() {
            told = true;
            if ended {
                self.send_lazily(frame);
            } else {
                self.send(frame);
            }
        }
        told
    }

    /// Queues a frame that nobody waits for.
    fn send_lazily(&mut self, frame: impl Into<Bytes>) {
        let frame = frame.into();
        self.out_bytes += frame.len();
        self.out.push_back(frame);
    }
}

impl Entry {
    fn new(role: Role, request: Option<(Kind, Vec<u8>)>) -> Self {
        Self {
            role,
            request,
            head: None,
            answered: false,
            end: None,
            over: false,
            resuming: false,
            by_client: false,
            waker: None,
            queue: VecDeque::new(),
            inbound: [Inbound::default(), Inbound::default()],
            sent: 0,
            consumed: 0,
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn finish(&mut self, end: End) {
        if self.end.is_none() {
            self.end = Some(end);
        }
        self.over = true;
        self.wake();
    }

    fn receive(&mut self, header: Header, mut frame: BytesMut) -> Result<(), Violation> {
        if self.over {
            return Err(Violation("frame after a channel's last one"));
        }
        let exec = matches!(self.role, Role::Exec(_));
        let payload = frame.get(HEADER_LEN..).unwrap_or_default();
        match header.kind {
            Kind::Started if exec && (!self.answered || self.resuming) => {
                self.started(Started::decode(payload)?);
            }
            Kind::Started if self.role == Role::Wait && !self.answered => {
                self.head = Some(Head::Started(Started::decode(payload)?));
                self.answered = true;
            }
            Kind::Exited if exec || self.role == Role::Wait => {
                let exited = Exited::decode(payload)?;
                self.finish(End::Exited(exited));
            }
            Kind::Error => {
                let failure = Failure::decode(payload)?;
                self.finish(End::Failed(failure));
            }
            Kind::Ok if !exec && !self.answered => {
                frame.advance(HEADER_LEN);
                self.head = Some(Head::Ok(frame.freeze()));
                self.answered = true;
                if !matches!(self.role, Role::Download | Role::Port) {
                    self.finish(End::Done);
                }
            }
            Kind::Window if self.role == Role::Upload || (self.role == Role::Port && self.answered) => {
                let Window { consumed } = Window::decode(payload)?;
                if consumed < self.consumed || consumed > self.sent {
                    return Err(Violation("window that does not fit what was sent"));
                }
                self.consumed = consumed;
            }
            Kind::Data
                if self.answered && !self.resuming && (exec || matches!(self.role, Role::Download | Role::Port)) =>
            {
                self.data(header, frame)?;
            }
            _ => return Err(Violation("frame that does not belong on its channel")),
        }
        Ok(())
    }

    fn started(&mut self, started: Started) {
        let offsets = [started.stdout_offset, started.stderr_offset];
        if self.resuming {
            self.resuming = false;
            if self.inbound.iter().zip(offsets).any(|(inbound, offset)| inbound.received != offset) {
                // Not `finish`: the agent still talks on this channel, and is told to stop when it is closed.
                let lost = "output was lost when the connection to the guest agent broke";
                self.end = Some(End::Ended(Ending::Lost(lost.to_owned())));
            }
            return;
        }
        self.inbound = offsets.map(Inbound::at);
        self.answered = true;
        self.request = None;
        self.head = Some(Head::Started(started));
    }

    fn data(&mut self, header: Header, mut frame: BytesMut) -> Result<(), Violation> {
        let exec = matches!(self.role, Role::Exec(_));
        if header.flags & !(EOF | STDERR) != 0 || (header.flags & STDERR != 0 && !exec) {
            return Err(Violation("unknown flags on data"));
        }
        let index = usize::from(header.flags & STDERR != 0);
        let [out, err] = &mut self.inbound;
        let inbound = if index == 0 { out } else { err };
        let length = header.len as usize;
        if inbound.ended {
            return Err(Violation("data after its stream's end"));
        }
        if length == 0 && header.flags & EOF == 0 {
            return Err(Violation("empty data"));
        }
        let received = inbound.received.saturating_add(length as u64);
        let window = if self.role == Role::Port { PORT_WINDOW } else { WINDOW };
        if received > inbound.acknowledged.saturating_add(window) {
            return Err(Violation("more data than the window allows"));
        }
        inbound.received = received;
        inbound.ended = header.flags & EOF != 0;
        let repeated = inbound.repeated.min(length as u64);
        inbound.repeated -= repeated;
        let repeated = repeated as usize;
        if length > repeated {
            // What the agent's header turns into does not matter: it is replaced.
            frame.advance(repeated);
            self.keep(index, frame, length - repeated, exec);
        }
        // The other half of a connection to a port may go on.
        if header.flags & EOF != 0 && self.role == Role::Download {
            self.finish(End::Done);
        }
        Ok(())
    }

    /// Puts a payload into the queue. An exec's gets the header of the client's stream, in the place of the agent's.
    fn keep(&mut self, index: usize, mut frame: BytesMut, length: usize, exec: bool) {
        let kind = if index == 0 { stream::STDOUT } else { stream::STDERR };
        let mut count = [0, 0];
        if let Some(count) = count.get_mut(index) {
            *count = length;
        }
        if length >= COPY_BELOW {
            let mut last = None;
            if exec {
                frame.advance(HEADER_LEN - stream::HEADER_LEN);
                if let Some(place) = frame.first_chunk_mut() {
                    *place = stream::header(kind, length);
                }
                last = Some((index, 0));
            } else {
                frame.advance(HEADER_LEN);
            }
            self.queue.push_back(Piece { bytes: frame, payload: count, last, gathered: false });
            return;
        }
        let payload = frame.get(HEADER_LEN..).unwrap_or_default();
        let gathers = |piece: &&mut Piece| piece.gathered && piece.bytes.len() < GATHER;
        if self.queue.back_mut().as_ref().is_none_or(|piece| !gathers(piece)) {
            let bytes = BytesMut::with_capacity(stream::HEADER_LEN + length);
            self.queue.push_back(Piece { bytes, payload: [0, 0], last: None, gathered: true });
        }
        let Some(piece) = self.queue.back_mut() else { return };
        if exec {
            match piece.last {
                Some((stream, place)) if stream == index => {
                    let whole = piece.bytes.len() - place - stream::HEADER_LEN + length;
                    if let Some(header) = piece.bytes.get_mut(place..).and_then(<[u8]>::first_chunk_mut) {
                        *header = stream::header(kind, whole);
                    }
                }
                _ => {
                    piece.last = Some((index, piece.bytes.len()));
                    piece.bytes.extend_from_slice(&stream::header(kind, length));
                }
            }
        }
        piece.bytes.extend_from_slice(payload);
        for (sum, count) in piece.payload.iter_mut().zip(count) {
            *sum += count;
        }
    }
}

/// A handler's end of a channel; dropping it tells the agent that nobody listens any more.
pub struct Channel {
    link: Arc<Link>,
    id: u32,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Channel({})", self.id)
    }
}

/// Tells the agent how far a channel's streams are consumed.
pub struct Acknowledger {
    link: Arc<Link>,
    id: u32,
}

impl Acknowledger {
    /// Everything before these offsets is consumed.
    pub fn consumed(&self, offsets: [u64; 2]) {
        if self.link.lock().consumed(self.id, offsets, false) {
            self.link.outgoing.notify_one();
        }
    }
}

/// The entry of an open channel went missing: impossible, and no reason to take the process down.
fn missing() -> End {
    End::Ended(Ending::Lost("the call's record is gone".to_owned()))
}

impl Channel {
    /// Waits for the first answer, or for the end when there is none.
    pub async fn head(&self) -> Result<Head, End> {
        std::future::poll_fn(|cx| {
            let mut state = self.link.lock();
            let Some(entry) = state.channels.get_mut(&self.id) else { return Poll::Ready(Err(missing())) };
            if let Some(head) = entry.head.take() {
                return Poll::Ready(Ok(head));
            }
            if let Some(end) = &entry.end {
                return Poll::Ready(Err(end.clone()));
            }
            entry.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Leaves it to the client to say what it has consumed; see [`Link::consumed`].
    pub fn leave_to_client(&mut self) {
        if let Some(entry) = self.link.lock().channels.get_mut(&self.id) {
            entry.by_client = true;
        }
    }

    /// Tells the agent of progress in an exec's output, from wherever it is seen.
    pub fn acknowledger(&self) -> Acknowledger {
        Acknowledger { link: Arc::clone(&self.link), id: self.id }
    }

    /// The next stretch of output and the offsets of stdout and stderr after it, or the end.
    pub fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<(Bytes, [u64; 2]), End>> {
        let mut state = self.link.lock();
        let Some(entry) = state.channels.get_mut(&self.id) else { return Poll::Ready(Err(missing())) };
        let Some(piece) = entry.queue.pop_front() else {
            if entry.role == Role::Port && entry.inbound[0].ended {
                return Poll::Ready(Err(End::Done));
            }
            if let Some(end) = &entry.end {
                return Poll::Ready(Err(end.clone()));
            }
            entry.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let mut offsets = [0; 2];
        for ((inbound, count), offset) in entry.inbound.iter_mut().zip(piece.payload).zip(&mut offsets) {
            // An agent may claim any first offset, the last ones that there are too.
            inbound.pulled = inbound.pulled.saturating_add(count as u64);
            *offset = inbound.pulled;
        }
        Poll::Ready(Ok((piece.bytes.freeze(), offsets)))
    }

    /// Sends all of `data` as the agent's window allows.
    ///
    /// # Errors
    /// The agent wants no more: [`Self::head`] has its answer.
    pub async fn send(&self, mut data: Bytes) -> Result<(), ()> {
        while !data.is_empty() {
            let room = std::future::poll_fn(|cx| self.poll_room(cx)).await?;
            let chunk = data.split_to(data.len().min(room).min(DATA_CHUNK));
            self.push(chunk, 0)?;
        }
        Ok(())
    }

    /// Ends the bytes: with [`EOF`], or [`DETACH`] to leave stdin open.
    pub fn finish(&self, flag: u8) -> Result<(), ()> {
        debug_assert!(flag == EOF || flag == DETACH, "other flags end nothing");
        self.push(Bytes::new(), flag)
    }

    /// Sends as much of `data` as the agent's window allows.
    ///
    /// # Errors
    /// The agent wants no more, for this reason.
    pub fn poll_send(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize, End>> {
        let Poll::Ready(room) = self.poll_room(cx) else { return Poll::Pending };
        let sent = room.and_then(|room| {
            let chunk = data.get(..room.min(DATA_CHUNK)).unwrap_or(data);
            self.push(Bytes::copy_from_slice(chunk), 0).map(|()| chunk.len())
        });
        Poll::Ready(sent.map_err(|()| self.end()))
    }

    /// Waits until the agent has consumed all that was sent.
    pub fn poll_consumed(&self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let mut state = self.link.lock();
        let Some(entry) = state.channels.get_mut(&self.id) else { return Poll::Ready(Err(missing())) };
        if entry.consumed == entry.sent {
            return Poll::Ready(Ok(()));
        }
        if let Some(end) = &entry.end {
            return Poll::Ready(Err(end.clone()));
        }
        entry.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Why nothing more comes.
    fn end(&self) -> End {
        self.link.lock().channels.get(&self.id).and_then(|entry| entry.end.clone()).unwrap_or_else(missing)
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<usize, ()>> {
        let mut state = self.link.lock();
        let state = &mut *state;
        let Some(entry) = state.channels.get_mut(&self.id) else { return Poll::Ready(Err(())) };
        if entry.end.is_some() {
            return Poll::Ready(Err(()));
        }
        let mut room = (entry.consumed + WINDOW).saturating_sub(entry.sent);
        if entry.role == Role::Port {
            let least = (entry.consumed + LEAST_AHEAD).saturating_sub(entry.sent);
            room = room.min(AHEAD.saturating_sub(state.ahead).max(least));
        }
        // Between two connections the call waits; it ends when the next one stands, or none does.
        if room > 0 && state.out_bytes < OUT_LIMIT && matches!(state.phase, Phase::Up) {
            return Poll::Ready(Ok(room as usize));
        }
        entry.waker = Some(cx.waker().clone());
        // A connection to a port also comes here when something was read.
        if state.out_bytes >= OUT_LIMIT && !state.room.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.room.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn push(&self, data: Bytes, flags: u8) -> Result<(), ()> {
        let mut state = self.link.lock();
        let state = &mut *state;
        let Some(entry) = state.channels.get_mut(&self.id) else { return Err(()) };
        if entry.end.is_some() {
            return Err(());
        }
        if !matches!(state.phase, Phase::Up) {
            return Ok(());
        }
        entry.sent += data.len() as u64;
        if entry.role == Role::Port {
            state.ahead += data.len() as u64;
        }
        let header = Header { len: data.len() as u32, channel: self.id, kind: Kind::Data, flags };
        state.send(Bytes::copy_from_slice(&header.encode()));
        if !data.is_empty() {
            state.send(data);
        }
        self.link.outgoing.notify_one();
        Ok(())
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        let Some(entry) = state.channels.remove(&self.id) else { return };
        if entry.role == Role::Port {
            state.ports = state.ports.saturating_sub(1);
            state.ahead = state.ahead.saturating_sub(entry.sent - entry.consumed);
        }
        // An exec's channel stays open after its end, for what is consumed late.
        let ended = matches!(entry.end, Some(End::Exited(_)));
        if (ended || !entry.over) && matches!(state.phase, Phase::Up) {
            let frame = shoal_wire::frame(Kind::Cancel, 0, self.id, &[]);
            if ended {
                state.send_lazily(frame);
            } else {
                state.send(frame);
            }
            self.link.outgoing.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(link: &Arc<Link>, role: Role) -> Channel {
        link.up();
        open_another(link, role)
    }

    /// As [`open`], on the connection that stands.
    fn open_another(link: &Arc<Link>, role: Role) -> Channel {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(link.open(role, Kind::ExecStart, Vec::new())).unwrap()
    }

    fn receive(link: &Link, kind: Kind, flags: u8, channel: u32, payload: &[u8]) -> Result<(), Violation> {
        let header = Header { len: payload.len() as u32, channel, kind, flags };
        link.admit(&header)?;
        link.receive(header, BytesMut::from(shoal_wire::frame(kind, flags, channel, payload).as_slice()))
    }

    /// Memory that is kept for a channel's reader.
    fn kept(link: &Link, id: u32) -> usize {
        let state = link.lock();
        let queue = &state.channels[&id].queue;
        queue.iter().map(|piece| piece.bytes.capacity() + size_of::<Piece>()).sum()
    }

    fn take(channel: &mut Channel) -> Option<Result<Bytes, End>> {
        match channel.poll_piece(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(taken) => Some(taken.map(|(piece, _)| piece)),
            Poll::Pending => None,
        }
    }

    #[test]
    fn rs_09_what_is_kept_for_a_reader_is_bounded_however_it_is_cut() {
        let link = Arc::new(Link::new());
        for size in [1, 7, 100, COPY_BELOW - 1, COPY_BELOW, DATA_CHUNK] {
            let channel = open(&link, Role::Exec("e".to_owned()));
            receive(&link, Kind::Started, 0, channel.id, &Started::default().encode()).unwrap();
            let payload = vec![b'x'; size];
            // Stdout and stderr by turns, so that no two frames can be joined.
            for _ in 0..WINDOW as usize / size {
                receive(&link, Kind::Data, 0, channel.id, &payload).unwrap();
                receive(&link, Kind::Data, STDERR, channel.id, &payload).unwrap();
            }
            let bytes = 2 * (WINDOW as usize / size) * (size + stream::HEADER_LEN);
            assert!(kept(&link, channel.id) < 2 * bytes + (64 << 10), "size {size}: {}", kept(&link, channel.id));
            let more = vec![b'x'; WINDOW as usize % size + 1];
            let refused = receive(&link, Kind::Data, 0, channel.id, &more);
            assert_eq!(refused, Err(Violation("more data than the window allows")));
        }
    }

    #[test]
    fn rs_09_a_reader_s_piece_keeps_no_larger_buffer_alive() {
        let link = Arc::new(Link::new());
        let mut channel = open(&link, Role::Port);
        receive(&link, Kind::Ok, 0, channel.id, &[]).unwrap();
        for size in [8 << 10, 16 << 10, super::super::connection::LARGE_READ / 2 - 1] {
            // As it is read: behind the frame there is another that nobody keeps.
            let payload = vec![b'x'; size];
            let mut buffer = BytesMut::with_capacity(super::super::connection::LARGE_READ);
            buffer.extend_from_slice(&shoal_wire::frame(Kind::Data, 0, channel.id, &payload));
            let frame = buffer.split_to(buffer.len());
            let place = frame.as_ptr_range();
            let header = Header { len: size as u32, channel: channel.id, kind: Kind::Data, flags: 0 };
            link.receive(header, frame).unwrap();
            let piece = take(&mut channel).unwrap().unwrap();
            assert_eq!(piece, payload);
            assert!(!place.contains(&piece.as_ptr()), "{size} bytes keep {}", super::super::connection::LARGE_READ);
        }
        let over = vec![b'x'; PORT_WINDOW as usize + 1];
        let refused = receive(&link, Kind::Data, 0, channel.id, &over);
        assert_eq!(refused, Err(Violation("more data than the window allows")));
    }

    #[test]
    fn frames_for_the_client_are_joined_where_they_are_small_and_kept_where_they_are_not() {
        let link = Arc::new(Link::new());
        let mut channel = open(&link, Role::Exec("e".to_owned()));
        receive(&link, Kind::Started, 0, channel.id, &Started::default().encode()).unwrap();
        let big = vec![b'B'; COPY_BELOW];
        for (flags, payload) in [(0, &b"ab"[..]), (0, b"c"), (STDERR, b"d"), (0, &big), (0, b"e")] {
            receive(&link, Kind::Data, flags, channel.id, payload).unwrap();
        }
        let first = take(&mut channel).unwrap().unwrap();
        assert_eq!(first, [&stream::header(2, 3)[..], b"abc", &stream::header(3, 1), b"d"].concat());
        let second = take(&mut channel).unwrap().unwrap();
        assert_eq!(second, [&stream::header(2, COPY_BELOW)[..], &big].concat());
        let third = take(&mut channel).unwrap().unwrap();
        assert_eq!(third, [&stream::header(2, 1)[..], b"e"].concat());
        assert!(take(&mut channel).is_none());
    }

    /// Sends as much as may be sent now.
    fn fill(channel: &Channel) -> usize {
        let mut cx = Context::from_waker(Waker::noop());
        let bytes = vec![0; DATA_CHUNK];
        let mut sent = 0;
        while let Poll::Ready(Ok(count)) = channel.poll_send(&mut cx, &bytes) {
            sent += count;
            // As the connection's task does when it has written.
            channel.link.written(usize::MAX);
        }
        sent
    }

    #[test]
    fn rs_09_what_an_agent_must_keep_for_servers_that_do_not_read_is_bounded() {
        let link = Arc::new(Link::new());
        link.up();
        let connect = || {
            let channel = open_another(&link, Role::Port);
            receive(&link, Kind::Ok, 0, channel.id, b"").unwrap();
            channel
        };
        let many: Vec<Channel> = (0..MAX_PORTS).map(|_| connect()).collect();
        let sent: Vec<usize> = many.iter().map(fill).collect();
        assert_eq!(sent[0] as u64, WINDOW);
        assert!(sent.iter().all(|sent| *sent as u64 >= LEAST_AHEAD));
        let most = AHEAD + MAX_PORTS as u64 * LEAST_AHEAD;
        assert!(sent.iter().sum::<usize>() as u64 <= most);
        // The agent of one that was held short says that it went on, and so does the door.
        let last = many.last().unwrap();
        let window = Window { consumed: LEAST_AHEAD }.encode();
        receive(&link, Kind::Window, 0, last.id, &window).unwrap();
        assert_eq!(fill(last) as u64, LEAST_AHEAD);
        drop(many);
        let left = {
            let state = link.lock();
            (state.ports, state.ahead)
        };
        assert_eq!(left, (0, 0));
        assert_eq!(fill(&connect()) as u64, WINDOW);
    }

    #[test]
    fn channel_numbers_go_round_and_skip_those_in_use() {
        let link = Arc::new(Link::new());
        let first = open(&link, Role::Call);
        link.lock().next_channel = u32::MAX;
        let last = open(&link, Role::Call);
        let next = open(&link, Role::Call);
        assert_eq!((first.id, last.id, next.id), (1, u32::MAX, 2));
        drop(first);
        // A late frame on a number of the past is no forgery.
        assert_eq!(receive(&link, Kind::Ok, 0, 1, b""), Ok(()));
        assert!(receive(&link, Kind::Ok, 0, 0, b"").is_err());
    }

    #[test]
    fn a_break_gives_up_what_was_queued_and_asks_for_it_again() {
        let link = Arc::new(Link::new());
        let mut channel = open(&link, Role::Exec("e".to_owned()));
        receive(&link, Kind::Started, 0, channel.id, &Started::default().encode()).unwrap();
        receive(&link, Kind::Data, 0, channel.id, &vec![b'a'; COPY_BELOW]).unwrap();
        assert_eq!(take(&mut channel).unwrap().unwrap().len(), COPY_BELOW + stream::HEADER_LEN);
        receive(&link, Kind::Data, 0, channel.id, b"not taken").unwrap();
        link.broke();
        link.up();
        assert!(take(&mut channel).is_none());
        let frame = link.lock().out.back().unwrap().clone();
        let attach = ExecAttach::decode(&frame[HEADER_LEN..]).unwrap();
        assert_eq!((attach.stdout_offset, attach.stderr_offset), (COPY_BELOW as u64, 0));
        // An agent that has not kept it does not get away with it.
        let started = Started { stdout_offset: COPY_BELOW as u64 + 9, ..Started::default() };
        receive(&link, Kind::Started, 0, channel.id, &started.encode()).unwrap();
        assert!(matches!(take(&mut channel), Some(Err(End::Ended(Ending::Lost(_))))));
    }

    #[test]
    fn what_the_client_has_not_confirmed_comes_again_to_the_link_and_not_to_the_client() {
        let link = Arc::new(Link::new());
        let mut channel = open(&link, Role::Exec("e".to_owned()));
        channel.leave_to_client();
        receive(&link, Kind::Started, 0, channel.id, &Started::default().encode()).unwrap();
        receive(&link, Kind::Data, 0, channel.id, b"0123456789").unwrap();
        assert_eq!(take(&mut channel).unwrap().unwrap()[stream::HEADER_LEN..], *b"0123456789");
        assert!(link.consumed("e", [4, 99]) && !link.consumed("f", [0, 0]));
        link.broke();
        link.up();
        let frame = link.lock().out.back().unwrap().clone();
        let attach = ExecAttach::decode(&frame[HEADER_LEN..]).unwrap();
        assert_eq!((attach.stdout_offset, attach.stderr_offset), (4, 0));
        let started = Started { stdout_offset: 4, ..Started::default() };
        receive(&link, Kind::Started, 0, channel.id, &started.encode()).unwrap();
        receive(&link, Kind::Data, 0, channel.id, b"456").unwrap();
        assert!(take(&mut channel).is_none());
        receive(&link, Kind::Data, 0, channel.id, b"789abc").unwrap();
        assert_eq!(take(&mut channel).unwrap().unwrap()[stream::HEADER_LEN..], *b"abc");
    }
}
