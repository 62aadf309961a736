//! System calls: each wrapper returns what the call gave, or its name and errno.
//!
//! Every signal that can be blocked is blocked for the whole life of the agent, so no call here meets `EINTR`.

use std::ffi::{CStr, CString};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A system call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// Name of the call or check.
    pub call: &'static str,
    /// Its errno.
    pub errno: i32,
}

impl Error {
    /// A failure with a known errno.
    pub const fn new(call: &'static str, errno: i32) -> Self {
        Self { call, errno }
    }
    /// The failure that `errno` tells of right now.
    fn last(call: &'static str) -> Self {
        Self { call, errno: std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) }
    }
}

/// What every call here returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Turns the C convention (-1 and errno) into a result.
fn check(call: &'static str, value: libc::c_int) -> Result<libc::c_int> {
    if value < 0 { Err(Error::last(call)) } else { Ok(value) }
}

/// As [`check`], for counts of bytes.
fn check_size(call: &'static str, value: libc::ssize_t) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::last(call))
}

/// As [`check`], for calls made through syscall(2).
fn check_long(call: &'static str, value: libc::c_long) -> Result<libc::c_long> {
    if value < 0 { Err(Error::last(call)) } else { Ok(value) }
}

/// Takes a descriptor that a call just made.
fn owned(call: &'static str, value: libc::c_long) -> Result<OwnedFd> {
    let fd = check_long(call, value)?;
    // SAFETY: the call succeeded and made this descriptor for us; nobody else holds its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that outlives the call; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Random bits that no process of the sandbox can guess.
pub fn random() -> u64 {
    let mut value = 0_u64;
    // SAFETY: the buffer is as long as said. A failure leaves the time, which only costs uniqueness.
    let got = unsafe { libc::getrandom((&raw mut value).cast(), mem::size_of::<u64>(), libc::GRND_NONBLOCK) };
    if got == 8 { value } else { now_ns() }
}

/// A pipe, read end first; both ends close on exec.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the array holds the two descriptors that the call writes.
    check("pipe2", unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    let [read, write] = ends;
    // SAFETY: the call succeeded, so both are new and ours.
    Ok(unsafe { (OwnedFd::from_raw_fd(read), OwnedFd::from_raw_fd(write)) })
}

/// Puts /dev/null where stdin, stdout or stderr is closed.
pub fn fill_standard_fds() -> Result<()> {
    for fd in 0..=2 {
        // SAFETY: no pointer.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            // The lowest free number is this one, since all below it are open. It stays open for good.
            std::mem::forget(openat2(None, c"/dev/null", libc::O_RDWR, 0, 0)?);
        }
    }
    Ok(())
}

/// Makes calls on this open file return `EAGAIN` instead of waiting.
pub fn set_nonblocking(fd: &impl AsRawFd) -> Result<()> {
    // SAFETY: fcntl with F_SETFL takes an int.
    check("fcntl", unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }).map(drop)
}

/// Asks for a larger pipe; that it is refused costs only speed.
pub fn grow_pipe(fd: &impl AsRawFd, bytes: libc::c_int) {
    // SAFETY: fcntl with F_SETPIPE_SZ takes an int.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETPIPE_SZ, bytes) };
}

/// Another descriptor for the same open file, the lowest free one from `least` on.
pub fn dup_from(fd: &OwnedFd, least: RawFd) -> Result<OwnedFd> {
    // SAFETY: fcntl with F_DUPFD_CLOEXEC takes an int.
    owned("dup", unsafe { libc::c_long::from(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least)) })
}

/// Reads into the buffer.
pub fn read(fd: &impl AsRawFd, buffer: &mut [u8]) -> Result<usize> {
    // SAFETY: pointer and length are those of one exclusive slice.
    check_size("read", unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) })
}

/// Reads at an offset.
pub fn pread(fd: &impl AsRawFd, buffer: &mut [u8], offset: u64) -> Result<usize> {
    // SAFETY: pointer and length are those of one exclusive slice.
    check_size("pread", unsafe {
        libc::pread(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), offset as libc::off_t)
    })
}

/// Reads into two buffers, the first one first.
pub fn read_pair(fd: &impl AsRawFd, first: &mut [u8], second: &mut [u8]) -> Result<usize> {
    let parts = [
        libc::iovec { iov_base: first.as_mut_ptr().cast(), iov_len: first.len() },
        libc::iovec { iov_base: second.as_mut_ptr().cast(), iov_len: second.len() },
    ];
    let count = if second.is_empty() { 1 } else { 2 };
    // SAFETY: both parts are exclusive slices that outlive the call.
    check_size("readv", unsafe { libc::readv(fd.as_raw_fd(), parts.as_ptr(), count) })
}

/// Writes what fits.
pub fn write(fd: &impl AsRawFd, bytes: &[u8]) -> Result<usize> {
    // SAFETY: pointer and length are those of one slice.
    check_size("write", unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) })
}

/// Takes bytes from a socket into the unused capacity of a vector; never waits. 0 is the end.
pub fn receive(fd: &impl AsRawFd, into: &mut Vec<u8>) -> Result<usize> {
    let spare = into.spare_capacity_mut();
    // SAFETY: pointer and length are those of the spare capacity.
    let got = check_size("recv", unsafe {
        libc::recv(fd.as_raw_fd(), spare.as_mut_ptr().cast(), spare.len(), libc::MSG_DONTWAIT)
    })?;
    // SAFETY: the kernel filled `got` bytes behind the old length, within the capacity.
    unsafe { into.set_len(into.len() + got) };
    Ok(got)
}

/// As [`receive`], but takes `most` bytes at the most.
pub fn receive_at_most(fd: &impl AsRawFd, into: &mut Vec<u8>, most: usize) -> Result<usize> {
    into.reserve(most);
    // SAFETY: the spare capacity is at least `most` bytes long.
    let got = check_size("recv", unsafe {
        libc::recv(fd.as_raw_fd(), into.spare_capacity_mut().as_mut_ptr().cast(), most, libc::MSG_DONTWAIT)
    })?;
    // SAFETY: the kernel filled `got` bytes behind the old length, within the capacity.
    unsafe { into.set_len(into.len() + got) };
    Ok(got)
}

/// Sends what fits; never waits, never signals.
pub fn send(fd: &impl AsRawFd, bytes: &[u8]) -> Result<usize> {
    // SAFETY: pointer and length are those of one slice.
    check_size("send", unsafe {
        libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    })
}

/// Takes one waiting connection.
pub fn accept(listener: &impl AsRawFd) -> Result<OwnedFd> {
    // SAFETY: null address pointers are allowed.
    owned("accept4", unsafe {
        libc::c_long::from(libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        ))
    })
}

/// Bytes that the kernel may hold in each direction of a connection to a port; left alone it goes up to megabytes.
const SOCKET_BUFFER: libc::c_int = 256 << 10;

/// A TCP socket on its way to a port of the loopback interface; true when it is connected already.
///
/// When it is not, room to write tells that it is, or [`socket_error`] why not.
pub fn connect_loopback(family: libc::c_int, port: u16) -> Result<(OwnedFd, bool)> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointer.
    let socket = owned("socket", unsafe { libc::c_long::from(libc::socket(family, kind, 0)) })?;
    set_int(&socket, libc::SOL_SOCKET, libc::SO_SNDBUF, SOCKET_BUFFER);
    set_int(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, SOCKET_BUFFER);
    let done = if family == libc::AF_INET6 {
        // SAFETY: a zeroed sockaddr_in6 is a valid value of this plain struct.
        let mut address: libc::sockaddr_in6 = unsafe { mem::zeroed() };
        address.sin6_family = family as libc::sa_family_t;
        address.sin6_port = port.to_be();
        address.sin6_addr.s6_addr[15] = 1;
        let length = mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: pointer and length are those of `address`, which outlives the call.
        check("connect", unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })
    } else {
        // SAFETY: a zeroed sockaddr_in is a valid value of this plain struct.
        let mut address: libc::sockaddr_in = unsafe { mem::zeroed() };
        address.sin_family = family as libc::sa_family_t;
        address.sin_port = port.to_be();
        address.sin_addr.s_addr = libc::INADDR_LOOPBACK.to_be();
        let length = mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: pointer and length are those of `address`, which outlives the call.
        check("connect", unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })
    };
    match done {
        Ok(_) => Ok((socket, true)),
        Err(Error { errno: libc::EINPROGRESS, .. }) => Ok((socket, false)),
        Err(error) => Err(error),
    }
}

/// Takes the error that a socket met by itself, if there is one.
pub fn socket_error(socket: &impl AsRawFd, call: &'static str) -> Result<()> {
    let mut errno: libc::c_int = 0;
    let mut length = mem::size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `errno` is an int, `length` says so, both outlive the call.
    check("getsockopt", unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut errno).cast(), &raw mut length)
    })?;
    if errno == 0 { Ok(()) } else { Err(Error::new(call, errno)) }
}

/// The port that a socket of the loopback interface has on this side.
pub fn local_port(socket: &impl AsRawFd) -> Result<u16> {
    // SAFETY: a zeroed sockaddr_in6 is a valid value of this plain struct.
    let mut address: libc::sockaddr_in6 = unsafe { mem::zeroed() };
    let mut length = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: `length` is that of `address`, and both outlive the call. The port of IPv4 lies in the same place.
    check("getsockname", unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut length) })?;
    Ok(u16::from_be(address.sin6_port))
}

/// Sends small pieces at once; that it is refused costs only time.
pub fn send_at_once(socket: &impl AsRawFd) {
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
}

/// Sets an option of a socket that only makes things better.
fn set_int(socket: &impl AsRawFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) {
    let length = mem::size_of_val(&value) as libc::socklen_t;
    // SAFETY: `value` is an int, `length` says so, and it outlives the call.
    unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
}

/// Makes closing a socket a reset: the other end sees that something broke, and no port stays taken.
pub fn reset_on_close(socket: &impl AsRawFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let length = mem::size_of_val(&linger) as libc::socklen_t;
    // SAFETY: `length` is that of `linger`, which outlives the call. A refusal leaves an ordinary close.
    unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length)
    };
}

/// Closes the half of a connection that sends.
pub fn shut_down_sending(socket: &impl AsRawFd) {
    // SAFETY: no pointer. A refusal means that the other end is gone, and reading tells that.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) };
}

/// Bytes that wait in a pipe or terminal.
pub fn readable_bytes(fd: &impl AsRawFd) -> u64 {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if done < 0 { 0 } else { count.max(0) as u64 }
}

/// Whether all writers of a pipe are gone.
pub fn hung_up(fd: &impl AsRawFd) -> bool {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one entry, as said; a timeout of 0 returns at once.
    let count = unsafe { libc::poll(&raw mut entry, 1, 0) };
    count > 0 && entry.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
}

/// An epoll instance.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// Makes one.
    pub fn new() -> Result<Self> {
        // SAFETY: no pointer.
        owned("epoll_create1", unsafe { libc::c_long::from(libc::epoll_create1(libc::EPOLL_CLOEXEC)) }).map(Self)
    }
    fn control(&self, op: libc::c_int, fd: RawFd, events: u32, token: u64) -> Result<()> {
        let mut event = libc::epoll_event { events, u64: token };
        // SAFETY: the event outlives the call.
        check("epoll_ctl", unsafe { libc::epoll_ctl(self.0.as_raw_fd(), op, fd, &raw mut event) }).map(drop)
    }
    /// Begins to watch a descriptor.
    pub fn add(&self, fd: &impl AsRawFd, events: libc::c_int, token: u64) -> Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd.as_raw_fd(), events as u32, token)
    }
    /// Watches it for something else.
    pub fn modify(&self, fd: &impl AsRawFd, events: libc::c_int, token: u64) -> Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd.as_raw_fd(), events as u32, token)
    }
    /// No longer watches it. (Closing the last descriptor of a file does the same.)
    pub fn remove(&self, fd: &impl AsRawFd) {
        let _ = self.control(libc::EPOLL_CTL_DEL, fd.as_raw_fd(), 0, 0);
    }
    /// Waits for events; `timeout_ms` -1 waits for ever.
    pub fn wait<'a>(
        &self,
        events: &'a mut [libc::epoll_event],
        timeout_ms: libc::c_int,
    ) -> Result<&'a [libc::epoll_event]> {
        let room = events.len() as libc::c_int;
        // SAFETY: pointer and length are those of one exclusive slice.
        let count = unsafe { libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), room, timeout_ms) };
        let count = check("epoll_wait", count)?;
        Ok(events.get(..count as usize).unwrap_or(&[]))
    }
}

/// Blocks every signal, puts every disposition back to its default and reports SIGCHLD through a descriptor.
///
/// A child then has to unblock and nothing else.
pub fn take_signals() -> Result<OwnedFd> {
    // SAFETY: a zeroed sigset_t is a valid value, the pointers outlive the calls, and no handler is installed. Refusals
    // for SIGKILL and SIGSTOP are of no interest.
    unsafe {
        let mut all: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        // To the kernel itself: glibc refuses to touch signals 32 and 33, which we may have inherited ignored. All
        // zero is the kernel's own structure with SIG_DFL and an empty mask.
        let default = [0_u64; 4];
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), 8);
        }
        let mut child: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut child);
        libc::sigaddset(&raw mut child, libc::SIGCHLD);
        let fd = libc::signalfd(-1, &raw const child, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        owned("signalfd", libc::c_long::from(fd))
    }
}

/// A child that ended.
#[derive(Clone, Copy, Debug)]
pub struct Reaped {
    /// Its pid.
    pub pid: i32,
    /// Status as wait4(2) gives it.
    pub status: i32,
    /// What it and the children it waited for used.
    pub usage: libc::rusage,
}

/// Takes the status of one child that ended, if there is one.
pub fn reap() -> Option<Reaped> {
    let mut status = 0;
    // SAFETY: a zeroed rusage is a valid value of this plain struct.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: both pointers outlive the call.
    let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG | libc::__WALL, &raw mut usage) };
    (pid > 0).then_some(Reaped { pid, status, usage })
}

/// Sends a signal; a negative pid is a process group.
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    // SAFETY: no pointer.
    check("kill", unsafe { libc::kill(pid, signal) }).map(drop)
}

/// A descriptor for a process, immune to reuse of its number.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd> {
    // SAFETY: no pointer.
    owned("pidfd_open", unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends a signal through a pidfd.
pub fn pidfd_signal(pidfd: &OwnedFd, signal: i32) -> Result<()> {
    // SAFETY: a null siginfo is allowed.
    let done = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    check_long("pidfd_send_signal", done).map(drop)
}

/// Path resolution never follows a magic link of /proc.
pub const NO_MAGICLINKS: u64 = 0x02;
/// Path resolution follows no symbolic link at all.
pub const NO_SYMLINKS: u64 = 0x04;
/// Path resolution stays below the directory it starts from.
pub const BENEATH: u64 = 0x08;
/// Path resolution stays on one mount.
pub const NO_XDEV: u64 = 0x01;

/// Source: `openat2(2)`, `struct open_how`.
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// Opens a path; [`NO_MAGICLINKS`] and close-on-exec are always on.
///
/// `dir` `None` is the working directory, which for PID 1 is the root.
pub fn openat2(
    dir: Option<BorrowedFd<'_>>,
    path: &CStr,
    flags: libc::c_int,
    mode: u32,
    resolve: u64,
) -> Result<OwnedFd> {
    let how =
        OpenHow { flags: (flags | libc::O_CLOEXEC) as u64, mode: u64::from(mode), resolve: resolve | NO_MAGICLINKS };
    let dir = dir.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
    // A racing rename makes a scoped lookup give EAGAIN; openat2(2) says to try again, within reason.
    let mut tries = 0;
    loop {
        // SAFETY: the path ends in NUL, the struct is of the size given, both outlive the call.
        let done =
            unsafe { libc::syscall(libc::SYS_openat2, dir, path.as_ptr(), &raw const how, mem::size_of::<OpenHow>()) };
        match owned("openat2", done) {
            Err(Error { errno: libc::EAGAIN, .. }) if resolve & BENEATH != 0 && tries < 32 => tries += 1,
            other => return other,
        }
    }
}

/// What a descriptor is.
pub fn fstat(fd: &impl AsRawFd) -> Result<libc::stat> {
    // SAFETY: a zeroed stat is a valid value of this plain struct.
    let mut stat: libc::stat = unsafe { mem::zeroed() };
    // SAFETY: the pointer outlives the call.
    check("fstat", unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) })?;
    Ok(stat)
}

/// What a name in a directory is; links are not followed.
pub fn fstatat(dir: &impl AsRawFd, name: &CStr) -> Result<libc::stat> {
    // SAFETY: a zeroed stat is a valid value of this plain struct.
    let mut stat: libc::stat = unsafe { mem::zeroed() };
    // SAFETY: the name ends in NUL and the pointers outlive the call.
    check("fstatat", unsafe {
        libc::fstatat(dir.as_raw_fd(), name.as_ptr(), &raw mut stat, libc::AT_SYMLINK_NOFOLLOW)
    })?;
    Ok(stat)
}

/// Where a symbolic link points; an empty name reads the link that `dir` itself is.
pub fn readlinkat(dir: &impl AsRawFd, name: &CStr) -> Result<Vec<u8>> {
    let mut target = vec![0_u8; libc::PATH_MAX as usize];
    // SAFETY: the name ends in NUL; pointer and length are those of one exclusive buffer.
    let length = check_size("readlinkat", unsafe {
        libc::readlinkat(dir.as_raw_fd(), name.as_ptr(), target.as_mut_ptr().cast(), target.len())
    })?;
    target.truncate(length);
    target.shrink_to_fit();
    Ok(target)
}

/// Makes a directory.
pub fn mkdirat(dir: &impl AsRawFd, name: &CStr, mode: u32) -> Result<()> {
    // SAFETY: the name ends in NUL and outlives the call.
    check("mkdirat", unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

/// Removes a name; with `AT_REMOVEDIR` a directory.
pub fn unlinkat(dir: &impl AsRawFd, name: &CStr, flags: libc::c_int) -> Result<()> {
    // SAFETY: the name ends in NUL and outlives the call.
    check("unlinkat", unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}

/// Renames, replacing what is there.
pub fn renameat(from_dir: &impl AsRawFd, from: &CStr, to_dir: &impl AsRawFd, to: &CStr) -> Result<()> {
    // SAFETY: both names end in NUL and outlive the call.
    check("renameat", unsafe { libc::renameat(from_dir.as_raw_fd(), from.as_ptr(), to_dir.as_raw_fd(), to.as_ptr()) })
        .map(drop)
}

/// Sets the owner of an open file.
pub fn fchown(fd: &impl AsRawFd, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: no pointer.
    check("fchown", unsafe { libc::fchown(fd.as_raw_fd(), uid, gid) }).map(drop)
}

/// Sets the owner of a name in a directory; links are not followed.
pub fn fchownat(dir: &impl AsRawFd, name: &CStr, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: the name ends in NUL and outlives the call.
    check("fchownat", unsafe { libc::fchownat(dir.as_raw_fd(), name.as_ptr(), uid, gid, libc::AT_SYMLINK_NOFOLLOW) })
        .map(drop)
}

/// Sets the permission bits of an open file.
pub fn fchmod(fd: &impl AsRawFd, mode: u32) -> Result<()> {
    // SAFETY: no pointer.
    check("fchmod", unsafe { libc::fchmod(fd.as_raw_fd(), mode) }).map(drop)
}

/// Sets the owner of what a descriptor leads to, also one that is only a path.
pub fn chown_path(fd: &impl AsRawFd, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: the empty name ends in NUL.
    check("fchownat", unsafe { libc::fchownat(fd.as_raw_fd(), c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH) }).map(drop)
}

/// The name of a descriptor of ours, for calls that take no descriptor.
fn proc_name(fd: &impl AsRawFd) -> Result<CString> {
    let number = fd.as_raw_fd();
    CString::new(format!("/proc/self/fd/{number}")).map_err(|_| Error::new("path", libc::EINVAL))
}

/// Sets the permission bits of what a descriptor leads to, also one that is only a path, which fchmod(2) refuses.
pub fn chmod_path(fd: &impl AsRawFd, mode: u32) -> Result<()> {
    let name = proc_name(fd)?;
    // SAFETY: the name ends in NUL and outlives the call.
    check("chmod", unsafe { libc::chmod(name.as_ptr(), mode) }).map(drop)
}

/// A queue of changes in directories.
pub fn inotify() -> Result<OwnedFd> {
    // SAFETY: no pointer.
    owned("inotify_init1", unsafe { libc::c_long::from(libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK)) })
}

/// Watches the directory behind a descriptor; the number is the same as before when it is watched already.
pub fn inotify_add(inotify: &impl AsRawFd, dir: &impl AsRawFd, events: u32) -> Result<i32> {
    let name = proc_name(dir)?;
    // SAFETY: the name ends in NUL and outlives the call.
    check("inotify_add_watch", unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), name.as_ptr(), events) })
}

/// Watches a directory no longer; it may be gone already.
pub fn inotify_remove(inotify: &impl AsRawFd, watch: i32) {
    // SAFETY: no pointer.
    unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), watch) };
}

/// Moves the position of a directory back to its start.
pub fn rewind(fd: &impl AsRawFd) -> Result<()> {
    // SAFETY: no pointer.
    check_long("lseek", unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_SET) }).map(drop)
}

/// Reads directory entries as the kernel packs them; 0 is the end.
pub fn getdents(fd: &impl AsRawFd, buffer: &mut [u8]) -> Result<usize> {
    // SAFETY: pointer and length are those of one exclusive slice.
    let got = unsafe { libc::syscall(libc::SYS_getdents64, fd.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
    check_long("getdents64", got).map(|count| count as usize)
}

/// Permitted capabilities of this process, two words.
pub fn permitted_capabilities() -> [u32; 2] {
    let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut data = [CapabilityData::default(); 2];
    // SAFETY: version 3 reads the header and writes two data structs.
    let done = unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) };
    if done < 0 { [0; 2] } else { data.map(|word| word.permitted) }
}

/// Source: `capget(2)`.
pub const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Source: `capget(2)`, `struct __user_cap_header_struct`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CapabilityHeader {
    /// [`CAPABILITY_VERSION_3`].
    pub version: u32,
    /// 0 is the caller.
    pub pid: i32,
}

/// Source: `capget(2)`, `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CapabilityData {
    /// Bits in force.
    pub effective: u32,
    /// Bits that may come into force.
    pub permitted: u32,
    /// Bits kept through execve of a file that has them.
    pub inheritable: u32,
}

/// Gives memory that malloc holds but nobody uses back to the kernel.
pub fn trim_memory() {
    // SAFETY: no pointer; only free chunks are touched.
    unsafe { libc::malloc_trim(0) };
}

/// Keeps malloc from holding on to large freed blocks.
pub fn configure_malloc() {
    // SAFETY: plain tunables, set before any other thread could exist (none ever does).
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 10);
    }
}
