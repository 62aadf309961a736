//! The socket to one sandbox's guest agent: made, served by one task, made again when it breaks.

use super::link::{Ending, Link, Violation};
use bytes::{Buf as _, Bytes, BytesMut};
use shoal_wire::{HEADER_LEN, Header, Kind, Ready, VERSION};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep, timeout_at};

/// Pauses before the attempts to connect again.
const RETRY_AFTER: [Duration; 3] = [Duration::from_millis(5), Duration::from_millis(50), Duration::from_millis(150)];

/// More breaks than this within [`BREAKS_WINDOW`] come from no honest agent.
const MAX_BREAKS: usize = 5;
const BREAKS_WINDOW: Duration = Duration::from_secs(10);

/// Bytes read at a time while only small frames come; an idle connection holds no buffer at all.
const SMALL_READ: usize = 4 << 10;
pub const LARGE_READ: usize = 64 << 10;

/// Reads before others get their turn, however much an agent has to say.
const READS_A_TURN: u32 = 8;

/// Memory that a frame gets at a time, however long it claims to be.
const GROWTH: usize = 256 << 10;

/// Buffers that one writev(2) takes.
const BATCH: usize = 64;

/// Why no agent serves at an address.
#[derive(Debug)]
pub enum ConnectError {
    /// It did not say READY in time.
    Timeout,
    /// It cannot be reached, or said something else.
    Failed(String),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout => f.write_str("the guest agent did not say READY in time"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

/// Connects to an agent and waits for its READY until `deadline`.
pub async fn connect(socket: &Path, deadline: Instant) -> Result<(UnixStream, Ready), ConnectError> {
    match timeout_at(deadline, hail(socket)).await {
        Ok(Ok(connected)) => Ok(connected),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(ConnectError::Timeout),
    }
}

async fn hail(socket: &Path) -> Result<(UnixStream, Ready), ConnectError> {
    let failed = |error: io::Error| ConnectError::Failed(format!("connect to the guest agent: {error}"));
    let mut stream = loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => break stream,
            // The backlog is full: the agent has not come to accept yet.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(Duration::from_millis(2)).await,
            Err(error) => return Err(failed(error)),
        }
    };
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await.map_err(failed)?;
    let header = Header::decode(header).map_err(|error| ConnectError::Failed(format!("first frame: {error}")))?;
    // As long as a READY of this version is; another length is not read.
    let expected = Ready::default().encode().len();
    if header.kind != Kind::Ready || header.channel != 0 || header.flags != 0 || header.len as usize != expected {
        return Err(ConnectError::Failed("the guest agent's first frame is no READY".to_owned()));
    }
    let mut payload = vec![0; expected];
    stream.read_exact(&mut payload).await.map_err(failed)?;
    let ready = Ready::decode(&payload).map_err(|error| ConnectError::Failed(format!("READY: {error}")))?;
    if ready.version != VERSION {
        let version = ready.version;
        return Err(ConnectError::Failed(format!("the guest agent speaks version {version}, not {VERSION}")));
    }
    Ok((stream, ready))
}

/// Why a connection ended.
#[derive(Debug)]
enum Break {
    Closed,
    Failed(io::Error),
    Violated(Violation),
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the guest agent closed the connection"),
            Self::Failed(error) => write!(f, "the connection to the guest agent broke: {error}"),
            Self::Violated(violation) => write!(f, "the guest agent broke the protocol: {}", violation.0),
        }
    }
}

/// Serves `link` over `stream` until the link is ended, by the node or because the agent is lost.
///
/// A broken connection may stay broken for `grace`; within this time the node may also say that it ended the sandbox
/// itself.
///
/// Returns why it is lost, or `None` when the node ended it.
pub async fn serve(
    link: Arc<Link>,
    socket: PathBuf,
    mut stream: UnixStream,
    generation: u64,
    grace: Duration,
) -> Option<String> {
    let mut breaks: VecDeque<Instant> = VecDeque::new();
    loop {
        link.up();
        let broken = {
            let (reader, writer) = stream.split();
            tokio::select! {
                broken = read(&link, reader) => broken,
                broken = write(&link, writer) => broken,
                () = link.ended() => return None,
            }
        };
        link.broke();
        let now = Instant::now();
        breaks.push_back(now);
        while breaks.front().is_some_and(|then| now.duration_since(*then) > BREAKS_WINDOW) {
            breaks.pop_front();
        }
        let hopeless = matches!(broken, Break::Violated(_)) || breaks.len() > MAX_BREAKS;
        let deadline = now + grace;
        let again = tokio::select! {
            again = reconnect(&socket, deadline, generation), if !hopeless => again,
            () = link.ended() => return None,
            () = tokio::time::sleep_until(deadline) => None,
        };
        if let Some(again) = again {
            stream = again;
        } else {
            // A connection that cannot come back still waits out its grace: the node may be about to say why.
            tokio::select! {
                () = link.ended() => return None,
                () = tokio::time::sleep_until(deadline) => {}
            }
            let why = broken.to_string();
            link.end(&Ending::Lost(why.clone()));
            return Some(why);
        }
    }
}

async fn reconnect(socket: &Path, deadline: Instant, generation: u64) -> Option<UnixStream> {
    for pause in RETRY_AFTER {
        sleep(pause).await;
        // Another generation is another agent, which knows nothing of these execs.
        if let Ok((stream, ready)) = connect(socket, deadline).await {
            return (ready.generation == generation).then_some(stream);
        }
    }
    None
}

/// Reads frames and hands them to the link.
///
/// A frame that is read in part gets exactly the room it needs, so its bytes are written once by
/// the kernel and never moved again: they go on to the client in the same memory.
async fn read(link: &Link, mut reader: ReadHalf<'_>) -> Break {
    let mut buffer = BytesMut::new();
    let mut small = SMALL_READ;
    let mut turn: u32 = 0;
    loop {
        turn = turn.wrapping_add(1);
        if turn.is_multiple_of(READS_A_TURN) {
            tokio::task::yield_now().await;
        }
        let missing = match parse(link, &mut buffer) {
            Ok(missing) => missing,
            Err(violation) => return Break::Violated(violation),
        };
        let want = if buffer.is_empty() {
            buffer = BytesMut::new();
            if let Err(error) = reader.readable().await {
                return Break::Failed(error);
            }
            small
        } else if buffer.len() < HEADER_LEN {
            small
        } else {
            // With the next frame's header, to know how much room that needs.
            missing.min(GROWTH) + HEADER_LEN
        };
        buffer.reserve(want);
        match reader.read_buf(&mut bytes::BufMut::limit(&mut buffer, want)).await {
            Ok(0) => return Break::Closed,
            Ok(count) if count == small => small = (small * 2).min(LARGE_READ),
            Ok(count) if count < small / 4 => small = (small / 2).max(SMALL_READ),
            Ok(_) => {}
            Err(error) => return Break::Failed(error),
        }
    }
}

/// Takes all whole frames out of `buffer`; returns how many bytes the next one lacks.
fn parse(link: &Link, buffer: &mut BytesMut) -> Result<usize, Violation> {
    while let Some(bytes) = buffer.first_chunk::<HEADER_LEN>() {
        let header = Header::decode(*bytes)?;
        link.admit(&header)?;
        let whole = HEADER_LEN + header.len as usize;
        if buffer.len() < whole {
            return Ok(whole - buffer.len());
        }
        link.receive(header, buffer.split_to(whole))?;
    }
    Ok(HEADER_LEN - buffer.len())
}

/// Writes what the link has to say.
async fn write(link: &Link, mut writer: WriteHalf<'_>) -> Break {
    loop {
        let mut waiting = link.outgoing().await;
        while !waiting.is_empty() {
            let mut slices = [IoSlice::new(&[]); BATCH];
            let mut count = 0;
            for (slice, bytes) in slices.iter_mut().zip(&waiting) {
                *slice = IoSlice::new(bytes);
                count += 1;
            }
            let written = match writer.write_vectored(slices.get(..count).unwrap_or_default()).await {
                Ok(0) => return Break::Closed,
                Ok(written) => written,
                Err(error) => return Break::Failed(error),
            };
            advance(&mut waiting, written);
            link.written(written);
        }
    }
}

fn advance(waiting: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(first) = waiting.front_mut() {
        if first.len() > written {
            first.advance(written);
            return;
        }
        written -= first.len();
        waiting.pop_front();
    }
}
