//! The worker's side: give everything up, then read the layer.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::AssertUnwindSafe;

use sha2::{Digest, Sha256};
use shoal_archive::{Limits, Policy, Unpack};

use super::super::error::{Error, Result};
use super::super::sys;
use super::inflate::Inflate;
use super::{Failure, Message, Request, Unpacked, filter};

/// Address space: the program, a zstd window of 100 MiB grown in steps, and the names of directories.
const MEMORY: u64 = 1 << 30;
/// Descriptors: three, and what unpacking one member opens.
const DESCRIPTORS: u64 = 64;
/// The descriptors of a worker. Nothing is at 2 that could be written to, so a panic's message
/// goes nowhere.
const BLOB: RawFd = 0;
const REPORT: RawFd = 1;
const ROOT: RawFd = 2;

/// `CAP_CHOWN`, `CAP_DAC_OVERRIDE`, `CAP_FOWNER`, `CAP_FSETID`.
const CAPABILITIES: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4;

/// Becomes the worker. Runs in the child of a fork.
pub fn run(request: &Request<'_>, userns: &OwnedFd, mount: &OwnedFd, report: &OwnedFd) -> ! {
    // A panic must not unwind into the code of the keeper, of which this process is a copy.
    let _ = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let mut pipe = report.as_raw_fd();
        let message = match confine(request, userns, mount, &mut pipe) {
            Ok(()) => unpack(request),
            Err(error) => Message::Error(Failure { bad_layer: false, errno: error.errno, message: error.message }),
        };
        let text = serde_json::to_vec(&message).unwrap_or_default();
        // SAFETY: `pipe` is the report's descriptor, and the process ends before it could be closed twice.
        let mut pipe = ManuallyDrop::new(unsafe { File::from_raw_fd(pipe) });
        // A keeper that no longer reads needs no answer.
        let _ = pipe.write_all(&text);
    }));
    // SAFETY: ends the process, without the exit handlers that it has copied from the keeper.
    unsafe { libc::_exit(0) }
}

/// The steps, in an order that cannot change: mounts while still root of the host, then the user
/// namespace, then the capabilities, then the filter that forbids all of this.
fn confine(request: &Request<'_>, userns: &OwnedFd, mount: &OwnedFd, pipe: &mut RawFd) -> Result<()> {
    reset_signals();
    limit(libc::RLIMIT_AS, MEMORY)?;
    limit(libc::RLIMIT_CORE, 0)?;
    limit(libc::RLIMIT_CPU, request.cpu_seconds)?;
    limit(libc::RLIMIT_FSIZE, request.max_bytes)?;
    enter_target(mount)?;
    place_descriptors(request.blob, *pipe)?;
    *pipe = REPORT;
    join(userns)?;
    // Not before the keeper's own are closed: it may have thousands.
    limit(libc::RLIMIT_NOFILE, DESCRIPTORS)?;
    drop_privileges()?;
    filter::install()
}

fn check(call: &'static str, object: &str, result: libc::c_long) -> Result<()> {
    if result < 0 { Err(Error::last(call, object)) } else { Ok(()) }
}

/// The keeper may block signals to read them from a descriptor; the worker dies of them.
fn reset_signals() {
    // SAFETY: all-zero is a valid empty set, made proper by sigemptyset; no handler is installed.
    unsafe {
        for signal in 1..=31 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

fn limit(what: libc::__rlimit_resource_t, most: u64) -> Result<()> {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: one structure, which outlives the call.
    check("setrlimit", "worker", unsafe { libc::setrlimit(what, &raw const limit) }.into())
}

/// Makes the target directory the only thing in this mount namespace.
fn enter_target(mount: &OwnedFd) -> Result<()> {
    let root = c"/";
    // SAFETY: strings end in NUL; a null source and type are allowed with these flags.
    let private = unsafe {
        libc::mount(
            std::ptr::null(),
            root.as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        )
    };
    check("mount", "private /", private.into())?;
    sys::move_mount(mount.as_fd(), "/")?;
    // SAFETY: an open descriptor.
    check("fchdir", "target", unsafe { libc::fchdir(mount.as_raw_fd()) }.into())?;
    // SAFETY: the strings end in NUL. This form puts the old root on top of the new one.
    let pivoted = unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) };
    check("pivot_root", "target", pivoted)?;
    // SAFETY: as above; detached because this process still stands in it.
    check("umount2", "old root", unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) }.into())?;
    // SAFETY: as above.
    check("chdir", "/", unsafe { libc::chdir(root.as_ptr()) }.into())
}

/// Puts the blob at 0, the report at 1, the target at 2; `join` closes what is above, when it has
/// used the last of it.
fn place_descriptors(blob: BorrowedFd<'_>, report: RawFd) -> Result<()> {
    let target = sys::open("/", libc::O_RDONLY | libc::O_DIRECTORY)?;
    let mut copies = [0; 3];
    for (copy, fd) in copies.iter_mut().zip([blob.as_raw_fd(), report, target.as_raw_fd()]) {
        // Out of the way first: one of them may have the number that another is to get.
        // SAFETY: an open descriptor.
        *copy = unsafe { libc::fcntl(fd, libc::F_DUPFD, 3) };
        check("fcntl", "descriptor", (*copy).into())?;
    }
    for (copy, place) in copies.into_iter().zip([BLOB, REPORT, ROOT]) {
        // SAFETY: open descriptors; what was at `place` is the keeper's copy, not needed here.
        check("dup2", "descriptor", unsafe { libc::dup2(copy, place) }.into())?;
    }
    std::mem::forget(target); // Closed with all the others.
    Ok(())
}

fn join(userns: &OwnedFd) -> Result<()> {
    // SAFETY: no groups, so no pointer is read.
    check("setgroups", "none", unsafe { libc::setgroups(0, std::ptr::null()) }.into())?;
    // SAFETY: an open descriptor of a user namespace.
    check("setns", "user", unsafe { libc::setns(userns.as_raw_fd(), libc::CLONE_NEWUSER) }.into())?;
    // SAFETY: plain calls.
    check("setresgid", "0", unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) })?;
    // SAFETY: plain calls.
    check("setresuid", "0", unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) })?;
    // SAFETY: every descriptor from 3 on is a copy of the keeper's, and used no more.
    check("close_range", "3-", unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) })
}

/// Source: `capabilities(7)`, `capset(2)`.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAP_VERSION_3: u32 = 0x2008_0522;

fn drop_privileges() -> Result<()> {
    for capability in 0..64 {
        // SAFETY: plain numbers. EINVAL tells that this kernel has no capability of that number.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            let error = Error::last("prctl", "PR_CAPBSET_DROP");
            if error.errno == libc::EINVAL && capability > 0 {
                break;
            }
            return Err(error);
        }
    }
    // SAFETY: plain numbers.
    let cleared = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    check("prctl", "PR_CAP_AMBIENT", cleared.into())?;
    let header = CapHeader { version: CAP_VERSION_3, pid: 0 };
    let kept = CapData { effective: CAPABILITIES, permitted: CAPABILITIES, inheritable: 0 };
    let data = [kept, CapData { effective: 0, permitted: 0, inheritable: 0 }];
    // SAFETY: a header of version 3 and the two structures that this version takes.
    check("capset", "worker", unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    // SAFETY: plain numbers, as all below.
    check("prctl", "PR_SET_NO_NEW_PRIVS", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    // SAFETY: as above.
    check("prctl", "PR_SET_DUMPABLE", unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }.into())?;
    // After the change of ids, which clears it.
    // SAFETY: as above.
    let tied = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    check("prctl", "PR_SET_PDEATHSIG", tied.into())?;
    let mut report = libc::pollfd { fd: REPORT, events: 0, revents: 0 };
    // A keeper that died before the line above leaves a pipe without a reader.
    // SAFETY: one structure, which outlives the call.
    if unsafe { libc::poll(&raw mut report, 1, 0) } != 0 {
        return Err(Error::other("unpack_failed", "the keeper is gone"));
    }
    Ok(())
}

fn unpack(request: &Request<'_>) -> Message {
    match try_unpack(request) {
        Ok(unpacked) => Message::Ok(unpacked),
        Err(failure) => Message::Error(failure),
    }
}

fn try_unpack(request: &Request<'_>) -> std::result::Result<Unpacked, Failure> {
    // SAFETY: `place_descriptors` put the layer there, and nothing else owns it.
    let blob = unsafe { File::from_raw_fd(BLOB) }.take(request.length.unwrap_or(u64::MAX));
    // SAFETY: as above, the target directory.
    let root = unsafe { OwnedFd::from_raw_fd(ROOT) };
    let mut source = Inflate::new(BufReader::with_capacity(64 << 10, blob)).map_err(|error| unreadable(&error))?;
    let compression = source.compression();
    let limits = Limits { max_entries: request.max_entries, max_bytes: request.max_bytes, ..Limits::default() };
    // Content is limited by itself; this is for headers, padding and what else a bomb is made of.
    let most = request
        .max_bytes
        .saturating_add(request.max_entries.saturating_mul(HEADERS_PER_ENTRY))
        .saturating_add(HEADERS_IN_ALL);
    let mut unpack = Unpack::new(root, Policy::Layer, limits);
    let mut hash = Sha256::new();
    let mut buffer = vec![0_u8; 128 << 10];
    let mut total = 0_u64;
    loop {
        let read = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(&error)),
        };
        let bytes = buffer.get(..read).unwrap_or_default();
        total += read as u64;
        if total > most {
            return Err(bad(format!("layer has more than {most} bytes uncompressed")));
        }
        hash.update(bytes);
        unpack.push(bytes).map_err(|error| refused(&error))?;
    }
    if request.length.is_some_and(|length| length > 0) && total == 0 {
        return Err(bad("layer is empty".to_owned()));
    }
    let report = unpack.finish().map_err(|error| refused(&error))?;
    let diff_id = hash.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = std::fmt::Write::write_fmt(&mut text, format_args!("{byte:02x}"));
        text
    });
    Ok(Unpacked {
        diff_id,
        entries: report.entries,
        bytes: report.bytes,
        compression: compression.name().to_owned(),
        whiteouts: report.whiteouts,
        special_skipped: report.special_skipped,
        set_id_dropped: report.set_id_dropped,
        xattrs_dropped: report.xattrs_dropped,
        unterminated: report.unterminated,
    })
}

/// Header, padding and a common pax header, per member.
const HEADERS_PER_ENTRY: u64 = 4096;
/// On top of it, for the few members with long records.
const HEADERS_IN_ALL: u64 = 64 << 20;

fn bad(message: String) -> Failure {
    Failure { bad_layer: true, errno: 0, message }
}

fn unreadable(error: &std::io::Error) -> Failure {
    match error.raw_os_error() {
        Some(errno) => Failure { bad_layer: false, errno, message: format!("read of the layer: {error}") },
        None if error.kind() == std::io::ErrorKind::UnexpectedEof => bad("layer ends early".to_owned()),
        None => bad(format!("layer cannot be decompressed: {error}")),
    }
}

fn refused(error: &shoal_archive::Error) -> Failure {
    // Over its quota is the layer's fault; any other word of the kernel is not.
    let errno = error.errno();
    Failure {
        bad_layer: errno.is_none_or(|errno| matches!(errno, libc::EDQUOT | libc::EFBIG)),
        errno: errno.unwrap_or(0),
        message: error.to_string(),
    }
}
