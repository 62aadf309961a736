//! Control groups, on hosts with v2 controllers and on hybrid ones where v1 has them.
//!
//! A sandbox has one group in every hierarchy we use, with two children. `work` holds everything
//! the sandbox's owner runs and has the limits; `agent` holds PID 1 alone. So a fork bomb, busy
//! threads or a full memory limit in `work` leave the guest agent as it was. The group above both
//! has the memory limit plus a little, so that what the agent writes for the owner is bounded too.

use std::ffi::CString;
use std::fmt::Display;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::error::{Error, Result};
use super::spec::Resources;
use super::sys;

/// Memory that the guest agent may use beyond the sandbox's own limit.
const AGENT_MEMORY: u64 = 32 << 20;

/// Which kind of hierarchy has the controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy a controller.
    V1,
    /// One hierarchy for all.
    V2,
}

/// A hierarchy, and our group in it.
struct Hierarchy {
    controllers: Vec<&'static str>,
    node: OwnedFd,
    parent: OwnedFd,
}

/// Our groups in all hierarchies that we use.
pub struct Cgroups {
    /// Kind of the hierarchies.
    pub version: Version,
    hierarchies: Vec<Hierarchy>,
    name: String,
}

const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

impl Cgroups {
    /// Finds the hierarchies and makes the node's group in each.
    ///
    /// Ends whatever an earlier keeper of the same node left in it.
    pub fn open(name: &str) -> Result<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")
            .map_err(|error| Error::io("read", "/proc/self/mountinfo", &error))?;
        let found = find(&mounts, |path| std::fs::read_to_string(path).unwrap_or_default())?;
        let mut hierarchies = Vec::new();
        for (mount, controllers) in found.places {
            let parent = sys::open(&mount, libc::O_RDONLY | libc::O_DIRECTORY)?;
            if found.version == Version::V2 {
                enable(parent.as_fd())?;
            }
            make(parent.as_fd(), name)?;
            let node = sys::open(&format!("{mount}/{name}"), libc::O_RDONLY | libc::O_DIRECTORY)?;
            if found.version == Version::V2 {
                enable(node.as_fd())?;
            }
            hierarchies.push(Hierarchy { controllers, node, parent });
        }
        let groups = Self { version: found.version, hierarchies, name: name.to_owned() };
        groups.end_leftovers()?;
        Ok(groups)
    }

    /// Makes a sandbox's groups with their limits.
    pub fn make(&self, id: &str, resources: &Resources) -> Result<()> {
        for hierarchy in &self.hierarchies {
            make(hierarchy.node.as_fd(), id)?;
            let group = sub(hierarchy.node.as_fd(), id)?;
            if self.version == Version::V2 {
                enable(group.as_fd())?;
            }
            make(group.as_fd(), "agent")?;
            make(group.as_fd(), "work")?;
            let work = sub(group.as_fd(), "work")?;
            for controller in &hierarchy.controllers {
                self.limit(controller, group.as_fd(), work.as_fd(), resources)?;
            }
        }
        Ok(())
    }

    fn limit(
        &self,
        controller: &str,
        group: BorrowedFd<'_>,
        work: BorrowedFd<'_>,
        resources: &Resources,
    ) -> Result<()> {
        let memory = resources.memory.limit;
        let cpu = resources.cpu;
        match (self.version, controller) {
            (Version::V1, "memory") => {
                for (dir, limit) in [(group, memory + AGENT_MEMORY), (work, memory)] {
                    write(dir, "memory.limit_in_bytes", limit)?;
                    // There without swap accounting it is not; with it, memory plus swap may not be more.
                    ignore_missing(write(dir, "memory.memsw.limit_in_bytes", limit))?;
                }
                // Buffers of TCP and UDP are counted apart, and not at all without a limit. They come on top.
                ignore_missing(write(work, "memory.kmem.tcp.limit_in_bytes", memory / 8))?;
            }
            (Version::V2, "memory") => {
                for (dir, limit) in [(group, memory + AGENT_MEMORY), (work, memory)] {
                    write(dir, "memory.max", limit)?;
                    ignore_missing(write(dir, "memory.swap.max", 0))?;
                }
            }
            (_, "pids") => write(work, "pids.max", resources.pids.limit)?,
            (Version::V1, "cpu") => {
                write(work, "cpu.cfs_period_us", cpu.period)?;
                write(work, "cpu.cfs_quota_us", cpu.quota)?;
                write(work, "cpu.shares", cpu.shares.max(2))?;
            }
            (Version::V2, "cpu") => {
                write(work, "cpu.max", format!("{} {}", cpu.quota, cpu.period))?;
                // The kernel's own scale: 1024 shares are weight 100 (cgroup-v2.rst, cpu.weight).
                write(work, "cpu.weight", (cpu.shares * 100 / 1024).clamp(1, 10_000))?;
            }
            _ => {}
        }
        Ok(())
    }

    /// `cgroup.procs` of one of a sandbox's groups in every hierarchy, for writing.
    ///
    /// The right to move a process is checked against who opened the file, so a process without
    /// privileges can move itself through it.
    pub fn entries(&self, id: &str, child: &str) -> Result<Vec<OwnedFd>> {
        let path = CString::new(format!("{id}/{child}/cgroup.procs")).map_err(|_| Error::invalid("bad id"))?;
        self.hierarchies.iter().map(|one| sys::open_beneath(one.node.as_fd(), &path, libc::O_WRONLY)).collect()
    }

    /// The file with the workload's count of OOM kills.
    pub fn oom_file(&self, id: &str) -> Result<OwnedFd> {
        let file = if self.version == Version::V1 { "memory.oom_control" } else { "memory.events" };
        let path = CString::new(format!("{id}/work/{file}")).map_err(|_| Error::invalid("bad id"))?;
        sys::open_beneath(self.with("memory")?, &path, libc::O_RDONLY)
    }

    /// OOM kills in a sandbox so far, in its workload and above it.
    pub fn oom_kills(&self, id: &str) -> u64 {
        let file = if self.version == Version::V1 { "memory.oom_control" } else { "memory.events" };
        let count =
            |group: &str| self.read("memory", &format!("{group}/{file}")).and_then(|text| field(&text, "oom_kill"));
        if self.version == Version::V1 {
            // v1 counts each group by itself.
            [id.to_owned(), format!("{id}/work"), format!("{id}/agent")].iter().filter_map(|group| count(group)).sum()
        } else {
            count(id).unwrap_or(0)
        }
    }

    /// Removes a sandbox's groups; those that are gone are no error. EBUSY while a task is on its way out.
    pub fn remove(&self, id: &str) -> Result<()> {
        for hierarchy in &self.hierarchies {
            for path in [format!("{id}/agent"), format!("{id}/work"), id.to_owned()] {
                rmdir(hierarchy.node.as_fd(), &path)?;
            }
        }
        Ok(())
    }

    /// Removes the node's own groups, once all sandboxes are gone.
    pub fn close(&self) {
        for hierarchy in &self.hierarchies {
            // Nothing depends on it: the next start takes the group over.
            let _ = rmdir(hierarchy.parent.as_fd(), &self.name);
        }
    }

    fn with(&self, controller: &str) -> Result<BorrowedFd<'_>> {
        self.hierarchies
            .iter()
            .find(|one| one.controllers.contains(&controller))
            .map(|one| one.node.as_fd())
            .ok_or_else(|| Error::other("host_unsupported", format!("no {controller} controller")))
    }

    fn read(&self, controller: &str, path: &str) -> Option<String> {
        let node = self.with(controller).ok()?;
        std::fs::read_to_string(format!("/proc/self/fd/{}/{path}", node.as_raw_fd())).ok()
    }

    /// Kills and removes every group below the node's.
    fn end_leftovers(&self) -> Result<()> {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let mut busy = None;
            for hierarchy in &self.hierarchies {
                let dir = format!("/proc/self/fd/{}", hierarchy.node.as_raw_fd());
                let entries = std::fs::read_dir(&dir).map_err(|error| Error::io("opendir", "cgroup", &error))?;
                for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
                    let id = entry.file_name().to_string_lossy().into_owned();
                    for child in ["agent", "work"] {
                        kill_all(hierarchy.node.as_fd(), &format!("{id}/{child}"));
                    }
                    if let Err(error) = self.remove(&id) {
                        busy = Some(error);
                    }
                }
            }
            match busy {
                None => return Ok(()),
                Some(error) if std::time::Instant::now() > deadline => return Err(error),
                Some(_) => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        }
    }
}

/// Ends every process of a group. A pid may be another process by the time the signal goes out, so
/// it is pinned first and looked up again.
fn kill_all(node: BorrowedFd<'_>, path: &str) {
    let file = format!("/proc/self/fd/{}/{path}/cgroup.procs", node.as_raw_fd());
    let pids = || -> Vec<i32> {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    for pid in pids() {
        if let Ok(pinned) = sys::pidfd_open(pid)
            && pids().contains(&pid)
        {
            let _ = sys::pidfd_kill(pinned.as_fd(), libc::SIGKILL);
        }
    }
}

struct Found {
    version: Version,
    places: Vec<(String, Vec<&'static str>)>,
}

/// Chooses the hierarchies: v2 where it has all we need, else v1.
fn find(mountinfo: &str, read: impl Fn(&str) -> String) -> Result<Found> {
    let mut v1: Vec<(String, Vec<&'static str>)> = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let Some(mount) = before.split(' ').nth(4) else { continue };
        let mut fields = after.split(' ');
        let (kind, options) = (fields.next().unwrap_or(""), fields.nth(1).unwrap_or(""));
        if kind == "cgroup2" {
            let offered = read(&format!("{mount}/cgroup.controllers"));
            if CONTROLLERS.iter().all(|wanted| offered.split_whitespace().any(|one| one == *wanted)) {
                return Ok(Found { version: Version::V2, places: vec![(mount.to_owned(), CONTROLLERS.to_vec())] });
            }
        } else if kind == "cgroup" {
            let taken: Vec<&str> = v1.iter().flat_map(|(_, controllers)| controllers.iter().copied()).collect();
            let here: Vec<&'static str> = CONTROLLERS
                .into_iter()
                .filter(|wanted| options.split(',').any(|one| one == *wanted) && !taken.contains(wanted))
                .collect();
            if !here.is_empty() {
                v1.push((mount.to_owned(), here));
            }
        }
    }
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|wanted| !v1.iter().any(|(_, controllers)| controllers.contains(wanted)))
        .collect();
    if missing.is_empty() {
        return Ok(Found { version: Version::V1, places: v1 });
    }
    Err(Error::other("host_unsupported", format!("no cgroup hierarchy has the controllers: {}", missing.join(", "))))
}

/// Mounts a named, empty v1 hierarchy of ours that asks for fast moves, detached from every directory.
///
/// Moving a process takes a global lock for writing, which waits for an RCU grace period (some 2 ms for each
/// hierarchy) when none was taken for a while. `favordynmods` on any hierarchy keeps the lock in its
/// fast state. The mount lives in the keeper's namespace and goes with it.
pub fn favor_moves() -> Result<OwnedFd> {
    let context = sys::FsContext::open("cgroup")?;
    context.flag("none")?;
    // Every process of the host sees this name in its list of groups, so it says nothing about the node.
    context.set("name", "shoal")?;
    context.flag("favordynmods")?;
    context.mount(sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV | sys::MOUNT_ATTR_NOEXEC)
}

fn make(dir: BorrowedFd<'_>, name: &str) -> Result<()> {
    match sys::mkdirat(dir, name, 0o755) {
        Err(error) if error.errno == libc::EEXIST => Ok(()),
        other => other,
    }
}

fn sub(dir: BorrowedFd<'_>, name: &str) -> Result<OwnedFd> {
    sys::open_beneath(dir, &sys::c_string(name)?, libc::O_RDONLY | libc::O_DIRECTORY)
}

fn rmdir(dir: BorrowedFd<'_>, path: &str) -> Result<()> {
    let c_path = sys::c_string(path)?;
    // SAFETY: the path ends in NUL and outlives the call.
    if unsafe { libc::unlinkat(dir.as_raw_fd(), c_path.as_ptr(), libc::AT_REMOVEDIR) } < 0 {
        let error = Error::last("rmdir", path);
        if error.errno != libc::ENOENT {
            return Err(error);
        }
    }
    Ok(())
}

/// Hands the controllers on to the groups below.
fn enable(dir: BorrowedFd<'_>) -> Result<()> {
    write(dir, "cgroup.subtree_control", CONTROLLERS.map(|name| format!("+{name}")).join(" "))
}

fn write(dir: BorrowedFd<'_>, file: &str, value: impl Display) -> Result<()> {
    let fd = sys::open_beneath(dir, &sys::c_string(file)?, libc::O_WRONLY)?;
    // One write: the kernel takes each as a value of its own.
    std::fs::File::from(fd)
        .write_all(value.to_string().as_bytes())
        .map_err(|error| Error::io("write", format!("{file} = {value}"), &error))
}

fn ignore_missing(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.errno == libc::ENOENT => Ok(()),
        other => other,
    }
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "1 0 0:1 / /sys/fs/cgroup/memory rw - cgroup none rw,memory\n\
        2 0 0:2 / /sys/fs/cgroup/cpu rw - cgroup none rw,cpu,cpuacct\n\
        3 0 0:3 / /sys/fs/cgroup/pids rw - cgroup none rw,pids\n";
    const V2: &str = "9 0 0:9 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 none rw\n";

    #[test]
    fn v2_is_used_where_it_has_every_controller() {
        let found = find(&format!("{V1}{V2}"), |_| "cpuset cpu io memory pids\n".to_owned()).unwrap();
        assert_eq!(found.version, Version::V2);
        assert_eq!(found.places, [("/sys/fs/cgroup/unified".to_owned(), CONTROLLERS.to_vec())]);
    }

    #[test]
    fn a_hybrid_host_falls_back_to_v1() {
        let found = find(&format!("{V2}{V1}"), |_| "hugetlb\n".to_owned()).unwrap();
        assert_eq!(found.version, Version::V1);
        assert_eq!(found.places.len(), 3);
        assert!(found.places.iter().any(|(mount, controllers)| mount.ends_with("/cpu") && controllers == &["cpu"]));
    }

    #[test]
    fn a_missing_controller_is_named() {
        let error = find(V2, |_| String::new()).err().unwrap();
        assert_eq!(error.code, "host_unsupported");
        assert!(error.message.contains("memory, pids, cpu"));
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        assert_eq!(field("oom 3\noom_kill 7\n", "oom_kill"), Some(7));
        assert_eq!(field("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", "oom_kill"), Some(1));
    }
}
