//! User namespaces that outlive the process they were made with, as descriptors.

use std::fmt::Write as _;
use std::os::fd::{AsFd, OwnedFd};

use super::error::{Error, Result};
use super::spec::IdMapping;
use super::sys;

/// Makes a user namespace with these maps, for users and groups alike.
///
/// A child is born in it, waits, and is ended once the namespace is held by its descriptor.
pub fn make(maps: &[IdMapping]) -> Result<OwnedFd> {
    // The kernel charges inotify instances, queued signals and POSIX message queues of all users of the namespace to
    // the user who made it, too: one whom nobody else is, or one sandbox could take what the host's root may have.
    let owner = maps.first().map_or(0, |map| map.host_id);
    let (pid, pidfd) = sys::as_user(owner, || {
        // SAFETY: the child only waits for the signal that ends it.
        match unsafe { sys::fork(libc::CLONE_NEWUSER) }? {
            Some(child) => Ok(child),
            None => loop {
                // If the keeper dies, init adopts a process that owns nothing: end with it.
                // SAFETY: no arguments.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                }
            },
        }
    })
    .map_err(|error| Error {
        code: "host_unsupported",
        message: format!("no user namespace: {error}"),
        ..error
    })?;
    let result = map(pid, maps);
    sys::pidfd_kill(pidfd.as_fd(), libc::SIGKILL)?;
    sys::wait(pid);
    result
}

fn map(pid: i32, maps: &[IdMapping]) -> Result<OwnedFd> {
    let mut text = String::new();
    for one in maps {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {} {}", one.container_id, one.host_id, one.size);
    }
    for file in ["uid_map", "gid_map"] {
        let path = format!("/proc/{pid}/{file}");
        std::fs::write(&path, &text).map_err(|error| Error::io("write", &path, &error))?;
    }
    sys::open(&format!("/proc/{pid}/ns/user"), libc::O_RDONLY)
}
