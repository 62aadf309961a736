//! Landlock: a process gives up writing outside named places, for itself and all it starts.
//!
//! Source: `landlock(7)`.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::error::{Error, Result};

/// Makes, removes, writes and truncates; reading and executing stay free.
const WRITES: u64 = 1 << 1 | 0x7ff << 4;
/// The part of it that means something for a path that is not a directory.
const FILE_WRITES: u64 = 1 << 1 | 1 << 14;

/// A ruleset that forbids writing anywhere but below `places`; `None` where the kernel has no Landlock.
pub fn write_only_below(places: &[&CStr]) -> Result<Option<OwnedFd>> {
    // SAFETY: asks for the version; takes no structure.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u64>(), 0, 1) };
    if version < 3 {
        return Ok(None);
    }
    let handled = WRITES;
    // SAFETY: the first field of landlock_ruleset_attr, which may be given alone.
    let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, 8, 0) };
    if fd < 0 {
        return Err(Error::last("landlock_create_ruleset", ""));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let ruleset = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    for place in places {
        let words = place.to_string_lossy().into_owned();
        // SAFETY: the path ends in NUL.
        let fd = unsafe { libc::open(place.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last("open", words));
        }
        // SAFETY: as above.
        let parent = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all-zero is a valid stat, which the kernel fills.
        let mut meta: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: an open descriptor and room for one structure.
        unsafe { libc::fstat(parent.as_raw_fd(), &raw mut meta) };
        let directory = meta.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let rule = PathBeneath { allowed: if directory { WRITES } else { FILE_WRITES }, parent: parent.as_raw_fd() };
        // SAFETY: the structure is what rule type 1 takes.
        let added = unsafe { libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), 1, &raw const rule, 0) };
        if added < 0 {
            return Err(Error::last("landlock_add_rule", words));
        }
    }
    Ok(Some(ruleset))
}

/// Puts the calling process under a ruleset; `no_new_privs` must be set.
pub fn restrict(ruleset: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: plain numbers.
    if unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) } < 0 {
        return Err(Error::last("landlock_restrict_self", ""));
    }
    Ok(())
}

/// Source: linux/landlock.h, `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}
