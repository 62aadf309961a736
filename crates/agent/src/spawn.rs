//! The way from a request to a running command.
//!
//! A plain fork, on purpose. The agent is small, so a fork is cheap, and a child that borrowed its memory (vfork)
//! would stop it: such a child sits in the workload's cgroup for a moment, where it can be throttled, frozen, stopped
//! by a process of the same user, or picked by the OOM killer, which then kills everybody who shares the memory.

use std::ffi::{CStr, CString, c_char};
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use shoal_wire::Stage;

use crate::sys::{self, CapabilityData, CapabilityHeader, Error};
use crate::user::Identity;

/// PATH of a command whose environment has none.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// TERM of a command that has a terminal, and whose environment does not say what kind.
const DEFAULT_TERM: &[u8] = b"xterm-256color";

/// Why a command did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotStarted {
    /// The step that failed.
    pub stage: Stage,
    /// Its errno.
    pub errno: i32,
}

impl NotStarted {
    /// Names the step that a system call belonged to.
    pub fn at(stage: Stage) -> impl Fn(Error) -> Self {
        move |error| Self { stage, errno: error.errno }
    }
}

/// What is the same for all commands of this sandbox.
#[derive(Debug)]
pub struct Context {
    /// `cgroup.procs` files of the workload, one a hierarchy.
    pub cgroups: Vec<OwnedFd>,
    /// The first number above those of `cgroups`: a child closes all above it at once.
    pub above_cgroups: RawFd,
    /// Capabilities that root keeps.
    pub permitted: [u32; 2],
    /// The agent's own ids: whoever asks for these needs no change.
    pub own: (u32, u32),
    /// /dev/null of the sandbox.
    pub null: OwnedFd,
    /// `RLIMIT_RTTIME` that the first command is marked with; see [`crate::tree`].
    pub first_mark: Option<u64>,
}

/// A list of strings as execve(2) takes it.
#[derive(Debug)]
struct Strings {
    #[cfg_attr(not(test), expect(dead_code, reason = "keeps alive what `pointers` points to"))]
    owned: Vec<CString>,
    pointers: Vec<*const c_char>,
}

impl Strings {
    fn new(owned: Vec<CString>) -> Self {
        let pointers = owned.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect();
        Self { owned, pointers }
    }
}

/// Everything a child needs, made before the fork.
#[derive(Debug)]
pub struct Command {
    argv: Strings,
    env: Strings,
    /// Files to try, in order.
    programs: Vec<CString>,
    /// They come from PATH, so that one that is not there says nothing of the next.
    searched: bool,
    cwd: CString,
    cwd_is_default: bool,
    identity: Identity,
    mark: Option<u64>,
}

/// A string without NUL.
fn text(bytes: &[u8]) -> Result<CString, NotStarted> {
    CString::new(bytes).map_err(|_| NotStarted { stage: Stage::Request, errno: libc::EINVAL })
}

/// Value of a variable.
fn variable<'a>(env: &'a [Vec<u8>], name: &[u8]) -> Option<&'a [u8]> {
    env.iter().find_map(|entry| entry.strip_prefix(name)?.strip_prefix(b"="))
}

/// Whether execvp(3) would look for this name in PATH.
fn is_searched(name: &[u8]) -> bool {
    !name.is_empty() && !name.contains(&b'/')
}

/// The files that execvp(3) would try for this name.
fn candidates(name: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if !is_searched(name) {
        return vec![name.to_vec()];
    }
    let full = |dir: &[u8]| if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() };
    path.split(|byte| *byte == b':').map(full).collect()
}

impl Command {
    /// Checks a request and lays out what the child needs.
    ///
    /// `cwd` empty is the home; `terminal`: it gets one; `mark` is what [`crate::tree`] knows the command's descendants
    /// by.
    pub fn new(
        argv: &[Vec<u8>],
        env: &[Vec<u8>],
        cwd: &[u8],
        identity: Identity,
        terminal: bool,
        mark: Option<u64>,
    ) -> Result<Self, NotStarted> {
        let invalid = NotStarted { stage: Stage::Request, errno: libc::EINVAL };
        let program = argv.first().ok_or(invalid)?;
        if !cwd.is_empty() && cwd.first() != Some(&b'/') {
            return Err(NotStarted { stage: Stage::Cwd, errno: libc::EINVAL });
        }
        let path = variable(env, b"PATH").unwrap_or(DEFAULT_PATH);
        let programs = candidates(program, path).iter().map(|file| text(file)).collect::<Result<_, _>>()?;
        let mut variables = env.iter().map(|entry| text(entry)).collect::<Result<Vec<_>, _>>()?;
        let defaults: [(&[u8], &[u8]); 6] = [
            (b"PATH", DEFAULT_PATH),
            (b"HOME", &identity.home),
            (b"USER", &identity.name),
            (b"LOGNAME", &identity.name),
            (b"SHELL", &identity.shell),
            (b"TERM", if terminal { DEFAULT_TERM } else { b"" }),
        ];
        for (name, value) in defaults {
            if !value.is_empty() && variable(env, name).is_none() {
                variables.push(text(&[name, b"=", value].concat())?);
            }
        }
        Ok(Self {
            argv: Strings::new(argv.iter().map(|entry| text(entry)).collect::<Result<_, _>>()?),
            env: Strings::new(variables),
            programs,
            searched: is_searched(program),
            cwd: text(if cwd.is_empty() { &identity.home } else { cwd })?,
            cwd_is_default: cwd.is_empty(),
            identity,
            mark,
        })
    }
}

/// The child's ends of its streams.
#[derive(Clone, Copy, Debug)]
pub struct Stdio {
    /// Become descriptors 0, 1 and 2.
    pub fds: [RawFd; 3],
    /// They are one terminal, which becomes the controlling one.
    pub terminal: bool,
    /// Gets four bytes of stage and four of errno when the command cannot start; closes when it has.
    pub report: RawFd,
}

/// Forks a child that becomes the command.
pub fn spawn(command: &Command, stdio: Stdio, context: &Context) -> Result<i32, Error> {
    match fork()? {
        0 => {
            let (report_fd, failed) = become_command(command, stdio, context);
            let mut report = [0_u8; 8];
            let (stage, errno) = report.split_at_mut(4);
            stage.copy_from_slice(&(failed.stage as u32).to_le_bytes());
            errno.copy_from_slice(&failed.errno.to_le_bytes());
            let _ = sys::write(&report_fd, &report);
            exit_now(127)
        }
        pid => Ok(pid),
    }
}

/// Ends this process without running anything of its parent's.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process; no pointer.
    unsafe { libc::_exit(code) }
}

/// fork(2), 0 in the child.
///
/// The raw call: libc's would run its own bookkeeping in both. It is sound because this process has one thread, so no
/// lock is held by anybody and the child's copy of all memory is whole.
pub fn fork() -> Result<i32, Error> {
    // SAFETY: no CLONE_VM, so nothing is shared; a null stack keeps the current one in the child's own copy.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if pid < 0 {
        return Err(Error::new("fork", std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN)));
    }
    Ok(pid as i32)
}

/// errno as it is now; allocates nothing.
fn errno() -> i32 {
    // SAFETY: the location is this thread's and always valid.
    unsafe { *libc::__errno_location() }
}

/// Turns this child into the command; returns only when that failed, with the descriptor to report to.
///
/// Allocates nothing and takes no lock. The order matters: copies of the agent's descriptors go before the cgroup can
/// hold this process up, for until then nobody sees a connection or pipe that the agent closes as closed; the cgroup
/// before the ids, while the agent's rights still count; ids before capabilities, because changing ids needs them; the
/// working directory last, because the user itself must be allowed to enter it.
fn become_command(command: &Command, stdio: Stdio, context: &Context) -> (RawFd, NotStarted) {
    let mut report = stdio.report;
    let failure = prepare(command, stdio, context, &mut report).err();
    (report, failure.unwrap_or_else(|| NotStarted { stage: Stage::Exec, errno: execute(command) }))
}

/// Everything before execve.
fn prepare(command: &Command, stdio: Stdio, context: &Context, report: &mut RawFd) -> Result<(), NotStarted> {
    let failed = |stage| Err(NotStarted { stage, errno: errno() });
    // SAFETY: plain calls on descriptors and strings that were made before the fork and live in this process's own
    // memory; every pointer given is to memory that outlives its call, and arrays end as the calls want them to.
    unsafe {
        libc::setsid();
        if stdio.terminal && libc::ioctl(stdio.fds[1], libc::TIOCSCTTY, 0) < 0 {
            return failed(Stage::Stdio);
        }
        for (target, fd) in stdio.fds.iter().enumerate() {
            // Never the same number: the agent's own 0 to 2 are always open, so these are above them.
            if libc::dup2(*fd, target as RawFd) < 0 {
                return failed(Stage::Stdio);
            }
        }
        if *report != context.above_cgroups {
            if libc::dup3(*report, context.above_cgroups, libc::O_CLOEXEC) < 0 {
                return failed(Stage::Stdio);
            }
            *report = context.above_cgroups;
        }
        // Where this is refused, all of them close on exec all the same.
        libc::syscall(libc::SYS_close_range, context.above_cgroups as u32 + 1, u32::MAX, 0);
        for cgroup in &context.cgroups {
            if libc::write(cgroup.as_raw_fd(), c"0".as_ptr().cast(), 1) < 0 {
                return failed(Stage::Cgroup);
            }
        }
        if let Err(stage) = change_identity(&command.identity, context) {
            return failed(stage);
        }
        if let Some(mark) = command.mark {
            // Refused only when the sandbox's own limit is lower; the tree is then found by parents and sessions.
            let limit = libc::rlimit { rlim_cur: mark, rlim_max: mark };
            libc::setrlimit(libc::RLIMIT_RTTIME, &raw const limit);
        }
        if libc::chdir(command.cwd.as_ptr()) < 0 && !(command.cwd_is_default && libc::chdir(c"/".as_ptr()) == 0) {
            return failed(Stage::Cwd);
        }
        let mut none: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
    Ok(())
}

/// Gives up the agent's ids and capabilities for the user's.
unsafe fn change_identity(identity: &Identity, context: &Context) -> Result<(), Stage> {
    if (identity.uid, identity.gid) == context.own {
        return Ok(());
    }
    let root = identity.uid == 0;
    let header = CapabilityHeader { version: sys::CAPABILITY_VERSION_3, pid: 0 };
    let mut sets = [CapabilityData::default(); 2];
    if root {
        for (set, permitted) in sets.iter_mut().zip(context.permitted) {
            *set = CapabilityData { effective: permitted, permitted, inheritable: 0 };
        }
    }
    // SAFETY: raw calls, because libc's would signal threads that do not exist; the list of groups and both structs
    // outlive their calls. The caller runs this in a child with memory of its own.
    let done = unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_setgroups, identity.groups.len(), identity.groups.as_ptr()) == 0
            && libc::syscall(libc::SYS_setresgid, identity.gid, identity.gid, identity.gid) == 0
            && libc::syscall(libc::SYS_setresuid, identity.uid, identity.uid, identity.uid) == 0
            && libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) == 0
    };
    if done { Ok(()) } else { Err(Stage::Privileges) }
}

/// execve(2) on each candidate, as execvp(3) goes on and stops, but without its shell for files of no known format.
///
/// Returns what the kernel said of the one file that was named, or what the search came to.
fn execute(command: &Command) -> i32 {
    let mut result = libc::ENOENT;
    for program in &command.programs {
        let program: &CStr = program;
        // SAFETY: the program ends in NUL, both arrays end in a null pointer, all strings live in `command`.
        unsafe { libc::execve(program.as_ptr(), command.argv.pointers.as_ptr(), command.env.pointers.as_ptr()) };
        match errno() {
            errno if !command.searched => return errno,
            // EACCES is remembered, because a later directory may still have it.
            libc::EACCES => result = libc::EACCES,
            libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT => {}
            other => return other,
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_searched_in_path_and_a_path_is_not() {
        assert_eq!(
            candidates(b"ls", b"/bin::/usr/bin"),
            [b"/bin/ls".to_vec(), b"ls".to_vec(), b"/usr/bin/ls".to_vec()]
        );
        assert_eq!(candidates(b"./ls", b"/bin"), [b"./ls".to_vec()]);
        assert_eq!(candidates(b"", b"/bin"), [b"".to_vec()]);
    }

    #[test]
    fn missing_variables_come_from_the_user_and_given_ones_stay() {
        let identity =
            Identity { home: b"/h".to_vec(), name: b"n".to_vec(), shell: b"/s".to_vec(), ..Identity::default() };
        let command = Command::new(&[b"true".to_vec()], &[b"HOME=/x".to_vec()], b"", identity, false, None).unwrap();
        let env: Vec<_> = command.env.owned.iter().map(|entry| entry.to_str().unwrap()).collect();
        assert_eq!(env[0], "HOME=/x");
        assert!(env.contains(&"USER=n") && env.contains(&"LOGNAME=n") && env.contains(&"SHELL=/s"));
        assert!(env.iter().any(|entry| entry.starts_with("PATH=/usr/local/sbin:")));
        assert!(!env.contains(&"HOME=/h"));
        assert_eq!(command.cwd.to_bytes(), b"/h");
    }

    #[test]
    fn requests_that_make_no_sense_name_their_stage() {
        let make =
            |argv: &[Vec<u8>], cwd: &[u8]| Command::new(argv, &[], cwd, Identity::default(), false, None).unwrap_err();
        assert_eq!(make(&[], b"/"), NotStarted { stage: Stage::Request, errno: libc::EINVAL });
        assert_eq!(make(&[b"a\0b".to_vec()], b"/"), NotStarted { stage: Stage::Request, errno: libc::EINVAL });
        assert_eq!(make(&[b"a".to_vec()], b"tmp"), NotStarted { stage: Stage::Cwd, errno: libc::EINVAL });
    }
}
