//! The `native` runtime: namespaces, an idmapped overlay root, capabilities, seccomp.
//!
//! Every namespace but the user namespace is made by the host's root and belongs to the initial
//! user namespace; PID 1 joins the sandbox's user namespace last, with nothing left to set up. So
//! no capability that a process inside can ever have is one over its own mounts, network or hostname.

mod enter;

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::super::cgroup::Cgroups;
use super::super::error::{Error, Result};
use super::super::pool::Pool;
use super::super::seccomp;
use super::super::spec::{DOOR_ID, Limit, Spec, rlimit_number};
use super::super::sys::{self, FsContext};
use super::super::userns;

pub use enter::NEW_ROOT;

/// Paths in /proc that show or change the host; masked where the kernel has them.
///
/// Source: OCI runtime-spec, `linux.maskedPaths`, as containerd fills it; kmsg, kallsyms and modules are ours.
const MASKED: [&str; 16] = [
    "acpi",
    "asound",
    "interrupts",
    "kallsyms",
    "kcore",
    "key-users",
    "keys",
    "kmsg",
    "latency_stats",
    "modules",
    "sched_debug",
    "scsi",
    "sysrq-trigger",
    "timer_list",
    "timer_stats",
    "vmallocinfo",
];

/// What all native sandboxes of this keeper share.
pub struct Native {
    /// The guest agent, sealed.
    agent: OwnedFd,
    /// The directory of the agents' sockets.
    sockets: OwnedFd,
    null: OwnedFd,
    filter: seccomp::Program,
    masked: Vec<enter::Mask>,
}

/// A sandbox whose PID 1 has become the guest agent.
pub struct Spawned {
    /// Its pid on the host.
    pub pid: i32,
    /// The same, pinned.
    pub pidfd: OwnedFd,
}

impl Native {
    /// Gathers what is shared. Call it in the keeper's small root, with /proc mounted.
    pub fn new(agent: OwnedFd, sockets: OwnedFd) -> Result<Self> {
        let mut masked = Vec::new();
        for name in MASKED {
            if let Ok(meta) = std::fs::symlink_metadata(format!("/proc/{name}")) {
                masked.push(enter::Mask { path: sys::c_string(name)?, directory: meta.is_dir() });
            }
        }
        let null = sys::open("/dev/null", libc::O_RDWR)?;
        Ok(Self { agent, sockets, null, filter: seccomp::standard(), masked })
    }

    /// The system call filter in numbers.
    pub fn filter_facts(&self) -> seccomp::Facts {
        self.filter.facts()
    }

    /// Starts a sandbox. What it acquires outside the process (groups, directories, socket) has been
    /// pushed by name before it is made: on an error the caller removes it with [`Native::remove`].
    pub fn spawn(&self, id: &str, generation: u64, spec: &Spec, pool: &Pool, cgroups: &Cgroups) -> Result<Spawned> {
        let host_id = spec.host_id();
        let userns = userns::make(&spec.linux.uid_mappings).map_err(|error| error.at("userns"))?;
        pool.make_sandbox(id, spec.disk.limit).map_err(|error| error.at("disk"))?;
        let root = overlay(id, &spec.root.layers, pool, &userns, host_id).map_err(|error| error.at("overlay"))?;
        let devices = Self::devices(&userns).map_err(|error| error.at("devices"))?;
        let terminals = terminals(host_id).map_err(|error| error.at("devices"))?;
        let shm = shared_memory(host_id, spec.shm).map_err(|error| error.at("devices"))?;
        cgroups.make(id, &spec.linux.resources).map_err(|error| error.at("cgroup"))?;
        let agent_groups = cgroups.entries(id, "agent").map_err(|error| error.at("cgroup"))?;
        let work_groups = cgroups.entries(id, "work").map_err(|error| error.at("cgroup"))?;
        let oom = cgroups.oom_file(id).map_err(|error| error.at("cgroup"))?;
        let listener = self.listen(id).map_err(|error| error.at("socket"))?;

        let joined: Vec<String> = work_groups.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        let words = [
            "shoal-agent".to_owned(),
            "--listen".to_owned(),
            listener.as_raw_fd().to_string(),
            "--cgroup".to_owned(),
            joined.join(","),
            "--oom".to_owned(),
            oom.as_raw_fd().to_string(),
            "--generation".to_owned(),
            generation.to_string(),
        ];
        let argv = words.into_iter().map(sys::c_string).collect::<Result<Vec<CString>>>()?;
        let kept: Vec<i32> =
            work_groups.iter().map(AsRawFd::as_raw_fd).chain([oom.as_raw_fd(), listener.as_raw_fd()]).collect();
        let hostname = sys::c_string(spec.hostname.as_str())?;
        let oom_score = sys::c_string(spec.process.oom_score_adj.to_string())?;
        let rlimits: Vec<(u32, libc::rlimit)> = spec
            .process
            .rlimits
            .iter()
            .filter_map(|one| {
                Some((rlimit_number(&one.kind)?, libc::rlimit { rlim_cur: one.soft, rlim_max: one.hard }))
            })
            .collect();
        let plan = enter::Plan {
            host_id,
            userns: userns.as_fd(),
            root: root.as_fd(),
            devices: devices.as_fd(),
            terminals: terminals.as_fd(),
            shm: shm.as_fd(),
            null: self.null.as_fd(),
            agent: self.agent.as_fd(),
            agent_groups: &agent_groups,
            kept: &kept,
            hostname: &hostname,
            oom_score: &oom_score,
            rlimits: &rlimits,
            masked: &self.masked,
            filter: &self.filter,
            argv: &enter::pointers(&argv),
        };
        let (pid, pidfd) = enter::start(&plan)?;
        Ok(Spawned { pid, pidfd })
    }

    /// Removes what [`Native::spawn`] made outside the process; what is gone is no error.
    pub fn remove(&self, id: &str, pool: &Pool, cgroups: &Cgroups) -> Result<()> {
        let name = sys::c_string(format!("{id}.sock"))?;
        // SAFETY: the name ends in NUL and outlives the call.
        if unsafe { libc::unlinkat(self.sockets.as_raw_fd(), name.as_ptr(), 0) } < 0 {
            let error = Error::last("unlinkat", "socket");
            if error.errno != libc::ENOENT {
                return Err(error);
            }
        }
        cgroups.remove(id)?;
        pool.drop_sandbox(id)
    }

    fn devices(userns: &OwnedFd) -> Result<OwnedFd> {
        // A file system of its own: locks, watches and times belong to inodes, and shared ones would tell one sandbox
        // when another opens /dev/null, or let it hold a lock there.
        let mount = device_mount()?;
        sys::mount_setattr(
            mount.as_fd(),
            sys::MOUNT_ATTR_RDONLY | sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NOEXEC,
            Some(userns.as_fd()),
        )?;
        Ok(mount)
    }

    /// The socket on which the guest agent will accept the front door, and nobody else can reach it.
    fn listen(&self, id: &str) -> Result<OwnedFd> {
        let name = format!("{id}.sock");
        let path = format!("/proc/self/fd/{}/{name}", self.sockets.as_raw_fd());
        let listener =
            std::os::unix::net::UnixListener::bind(&path).map_err(|error| Error::io("bind", &name, &error))?;
        let c_name = sys::c_string(name.as_str())?;
        // SAFETY: the name ends in NUL and outlives the call.
        let owned = unsafe {
            libc::fchownat(self.sockets.as_raw_fd(), c_name.as_ptr(), DOOR_ID, DOOR_ID, libc::AT_SYMLINK_NOFOLLOW)
        };
        if owned < 0 {
            return Err(Error::last("fchownat", name));
        }
        Ok(listener.into())
    }
}

/// The sandbox's root: shared layers below, its own limited directory on top, all owned through its ids.
///
/// `userxattr` keeps overlayfs's marks in `user.overlay.*`, which need no privilege to unpack and
/// which a process inside can neither see nor set.
fn overlay(id: &str, layers: &[String], pool: &Pool, userns: &OwnedFd, host_id: u32) -> Result<OwnedFd> {
    // One clone serves all layers and the upper directory: they lie in one file system.
    let mapped = sys::clone_mount(pool.root())?;
    sys::mount_setattr(mapped.as_fd(), 0, Some(userns.as_fd()))?;
    let place = |path: String| -> Result<OwnedFd> {
        sys::open_beneath(mapped.as_fd(), &sys::c_string(path)?, libc::O_PATH | libc::O_DIRECTORY)
    };
    let lowers = layers.iter().map(|layer| place(format!("layers/{layer}"))).collect::<Result<Vec<_>>>()?;
    let upper = place(format!("sandboxes/{id}/upper"))?;
    let work = place(format!("sandboxes/{id}/work"))?;
    let context = FsContext::open("overlay")?;
    context.set("source", "shoal")?;
    for lower in &lowers {
        context.set("lowerdir+", &format!("/proc/self/fd/{}", lower.as_raw_fd()))?;
    }
    context.set("upperdir", &format!("/proc/self/fd/{}", upper.as_raw_fd()))?;
    context.set("workdir", &format!("/proc/self/fd/{}", work.as_raw_fd()))?;
    context.flag("userxattr")?;
    // Nothing of a sandbox outlives a crash of the host, so syncing it would buy nothing.
    context.flag("volatile")?;
    // overlayfs keeps the credentials of this moment for what it makes itself (its work directory, whiteouts).
    // The mapping knows the sandbox's ids and not the host's root, whose files would get EOVERFLOW.
    let root = sys::as_user(host_id, || context.mount(sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV))?;
    // overlayfs does not fail when it cannot write to its upper directory: it mounts read-only.
    if sys::is_read_only(root.as_fd())? {
        return Err(Error::other("syscall_failed", "overlayfs could not use the sandbox's own directory"));
    }
    Ok(root)
}

fn terminals(host_id: u32) -> Result<OwnedFd> {
    let context = FsContext::open("devpts")?;
    context.set("ptmxmode", "0666")?;
    context.set("mode", "0620")?;
    // Group 5 is `tty` in every distribution; grantpt(3) expects it.
    context.set("gid", &(host_id + 5).to_string())?;
    context.set("max", "256")?;
    context.mount(sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NOEXEC)
}

fn shared_memory(host_id: u32, size: Limit) -> Result<OwnedFd> {
    let context = FsContext::open("tmpfs")?;
    context.set("source", "shm")?;
    context.set("size", &size.limit.to_string())?;
    // An inode costs about a KiB of kernel memory.
    context.set("nr_inodes", &(size.limit / 4096).clamp(16, 1 << 20).to_string())?;
    context.set("mode", "1777")?;
    context.set("uid", &host_id.to_string())?;
    context.set("gid", &host_id.to_string())?;
    context.mount(sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV | sys::MOUNT_ATTR_NOEXEC)
}

/// A mount with the device nodes that every sandbox sees, and the places for its terminals and shared memory.
pub fn device_mount() -> Result<OwnedFd> {
    let context = FsContext::open("tmpfs")?;
    context.set("source", "dev")?;
    context.set("mode", "0755")?;
    context.set("size", "64k")?;
    let mount = context.mount(sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NOEXEC)?;
    for (name, minor) in [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)] {
        node(&mount, name, libc::makedev(1, minor))?;
    }
    node(&mount, "tty", libc::makedev(5, 0))?;
    for name in ["pts", "shm"] {
        sys::mkdirat(mount.as_fd(), name, 0o755)?;
    }
    for (name, target) in [
        ("ptmx", c"pts/ptmx"),
        ("fd", c"/proc/self/fd"),
        ("stdin", c"/proc/self/fd/0"),
        ("stdout", c"/proc/self/fd/1"),
        ("stderr", c"/proc/self/fd/2"),
    ] {
        let c_name = sys::c_string(name)?;
        // SAFETY: both strings end in NUL and outlive the call.
        if unsafe { libc::symlinkat(target.as_ptr(), mount.as_raw_fd(), c_name.as_ptr()) } < 0 {
            return Err(Error::last("symlinkat", name));
        }
    }
    // Device nodes can be written to all the same; what must not change is their owner, mode and times.
    sys::mount_setattr(mount.as_fd(), sys::MOUNT_ATTR_RDONLY, None)?;
    Ok(mount)
}

fn node(dir: &OwnedFd, name: &str, device: u64) -> Result<()> {
    let c_name = sys::c_string(name)?;
    // SAFETY: the name ends in NUL and outlives both calls.
    let made = unsafe {
        let made = libc::mknodat(dir.as_raw_fd(), c_name.as_ptr(), libc::S_IFCHR | 0o666, device);
        // mknod heeds the umask.
        if made == 0 { libc::fchmodat(dir.as_raw_fd(), c_name.as_ptr(), 0o666, 0) } else { made }
    };
    if made < 0 { Err(Error::last("mknodat", name)) } else { Ok(()) }
}
