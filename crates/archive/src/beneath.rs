//! System calls that name nothing outside a directory.

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::error::{Error, last_errno};

/// How often a lookup that raced with a rename is tried again.
const RACES: usize = 128;

/// A name for the kernel.
pub(crate) fn c_string(name: &[u8]) -> Result<CString, Error> {
    CString::new(name).map_err(|_| Error::refused("NUL in a name", name))
}

/// Opens `path` as seen from `root`, without leaving it.
///
/// `resolve` is added to "no magic links": `RESOLVE_IN_ROOT` follows links as a process would for
/// which `root` is `/`; `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS` follows none.
///
/// Source: `openat2(2)`; `EAGAIN` means that a rename raced with `..` and the answer would be unsafe.
pub(crate) fn open(root: BorrowedFd<'_>, path: &[u8], flags: i32, resolve: u64) -> Result<OwnedFd, Error> {
    let name = c_string(path)?;
    // SAFETY: all-zero is a valid `open_how`; the struct is plain numbers and may grow by fields.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.resolve = resolve | libc::RESOLVE_NO_MAGICLINKS;
    for _ in 0..RACES {
        // SAFETY: `name` ends in NUL, `how` is initialised, and both outlive the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                root.as_raw_fd(),
                name.as_ptr(),
                &raw const how,
                size_of::<libc::open_how>(),
            )
        };
        if fd >= 0 {
            // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        }
        if !matches!(last_errno(), libc::EAGAIN | libc::EINTR) {
            break;
        }
    }
    Err(Error::last("openat2", path))
}

/// Opens one component of `parent`; a link there is not followed.
pub(crate) fn open_at(parent: BorrowedFd<'_>, name: &[u8], flags: i32, mode: u32) -> Result<OwnedFd, Error> {
    let text = c_string(name)?;
    let flags = flags | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: `text` ends in NUL and outlives the call.
    let fd = unsafe { libc::openat(parent.as_raw_fd(), text.as_ptr(), flags, mode) };
    if fd < 0 {
        return Err(Error::last("openat", name));
    }
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What lies under one component of `parent`; a link there is not followed.
pub(crate) fn stat_at(parent: BorrowedFd<'_>, name: &[u8]) -> Result<libc::stat, Error> {
    let text = c_string(name)?;
    // SAFETY: all-zero is a valid `stat`, plain numbers.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `text` ends in NUL, `stat` is writable, both outlive the call.
    let done = unsafe { libc::fstatat(parent.as_raw_fd(), text.as_ptr(), &raw mut stat, libc::AT_SYMLINK_NOFOLLOW) };
    check("fstatat", name, done)?;
    Ok(stat)
}

/// What a descriptor stands for.
pub(crate) fn stat(fd: BorrowedFd<'_>, name: &[u8]) -> Result<libc::stat, Error> {
    // SAFETY: all-zero is a valid `stat`, plain numbers.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is writable and outlives the call.
    check("fstat", name, unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) })?;
    Ok(stat)
}

/// The result of a call that answers -1 on failure.
pub(crate) fn check(call: &'static str, path: &[u8], result: i32) -> Result<(), Error> {
    if result < 0 { Err(Error::last(call, path)) } else { Ok(()) }
}

/// The type bits of a mode.
pub(crate) fn file_type(stat: &libc::stat) -> u32 {
    stat.st_mode & libc::S_IFMT
}

/// Is it the device node 0:0 that overlayfs takes for "nothing here"?
pub(crate) fn is_whiteout(stat: &libc::stat) -> bool {
    file_type(stat) == libc::S_IFCHR && stat.st_rdev == 0
}
