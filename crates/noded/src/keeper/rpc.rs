//! Packets to and from the server, the ready line, and the event loop's one call.

use std::collections::VecDeque;
use std::io::Write as _;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use serde_json::{Value, json};

use super::error::{Error, Result};

/// Longest packet.
const PACKET: usize = 128 << 10;

/// What came in.
pub enum Received {
    /// Nothing now.
    Nothing,
    /// The server is gone.
    Closed,
    /// A packet, and the descriptor that came along.
    Packet(Vec<u8>, Option<OwnedFd>),
}

/// The server's end of the conversation.
pub struct Channel {
    socket: Option<OwnedFd>,
    waiting: VecDeque<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Channel {
    /// Talks over a `SOCK_SEQPACKET` socket; an error in copying it shows as a server that is gone.
    pub fn new(socket: std::io::Result<OwnedFd>) -> Self {
        Self { socket: socket.ok(), waiting: VecDeque::new(), buffer: vec![0; PACKET] }
    }

    /// Takes the next packet without waiting.
    pub fn receive(&mut self) -> Received {
        let Some(socket) = &self.socket else { return Received::Closed };
        let mut control = [0_u64; 8];
        let mut part = libc::iovec { iov_base: self.buffer.as_mut_ptr().cast(), iov_len: self.buffer.len() };
        // SAFETY: all-zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = std::mem::size_of_val(&control);
        // SAFETY: the message's pointers are to buffers as long as it says.
        let count =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) };
        if count < 0 {
            let errno = std::io::Error::last_os_error().raw_os_error();
            let again = errno == Some(libc::EAGAIN) || errno == Some(libc::EINTR);
            return if again { Received::Nothing } else { Received::Closed };
        }
        let fd = descriptor(&message);
        if count == 0 {
            return Received::Closed;
        }
        Received::Packet(self.buffer.get(..count as usize).unwrap_or_default().to_vec(), fd)
    }

    /// Answers a request.
    pub fn answer(&mut self, id: u64, result: Result<Value>) {
        let packet = match result {
            Ok(value) => json!({ "id": id, "ok": value }),
            Err(error) => json!({ "id": id, "error": error }),
        };
        self.tell(&packet);
    }

    /// Says something unasked.
    pub fn tell(&mut self, packet: &Value) {
        self.waiting.push_back(packet.to_string().into_bytes());
        self.flush();
    }

    /// Sends what the server has room for.
    pub fn flush(&mut self) {
        let Some(socket) = &self.socket else {
            self.waiting.clear();
            return;
        };
        while let Some(packet) = self.waiting.front() {
            // SAFETY: the packet is as long as said.
            let sent = unsafe {
                libc::send(
                    socket.as_raw_fd(),
                    packet.as_ptr().cast(),
                    packet.len(),
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            };
            if sent < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN) {
                return;
            }
            // Anything but a full socket means that nobody will ever read it.
            self.waiting.pop_front();
        }
    }

    /// Packets wait for room.
    pub fn is_blocked(&self) -> bool {
        !self.waiting.is_empty()
    }
}

/// Takes the first descriptor out of a message, and closes any other.
fn descriptor(message: &libc::msghdr) -> Option<OwnedFd> {
    let mut first = None;
    // SAFETY: the CMSG macros walk the control buffer that the kernel filled; each descriptor in it is ours.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header);
                for offset in (0..bytes).step_by(std::mem::size_of::<RawFd>()) {
                    let mut fd: RawFd = -1;
                    let (from, to) = (data.add(offset), (&raw mut fd).cast::<u8>());
                    std::ptr::copy_nonoverlapping(from, to, std::mem::size_of::<RawFd>());
                    first.get_or_insert(OwnedFd::from_raw_fd(fd));
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    first
}

/// The pipe on which one line says whether the node came up.
pub struct Ready(std::fs::File);

impl Ready {
    /// Takes the descriptor given on the command line.
    pub fn new(fd: RawFd) -> Self {
        // SAFETY: whoever started the keeper made this descriptor for it.
        let file = unsafe { std::fs::File::from_raw_fd(fd) };
        // SAFETY: plain numbers.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        Self(file)
    }

    /// It came up.
    pub fn ok(mut self, run_dir: &str) {
        let line = json!({ "ok": { "socket": format!("{run_dir}/shoal.sock") } });
        // Who does not read it any more does not wait for it either.
        let _ = writeln!(self.0, "{line}");
    }

    /// It did not.
    pub fn failed(mut self, error: &Error) {
        let (code, status) = if error.code == "host_unsupported" || error.code == "syscall_failed" {
            ("host_unsupported", 501)
        } else if error.code == "conflict" {
            ("conflict", 409)
        } else if error.code == "invalid_request" {
            ("invalid_argument", 400)
        } else {
            ("node_unavailable", 503)
        };
        let detail =
            if error.stage.is_empty() { error.message.clone() } else { format!("{}: {}", error.stage, error.message) };
        let problem = json!({
            "code": code, "status": status, "detail": detail, "hint": "`shoal doctor` says what this host lacks",
            "is_infra": true, "details": { "stage": error.stage, "call": error.call, "errno": error.errno },
        });
        let _ = writeln!(self.0, "{}", json!({ "error": problem }));
    }
}

/// An epoll instance.
pub struct Epoll(OwnedFd);

impl Epoll {
    /// Makes one.
    pub fn new() -> Result<Self> {
        // SAFETY: plain numbers.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last("epoll_create1", ""));
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Watches a descriptor for reading, under a number.
    pub fn add(&self, fd: RawFd, token: u64) -> Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        // SAFETY: one structure.
        if unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) } < 0 {
            return Err(Error::last("epoll_ctl", ""));
        }
        Ok(())
    }

    /// Watches it no more.
    pub fn remove(&self, fd: RawFd) {
        // A descriptor that is not watched is what the caller wants.
        // SAFETY: a null event is allowed for this command.
        unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// Waits for events, `None` without end; the numbers of what happened.
    pub fn wait(&self, patience: Option<Duration>) -> Result<Vec<u64>> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        let timeout = patience.map_or(-1, |time| i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        // SAFETY: room for 64 events.
        let count = unsafe { libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), 64, timeout) };
        if count < 0 {
            let error = Error::last("epoll_wait", "");
            return if error.errno == libc::EINTR { Ok(Vec::new()) } else { Err(error) };
        }
        Ok(events.iter().take(count as usize).map(|event| event.u64).collect())
    }
}
