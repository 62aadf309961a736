//! Unpacking a layer: hostile bytes, read where they can do no harm.
//!
//! The keeper starts one *worker* a layer and reads nothing of the layer itself. The worker has
//! - a user namespace of its own, mapped to a reserved range of host ids, and in it four
//!   capabilities over files (`CHOWN`, `DAC_OVERRIDE`, `FOWNER`, `FSETID`) and no other;
//! - its own mount, pid, net, ipc, uts and cgroup namespaces, which belong to the host, so that it
//!   has no capability in them: no network, and a file tree that is the target directory alone;
//! - that directory through an idmapped mount, `nosuid,nodev,noexec`: what it writes as id 0 to
//!   65535 is on disk as 0 to 65535;
//! - three descriptors, `no_new_privs`, a system-call filter, and limits on memory, CPU time and
//!   the size of files.
//!
//! It ends when it is done, when the keeper kills it (that is how a deadline is kept) or when the
//! keeper dies. What it has written by then is the caller's to drop.

mod filter;
mod inflate;
mod worker;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::spec::IdMapping;
use super::sys;
use super::userns;

/// Ids that a layer may use: 0 to 65535, mapped to a range on the host that nothing else uses.
pub const IDS: u32 = 65_536;
/// Largest report that is read; a worker writes a few hundred bytes.
const MAX_REPORT: u64 = 64 << 10;

/// A layer to unpack.
pub struct Request<'a> {
    /// The layer, positioned at its first byte.
    pub blob: BorrowedFd<'a>,
    /// Bytes that belong to it; `None`: up to the end of the file.
    pub length: Option<u64>,
    /// An empty directory, on a mount of this mount namespace, to unpack into.
    pub target: BorrowedFd<'a>,
    /// First of the [`IDS`] host ids that the worker runs as.
    pub host_id: u32,
    /// Bytes of content that the layer may hold.
    pub max_bytes: u64,
    /// Members that it may have.
    pub max_entries: u64,
    /// Seconds of CPU time, after which the kernel ends the worker.
    pub cpu_seconds: u64,
}

/// A worker under way.
///
/// Poll [`report`](Self::report) for reading; it ends when the worker does. Killing the worker
/// through its pidfd is always right. The caller reaps it.
pub struct Worker {
    /// Process id, in the keeper's pid namespace.
    pub pid: i32,
    /// The process, whatever becomes of its id.
    pub pidfd: OwnedFd,
    /// Read end of the pipe that the report arrives on; does not block.
    pub report: OwnedFd,
}

/// What the worker found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpacked {
    /// Hex SHA-256 of the uncompressed tar stream.
    pub diff_id: String,
    /// Members.
    pub entries: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// `none`, `gzip` or `zstd`.
    pub compression: String,
    /// Whiteouts and opaque marks.
    pub whiteouts: u64,
    /// Devices and pipes that were left out.
    pub special_skipped: u64,
    /// Files that lost a set-id bit.
    pub set_id_dropped: u64,
    /// Extended attributes that were left out.
    pub xattrs_dropped: u64,
    /// The archive lacks its end: only who expects this diffID knows that nothing is missing.
    pub unterminated: bool,
}

/// Why the worker gave up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Failure {
    /// The layer is to blame, not the machine.
    bad_layer: bool,
    errno: i32,
    message: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    Ok(Unpacked),
    Error(Failure),
}

/// Starts a worker. It is running when this returns; whatever had been made is undone on failure.
///
/// # Errors
///
/// The step that failed. A worker without one of its walls is never started.
pub fn spawn(request: &Request<'_>) -> Result<Worker> {
    let userns = userns::make(&[IdMapping { container_id: 0, host_id: request.host_id, size: IDS }])?;
    let mount = sys::clone_mount(request.target)?;
    let attributes = sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV | sys::MOUNT_ATTR_NOEXEC;
    sys::mount_setattr(mount.as_fd(), attributes, Some(userns.as_fd()))?;
    let (report, write) = sys::pipe()?;
    set_nonblocking(report.as_fd())?;
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    // SAFETY: the child runs `worker::run`, which never returns.
    match (unsafe { sys::fork(namespaces) })? {
        Some((pid, pidfd)) => Ok(Worker { pid, pidfd, report }),
        None => worker::run(request, &userns, &mount, &write),
    }
}

impl Worker {
    /// Reads what has arrived into `bytes`; true at the end of the report.
    ///
    /// # Errors
    ///
    /// When reading failed, or the worker wrote more than a report.
    pub fn read(&self, bytes: &mut Vec<u8>) -> Result<bool> {
        let copy = self.report.try_clone().map_err(|error| Error::io("dup", "report", &error))?;
        match File::from(copy).take(MAX_REPORT).read_to_end(bytes) {
            Ok(_) if bytes.len() as u64 >= MAX_REPORT => Err(Error::other("bad_layer", "unpacker said too much")),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(Error::io("read", "report", &error)),
        }
    }
}

/// What a worker's report and its wait status say together.
///
/// # Errors
///
/// Code `bad_layer` when the layer is to blame, which includes a worker that had to be stopped;
/// `unpack_failed` when this machine is.
pub fn outcome(report: &[u8], status: i32) -> Result<Unpacked> {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        let why = match signal {
            libc::SIGKILL | libc::SIGXCPU => "ran out of time",
            libc::SIGSYS => "made a forbidden system call",
            // As the first process of its pid namespace it does not die of SIGABRT, but of what follows.
            libc::SIGABRT | libc::SIGSEGV | libc::SIGILL | libc::SIGTRAP => "ran out of memory or crashed",
            _ => "was stopped",
        };
        return Err(Error::other("bad_layer", format!("unpacking stopped: the unpacker {why} (signal {signal})")));
    }
    match serde_json::from_slice(report) {
        Ok(Message::Ok(unpacked)) if is_digest(&unpacked.diff_id) => Ok(unpacked),
        Ok(Message::Error(failure)) => {
            let code = if failure.bad_layer { "bad_layer" } else { "unpack_failed" };
            let mut error = Error::other(code, failure.message);
            error.errno = failure.errno;
            Err(error)
        }
        _ => Err(Error::other("unpack_failed", format!("unpacker ended without a report (status {status})"))),
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: a plain call on a descriptor that is open.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
        return Err(Error::last("fcntl", "report"));
    }
    Ok(())
}
