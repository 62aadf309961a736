//! The poll loop: connections in, commands and files behind them.
//!
//! One thread waits in one place. Whatever takes long (a stream, a listing, a removal, an archive) goes forward a
//! bounded step a turn; a connection's channels take turns, and so do the connections.

use std::os::fd::{AsRawFd, OwnedFd};

use shoal_archive::{Limits, Policy, Unpack};
use shoal_wire::{
    DETACH, DecodeError, EOF, ExecAttach, ExecInput, ExecList, ExecResize, ExecSignal, ExecStart, FileList, FileRead,
    FileRename, FileUnpack, FileWrite, HEADER_LEN, Header, Kind, MAX_PAYLOAD, Outcome, PathRequest, Reader, Ready,
    STDERR, Stage, Started, Window,
};

use crate::conn::{self, Channel, Conn, Step, Taken, Target, WINDOW_STEP, Work};
use crate::exec::{Birth, Exec, Fed, Feeder, Output, Watcher};
use crate::files::{self, Draft, Owner};
use crate::jobs::{Listing, Packing, Reading, Removal};
use crate::slab::{Key, Slab};
use crate::spawn::{self, Command, Context, NotStarted, Stdio};
use crate::sys::{self, Epoll, Error};
use crate::terminal;
use crate::tree;
use crate::user::{Identity, Users};

/// What an event is about; for all but the first two the rest of the token is a [`Key`].
const LISTENER: u8 = 0;
const SIGNALS: u8 = 1;
const CONNECTION: u8 = 2;
const REPORT: u8 = 3;
const STDOUT: u8 = 4;
const STDERR_PIPE: u8 = 5;
const STDIN: u8 = 6;
const LEFTOVER: u8 = 7;

/// Connections served at a time.
const MAX_CONNECTIONS: usize = 64;
/// Channels open on one connection.
const MAX_CHANNELS: usize = 4096;
/// Commands running at a time.
const MAX_RUNNING: usize = 4096;
/// Finished commands remembered.
const MAX_FINISHED: usize = 128;
/// Bytes of unread output kept for finished commands, all together.
const MAX_FINISHED_BYTES: usize = 32 << 20;
/// Pipes kept open for background processes whose command has ended.
const MAX_LEFTOVERS: usize = 64;
/// Longest exec id.
const MAX_EXEC_ID: usize = 128;
/// Children reaped before others get their turn.
const REAPS_A_TURN: usize = 256;
/// Bytes a connection may queue to be sent before it sends.
const FILL: usize = 256 << 10;
/// Steps of a connection's channels before other connections get their turn.
const STEPS_A_TURN: usize = 8;
/// Descriptors kept free for connections and files, so that commands cannot use up the last one.
const SPARE_FDS: u64 = 64;

const MS: u64 = 1_000_000;
/// Quiet time after which memory is given back.
const TRIM_AFTER_NS: u64 = 200 * MS;
/// Time between two looks at what is left of a killed tree.
const KILL_AGAIN_NS: u64 = 20 * MS;
/// How often it is looked at.
const KILL_TRIES: u32 = 250;
/// Time a background process waits after filling its pipe, which nobody reads, before it is emptied again.
const LEFTOVER_PAUSE_NS: u64 = 50 * MS;
/// Time without accepting when descriptors have run out.
const ACCEPT_PAUSE_NS: u64 = 100 * MS;

/// The other side broke the protocol; its connection ends.
struct Violation;

impl From<DecodeError> for Violation {
    fn from(_: DecodeError) -> Self {
        Self
    }
}

/// A pipe of a command that has ended, held open by processes that it left behind.
///
/// They keep running without SIGPIPE; what they write is thrown away, at a pace that costs nothing.
struct Leftover {
    fd: OwnedFd,
    /// When it is looked at again; `None` while the poll loop watches it.
    pause_until: Option<u64>,
}

/// What the command line gave.
#[derive(Debug)]
pub struct Options {
    /// A listening unix socket.
    pub listener: OwnedFd,
    /// Counter of OOM kills.
    pub oom: Option<OwnedFd>,
    /// Told in READY.
    pub generation: u64,
    /// What commands are started with.
    pub context: Context,
    /// The agent may become other users.
    pub privileged: bool,
}

/// Everything the agent knows.
pub struct Agent {
    epoll: Epoll,
    options: Options,
    signals: OwnedFd,
    ready: Vec<u8>,
    users: Users,
    conns: Slab<Conn>,
    execs: Slab<Exec>,
    leftovers: Slab<Leftover>,
    /// Connections that have something to do.
    queue: Vec<Key>,
    next_serial: u64,
    more_to_reap: bool,
    /// The image still lacks its /etc/hosts; written after the first READY, which should not wait for it.
    hosts_due: bool,
    trim_at: Option<u64>,
    accept_again_at: Option<u64>,
    most_fds: u64,
    now: u64,
}

impl Agent {
    /// Begins to listen.
    pub fn new(options: Options) -> Result<Self, Error> {
        let epoll = Epoll::new()?;
        let signals = sys::take_signals()?;
        sys::set_nonblocking(&options.listener)?;
        epoll.add(&signals, libc::EPOLLIN, u64::from(SIGNALS) << 60)?;
        epoll.add(&options.listener, libc::EPOLLIN, u64::from(LISTENER) << 60)?;
        let now = sys::now_ns();
        let ready = Ready { version: shoal_wire::VERSION, generation: options.generation, ready_at_ns: now };
        let users = Users::new(options.context.own.0, options.privileged);
        Ok(Self {
            epoll,
            signals,
            ready: shoal_wire::frame(Kind::Ready, 0, 0, &ready.encode()),
            users,
            conns: Slab::default(),
            execs: Slab::default(),
            leftovers: Slab::default(),
            queue: Vec::new(),
            next_serial: 0,
            more_to_reap: true,
            hosts_due: options.privileged && std::process::id() == 1,
            trim_at: None,
            accept_again_at: None,
            most_fds: open_file_limit(),
            now,
            options,
        })
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// When waiting for events fails, which leaves nothing to do.
    pub fn run(mut self) -> Error {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        loop {
            let timeout = self.timeout();
            let happened = match self.epoll.wait(&mut events, timeout) {
                Ok(happened) => happened,
                Err(Error { errno: libc::EINTR, .. }) => continue,
                Err(error) => return error,
            };
            self.now = sys::now_ns();
            if !happened.is_empty() {
                self.trim_at = Some(self.now + TRIM_AFTER_NS);
            }
            for event in happened {
                self.event(event.u64, event.events as libc::c_int);
            }
            if self.more_to_reap {
                self.reap();
            }
            self.timers();
            for key in std::mem::take(&mut self.queue) {
                self.serve(key);
            }
        }
    }

    fn event(&mut self, token: u64, events: libc::c_int) {
        let (tag, key) = Key::from_token(token);
        match tag {
            LISTENER => self.accept(),
            SIGNALS => {
                // One or many children: the queue of a signal holds one of its kind.
                let mut info = [0; size_of::<libc::signalfd_siginfo>()];
                let _ = sys::read(&self.signals, &mut info);
                self.more_to_reap = true;
            }
            CONNECTION => self.connection_event(key, events),
            REPORT => self.read_report(key),
            STDOUT => self.pump(key, 0),
            STDERR_PIPE => self.pump(key, 1),
            STDIN => self.feed(key),
            LEFTOVER => self.discard(key),
            _ => {}
        }
    }

    // --- time -------------------------------------------------------------------------------------------------------

    /// Milliseconds until something is due, rounded up.
    fn timeout(&self) -> libc::c_int {
        if self.more_to_reap || !self.queue.is_empty() {
            return 0;
        }
        let of_exec = |exec: &Exec| [exec.deadline_ns, exec.kill_again.map(|(at, _)| at)];
        let due = self
            .execs
            .iter()
            .flat_map(|(_, exec)| of_exec(exec))
            .chain(self.leftovers.iter().map(|(_, leftover)| leftover.pause_until))
            .chain([self.trim_at, self.accept_again_at])
            .flatten()
            .min();
        let Some(due) = due else { return -1 };
        let ms = due.saturating_sub(sys::now_ns()).div_ceil(MS);
        ms.min(1_000_000) as libc::c_int
    }

    fn timers(&mut self) {
        let now = self.now;
        for (_, exec) in self.execs.iter_mut() {
            if exec.deadline_ns.is_some_and(|at| at <= now) {
                exec.time_out();
                exec.kill_again = Some((now + KILL_AGAIN_NS, KILL_TRIES));
            }
            if let Some((at, tries)) = exec.kill_again
                && at <= now
            {
                let left = tree::signal(exec.root(), libc::SIGKILL);
                exec.kill_again = (left > 0 && tries > 0).then(|| (now + KILL_AGAIN_NS, tries - 1));
            }
        }
        let epoll = &self.epoll;
        for (key, leftover) in self.leftovers.iter_mut() {
            if leftover.pause_until.is_some_and(|at| at <= now) {
                leftover.pause_until = None;
                let _ = epoll.add(&leftover.fd, libc::EPOLLIN, key.token(LEFTOVER));
            }
        }
        if self.accept_again_at.is_some_and(|at| at <= now) {
            self.accept_again_at = None;
            let _ = self.epoll.add(&self.options.listener, libc::EPOLLIN, u64::from(LISTENER) << 60);
        }
        if self.trim_at.is_some_and(|at| at <= now) {
            self.trim_at = None;
            self.trim();
        }
    }

    /// Gives memory back after a while without work.
    fn trim(&mut self) {
        for (_, conn) in self.conns.iter_mut() {
            conn.shrink();
        }
        for (_, exec) in self.execs.iter_mut() {
            for output in &mut exec.outputs {
                output.ring.shrink();
            }
        }
        self.queue.shrink_to_fit();
        sys::trim_memory();
    }

    // --- connections ------------------------------------------------------------------------------------------------

    fn accept(&mut self) {
        match sys::accept(&self.options.listener) {
            Ok(fd) if self.conns.len() < MAX_CONNECTIONS => {
                let mut conn = Conn::new(fd);
                conn.out.extend_from_slice(&self.ready);
                conn.interest = libc::EPOLLIN;
                let key = self.conns.insert(conn);
                let Some(conn) = self.conns.get(key) else { return };
                if self.epoll.add(&conn.fd, conn.interest, key.token(CONNECTION)).is_err() {
                    self.conns.remove(key);
                    return;
                }
                self.serve(key);
                if self.hosts_due {
                    self.hosts_due = false;
                    files::make_hosts(Some((0, 0)));
                }
            }
            Ok(_) | Err(Error { errno: libc::EAGAIN | libc::ECONNABORTED, .. }) => {}
            Err(_) => {
                self.epoll.remove(&self.options.listener);
                self.accept_again_at = Some(self.now + ACCEPT_PAUSE_NS);
            }
        }
    }

    fn connection_event(&mut self, key: Key, events: libc::c_int) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if conn.stalled() && events & (libc::EPOLLHUP | libc::EPOLLERR) != 0 {
            self.close(key);
            return;
        }
        if events & (libc::EPOLLIN | libc::EPOLLHUP | libc::EPOLLERR) != 0 && !conn.stalled() {
            match conn.receive() {
                Ok(0) => return self.close(key),
                Ok(_) => return self.read_frames(key),
                Err(Error { errno: libc::EAGAIN, .. }) => {}
                Err(_) => return self.close(key),
            }
        }
        self.enqueue(key);
    }

    /// Acts on every whole frame that has come.
    fn read_frames(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let mut input = std::mem::take(&mut conn.input);
        let mut taken = 0;
        loop {
            let Some(conn) = self.conns.get_mut(key) else { return };
            let rest = input.get(taken..).unwrap_or(&[]);
            let Some((header, body)) = rest.split_first_chunk::<HEADER_LEN>() else { break };
            let Ok(header) = Header::decode(*header) else { return self.close(key) };
            let Some(payload) = body.get(..header.len as usize) else { break };
            if conn.stalled() {
                break;
            }
            taken += HEADER_LEN + payload.len();
            if self.frame(key, header, payload).is_err() {
                return self.close(key);
            }
        }
        input.drain(..taken);
        if let Some(conn) = self.conns.get_mut(key) {
            conn.input = input;
        }
        self.enqueue(key);
    }

    fn enqueue(&mut self, key: Key) {
        if let Some(conn) = self.conns.get_mut(key)
            && !conn.queued
        {
            conn.queued = true;
            self.queue.push(key);
        }
    }

    /// Lets a connection's channels fill its outgoing bytes, and sends them.
    fn serve(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.queued = false;
        let was_stalled = conn.stalled();
        let mut steps = STEPS_A_TURN;
        let mut sent_all = true;
        loop {
            while steps > 0
                && conn.pending() < FILL
                && let Some(channel) = conn.ready.pop_front()
            {
                steps -= 1;
                Self::step(conn, channel, &self.execs);
            }
            if conn.pending() == 0 {
                break;
            }
            match conn.send() {
                Ok(true) => {}
                Ok(false) => {
                    sent_all = false;
                    break;
                }
                Err(_) => return self.close(key),
            }
            if steps == 0 {
                break;
            }
        }
        let again = sent_all && !conn.ready.is_empty();
        let stalled = conn.stalled();
        let interest = if stalled { 0 } else { libc::EPOLLIN } | if sent_all { 0 } else { libc::EPOLLOUT };
        if interest != conn.interest {
            conn.interest = interest;
            if self.epoll.modify(&conn.fd, interest, key.token(CONNECTION)).is_err() {
                return self.close(key);
            }
        }
        if again {
            self.enqueue(key);
        }
        if was_stalled && !stalled {
            self.read_frames(key);
        }
    }

    /// Takes one channel a bounded step further.
    fn step(conn: &mut Conn, id: u32, execs: &Slab<Exec>) {
        let Conn { channels, out, .. } = conn;
        let Some(channel) = channels.get_mut(&id) else { return };
        channel.queued = false;
        let step = match &mut channel.work {
            Work::Watch(exec, watcher) => match execs.get(*exec) {
                Some(exec) => watcher.step(exec, id, out),
                None => Step::Done,
            },
            Work::Read(reading) => reading.step(id, out).unwrap_or_else(|error| {
                conn::push_error(out, id, error, b"");
                Step::Done
            }),
            Work::List(listing) => match listing.step() {
                Ok(None) => Step::More,
                Ok(Some(payload)) => {
                    conn::push(out, Kind::Ok, 0, id, &payload);
                    Step::Done
                }
                Err(error) => {
                    conn::push_error(out, id, error, b"");
                    Step::Done
                }
            },
            Work::Remove(removal) => match removal.step() {
                Ok(false) => Step::More,
                Ok(true) => {
                    conn::push(out, Kind::Ok, 0, id, &[]);
                    Step::Done
                }
                Err(error) => {
                    conn::push_error(out, id, error, b"");
                    Step::Done
                }
            },
            Work::Pack(packing) => packing.step(id, out).unwrap_or_else(|error| {
                push_archive_error(out, id, &error);
                Step::Done
            }),
            Work::Feed(..) | Work::Write(..) | Work::Unpack(..) => Step::Wait,
        };
        match step {
            Step::More => conn.wake(id),
            Step::Wait => {}
            Step::Done => {
                conn.channels.remove(&id);
            }
        }
    }

    /// Ends a connection and what was only for it.
    fn close(&mut self, key: Key) {
        let Some(conn) = self.conns.remove(key) else { return };
        for (id, channel) in conn.channels {
            self.abandon((key, id), &channel.work);
        }
    }

    /// Nobody listens to a channel any more: its exec goes on; a file operation ends as its state is dropped.
    fn abandon(&mut self, target: Target, work: &Work) {
        match work {
            Work::Watch(key, _) => {
                if let Some(exec) = self.execs.get_mut(*key)
                    && exec.attached == Some(target)
                {
                    exec.attached = None;
                }
            }
            Work::Feed(key, _) => {
                if let Some(exec) = self.execs.get_mut(*key) {
                    exec.inputs.retain(|input| *input != target);
                }
                self.feed(*key);
            }
            _ => {}
        }
    }

    // --- requests ---------------------------------------------------------------------------------------------------

    fn reply(&mut self, (key, id): Target, payload: &[u8]) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn::push(&mut conn.out, Kind::Ok, 0, id, payload);
        }
        self.enqueue(key);
    }

    fn fail(&mut self, (key, id): Target, error: Error, object: &[u8]) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn::push_error(&mut conn.out, id, error, object);
        }
        self.enqueue(key);
    }

    /// Answers with Ok and nothing else, or with Error.
    fn answer(&mut self, target: Target, result: Result<(), Error>, object: &[u8]) {
        match result {
            Ok(()) => self.reply(target, &[]),
            Err(error) => self.fail(target, error, object),
        }
    }

    fn open(&mut self, (key, id): Target, work: Work) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn.channels.insert(id, Channel { work, queued: false });
            conn.wake(id);
        }
        self.enqueue(key);
    }

    fn frame(&mut self, key: Key, header: Header, payload: &[u8]) -> Result<(), Violation> {
        let target = (key, header.channel);
        match header.kind {
            Kind::Data => return self.data(target, header.flags, payload),
            Kind::Window => return self.window(target, header.flags, Window::decode(payload)?.consumed),
            Kind::Cancel => {
                let channel = self.conns.get_mut(key).and_then(|conn| conn.channels.remove(&header.channel));
                if let Some(channel) = channel {
                    self.abandon(target, &channel.work);
                }
                return Ok(());
            }
            Kind::Ready | Kind::Started | Kind::Exited | Kind::Ok | Kind::Error => return Err(Violation),
            _ => {}
        }
        let Some(conn) = self.conns.get_mut(key) else { return Ok(()) };
        let busy = |channel: &Channel| !matches!(&channel.work, Work::Watch(_, watcher) if watcher.done);
        if header.channel == 0 || conn.channels.get(&header.channel).is_some_and(busy) {
            return Err(Violation);
        }
        if let Some(done) = conn.channels.remove(&header.channel) {
            self.abandon(target, &done.work);
        } else if conn.channels.len() >= MAX_CHANNELS {
            self.fail(target, Error::new("too many channels", libc::EAGAIN), b"");
            return Ok(());
        }
        match header.kind {
            Kind::ExecStart => self.exec_start(target, ExecStart::decode(payload)?),
            Kind::ExecAttach => self.exec_attach(target, &ExecAttach::decode(payload)?),
            Kind::ExecInput => self.exec_input(target, &ExecInput::decode(payload)?),
            Kind::ExecSignal => self.exec_signal(target, &ExecSignal::decode(payload)?),
            Kind::ExecResize => self.exec_resize(target, &ExecResize::decode(payload)?),
            Kind::ExecList => {
                Reader::new(payload).finish()?;
                self.exec_list(target);
            }
            Kind::ExecForget => {
                let mut reader = Reader::new(payload);
                let id = reader.bytes()?;
                reader.finish()?;
                self.exec_forget(target, &id);
            }
            Kind::FileRead => {
                let request = FileRead::decode(payload)?;
                match Reading::new(&request.path, request.offset, request.length) {
                    Ok((reading, info)) => {
                        self.reply(target, &info.encode());
                        self.open(target, Work::Read(reading));
                    }
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileWrite => {
                let request = FileWrite::decode(payload)?;
                match self.begin_write(&request) {
                    Ok(draft) => self.open(target, Work::Write(Box::new(draft), Taken::default())),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileStat => {
                let request = PathRequest::decode(payload)?;
                match files::stat(&request.path) {
                    Ok(info) => self.reply(target, &info.encode()),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileList => {
                let request = FileList::decode(payload)?;
                match Listing::new(&request.path, request.depth) {
                    Ok(listing) => self.open(target, Work::List(Box::new(listing))),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileMakeDir => {
                let request = PathRequest::decode(payload)?;
                let made = self
                    .owner(&request.user)
                    .and_then(|owner| files::make_dir(&request.path, request.bits & 1 != 0, owner));
                match made {
                    Ok(info) => self.reply(target, &info.encode()),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileRemove => {
                let request = PathRequest::decode(payload)?;
                match Removal::new(&request.path, request.bits & 1 != 0) {
                    Ok(Some(removal)) => self.open(target, Work::Remove(Box::new(removal))),
                    Ok(None) => self.reply(target, &[]),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileRename => {
                let request = FileRename::decode(payload)?;
                self.answer(target, files::rename(&request.from, &request.to), &request.from);
            }
            Kind::FilePack => {
                let request = PathRequest::decode(payload)?;
                match Packing::new(&request.path) {
                    Ok(packing) => {
                        self.reply(target, &[]);
                        self.open(target, Work::Pack(Box::new(packing)));
                    }
                    Err(error) => self.fail_archive(target, &error),
                }
            }
            Kind::FileUnpack => {
                let request = FileUnpack::decode(payload)?;
                match self.begin_unpack(&request) {
                    Ok(unpack) => self.open(target, Work::Unpack(Box::new(unpack), Taken::default())),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            _ => return Err(Violation),
        }
        Ok(())
    }

    fn fail_archive(&mut self, (key, id): Target, error: &shoal_archive::Error) {
        if let Some(conn) = self.conns.get_mut(key) {
            push_archive_error(&mut conn.out, id, error);
        }
        self.enqueue(key);
    }

    /// The owner that a request names; `None`: nothing was named and nothing has to change.
    ///
    /// Nobody named is root, or whoever runs the agent when it may become nobody else.
    fn owner(&mut self, user: &[u8]) -> Result<Option<Owner>, Error> {
        if user.is_empty() {
            return Ok(self.options.privileged.then_some((0, 0)));
        }
        let Identity { uid, gid, .. } = self.users.find(user)?;
        Ok(Some((uid, gid)))
    }

    fn begin_write(&mut self, request: &FileWrite) -> Result<Draft, Error> {
        let owner = if request.user.is_empty() { None } else { self.owner(&request.user)? };
        let default_owner = self.owner(b"")?;
        if request.parents {
            let end = request.path.iter().rposition(|byte| *byte != b'/').map_or(0, |at| at + 1);
            let name_at = request.path.get(..end).and_then(|path| path.iter().rposition(|byte| *byte == b'/'));
            if let Some(parent) = name_at.and_then(|at| request.path.get(..=at)) {
                files::make_dirs(parent, owner.or(default_owner))?;
            }
        }
        Draft::new(&request.path, request.mode, owner, default_owner)
    }

    fn begin_unpack(&mut self, request: &FileUnpack) -> Result<Unpack, Error> {
        let owner = self.owner(&request.user)?;
        files::make_dirs(&request.path, owner)?;
        let root = files::open_to_list(&request.path)?;
        let (uid, gid) = owner.unwrap_or(self.options.context.own);
        Ok(Unpack::new(root, Policy::Upload { uid, gid }, Limits::default()))
    }

    // --- streams ----------------------------------------------------------------------------------------------------

    /// Bytes from the client: stdin, a file or an archive.
    fn data(&mut self, target: Target, flags: u8, payload: &[u8]) -> Result<(), Violation> {
        let (key, id) = target;
        let Some(conn) = self.conns.get_mut(key) else { return Ok(()) };
        // An unknown channel is one that was answered while this was on its way.
        let Some(channel) = conn.channels.get_mut(&id) else { return Ok(()) };
        let eof = flags & EOF != 0;
        match &mut channel.work {
            Work::Feed(exec, feeder) => {
                let exec = *exec;
                if !feeder.take(payload, eof, eof || flags & DETACH != 0) {
                    return Err(Violation);
                }
                self.feed(exec);
            }
            Work::Write(draft, taken) => {
                let written = draft.write(payload);
                let told = taken.add(payload.len());
                if let Err(error) = written {
                    conn.channels.remove(&id);
                    self.fail(target, error, b"");
                } else if eof {
                    self.publish(target);
                } else {
                    self.tell_window(target, told);
                }
            }
            Work::Unpack(unpack, taken) => {
                let pushed = unpack.push(payload);
                let told = taken.add(payload.len());
                if let Err(error) = pushed {
                    conn.channels.remove(&id);
                    self.fail_archive(target, &error);
                } else if eof {
                    self.finish_unpack(target);
                } else {
                    self.tell_window(target, told);
                }
            }
            // A channel that is done may have been given another meaning; all others send and do not take.
            Work::Watch(_, watcher) if watcher.done => {}
            _ => return Err(Violation),
        }
        Ok(())
    }

    fn tell_window(&mut self, (key, id): Target, consumed: Option<u64>) {
        let Some(consumed) = consumed else { return };
        if let Some(conn) = self.conns.get_mut(key) {
            conn::push(&mut conn.out, Kind::Window, 0, id, &Window { consumed }.encode());
        }
        self.enqueue(key);
    }

    fn publish(&mut self, (key, id): Target) {
        let channel = self.conns.get_mut(key).and_then(|conn| conn.channels.remove(&id));
        let Some(Channel { work: Work::Write(draft, _), .. }) = channel else { return };
        match draft.publish() {
            Ok(info) => self.reply((key, id), &info.encode()),
            Err(error) => self.fail((key, id), error, b""),
        }
    }

    fn finish_unpack(&mut self, (key, id): Target) {
        let channel = self.conns.get_mut(key).and_then(|conn| conn.channels.remove(&id));
        let Some(Channel { work: Work::Unpack(unpack, _), .. }) = channel else { return };
        match unpack.finish() {
            Ok(_) => self.reply((key, id), &[]),
            Err(error) => self.fail_archive((key, id), &error),
        }
    }

    /// The client's progress in a stream that we send.
    fn window(&mut self, (key, id): Target, flags: u8, consumed: u64) -> Result<(), Violation> {
        let Some(conn) = self.conns.get_mut(key) else { return Ok(()) };
        let Some(channel) = conn.channels.get_mut(&id) else { return Ok(()) };
        let keeps_rules = match &mut channel.work {
            Work::Read(reading) => reading.consumed(consumed),
            Work::Pack(packing) => packing.consumed(consumed),
            Work::Watch(exec_key, watcher) => {
                let stream = usize::from(flags & STDERR != 0);
                let sent = watcher.sent.get(stream).copied().unwrap_or(0);
                let exec_key = *exec_key;
                if consumed > sent {
                    return Err(Violation);
                }
                if let Some(exec) = self.execs.get_mut(exec_key) {
                    exec.consume(stream, consumed);
                }
                self.pump(exec_key, stream);
                return Ok(());
            }
            _ => return Err(Violation),
        };
        if !keeps_rules {
            return Err(Violation);
        }
        conn.wake(id);
        self.enqueue(key);
        Ok(())
    }

    /// Reads what a command has written, as far as there is room, and passes it on.
    fn pump(&mut self, key: Key, stream: usize) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        let terminal = exec.terminal;
        let Some(output) = exec.outputs.get_mut(stream) else { return };
        let leftover = output.pump();
        if let Some(fd) = leftover {
            if output.watched {
                self.epoll.remove(&fd);
            }
            if !terminal {
                self.keep_open(fd);
            }
        }
        self.watch(key, stream);
        self.wake_watcher(key);
    }

    /// Has the poll loop look at a stream, or not: with no room left, a pipe that hung up would wake it for ever.
    fn watch(&mut self, key: Key, stream: usize) {
        let Some(output) = self.execs.get_mut(key).and_then(|exec| exec.outputs.get_mut(stream)) else { return };
        let tag = if stream == 0 { STDOUT } else { STDERR_PIPE };
        let Some(fd) = &output.fd else {
            output.watched = false;
            return;
        };
        let wanted = output.ring.has_room();
        if wanted && !output.watched {
            output.watched = self.epoll.add(fd, libc::EPOLLIN, key.token(tag)).is_ok();
        } else if !wanted && output.watched {
            self.epoll.remove(fd);
            output.watched = false;
        }
    }

    fn wake_watcher(&mut self, key: Key) {
        let attached = self.execs.get(key).and_then(|exec| exec.attached);
        if let Some((conn_key, id)) = attached {
            if let Some(conn) = self.conns.get_mut(conn_key) {
                conn.wake(id);
            }
            self.enqueue(conn_key);
        }
    }

    /// Writes to a command's stdin what its channels have, the oldest channel first.
    fn feed(&mut self, key: Key) {
        loop {
            let Some(exec) = self.execs.get_mut(key) else { return };
            let Some(target) = exec.inputs.front().copied() else { break };
            let channel = self.conns.get_mut(target.0).and_then(|conn| conn.channels.get_mut(&target.1));
            let Some(Channel { work: Work::Feed(_, feeder), .. }) = channel else {
                exec.inputs.pop_front();
                continue;
            };
            let fed = feeder.step(exec);
            let told = (feeder.consumed - feeder.told >= WINDOW_STEP).then_some(feeder.consumed);
            if let Some(consumed) = told {
                feeder.told = consumed;
            }
            let full = matches!(fed, Ok(Fed::Full));
            if let (Some(fd), true) = (&exec.stdin, full != exec.stdin_watched) {
                if full {
                    exec.stdin_watched = self.epoll.add(fd, libc::EPOLLOUT, key.token(STDIN)).is_ok();
                } else {
                    self.epoll.remove(fd);
                    exec.stdin_watched = false;
                }
            }
            let result = match fed {
                Ok(Fed::All | Fed::Full) => {
                    self.tell_window(target, told);
                    return;
                }
                Ok(Fed::Done) => Ok(()),
                Err(error) => Err(error),
            };
            exec.inputs.pop_front();
            if let Some(conn) = self.conns.get_mut(target.0) {
                conn.channels.remove(&target.1);
            }
            self.answer(target, result, b"");
        }
        // Nothing is waiting to be written.
        if let Some(exec) = self.execs.get_mut(key)
            && exec.stdin_watched
        {
            if let Some(fd) = &exec.stdin {
                self.epoll.remove(fd);
            }
            exec.stdin_watched = false;
        }
    }

    /// Keeps a pipe of a command that has ended open for those it left behind.
    fn keep_open(&mut self, fd: OwnedFd) {
        if self.leftovers.len() >= MAX_LEFTOVERS {
            return;
        }
        let key = self.leftovers.insert(Leftover { fd, pause_until: None });
        if let Some(leftover) = self.leftovers.get(key)
            && self.epoll.add(&leftover.fd, libc::EPOLLIN, key.token(LEFTOVER)).is_err()
        {
            self.leftovers.remove(key);
        }
    }

    /// Throws away one pipe full, then looks elsewhere for a while.
    fn discard(&mut self, key: Key) {
        let Some(leftover) = self.leftovers.get_mut(key) else { return };
        let mut sink = vec![0; 64 << 10];
        match sys::read(&leftover.fd, &mut sink) {
            Ok(count) if count > 0 => {
                self.epoll.remove(&leftover.fd);
                leftover.pause_until = Some(self.now + LEFTOVER_PAUSE_NS);
            }
            Err(Error { errno: libc::EAGAIN, .. }) => {}
            _ => {
                self.leftovers.remove(key);
            }
        }
    }

    // --- commands ---------------------------------------------------------------------------------------------------

    fn find(&self, id: &[u8]) -> Option<Key> {
        self.execs.iter().find(|(_, exec)| exec.id == id).map(|(key, _)| key)
    }

    fn oom_kills(&self) -> u64 {
        let Some(fd) = &self.options.oom else { return 0 };
        let mut buffer = [0; 1024];
        let count = sys::pread(fd, &mut buffer, 0).unwrap_or(0);
        parse_oom_kills(buffer.get(..count).unwrap_or(&[]))
    }

    fn exec_start(&mut self, target: Target, request: ExecStart) {
        if let Some(key) = self.find(&request.exec_id) {
            return self.attach(target, key, true, None);
        }
        let invalid = NotStarted { stage: Stage::Request, errno: libc::EINVAL };
        let known = (1..=MAX_EXEC_ID).contains(&request.exec_id.len());
        let made = if known { self.start(request) } else { Err((request, invalid)) };
        let key = match made {
            Ok(key) => key,
            Err((request, failed)) => {
                let exited = Exec::not_started(failed.stage, failed.errno);
                if !known {
                    let (conn, id) = target;
                    if let Some(conn) = self.conns.get_mut(conn) {
                        conn::push(&mut conn.out, Kind::Exited, 0, id, &exited.encode());
                    }
                    return self.enqueue(conn);
                }
                let mut exec =
                    Exec::new(self.birth(request, 0, None), [Output::new(None), Output::new(None)], None, None);
                exec.exited = Some(exited);
                self.remember(exec)
            }
        };
        self.attach(target, key, false, None);
        self.forget_oldest();
    }

    fn birth(&mut self, request: ExecStart, pid: i32, mark: Option<u64>) -> Birth {
        self.next_serial += 1;
        let timeout = request.timeout_ms.saturating_mul(MS);
        Birth {
            id: request.exec_id,
            serial: self.next_serial,
            pid,
            terminal: request.pty,
            argv: request.argv,
            mark,
            started_ns: self.now,
            deadline_ns: (timeout > 0 && pid > 0).then(|| self.now.saturating_add(timeout)),
            oom_kills: 0,
        }
    }

    fn remember(&mut self, exec: Exec) -> Key {
        self.execs.insert(exec)
    }

    /// Forks a command; the request comes back with the reason when that fails.
    fn start(&mut self, request: ExecStart) -> Result<Key, (ExecStart, NotStarted)> {
        match self.try_start(&request) {
            Ok(born) => {
                let Born { pid, outputs, stdin, report, mark, oom_kills } = born;
                let mut birth = self.birth(request, pid, mark);
                birth.oom_kills = oom_kills;
                let key = self.remember(Exec::new(birth, outputs, stdin, Some(report)));
                if let Some(exec) = self.execs.get(key)
                    && let Some(report) = &exec.report
                {
                    // Without it nobody would learn that the command runs; reaping it still tells how it ended.
                    let _ = self.epoll.add(report, libc::EPOLLIN, key.token(REPORT));
                }
                Ok(key)
            }
            Err(failed) => Err((request, failed)),
        }
    }

    fn try_start(&mut self, request: &ExecStart) -> Result<Born, NotStarted> {
        let running = self.execs.iter().filter(|(_, exec)| exec.exited.is_none()).count();
        if running >= MAX_RUNNING {
            return Err(NotStarted { stage: Stage::Fork, errno: libc::EAGAIN });
        }
        let identity = self.users.find(&request.user).map_err(NotStarted::at(Stage::User))?;
        let owner = (identity.uid, identity.gid);
        // Serials count from 1, so the first command's mark is one below the base.
        let mark = self.options.context.first_mark.map(|base| base - (self.next_serial + 1));
        let command = Command::new(&request.argv, &request.env, &request.cwd, identity, mark)?;
        if request.make_cwd && !request.cwd.is_empty() {
            let owner = (owner != self.options.context.own).then_some(owner);
            files::make_dirs(&request.cwd, owner).map_err(NotStarted::at(Stage::Cwd))?;
        }
        let stdio = |error: Error| NotStarted { stage: Stage::Stdio, errno: error.errno };
        let (report, child_report) = sys::pipe().map_err(stdio)?;
        sys::set_nonblocking(&report).map_err(stdio)?;
        let streams = if request.pty {
            let size = terminal::Size { rows: request.rows, cols: request.cols };
            Streams::terminal(size, owner).map_err(stdio)?
        } else {
            Streams::pipes(request.stdin).map_err(stdio)?
        };
        if streams.highest() + SPARE_FDS > self.most_fds {
            return Err(NotStarted { stage: Stage::Stdio, errno: libc::EMFILE });
        }
        let null = self.options.context.null.as_raw_fd();
        let child = Stdio {
            fds: streams.child.each_ref().map(|fd| fd.as_ref().map_or(null, AsRawFd::as_raw_fd)),
            terminal: request.pty,
            report: child_report.as_raw_fd(),
        };
        let oom_kills = self.oom_kills();
        let pid = spawn::spawn(&command, child, &self.options.context).map_err(NotStarted::at(Stage::Fork))?;
        let Streams { stdin, outputs, .. } = streams;
        Ok(Born { pid, outputs: outputs.map(Output::new), stdin, report, mark, oom_kills })
    }

    /// Learns whether a command has started.
    fn read_report(&mut self, key: Key) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        let Some(report) = &exec.report else { return };
        let mut record = [0_u8; 8];
        let count = match sys::read(report, &mut record) {
            Err(Error { errno: libc::EAGAIN, .. }) => return,
            Ok(count) => count,
            Err(_) => 0,
        };
        exec.report = None;
        if count == record.len() {
            let [stage, _, _, _, errno @ ..] = record;
            let stage = Stage::from_byte(stage).unwrap_or(Stage::Exec);
            exec.exited = Some(Exec::not_started(stage, i32::from_le_bytes(errno)));
            exec.deadline_ns = None;
            exec.outputs = [Output::new(None), Output::new(None)];
            exec.stdin = None;
            exec.stdin_watched = false;
            // Its number is free for others as soon as it is reaped.
            exec.pid = 0;
            self.announce(key);
            self.feed(key);
            self.forget_oldest();
            return;
        }
        self.announce(key);
        self.watch(key, 0);
        self.watch(key, 1);
    }

    /// Tells the attached channel that the command has started, or that it never will.
    fn announce(&mut self, key: Key) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        let Some((conn_key, id)) = exec.attached else { return };
        let Some(conn) = self.conns.get_mut(conn_key) else { return };
        let Some(Channel { work: Work::Watch(_, watcher), .. }) = conn.channels.get_mut(&id) else { return };
        if watcher.announced {
            return;
        }
        watcher.announced = true;
        if let Some(exited) = exec.exited.as_ref().filter(|exited| exited.outcome == Outcome::NotStarted) {
            watcher.done = true;
            conn::push(&mut conn.out, Kind::Exited, 0, id, &exited.encode());
        } else {
            let offsets = exec.outputs.each_ref().map(|output| output.ring.start());
            watcher.sent = offsets;
            let [stdout_offset, stderr_offset] = offsets;
            let started = Started { pid: exec.pid as u32, existing: watcher.existing, stdout_offset, stderr_offset };
            conn::push(&mut conn.out, Kind::Started, 0, id, &started.encode());
            conn.wake(id);
        }
        self.enqueue(conn_key);
    }

    /// Makes a channel the one that an exec's output goes to. One that was attached before ends with `ESTALE`.
    fn attach(&mut self, target: Target, key: Key, existing: bool, offsets: Option<[u64; 2]>) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        if let Some(offsets) = offsets {
            let beyond = exec.outputs.iter().zip(offsets).any(|(output, offset)| offset > output.ring.end());
            if beyond {
                return self.fail(target, Error::new("offset beyond the output's end", libc::EINVAL), b"");
            }
            for (stream, offset) in offsets.into_iter().enumerate() {
                exec.consume(stream, offset);
            }
        }
        let former = exec.attached.replace(target);
        let starting = exec.report.is_some();
        if let Some((conn_key, id)) = former {
            let open = self.conns.get_mut(conn_key).and_then(|conn| conn.channels.remove(&id));
            if let Some(Channel { work: Work::Watch(_, watcher), .. }) = open
                && !watcher.done
            {
                self.fail((conn_key, id), Error::new("another reader has taken over", libc::ESTALE), b"");
            }
        }
        self.open(target, Work::Watch(key, Watcher::new(existing)));
        if !starting {
            self.announce(key);
            self.pump(key, 0);
            self.pump(key, 1);
        }
    }

    fn unknown_exec() -> Error {
        Error::new("no such exec", libc::ENOENT)
    }

    fn exec_attach(&mut self, target: Target, request: &ExecAttach) {
        match self.find(&request.exec_id) {
            Some(key) => self.attach(target, key, true, Some([request.stdout_offset, request.stderr_offset])),
            None => self.fail(target, Self::unknown_exec(), &request.exec_id),
        }
    }

    fn exec_input(&mut self, target: Target, request: &ExecInput) {
        let Some(key) = self.find(&request.exec_id) else {
            return self.fail(target, Self::unknown_exec(), &request.exec_id);
        };
        self.open(target, Work::Feed(key, Feeder::new(request.offset)));
        if let Some(exec) = self.execs.get_mut(key) {
            exec.inputs.push_back(target);
        }
        self.feed(key);
    }

    fn exec_signal(&mut self, target: Target, request: &ExecSignal) {
        let Some(key) = self.find(&request.exec_id) else {
            return self.fail(target, Self::unknown_exec(), &request.exec_id);
        };
        let now = self.now;
        let Some(exec) = self.execs.get_mut(key) else { return };
        let sent = exec.signal(request.signal, request.tree);
        if sent.is_ok() && request.tree && i32::from(request.signal) == libc::SIGKILL {
            exec.kill_again = Some((now + KILL_AGAIN_NS, KILL_TRIES));
        }
        self.answer(target, sent, &request.exec_id);
    }

    fn exec_resize(&mut self, target: Target, request: &ExecResize) {
        let size = terminal::Size { rows: request.rows, cols: request.cols };
        let result = match self.find(&request.exec_id).and_then(|key| self.execs.get(key)) {
            None => Err(Self::unknown_exec()),
            Some(exec) => match &exec.stdin {
                Some(fd) if exec.terminal => terminal::resize(fd, size),
                _ if exec.terminal => Err(Error::new("the terminal is gone", libc::ESRCH)),
                _ => Err(Error::new("no terminal", libc::ENOTTY)),
            },
        };
        self.answer(target, result, &request.exec_id);
    }

    fn exec_list(&mut self, target: Target) {
        let mut known: Vec<&Exec> = self.execs.iter().map(|(_, exec)| exec).collect();
        known.sort_unstable_by_key(|exec| exec.serial);
        let mut list = ExecList { execs: known.into_iter().map(Exec::status).collect() };
        // Arguments are cut where they would not fit one frame; ids and outcomes always do.
        let mut room = MAX_PAYLOAD / 2;
        for status in &mut list.execs {
            let size = status.argv.iter().map(|argument| argument.len() + 4).sum();
            room = room.saturating_sub(size);
            if room == 0 {
                status.argv.truncate(0);
            }
        }
        self.reply(target, &list.encode());
    }

    fn exec_forget(&mut self, target: Target, id: &[u8]) {
        let result = match self.find(id) {
            None => Err(Self::unknown_exec()),
            Some(key) if self.execs.get(key).is_some_and(|exec| exec.exited.is_none()) => {
                Err(Error::new("the exec is running", libc::EBUSY))
            }
            Some(key) => {
                self.forget(key);
                Ok(())
            }
        };
        self.answer(target, result, id);
    }

    /// Lets go of a finished exec and ends the channels on it.
    fn forget(&mut self, key: Key) {
        let Some(exec) = self.execs.remove(key) else { return };
        for target in exec.attached.into_iter().chain(exec.inputs) {
            let open = self.conns.get_mut(target.0).and_then(|conn| conn.channels.remove(&target.1));
            match open.map(|channel| channel.work) {
                None => {}
                Some(Work::Watch(_, watcher)) if watcher.done => {}
                Some(_) => self.fail(target, Error::new("the exec was forgotten", libc::ENOENT), b""),
            }
        }
    }

    /// Keeps the number of finished execs, and the output kept for them, within bounds.
    ///
    /// Those whose output is consumed go first, then the oldest.
    fn forget_oldest(&mut self) {
        loop {
            let mut count = 0;
            let mut bytes = 0;
            let mut first: Option<(bool, u64, Key)> = None;
            for (key, exec) in self.execs.iter().filter(|(_, exec)| exec.exited.is_some()) {
                let unconsumed = exec.unconsumed();
                count += 1;
                bytes += unconsumed;
                // An exec that somebody is reading is not let go of.
                let idle = exec.attached.is_none_or(|(conn, id)| self.is_done(conn, id));
                let candidate = (unconsumed > 0, exec.serial, key);
                if idle && first.is_none_or(|first| candidate < first) {
                    first = Some(candidate);
                }
            }
            let over = count > MAX_FINISHED || bytes > MAX_FINISHED_BYTES;
            match first {
                Some((_, _, key)) if over => self.forget(key),
                _ => return,
            }
        }
    }

    fn is_done(&self, conn: Key, id: u32) -> bool {
        let channel = self.conns.get(conn).and_then(|conn| conn.channels.get(&id));
        !matches!(channel, Some(Channel { work: Work::Watch(_, watcher), .. }) if !watcher.done)
    }

    /// Takes the status of children that ended: commands, and orphans that nobody else waits for.
    fn reap(&mut self) {
        self.more_to_reap = false;
        for turn in 0.. {
            if turn == REAPS_A_TURN {
                self.more_to_reap = true;
                break;
            }
            let Some(reaped) = sys::reap() else { break };
            let found = self.execs.iter().find(|(_, exec)| exec.pid == reaped.pid && exec.exited.is_none());
            let Some((key, _)) = found else { continue };
            // What it had to say about its start comes before its end.
            self.read_report(key);
            let oom_kills = self.oom_kills();
            let now = sys::now_ns();
            let Some(exec) = self.execs.get_mut(key) else { continue };
            if exec.exited.is_some() {
                continue;
            }
            exec.report = None;
            exec.ended(&reaped, now, oom_kills);
            exec.stdin = None;
            exec.stdin_watched = false;
            self.announce(key);
            self.feed(key);
            self.pump(key, 0);
            self.pump(key, 1);
            self.forget_oldest();
        }
    }
}

/// A command that was forked.
struct Born {
    pid: i32,
    outputs: [Output; 2],
    stdin: Option<OwnedFd>,
    report: OwnedFd,
    mark: Option<u64>,
    oom_kills: u64,
}

/// Both ends of a command's streams.
struct Streams {
    stdin: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
    /// The child's ends; `None` is /dev/null, and of a terminal all three are the first.
    child: [Option<std::rc::Rc<OwnedFd>>; 3],
}

impl Streams {
    fn pipes(with_stdin: bool) -> Result<Self, Error> {
        let (out, child_out) = sys::pipe()?;
        let (err, child_err) = sys::pipe()?;
        sys::set_nonblocking(&out)?;
        sys::set_nonblocking(&err)?;
        let (child_in, stdin) = if with_stdin {
            let (child_in, stdin) = sys::pipe()?;
            sys::set_nonblocking(&stdin)?;
            (Some(child_in.into()), Some(stdin))
        } else {
            (None, None)
        };
        let child = [child_in, Some(child_out.into()), Some(child_err.into())];
        Ok(Self { stdin, outputs: [Some(out), Some(err)], child })
    }

    fn terminal(size: terminal::Size, owner: Owner) -> Result<Self, Error> {
        let (master, slave) = terminal::open(size, owner)?;
        let stdin = sys::dup_from(&master, 3)?;
        let slave = std::rc::Rc::new(slave);
        let child = [Some(slave.clone()), Some(slave.clone()), Some(slave)];
        Ok(Self { stdin: Some(stdin), outputs: [Some(master), None], child })
    }

    /// The largest descriptor number among them.
    fn highest(&self) -> u64 {
        let ours = self.outputs.iter().flatten().chain(&self.stdin).map(AsRawFd::as_raw_fd);
        let theirs = self.child.iter().flatten().map(|fd| fd.as_raw_fd());
        ours.chain(theirs).max().unwrap_or(0) as u64
    }
}

/// How many descriptors this process may have.
fn open_file_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 1024, rlim_max: 1024 };
    // SAFETY: the pointer outlives the call; on failure the value stays.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}

/// The count in a line `oom_kill N`.
///
/// Source: cgroup-v2, `memory.events`; cgroup-v1, `memory.oom_control`.
fn parse_oom_kills(text: &[u8]) -> u64 {
    text.split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"oom_kill "))
        .and_then(|count| std::str::from_utf8(count).ok()?.trim_end().parse().ok())
        .unwrap_or(0)
}

/// Appends an error frame for what went wrong with an archive: the kernel's errno, or `EINVAL` for a bad archive.
fn push_archive_error(out: &mut Vec<u8>, channel: u32, error: &shoal_archive::Error) {
    let errno = error.errno().unwrap_or(match error {
        shoal_archive::Error::Limit { .. } => libc::E2BIG,
        _ => libc::EINVAL,
    });
    let failure = shoal_wire::Failure { errno, what: error.to_string().into_bytes() };
    conn::push(out, Kind::Error, 0, channel, &failure.encode());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_cgroup_versions_tell_the_oom_kills() {
        assert_eq!(parse_oom_kills(b"low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n"), 4);
        assert_eq!(parse_oom_kills(b"oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"), 7);
        assert_eq!(parse_oom_kills(b"oom_kill x\n"), 0);
        assert_eq!(parse_oom_kills(b""), 0);
    }
}
