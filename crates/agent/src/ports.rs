//! Ports of the sandbox: connections to what listens there, each behind a channel of its own.
//!
//! Only TCP, and only over the loopback interface of the network namespace that the agent is in. Each socket is
//! watched for changes ("edge triggered"): it is read until it is empty and written until it is full, and while the
//! client does not read, nobody looks at it at all.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use shoal_wire::{DATA_CHUNK, EOF, HEADER_LEN, Header, Kind, PORT_WINDOW, PortConnect, WINDOW};

use crate::agent::{Agent, PORT};
use crate::commands::SPARE_FDS;
use crate::conn::{self, Step, Target, WINDOW_STEP, Work};
use crate::requests::Violation;
use crate::slab::Key;
use crate::sys::{self, Error};

/// Bytes consumed before the sender is told again when nothing more is waiting: it may keep to less than a window.
const WINDOW_STEP_IDLE: u64 = 8 << 10;

/// Where `localhost` may mean, in the order in which it is tried.
const FAMILIES: [libc::c_int; 2] = [libc::AF_INET, libc::AF_INET6];

/// How far a connection is.
#[derive(Debug)]
enum State {
    /// It is being made to this member of [`FAMILIES`]; the error is what the earlier one gave.
    Connecting(usize, Option<Error>),
    /// Bytes go both ways.
    Open,
}

/// How far the client's half of a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    /// More may come.
    Open,
    /// The client has said its last.
    Ended,
    /// And all of it is in the socket, whose other end knows.
    Closed,
}

/// A connection to a port.
#[derive(Debug)]
pub struct Port {
    socket: OwnedFd,
    target: Target,
    number: u16,
    state: State,
    /// Bytes of the client that the socket has not taken yet.
    input: VecDeque<u8>,
    /// Bytes of the client that the socket has taken, and how much of it the client knows.
    taken: u64,
    told: u64,
    half: Half,
    /// Writing failed. What the other end said before may still be there to read.
    broken: Option<Error>,
    /// Bytes of the socket that were sent to the client, and how much of it was consumed.
    sent: u64,
    consumed: u64,
    /// The other end has said its last, and the client was told.
    output_ended: bool,
    /// There may be something to read.
    readable: bool,
}

impl Port {
    /// Takes the client's progress; false when it claims more than was sent.
    pub fn consumed(&mut self, offset: u64) -> bool {
        self.consumed = self.consumed.max(offset);
        offset <= self.sent
    }

    /// Sends the client one stretch of what has come, read straight into the outgoing bytes.
    pub fn step(&mut self, channel: u32, out: &mut Vec<u8>) -> Step {
        let window = (self.consumed + PORT_WINDOW).saturating_sub(self.sent);
        if matches!(self.state, State::Connecting(..)) || self.output_ended || !self.readable || window == 0 {
            return Step::Wait;
        }
        let begin = out.len();
        conn::push_header(out, Kind::Data, 0, channel, 0);
        let got = sys::receive_at_most(&self.socket, out, window.min(DATA_CHUNK as u64) as usize);
        let (flags, length, step) = match (got, self.broken) {
            (Err(Error { errno: libc::EAGAIN, .. }), None) => {
                out.truncate(begin);
                self.readable = false;
                return Step::Wait;
            }
            (Ok(0), None) => {
                self.output_ended = true;
                (EOF, 0, if self.half == Half::Closed { Step::Done } else { Step::Wait })
            }
            // What writing met is why reading ends.
            (Ok(0) | Err(_), Some(error)) | (Err(error), None) => {
                out.truncate(begin);
                conn::push_error(out, channel, error, b"");
                return Step::Done;
            }
            (Ok(count), _) => (0, count, Step::More),
        };
        self.sent += length as u64;
        let header = Header { len: length as u32, channel, kind: Kind::Data, flags }.encode();
        if let Some(place) = out.get_mut(begin..begin + HEADER_LEN) {
            place.copy_from_slice(&header);
        }
        step
    }

    /// Takes bytes of the client: into the socket as far as it goes, and keeps the rest.
    fn take(&mut self, bytes: &[u8]) {
        let count = if self.input.is_empty() { send(&self.socket, bytes, &mut self.broken) } else { 0 };
        self.taken += count as u64;
        self.input.extend(bytes.get(count..).unwrap_or_default());
    }

    /// Writes what was kept and the socket takes now, and closes its half after the client's last byte.
    fn write(&mut self) {
        while !self.input.is_empty() {
            let count = send(&self.socket, self.input.as_slices().0, &mut self.broken);
            if count == 0 {
                return;
            }
            self.input.drain(..count);
            self.taken += count as u64;
        }
        // Of the many that there may be, only those that wait for their servers hold memory.
        self.input = VecDeque::new();
        self.readable |= self.broken.is_some();
        if self.half == Half::Ended {
            self.half = Half::Closed;
            sys::shut_down_sending(&self.socket);
        }
    }

    /// The window to tell the client, when it is time to.
    fn window(&mut self) -> Option<u64> {
        let step = match self.input.is_empty() {
            true if self.half == Half::Closed => 1,
            true => WINDOW_STEP_IDLE,
            false => WINDOW_STEP,
        };
        let due = self.taken - self.told >= step;
        if due {
            self.told = self.taken;
        }
        due.then_some(self.told)
    }

    /// Closes the connection because the client's end is gone: what did not get there must not look like an end.
    pub fn hang_up(self) {
        if self.half != Half::Closed {
            sys::reset_on_close(&self.socket);
        }
    }
}

/// Sends what the socket takes; returns how much that was. Once it is `broken` everything counts as taken: nobody will
/// ever read it, and the client shall not wait for room.
fn send(socket: &OwnedFd, bytes: &[u8], broken: &mut Option<Error>) -> usize {
    if broken.is_some() || bytes.is_empty() {
        return bytes.len();
    }
    match sys::send(socket, bytes) {
        Ok(count) => count,
        Err(Error { errno: libc::EAGAIN, .. }) => 0,
        Err(error) => {
            *broken = Some(error);
            bytes.len()
        }
    }
}

impl Agent {
    /// Begins to connect to a port.
    pub fn port_connect(&mut self, target: Target, request: &PortConnect) {
        self.try_connect(target, request.port, 0, None);
    }

    /// Tries the addresses from `family` on; `earlier` is what the one before gave.
    fn try_connect(&mut self, target: Target, number: u16, family: usize, mut earlier: Option<Error>) {
        for (index, domain) in FAMILIES.into_iter().enumerate().skip(family) {
            match self.begin_connect(domain, number) {
                Ok((socket, connected)) => {
                    let port = Port {
                        socket,
                        target,
                        number,
                        state: State::Connecting(index, earlier),
                        input: VecDeque::new(),
                        taken: 0,
                        told: 0,
                        half: Half::Open,
                        broken: None,
                        sent: 0,
                        consumed: 0,
                        output_ended: false,
                        readable: false,
                    };
                    let key = self.ports.insert(port);
                    self.open(target, Work::Port(key));
                    self.watch_port(key, connected);
                    return;
                }
                Err(error) => earlier = earlier.or(Some(error)),
            }
        }
        self.fail(target, earlier.unwrap_or(Error::new("connect", libc::ECONNREFUSED)), b"");
    }

    fn begin_connect(&self, domain: libc::c_int, number: u16) -> Result<(OwnedFd, bool), Error> {
        let (socket, connected) = sys::connect_loopback(domain, number)?;
        if socket.as_raw_fd() as u64 + SPARE_FDS > self.most_fds {
            sys::reset_on_close(&socket);
            return Err(Error::new("socket", libc::EMFILE));
        }
        Ok((socket, connected))
    }

    /// Has the poll loop watch a new connection. One that stands already is told of at once.
    fn watch_port(&mut self, key: Key, connected: bool) {
        let Some(port) = self.ports.get(key) else { return };
        let events = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
        if let Err(error) = self.epoll.add(&port.socket, events, key.token(PORT)) {
            self.end_port(key, Some(error));
        } else if connected {
            self.connected(key);
        }
    }

    /// Something happened to a connection's socket.
    pub fn port_event(&mut self, key: Key, events: libc::c_int) {
        let Some(port) = self.ports.get_mut(key) else { return };
        if matches!(port.state, State::Connecting(..)) {
            if events & (libc::EPOLLOUT | libc::EPOLLERR | libc::EPOLLHUP) != 0 {
                self.connected(key);
            }
            return;
        }
        port.readable |= events & !libc::EPOLLOUT != 0;
        self.move_port(key);
    }

    /// A connection stands, or could not be made.
    fn connected(&mut self, key: Key) {
        let Some(port) = self.ports.get_mut(key) else { return };
        let State::Connecting(family, earlier) = port.state else { return };
        let number = port.number;
        let made = sys::socket_error(&port.socket, "connect").and_then(|()| match sys::local_port(&port.socket)? {
            // Nobody listens, and the kernel happened to give the socket the very port that it was to connect to, so
            // that it met itself.
            same if same == number => Err(Error::new("connect", libc::ECONNREFUSED)),
            _ => Ok(()),
        });
        match made {
            Ok(()) => {
                sys::send_at_once(&port.socket);
                port.state = State::Open;
                port.readable = true;
                let target = port.target;
                self.reply(target, &[]);
                self.move_port(key);
            }
            Err(error) => {
                let target = port.target;
                self.end_port(key, None);
                self.try_connect(target, number, family + 1, earlier.or(Some(error)));
            }
        }
    }

    /// Bytes of the client for a connection, or their end.
    pub fn port_data(&mut self, key: Key, payload: &[u8], eof: bool) -> Result<(), Violation> {
        let Some(port) = self.ports.get_mut(key) else { return Ok(()) };
        let too_much = (port.input.len() + payload.len()) as u64 > WINDOW;
        if matches!(port.state, State::Connecting(..)) || port.half != Half::Open || too_much {
            return Err(Violation);
        }
        port.take(payload);
        if eof {
            port.half = Half::Ended;
        }
        self.move_port(key);
        Ok(())
    }

    /// Takes a connection as far as it goes: writes, tells the client, lets its channel read.
    fn move_port(&mut self, key: Key) {
        let Some(port) = self.ports.get_mut(key) else { return };
        port.write();
        let (target, window) = (port.target, port.window());
        if port.output_ended && port.broken.is_some() {
            let broken = port.broken;
            return self.end_port(key, broken);
        }
        let over = port.output_ended && port.half == Half::Closed;
        self.tell_window(target, window);
        if over {
            return self.end_port(key, None);
        }
        if let Some(conn) = self.conns.get_mut(target.0) {
            conn.wake(target.1);
        }
        self.enqueue(target.0);
    }

    /// Ends a connection and its channel, with an error if there is one.
    fn end_port(&mut self, key: Key, error: Option<Error>) {
        let Some(port) = self.ports.remove(key) else { return };
        if let Some(conn) = self.conns.get_mut(port.target.0) {
            conn.channels.remove(&port.target.1);
        }
        if let Some(error) = error {
            self.fail(port.target, error, b"");
        }
        port.hang_up();
    }
}
