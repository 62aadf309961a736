//! PID 1 of every sandbox.
//!
//! It is made outside, comes in through a sealed memfd with everything it needs as descriptors, and serves the front
//! door on the unix socket it was handed: commands, files, signals, ports. It also reaps what nobody else waits for. See
//! [`agent`] for the poll loop, [`spawn`] for the way of a command, [`files`] for paths.

// Without std's own main, which asks the system for things that PID 1 never needs: 12 KiB and a tenth of a millisecond.
#![cfg_attr(not(test), no_main)]

mod agent;
mod changes;
mod commands;
mod conn;
mod exec;
mod files;
mod jobs;
mod ports;
mod requests;
mod ring;
mod slab;
mod spawn;
mod streams;
mod sys;
mod terminal;
mod tree;
mod user;

use std::ffi::OsString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use agent::{Agent, Options};
use sys::Error;

const USAGE: &str = "usage: shoal-agent --listen FD [--cgroup FD[,FD...]] [--oom FD] --generation N";

/// The first descriptor behind stdin, stdout and stderr.
const FIRST_FD: RawFd = 3;

/// The command line, checked.
#[derive(Debug, Default, PartialEq, Eq)]
struct Arguments {
    listen: RawFd,
    cgroups: Vec<RawFd>,
    oom: Option<RawFd>,
    generation: u64,
}

/// Reads a descriptor that is not one of the standard three.
fn descriptor(text: &str) -> Option<RawFd> {
    text.parse().ok().filter(|fd| *fd >= FIRST_FD)
}

/// Reads the command line; every option once at the most, nothing else.
fn parse(arguments: impl Iterator<Item = OsString>) -> Option<Arguments> {
    let (mut listen, mut cgroups, mut oom, mut generation) = (None, None, None, None);
    let mut arguments = arguments.map(|argument| argument.into_string().ok());
    while let Some(name) = arguments.next() {
        let (name, value) = (name?, arguments.next()??);
        let repeated = match name.as_str() {
            "--listen" => listen.replace(descriptor(&value)?).is_some(),
            "--cgroup" => cgroups.replace(value.split(',').map(descriptor).collect::<Option<Vec<_>>>()?).is_some(),
            "--oom" => oom.replace(descriptor(&value)?).is_some(),
            "--generation" => generation.replace(value.parse().ok()?).is_some(),
            _ => return None,
        };
        if repeated {
            return None;
        }
    }
    let arguments = Arguments { listen: listen?, cgroups: cgroups.unwrap_or_default(), oom, generation: generation? };
    let mut all: Vec<RawFd> =
        arguments.cgroups.iter().copied().chain(arguments.oom).chain([arguments.listen]).collect();
    all.sort_unstable();
    if all.windows(2).any(|pair| pair.first() == pair.last()) { None } else { Some(arguments) }
}

/// Takes over an inherited descriptor.
fn take(fd: RawFd) -> Result<OwnedFd, Error> {
    // SAFETY: no pointer; a number that is not open gives EBADF.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(Error::new("inherited descriptor", libc::EBADF));
    }
    // SAFETY: it is open, was left to us by whoever started us, and `parse` refuses a number given twice.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Moves a descriptor to the lowest free number from `least` on.
fn move_fd(fd: OwnedFd, least: RawFd) -> Result<OwnedFd, Error> {
    let moved = sys::dup_from(&fd, least)?;
    drop(fd);
    Ok(moved)
}

/// Gets everything ready; returns only what went wrong.
fn serve(arguments: Arguments) -> Result<Error, Error> {
    // First of all: from here on nobody in the sandbox can look into this process.
    // SAFETY: no pointer.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } < 0 {
        return Err(Error::new("PR_SET_DUMPABLE", libc::EPERM));
    }
    // SAFETY: no pointer; only flags of descriptors change. What was not named on the command line goes no further.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    sys::configure_malloc();
    // Whatever is opened from here on must not become somebody's stdin.
    sys::fill_standard_fds()?;
    // SAFETY: no pointer, cannot fail.
    let own = unsafe {
        libc::umask(0o022);
        (libc::getuid(), libc::getgid())
    };
    let permitted = sys::permitted_capabilities();
    let needed = 1_u32 << CAP_SETUID | 1 << CAP_SETGID | 1 << CAP_CHOWN;
    let privileged = permitted.first().is_some_and(|low| low & needed == needed);
    // The cgroups go to the lowest numbers, everything else above them: see `spawn::Context::above_cgroups`.
    let count = arguments.cgroups.len() as RawFd;
    let listener = move_fd(take(arguments.listen)?, FIRST_FD + count)?;
    let oom = arguments.oom.map(|fd| move_fd(take(fd)?, FIRST_FD + count)).transpose()?;
    let cgroups = arguments.cgroups.into_iter().map(take).collect::<Result<Vec<_>, _>>()?;
    let cgroups = cgroups.into_iter().map(|fd| move_fd(fd, FIRST_FD)).collect::<Result<Vec<_>, _>>()?;
    let context = spawn::Context {
        above_cgroups: cgroups.iter().map(|fd| fd.as_raw_fd() + 1).max().unwrap_or(FIRST_FD),
        cgroups,
        permitted,
        own,
        null: sys::openat2(None, c"/dev/null", libc::O_RDWR, 0, 0)?,
        first_mark: tree::first_mark(),
    };
    let options = Options { listener, oom, generation: arguments.generation, context, privileged };
    Ok(Agent::new(options)?.run())
}

/// Source: `capabilities(7)`, linux/capability.h.
const CAP_CHOWN: u32 = 0;
const CAP_SETGID: u32 = 6;
const CAP_SETUID: u32 = 7;

/// The program, called by libc. The arguments come by way of `std::env`, which reads them before this.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn main() -> libc::c_int {
    let Some(arguments) = parse(std::env::args_os().skip(1)) else {
        complain(USAGE);
        return 2;
    };
    let (Ok(error) | Err(error)) = serve(arguments);
    complain(&format!("shoal-agent: {}: errno {}", error.call, error.errno));
    1
}

/// Says something on stderr, which in a sandbox is /dev/null.
fn complain(text: &str) {
    let _ = sys::write(&2, format!("{text}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Option<Arguments> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_command_line_is_read_strictly() {
        let full = Arguments { listen: 5, cgroups: vec![6, 7], oom: Some(8), generation: 3 };
        assert_eq!(read("--listen 5 --cgroup 6,7 --oom 8 --generation 3"), Some(full));
        for bad in [
            "",
            "--listen 5",
            "--generation 1",
            "--listen 1 --generation 1",
            "--listen x --generation 1",
            "--listen 5 --generation",
            "--listen 5 --listen 6 --generation 1",
            "--listen 5 --cgroup 5 --generation 1",
            "--listen 5 --cgroup 6, --generation 1",
            "--listen 5 --generation 1 --more 2",
        ] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }
}
