//! System calls that neither std nor libc wraps, each as one safe function.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::error::{Error, Result};

/// A path or name as the kernel takes it.
pub fn c_string(text: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid("a NUL byte in a name"))
}

fn owned(call: &'static str, object: &str, fd: libc::c_long) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::last(call, object));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn check(call: &'static str, object: &str, result: libc::c_long) -> Result<()> {
    if result < 0 { Err(Error::last(call, object)) } else { Ok(()) }
}

/// Opens `path` below `dir`; no component may be a link, and nothing above `dir` is reachable.
///
/// Source: `openat2(2)`.
pub fn open_beneath(dir: BorrowedFd<'_>, path: &CStr, flags: i32) -> Result<OwnedFd> {
    // SAFETY: all-zero is a valid open_how.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: the path ends in NUL, `how` is as long as said, and both outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            std::mem::size_of::<libc::open_how>(),
        )
    };
    owned("openat2", &path.to_string_lossy(), fd)
}

/// Opens a path that the keeper itself chose.
pub fn open(path: &str, flags: i32) -> Result<OwnedFd> {
    let c_path = c_string(path)?;
    // SAFETY: the path ends in NUL and outlives the call.
    let fd = unsafe { libc::open(c_path.as_ptr(), flags | libc::O_CLOEXEC) };
    owned("open", path, fd.into())
}

/// Makes a directory below `dir`.
pub fn mkdirat(dir: BorrowedFd<'_>, name: &str, mode: u32) -> Result<()> {
    let c_name = c_string(name)?;
    // SAFETY: the name ends in NUL and outlives the call.
    let result = unsafe { libc::mkdirat(dir.as_raw_fd(), c_name.as_ptr(), mode) };
    check("mkdirat", name, result.into())
}

/// A detached copy of the mount at `dir`, which can be given attributes of its own.
pub fn clone_mount(dir: BorrowedFd<'_>) -> Result<OwnedFd> {
    // SAFETY: an empty path and a descriptor that is open.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            dir.as_raw_fd(),
            c"".as_ptr(),
            OPEN_TREE_CLONE | libc::O_CLOEXEC as u32 | libc::AT_EMPTY_PATH as u32,
        )
    };
    owned("open_tree", "", fd)
}

/// Sets attributes of the mount behind `mount`; with `userns`, its owners are mapped through it.
pub fn mount_setattr(mount: BorrowedFd<'_>, set: u64, userns: Option<BorrowedFd<'_>>) -> Result<()> {
    let mut attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    if let Some(userns) = userns {
        attributes.attr_set |= MOUNT_ATTR_IDMAP;
        attributes.userns_fd = userns.as_raw_fd() as u64;
    }
    // SAFETY: an empty path, an open descriptor, and a structure of the size said.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            std::mem::size_of::<libc::mount_attr>(),
        )
    };
    check("mount_setattr", "", result)
}

/// Whether nothing can be written through a mount.
pub fn is_read_only(mount: BorrowedFd<'_>) -> Result<bool> {
    // SAFETY: all-zero is a valid statvfs, which the kernel fills.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and room for one structure.
    check("fstatvfs", "", unsafe { libc::fstatvfs(mount.as_raw_fd(), &raw mut stat) }.into())?;
    Ok(stat.f_flag & libc::ST_RDONLY != 0)
}

/// Attaches a detached mount at a path.
pub fn move_mount(mount: BorrowedFd<'_>, target: &str) -> Result<()> {
    let c_target = c_string(target)?;
    // SAFETY: both paths end in NUL and outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c_target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    check("move_mount", target, result)
}

/// A file system being configured, before it is mounted.
///
/// Source: `fsopen(2)`.
pub struct FsContext {
    fd: OwnedFd,
    kind: &'static str,
}

impl FsContext {
    /// Starts with a file system type.
    pub fn open(kind: &'static str) -> Result<Self> {
        let name = c_string(kind)?;
        // SAFETY: the name ends in NUL and outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) };
        Ok(Self { fd: owned("fsopen", kind, fd)?, kind })
    }

    fn config(&self, command: u32, key: Option<&str>, value: Option<&str>) -> Result<()> {
        let key_c = key.map(c_string).transpose()?;
        let value_c = value.map(c_string).transpose()?;
        // SAFETY: both strings end in NUL (or are null, as the command asks) and outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.fd.as_raw_fd(),
                command,
                key_c.as_ref().map_or(std::ptr::null(), |key| key.as_ptr()),
                value_c.as_ref().map_or(std::ptr::null(), |value| value.as_ptr()),
                0,
            )
        };
        check("fsconfig", &format!("{} {}", self.kind, key.unwrap_or("create")), result).map_err(|mut error| {
            if let Some(words) = self.message() {
                error.message = format!("{}: {words}", error.message);
            }
            error
        })
    }

    /// What the file system itself says of the last failure.
    fn message(&self) -> Option<String> {
        let mut buffer = [0_u8; 512];
        // SAFETY: the buffer is as long as said.
        let count = unsafe { libc::read(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        let words = buffer.get(..usize::try_from(count).ok()?)?;
        Some(String::from_utf8_lossy(words).trim().to_owned())
    }

    /// Sets an option with a value.
    pub fn set(&self, key: &str, value: &str) -> Result<()> {
        self.config(FSCONFIG_SET_STRING, Some(key), Some(value))
    }

    /// Sets an option that is its own value.
    pub fn flag(&self, key: &str) -> Result<()> {
        self.config(FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Makes the file system and a detached mount of it with `attributes`.
    pub fn mount(self, attributes: u64) -> Result<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: an open file system context; the kernel keeps no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_fsmount, self.fd.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) };
        owned("fsmount", self.kind, fd)
    }
}

/// A pipe, both ends closed on exec: (read, write).
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    check("pipe2", "", unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }.into())?;
    // SAFETY: the kernel has just made both for us.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Forks into new namespaces (`CLONE_NEW*` flags): `None` in the child, pid and pidfd in the parent.
///
/// Source: `clone3(2)`.
///
/// # Safety
/// The child must end in exec or `_exit`, and must not return into code that owns the keeper's resources.
pub unsafe fn fork(namespaces: i32) -> Result<Option<(i32, OwnedFd)>> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid clone_args.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = (namespaces | libc::CLONE_PIDFD) as u64;
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM this is fork; the structure is as long as said.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, std::mem::size_of::<libc::clone_args>()) };
    if pid < 0 {
        return Err(Error::last("clone3", ""));
    }
    if pid == 0 {
        return Ok(None);
    }
    Ok(Some((pid as i32, owned("clone3", "pidfd", pidfd.into())?)))
}

/// Sends a signal to exactly the process behind a pidfd; a process that has ended is no error.
pub fn pidfd_kill(pidfd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    // SAFETY: no pointer but a null one.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    match check("pidfd_send_signal", "", result) {
        Err(error) if error.errno == libc::ESRCH => Ok(()),
        other => other,
    }
}

/// Takes the exit status of a child that has ended; `None` while it runs.
pub fn reap(pid: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: room for one status.
    let got = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
    (got == pid).then_some(status)
}

/// Waits for a child that is about to end; its status.
pub fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: room for one status.
    while unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0
        && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR)
    {}
    status
}

/// Whether a descriptor (a pidfd: at its process's end) becomes readable, or is closed at the other end, in time.
pub fn ends_within(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure.
        let ready = unsafe { libc::poll(&raw mut poll, 1, left.as_millis() as i32) };
        if ready > 0 {
            return true;
        }
        if left.is_zero() {
            return false;
        }
    }
}

/// Opens a pidfd of a process of this pid namespace.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned("pidfd_open", &pid.to_string(), fd)
}

const OPEN_TREE_CLONE: u32 = 1;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
/// Mount attribute: read-only.
pub const MOUNT_ATTR_RDONLY: u64 = 0x1;
/// Mount attribute: set-id bits mean nothing.
pub const MOUNT_ATTR_NOSUID: u64 = 0x2;
/// Mount attribute: device nodes cannot be opened.
pub const MOUNT_ATTR_NODEV: u64 = 0x4;
/// Mount attribute: nothing can be executed.
pub const MOUNT_ATTR_NOEXEC: u64 = 0x8;
/// Mount attribute: reading changes no time stamp.
pub const MOUNT_ATTR_NOATIME: u64 = 0x10;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;

/// Acts with another user's effective ids and all of the keeper's capabilities.
pub fn as_user<T>(id: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    const SAME: u32 = u32::MAX;
    let change = |id: u32, bits: libc::c_ulong| -> Result<()> {
        // SAFETY: numbers only; raw, because the keeper has one thread. With the bit, leaving id 0 keeps the capabilities.
        unsafe {
            if libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) < 0
                || libc::syscall(libc::SYS_setresgid, SAME, id, SAME) < 0
                || libc::syscall(libc::SYS_setresuid, SAME, id, SAME) < 0
                || libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0) < 0
            {
                return Err(Error::last("setresuid", id.to_string()));
            }
        }
        Ok(())
    };
    let result = change(id, NO_SETUID_FIXUP).and_then(|()| act());
    change(0, 0)?;
    result
}
