//! Terminals for commands that want one.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::files::Owner;
use crate::sys::{self, Error, Result};

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub cols: u16,
}

impl Default for Size {
    fn default() -> Self {
        Self { rows: 24, cols: 80 }
    }
}

/// A new terminal: our end and the command's.
///
/// The command's end belongs to `owner`, so that it can open /dev/tty and its own terminal again.
///
/// Source: `pts(4)`, `ioctl_tty(2)`; TIOCGPTPEER needs no path and so no trust in one.
pub fn open(size: Size, owner: Owner) -> Result<(OwnedFd, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
    let master = sys::openat2(None, c"/dev/ptmx", flags, 0, 0)?;
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    ioctl_result("unlockpt", unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) })?;
    let peer_flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags and makes a descriptor.
    let peer = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, peer_flags) };
    ioctl_result("open of the terminal", peer)?;
    // SAFETY: the call succeeded, so the descriptor is new and ours.
    let slave = unsafe { OwnedFd::from_raw_fd(peer) };
    let stat = sys::fstat(&slave)?;
    if (stat.st_uid, stat.st_gid) != owner {
        sys::fchown(&slave.as_fd(), owner.0, owner.1)?;
    }
    let size = if size.rows == 0 || size.cols == 0 { Size::default() } else { size };
    resize(&master, size)?;
    Ok((master, slave))
}

/// Sets the size; the command gets SIGWINCH when it changes.
pub fn resize(fd: &OwnedFd, size: Size) -> Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    ioctl_result("resize", unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
}

fn ioctl_result(call: &'static str, value: libc::c_int) -> Result<()> {
    if value >= 0 {
        return Ok(());
    }
    Err(Error::new(call, std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)))
}
