//! The keeper's two other processes: the front door and the server. Both start with less than the keeper has.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::Options;
use super::error::{Error, Result};
use super::landlock;
use super::spec::DOOR_ID;
use super::sys;
use crate::front_door;

/// A process that the keeper started and watches.
pub struct Child {
    /// Its pid.
    pub pid: i32,
    /// The same, pinned.
    pub pidfd: OwnedFd,
}

/// What the front door and the server are started with, at first and whenever one of them has died.
///
/// All of it is at hand without the host's file system, which the keeper has left by then.
pub struct Starter {
    /// The host's mount namespace, in which both of them live.
    host_mounts: OwnedFd,
    /// Directory of the sockets, as the host has it.
    pub run: OwnedFd,
    listeners: Listeners,
    argv: Vec<CString>,
    /// Without the descriptors' numbers.
    environment: Vec<CString>,
    ruleset: Option<OwnedFd>,
}

/// Listening sockets. The keeper keeps them, so that nobody who knocks meanwhile finds a door gone.
pub struct Listeners {
    /// For clients, unix and TCP; the front door's.
    pub public: Vec<OwnedFd>,
    /// For the server; the front door's.
    pub control: OwnedFd,
    /// For what the front door passes on; the server's.
    pub server: OwnedFd,
}

impl Starter {
    /// Prepares both; call it where `options.data_dir` can be reached.
    pub fn new(options: &Options, host_mounts: OwnedFd, run: OwnedFd, listeners: Listeners) -> Result<Self> {
        let mut words = vec![
            options.python.clone(),
            "-m".to_owned(),
            "shoal.node".to_owned(),
            "--data-dir".to_owned(),
            options.data_dir.clone(),
            "--run-dir".to_owned(),
            options.run_dir.clone(),
        ];
        if let Some(idle) = &options.idle_exit {
            words.extend(["--idle-exit".to_owned(), idle.clone()]);
        }
        let ours =
            |name: &str| name.starts_with("SHOAL_KEEPER") || name.starts_with("SHOAL_SERVER") || name == "TMPDIR";
        let mut variables: Vec<String> =
            std::env::vars().filter(|(name, _)| !ours(name)).map(|(name, value)| format!("{name}={value}")).collect();
        variables.push(format!("TMPDIR={}/tmp", options.data_dir));
        let data_dir = sys::c_string(options.data_dir.as_str())?;
        Ok(Self {
            host_mounts,
            run,
            listeners,
            argv: words.into_iter().map(sys::c_string).collect::<Result<_>>()?,
            environment: variables.into_iter().map(sys::c_string).collect::<Result<_>>()?,
            ruleset: landlock::write_only_below(&[&data_dir, c"/dev/null"])?,
        })
    }

    /// Whether the kernel keeps the server from writing elsewhere.
    pub fn has_landlock(&self) -> bool {
        self.ruleset.is_some()
    }

    /// Starts a front door: another user, no capability, an empty network, and `run` as its whole file system.
    pub fn door(&self) -> Result<Child> {
        // SAFETY: the child ends in `_exit`.
        let Some((pid, pidfd)) = (unsafe { sys::fork(0) })? else {
            match self.confined_door() {
                Ok(config) => {
                    // It returns only when it cannot serve, and has said why.
                    front_door::run(config);
                }
                Err(error) => super::log("front_door_failed", &serde_json::json!({ "error": error })),
            }
            // SAFETY: ends this copy of the keeper without touching what it owns.
            unsafe { libc::_exit(1) }
        };
        Ok(Child { pid, pidfd })
    }

    /// In the child: gives up all that a front door does not need.
    fn confined_door(&self) -> Result<front_door::Config> {
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(|error| Error::io("dup", "listener", &error));
        let public = self.listeners.public.iter().map(copy).collect::<Result<Vec<OwnedFd>>>()?;
        let control = copy(&self.listeners.control)?;
        let kept: Vec<RawFd> = public.iter().chain([&control]).map(AsRawFd::as_raw_fd).collect();
        confine_door(self.host_mounts.as_fd(), self.run.as_fd(), &kept)?;
        Ok(front_door::Config::new(public, control, "/server.sock".into()))
    }

    /// Starts a server at the other end of `keeper`: root's name without any of its rights, and no writing outside
    /// the data directory.
    pub fn server(&self, keeper: BorrowedFd<'_>) -> Result<Child> {
        let listener = self.listeners.server.as_fd();
        let mut environment = self.environment.clone();
        environment.push(sys::c_string(format!("SHOAL_KEEPER_FD={}", keeper.as_raw_fd()))?);
        environment.push(sys::c_string(format!("SHOAL_SERVER_FD={}", listener.as_raw_fd()))?);
        // SAFETY: the child ends in exec or `_exit`.
        let Some((pid, pidfd)) = (unsafe { sys::fork(0) })? else {
            let host_mounts = self.host_mounts.as_fd();
            let failed = exec_server(&self.argv, &environment, keeper, listener, host_mounts, self.ruleset.as_ref());
            super::log("server_failed", &serde_json::json!({ "error": failed }));
            // SAFETY: as above.
            unsafe { libc::_exit(127) }
        };
        Ok(Child { pid, pidfd })
    }
}

fn confine_door(host_mounts: BorrowedFd<'_>, run_dir: BorrowedFd<'_>, kept: &[RawFd]) -> Result<()> {
    // SAFETY: open descriptors, strings that end in NUL, plain numbers.
    unsafe {
        check("setns", libc::setns(host_mounts.as_raw_fd(), libc::CLONE_NEWNS))?;
        check("fchdir", libc::fchdir(run_dir.as_raw_fd()))?;
        check("chroot", libc::chroot(c".".as_ptr()))?;
        check("chdir", libc::chdir(c"/".as_ptr()))?;
        check("unshare", libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS))?;
        close_others(kept)?;
        unblock_signals()?;
        drop_bounding_set()?;
        check("setgroups", libc::setgroups(0, std::ptr::null()))?;
        check("setresgid", libc::setresgid(DOOR_ID, DOOR_ID, DOOR_ID))?;
        check("setresuid", libc::setresuid(DOOR_ID, DOOR_ID, DOOR_ID))?;
        check("no_new_privs", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // A change of user clears it, so last.
        check("pdeathsig", libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))
    }
}

fn exec_server(
    argv: &[CString],
    environment: &[CString],
    keeper: BorrowedFd<'_>,
    listener: BorrowedFd<'_>,
    host_mounts: BorrowedFd<'_>,
    ruleset: Option<&OwnedFd>,
) -> Error {
    let confined = || -> Result<()> {
        // SAFETY: open descriptors, strings that end in NUL, plain numbers.
        unsafe {
            check("setns", libc::setns(host_mounts.as_raw_fd(), libc::CLONE_NEWNS))?;
            check("chdir", libc::chdir(c"/".as_ptr()))?;
            for fd in [keeper, listener] {
                check("fcntl", libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0))?;
            }
            unblock_signals()?;
            // With an empty bounding set, exec gives user 0 no capability back.
            drop_bounding_set()?;
            check("no_new_privs", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            if let Some(ruleset) = ruleset {
                landlock::restrict(ruleset.as_fd())?;
            }
            check("pdeathsig", libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM, 0, 0, 0))
        }
    };
    if let Err(error) = confined() {
        return error;
    }
    let point = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|one| one.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (words, variables) = (point(argv), point(environment));
    // SAFETY: both lists end with a null pointer, their strings with NUL, and all outlive the call.
    unsafe { libc::execve(words.first().copied().unwrap_or(std::ptr::null()), words.as_ptr(), variables.as_ptr()) };
    Error::last("execve", argv.first().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default())
}

fn check(call: &'static str, result: i32) -> Result<()> {
    if result < 0 { Err(Error::last(call, "")) } else { Ok(()) }
}

fn drop_bounding_set() -> Result<()> {
    for capability in 0..=63 {
        // SAFETY: plain numbers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            let error = Error::last("PR_CAPBSET_DROP", capability.to_string());
            // The kernel knows no capability of this number, nor any above it.
            return if error.errno == libc::EINVAL { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

fn unblock_signals() -> Result<()> {
    // SAFETY: all-zero is a valid (empty) signal set.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        check("sigprocmask", libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut()))
    }
}

/// Closes every descriptor above 2 that is not in `kept`.
fn close_others(kept: &[RawFd]) -> Result<()> {
    let mut kept: Vec<u32> = kept.iter().map(|fd| *fd as u32).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        if fd > first {
            // SAFETY: the objects behind these numbers are never used again in this process.
            check("close_range", unsafe { libc::close_range(first, fd - 1, 0) })?;
        }
        first = fd + 1;
    }
    // SAFETY: as above.
    check("close_range", unsafe { libc::close_range(first, u32::MAX, 0) })
}

/// A file in memory with the guest agent, which nobody can change or find in a directory.
///
/// Source: `memfd_create(2)`, `fcntl(2)` on seals.
pub fn seal_agent(path: &str) -> Result<OwnedFd> {
    let program = std::fs::read(path).map_err(|error| Error::io("read", path, &error))?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let name: &CStr = c"shoal-agent";
    // SAFETY: the name ends in NUL.
    let mut fd = unsafe { libc::memfd_create(name.as_ptr(), flags | libc::MFD_EXEC) };
    if fd < 0 {
        // Before Linux 6.3 every such file could be executed and the flag was unknown.
        // SAFETY: as above.
        fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    }
    check("memfd_create", fd)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let file: std::fs::File = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
    std::io::Write::write_all(&mut &file, &program).map_err(|error| Error::io("write", "memfd", &error))?;
    let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
    // SAFETY: plain numbers.
    unsafe {
        // Executable, and not readable for whoever runs it: then the kernel counts the process's memory and its
        // files in /proc as the host root's, and root in the sandbox is a stranger to them. Source: would_dump()
        // in the kernel's fs/exec.c.
        check("fchmod", libc::fchmod(fd, 0o111))?;
        check("F_ADD_SEALS", libc::fcntl(fd, libc::F_ADD_SEALS, seals))?;
    }
    Ok(file.into())
}
