//! One connection: bytes in, bytes out, and the channels on it.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

use shoal_archive::Unpack;
use shoal_wire::{Failure, HEADER_LEN, Header, Kind};

use crate::changes::Changes;
use crate::exec::{Feeder, Watcher};
use crate::files::Draft;
use crate::jobs::{Listing, Packing, Reading, Removal};
use crate::slab::Key;
use crate::sys::{self, Error};

pub use crate::jobs::Step;

/// First size of the buffer for incoming bytes.
const SMALLEST_INPUT: usize = 4 << 10;
/// Size it grows to when a connection is busy.
const LARGEST_INPUT: usize = 512 << 10;
/// Outgoing bytes beyond which no further request is looked at until the client has read.
const MOST_OUTPUT: usize = 1 << 20;

/// Bytes consumed before the sender is told again.
pub const WINDOW_STEP: u64 = shoal_wire::WINDOW / 4;

/// A channel of a connection.
pub type Target = (Key, u32);

/// What a channel is busy with.
pub enum Work {
    /// Output of an exec.
    Watch(Key, Watcher),
    /// The end of an exec, and none of its output.
    Wait(Key),
    /// Stdin of an exec.
    Feed(Key, Feeder),
    /// A file that is read.
    Read(Reading),
    /// A file that is written.
    Write(Box<Draft>, Taken),
    /// A directory that is listed.
    List(Box<Listing>),
    /// A tree that is removed.
    Remove(Box<Removal>),
    /// A tree that is packed.
    Pack(Box<Packing>),
    /// An archive that is unpacked.
    Unpack(Box<Unpack>, Taken),
    /// A connection to a port.
    Port(Key),
    /// A tree whose changes are told.
    Changes(Box<Changes>),
}

/// How far an upload has come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taken {
    consumed: u64,
    told: u64,
}

impl Taken {
    /// Counts bytes; returns the window to tell when it is time to.
    pub fn add(&mut self, count: usize) -> Option<u64> {
        self.consumed += count as u64;
        let due = self.consumed - self.told >= WINDOW_STEP;
        if due {
            self.told = self.consumed;
        }
        due.then_some(self.told)
    }
}

/// A channel.
pub struct Channel {
    /// What it does.
    pub work: Work,
    /// It stands in [`Conn::ready`].
    pub queued: bool,
}

/// A connection of the front door.
pub struct Conn {
    /// The socket.
    pub fd: OwnedFd,
    /// Bytes that came and are not looked at yet.
    pub input: Vec<u8>,
    /// Bytes that wait to go out, from `sent` on.
    pub out: Vec<u8>,
    /// See `out`.
    pub sent: usize,
    /// Channels that are open.
    pub channels: BTreeMap<u32, Channel>,
    /// Channels that may have something to send, each once.
    pub ready: VecDeque<u32>,
    /// What the poll loop watches the socket for.
    pub interest: libc::c_int,
    /// It stands in the list of connections to be served.
    pub queued: bool,
    wanted: usize,
}

/// Appends a frame's header.
pub fn push_header(out: &mut Vec<u8>, kind: Kind, flags: u8, channel: u32, length: usize) {
    out.extend_from_slice(&Header { len: length as u32, channel, kind, flags }.encode());
}

/// Appends a frame.
pub fn push(out: &mut Vec<u8>, kind: Kind, flags: u8, channel: u32, payload: &[u8]) {
    out.reserve(HEADER_LEN + payload.len());
    push_header(out, kind, flags, channel, payload.len());
    out.extend_from_slice(payload);
}

/// Appends an error frame; `object` is what the call was about.
pub fn push_error(out: &mut Vec<u8>, channel: u32, error: Error, object: &[u8]) {
    let what = if object.is_empty() { error.call.as_bytes() } else { object }.to_vec();
    push(out, Kind::Error, 0, channel, &Failure { errno: error.errno, what }.encode());
}

impl Conn {
    /// A connection that was just accepted.
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            input: Vec::new(),
            out: Vec::new(),
            sent: 0,
            channels: BTreeMap::new(),
            ready: VecDeque::new(),
            interest: 0,
            queued: false,
            wanted: SMALLEST_INPUT,
        }
    }

    /// Bytes that wait to go out.
    pub fn pending(&self) -> usize {
        self.out.len() - self.sent
    }

    /// The client has to read before it is heard again.
    pub fn stalled(&self) -> bool {
        self.pending() > MOST_OUTPUT
    }

    /// Takes bytes off the socket, once; 0 is the end.
    pub fn receive(&mut self) -> Result<usize, Error> {
        let room = self.frame_length().map_or(0, |length| length.saturating_sub(self.input.len())).max(self.wanted);
        self.input.reserve(room);
        let offered = self.input.capacity() - self.input.len();
        let count = sys::receive(&self.fd, &mut self.input)?;
        if count == offered {
            self.wanted = (self.wanted * 4).min(LARGEST_INPUT);
        }
        Ok(count)
    }

    /// Length of the frame that the input begins with, if that is known.
    fn frame_length(&self) -> Option<usize> {
        let header = Header::decode(*self.input.first_chunk::<HEADER_LEN>()?).ok()?;
        Some(HEADER_LEN + header.len as usize)
    }

    /// Sends what fits; true when all is out.
    pub fn send(&mut self) -> Result<bool, Error> {
        while let Some(rest) = self.out.get(self.sent..)
            && !rest.is_empty()
        {
            match sys::send(&self.fd, rest) {
                Ok(count) => self.sent += count,
                Err(Error { errno: libc::EAGAIN, .. }) => {
                    // While there is always more to send, nothing else would ever give back what is out. Each byte
                    // is moved once at the most.
                    if self.sent >= self.pending() {
                        self.out.drain(..self.sent);
                        self.sent = 0;
                    }
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(true)
    }

    /// Says that a channel may have something to send.
    pub fn wake(&mut self, channel: u32) {
        if let Some(open) = self.channels.get_mut(&channel)
            && !open.queued
        {
            open.queued = true;
            self.ready.push_back(channel);
        }
    }

    /// Gives memory back that a quiet connection does not need.
    pub fn shrink(&mut self) {
        if self.input.is_empty() {
            self.input = Vec::new();
            self.wanted = SMALLEST_INPUT;
        }
        if self.pending() == 0 {
            self.out = Vec::new();
            self.sent = 0;
        }
        if self.ready.is_empty() {
            self.ready.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    #[test]
    fn rs_09_a_client_that_is_always_behind_costs_no_more_than_what_it_is_behind() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut conn = Conn::new(ours.into());
        let payload = vec![0; 64 << 10];
        let mut read = vec![0; 64 << 10];
        while conn.send().unwrap() {
            push(&mut conn.out, Kind::Data, 0, 1, &payload);
        }
        for _ in 0..4096 {
            push(&mut conn.out, Kind::Data, 0, 1, &payload);
            theirs.read_exact(&mut read).unwrap();
            conn.send().unwrap();
            assert!(conn.pending() > 0, "the client has caught up");
        }
        assert!(conn.out.capacity() <= MOST_OUTPUT, "{} bytes are held for {}", conn.out.capacity(), conn.pending());
    }
}
