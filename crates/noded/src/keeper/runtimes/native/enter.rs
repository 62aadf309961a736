//! From fork to exec: the child's way into its sandbox.
//!
//! Nothing here allocates or takes a lock; everything it needs was made ready in [`Plan`].

use std::ffi::{CStr, CString};
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use super::super::super::error::{Error, Result};
use super::super::super::seccomp;
use super::super::super::spec::AGENT_ID;
use super::super::super::sys;

/// Directory of the keeper's root on which a sandbox's root is put before it becomes one.
pub const NEW_ROOT: &CStr = c"/root";
/// Directory of the sandbox's own /dev, empty until the terminals come, that covers masked directories. From /proc.
const EMPTY_DIR: &CStr = c"../dev/pts";

/// Capabilities that root in the sandbox may have, over the sandbox's own ids alone (SPECIFICATION.md, PR-04).
const CAPABILITIES: [u32; 11] = [
    0,  // CHOWN
    1,  // DAC_OVERRIDE
    3,  // FOWNER
    4,  // FSETID
    5,  // KILL
    6,  // SETGID
    7,  // SETUID
    8,  // SETPCAP
    10, // NET_BIND_SERVICE
    18, // SYS_CHROOT
    31, // SETFCAP
];
/// Highest capability number that a kernel may know.
const LAST_CAPABILITY: u32 = 63;

/// A path of /proc to cover.
pub struct Mask {
    pub path: CString,
    pub directory: bool,
}

/// Everything that the child uses.
pub struct Plan<'a> {
    pub host_id: u32,
    pub userns: BorrowedFd<'a>,
    pub root: BorrowedFd<'a>,
    pub devices: BorrowedFd<'a>,
    pub terminals: BorrowedFd<'a>,
    pub shm: BorrowedFd<'a>,
    pub null: BorrowedFd<'a>,
    pub agent: BorrowedFd<'a>,
    pub agent_groups: &'a [OwnedFd],
    /// Descriptors that the agent inherits under the same numbers.
    pub kept: &'a [RawFd],
    pub hostname: &'a CStr,
    pub oom_score: &'a CStr,
    pub rlimits: &'a [(u32, libc::rlimit)],
    pub masked: &'a [Mask],
    pub filter: &'a seccomp::Program,
    /// Ends with a null pointer.
    pub argv: &'a [*const libc::c_char],
}

/// The pointers that exec wants, with the null at their end; valid as long as `strings`.
pub fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|one| one.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Declares the steps, so that a failed one can be told by number through the pipe.
macro_rules! steps {
    ($($step:ident = $word:literal,)*) => {
        #[derive(Clone, Copy)]
        #[repr(u8)]
        enum Step { $($step,)* }
        const STEP_WORDS: &[&str] = &[$($word,)*];
    };
}

steps! {
    OomScore = "oom_score_adj",
    Cgroup = "cgroup",
    Loopback = "loopback",
    Hostname = "hostname",
    Root = "root",
    Proc = "proc",
    Masks = "masks",
    Devices = "devices",
    Pivot = "pivot_root",
    Rlimits = "rlimits",
    Descriptors = "descriptors",
    UserNamespace = "userns",
    Capabilities = "capabilities",
    NoNewPrivileges = "no_new_privs",
    Seccomp = "seccomp",
    Exec = "exec",
}

/// What failed, where.
struct Fault(Step, i32);

type Stepped<T = ()> = std::result::Result<T, Fault>;

/// Longest that the way from fork to exec may take; a millisecond or two is usual.
const START_PATIENCE: Duration = Duration::from_secs(5);

/// Forks the sandbox's PID 1 and waits until it has become the guest agent.
pub fn start(plan: &Plan<'_>) -> Result<(i32, OwnedFd)> {
    let (read, write) = sys::pipe()?;
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | CLONE_NEWTIME;
    // SAFETY: the child goes to `enter`, which ends in exec, or ends by itself.
    let child = unsafe { sys::fork(namespaces) };
    let Some((pid, pidfd)) = child.map_err(|error| error.at("fork"))? else {
        let Fault(step, errno) = enter(plan);
        let told = [step as u8, errno as u8, (errno >> 8) as u8];
        // SAFETY: the buffer is as long as said; _exit ends this copy of the keeper without touching what it owns.
        unsafe {
            libc::write(write.as_raw_fd(), told.as_ptr().cast(), told.len());
            libc::_exit(1)
        }
    };
    drop(write);
    // The pipe closes at exec, or when the child dies.
    let mut told = Vec::new();
    let heard = if sys::ends_within(read.as_fd(), START_PATIENCE) {
        std::fs::File::from(read).take(3).read_to_end(&mut told).map_err(|error| Error::io("read", "status", &error))
    } else {
        Err(Error::os("start", "in the sandbox", libc::ETIMEDOUT))
    };
    if let Err(error) = heard {
        sys::pidfd_kill(pidfd.as_fd(), libc::SIGKILL)?;
        sys::wait(pid);
        return Err(error.at("start"));
    }
    if let [step, low, high] = told.as_slice() {
        sys::wait(pid);
        let word = STEP_WORDS.get(*step as usize).copied().unwrap_or("unknown");
        let errno = i32::from(*low) | i32::from(*high) << 8;
        return Err(Error::os(word, "in the sandbox", errno).at(word));
    }
    Ok((pid, pidfd))
}

fn last(step: Step) -> Fault {
    // SAFETY: reads this thread's errno.
    Fault(step, unsafe { *libc::__errno_location() })
}

fn done(step: Step, result: libc::c_long) -> Stepped {
    if result < 0 { Err(last(step)) } else { Ok(()) }
}

/// Takes all steps, in the one order that works; returns only when one failed.
fn enter(plan: &Plan<'_>) -> Fault {
    match try_enter(plan) {
        Err(fault) => fault,
        Ok(never) => match never {},
    }
}

fn try_enter(plan: &Plan<'_>) -> Stepped<std::convert::Infallible> {
    // As the host's root: a raise by it is also the floor below which nobody inside can go.
    write_file(Step::OomScore, c"/proc/self/oom_score_adj", plan.oom_score)?;
    for group in plan.agent_groups {
        // SAFETY: one byte from a literal.
        done(Step::Cgroup, unsafe { libc::write(group.as_raw_fd(), c"0".as_ptr().cast(), 1) } as libc::c_long)?;
    }
    // After the move: the namespace's root is the group we are in.
    // SAFETY: no pointers.
    done(Step::Cgroup, unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }.into())?;
    loopback()?;
    // SAFETY: the name is as long as said.
    let named = unsafe { libc::sethostname(plan.hostname.as_ptr(), plan.hostname.count_bytes()) };
    done(Step::Hostname, named.into())?;
    mount_root(plan)?;
    mount_devices(plan)?;
    mount_proc(plan)?;
    mount_below_devices(plan)?;
    pivot()?;
    for (kind, limit) in plan.rlimits {
        limit_resource(*kind, *limit)?;
    }
    descriptors(plan)?;
    // The last thing that needs the host's root. From here on no host id but the sandbox's own.
    // SAFETY: an open descriptor.
    done(Step::UserNamespace, unsafe { libc::setns(plan.userns.as_raw_fd(), libc::CLONE_NEWUSER) }.into())?;
    become_agent()?;
    // SAFETY: no pointers.
    done(Step::NoNewPrivileges, unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    // A keeper that is killed takes its sandboxes along. After the change of user, which clears it.
    // SAFETY: no pointers.
    done(Step::NoNewPrivileges, unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) }.into())?;
    if seccomp::install(plan.filter).is_err() {
        return Err(last(Step::Seccomp));
    }
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: argv and environment end with null pointers, their strings with NUL, and all outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            plan.agent.as_raw_fd(),
            c"".as_ptr(),
            plan.argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Err(last(Step::Exec))
}

/// Sets a limit, or the keeper's own where that is lower: not every root may raise one.
fn limit_resource(kind: u32, mut limit: libc::rlimit) -> Stepped {
    // SAFETY: all-zero is a valid rlimit, which the kernel fills.
    unsafe {
        let mut own: libc::rlimit = std::mem::zeroed();
        done(Step::Rlimits, libc::getrlimit(kind, &raw mut own).into())?;
        limit.rlim_max = limit.rlim_max.min(own.rlim_max);
        limit.rlim_cur = limit.rlim_cur.min(limit.rlim_max);
        done(Step::Rlimits, libc::setrlimit(kind, &raw const limit).into())
    }
}

fn write_file(step: Step, path: &CStr, value: &CStr) -> Stepped {
    // SAFETY: the path ends in NUL; the value is as long as said; the descriptor is ours to close.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        done(step, fd.into())?;
        let wrote = libc::write(fd, value.as_ptr().cast(), value.count_bytes());
        let result = done(step, wrote as libc::c_long);
        libc::close(fd);
        result
    }
}

/// Brings `lo` up and lets every user bind every port: the namespace belongs to the host's root, so
/// that no capability inside would.
fn loopback() -> Stepped {
    // SAFETY: all-zero is a valid ifreq; the name is shorter than its field.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        done(Step::Loopback, fd.into())?;
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        let result = done(Step::Loopback, libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request).into());
        libc::close(fd);
        result?;
    }
    write_file(Step::Loopback, c"/proc/sys/net/ipv4/ip_unprivileged_port_start", c"0")
}

fn move_mount(step: Step, mount: RawFd, target: RawFd, path: &CStr) -> Stepped {
    const F_EMPTY_PATH: u32 = 0x4;
    const T_EMPTY_PATH: u32 = 0x40;
    // SAFETY: both paths end in NUL.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount,
            c"".as_ptr(),
            target,
            path.as_ptr(),
            F_EMPTY_PATH | if path.is_empty() { T_EMPTY_PATH } else { 0 },
        )
    };
    done(step, moved)
}

fn mount_root(plan: &Plan<'_>) -> Stepped {
    move_mount(Step::Root, plan.root.as_raw_fd(), libc::AT_FDCWD, NEW_ROOT)?;
    // SAFETY: the path ends in NUL.
    done(Step::Root, unsafe { libc::chdir(NEW_ROOT.as_ptr()) }.into())
}

/// Opens a directory at the top of the new root, making it where the image has none or something else.
///
/// The image controls what is there: a link is replaced, never followed.
fn top_directory(plan: &Plan<'_>, step: Step, name: &CStr) -> Stepped<RawFd> {
    // SAFETY: all-zero is a valid open_how; all names end in NUL; the numbers are plain.
    unsafe {
        let mut how: libc::open_how = std::mem::zeroed();
        how.flags = (libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC) as u64;
        how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_XDEV;
        let size = std::mem::size_of::<libc::open_how>();
        let open = || libc::syscall(libc::SYS_openat2, libc::AT_FDCWD, name.as_ptr(), &raw const how, size);
        let fd = open();
        if fd >= 0 {
            return Ok(fd as RawFd);
        }
        // Ids of the host have no place in the idmapped upper directory, so make it as the sandbox's root.
        libc::setfsgid(plan.host_id);
        libc::setfsuid(plan.host_id);
        libc::unlinkat(libc::AT_FDCWD, name.as_ptr(), 0);
        let made = done(step, libc::mkdirat(libc::AT_FDCWD, name.as_ptr(), 0o755).into());
        libc::setfsuid(0);
        libc::setfsgid(0);
        made?;
        let fd = open();
        done(step, fd)?;
        Ok(fd as RawFd)
    }
}

fn mount_devices(plan: &Plan<'_>) -> Stepped {
    let dev = top_directory(plan, Step::Devices, c"dev")?;
    move_mount(Step::Devices, plan.devices.as_raw_fd(), dev, c"")
}

fn mount_below_devices(plan: &Plan<'_>) -> Stepped {
    // Below our own device mount nothing is the image's, so paths will do.
    move_mount(Step::Devices, plan.terminals.as_raw_fd(), libc::AT_FDCWD, c"dev/pts")?;
    move_mount(Step::Devices, plan.shm.as_raw_fd(), libc::AT_FDCWD, c"dev/shm")
}

/// Mounts a read-only /proc of the new pid namespace, with what shows the host covered.
///
/// Read-only as a whole: /proc/sys, sysrq-trigger, irq, bus and fs with one flag instead of five mounts.
fn mount_proc(plan: &Plan<'_>) -> Stepped {
    let proc = top_directory(plan, Step::Proc, c"proc")?;
    // SAFETY: all strings end in NUL, null pointers stand where the commands want none.
    unsafe {
        let context = libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), 1) as RawFd;
        done(Step::Proc, context.into())?;
        let none = std::ptr::null::<libc::c_char>();
        done(Step::Proc, libc::syscall(libc::SYS_fsconfig, context, 6, none, none, 0))?;
        let attributes =
            sys::MOUNT_ATTR_RDONLY | sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV | sys::MOUNT_ATTR_NOEXEC;
        let mount = libc::syscall(libc::SYS_fsmount, context, 1, attributes) as RawFd;
        done(Step::Proc, mount.into())?;
        move_mount(Step::Proc, mount, proc, c"")?;
        done(Step::Proc, libc::chdir(c"proc".as_ptr()).into())?;
    }
    for mask in plan.masked {
        // The sandbox's own, for what is shared can be locked and watched; /dev is our mount by now, not the image's.
        let source = if mask.directory { EMPTY_DIR } else { c"../dev/null" };
        // SAFETY: the path ends in NUL; flag 1 clones.
        let clone =
            unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), 1 | libc::O_CLOEXEC as u32) };
        done(Step::Masks, clone)?;
        move_mount(Step::Masks, clone as RawFd, libc::AT_FDCWD, &mask.path)?;
        // SAFETY: ours to close.
        unsafe { libc::close(clone as RawFd) };
    }
    // SAFETY: the path ends in NUL.
    done(Step::Masks, unsafe { libc::chdir(NEW_ROOT.as_ptr()) }.into())
}

/// Makes the working directory the root and lets go of the keeper's.
///
/// Source: `pivot_root(2)`, the form with two dots, which needs no directory for the old root.
fn pivot() -> Stepped {
    // SAFETY: both strings end in NUL. MNT_DETACH because this process still stands in the old root.
    unsafe {
        done(Step::Pivot, libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))?;
        done(Step::Pivot, libc::umount2(c".".as_ptr(), libc::MNT_DETACH).into())?;
        done(Step::Pivot, libc::chdir(c"/".as_ptr()).into())
    }
}

fn descriptors(plan: &Plan<'_>) -> Stepped {
    // A session of its own: no terminal of the host's can be its controlling one.
    // SAFETY: no arguments.
    done(Step::Descriptors, unsafe { libc::setsid() }.into())?;
    for number in 0..=2 {
        // SAFETY: plain numbers.
        done(Step::Descriptors, unsafe { libc::dup2(plan.null.as_raw_fd(), number) }.into())?;
    }
    // Everything the keeper opens closes on exec; only what the agent inherits must not.
    for fd in plan.kept {
        // SAFETY: plain numbers.
        done(Step::Descriptors, unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) }.into())?;
    }
    // SAFETY: all-zero is a valid (empty) signal set.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        done(Step::Descriptors, libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut()).into())?;
        libc::umask(0o022);
        Ok(())
    }
}

/// Takes the agent's id and no more than [`CAPABILITIES`], so that they survive exec.
fn become_agent() -> Stepped {
    let step = Step::Capabilities;
    let mut mask = 0_u64;
    for capability in CAPABILITIES {
        mask |= 1 << capability;
    }
    // SAFETY: plain numbers, and two structures that capset(2) takes.
    unsafe {
        for capability in 0..=LAST_CAPABILITY {
            if mask & (1 << capability) == 0 && libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 {
                // The kernel knows no capability of this number, nor any above it.
                if *libc::__errno_location() == libc::EINVAL {
                    break;
                }
                return Err(last(step));
            }
        }
        done(step, libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
        done(step, libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()))?;
        done(step, libc::syscall(libc::SYS_setresgid, AGENT_ID, AGENT_ID, AGENT_ID))?;
        done(step, libc::syscall(libc::SYS_setresuid, AGENT_ID, AGENT_ID, AGENT_ID))?;
        let header = CapHeader { version: 0x2008_0522, pid: 0 };
        let (low, high) = (mask as u32, (mask >> 32) as u32);
        let sets = [
            CapData { effective: low, permitted: low, inheritable: low },
            CapData { effective: high, permitted: high, inheritable: high },
        ];
        done(step, libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()))?;
        for capability in CAPABILITIES {
            let raised = libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0);
            done(step, raised.into())?;
        }
        done(step, libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0).into())
    }
}

/// Source: linux/capability.h.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

/// Source: linux/capability.h.
#[repr(C)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `clone3(2)`, linux/sched.h.
const CLONE_NEWTIME: i32 = 0x80;
