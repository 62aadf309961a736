//! The processes that descend from a command, those that hide behind a double fork and setsid(2) included.
//!
//! A process belongs to a command's tree when
//! - it carries the command's *mark*: a value of `RLIMIT_RTTIME` that the child gave itself before exec. Resource
//!   limits pass on through fork and exec, nobody without `CAP_SYS_RESOURCE` can raise one again, this one has no effect
//!   on processes that are not real-time (and none in a sandbox is), and /proc/PID/limits shows it to everyone;
//! - or its session or process group is the command's, while the command lives;
//! - or its parent belongs to the tree.
//!
//! What can still get away: a process that lowers its own `RLIMIT_RTTIME` on purpose, calls setsid(2) and lets its
//! parent die. It only hides from a signal to this tree; with the sandbox ends its PID namespace, and that finds it.

use std::collections::BTreeSet;

use crate::sys::{self, Result};

/// One process as /proc tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    started: u64,
    dead: bool,
    mark: Option<u64>,
}

/// What a tree is known by.
#[derive(Clone, Copy, Debug)]
pub struct Root {
    /// The leader, while it is not reaped (its number cannot mean anyone else then).
    pub leader: Option<i32>,
    /// See the module.
    pub mark: Option<u64>,
}

/// The mark base of this process: the highest value that all its children may set, less something random.
///
/// `None` when the inherited limit leaves no room; trees are then found without marks.
pub fn first_mark() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer outlives the call.
    let done = unsafe { libc::getrlimit(libc::RLIMIT_RTTIME, &raw mut limit) };
    // 47 random bits keep agents that share a /proc (in tests) apart.
    let below = (sys::random() >> 17) + 1;
    if done == 0 { limit.rlim_max.checked_sub(below).filter(|mark| *mark > 1 << 48) } else { None }
}

/// Every process that /proc shows. Where thousands run the look takes long, so trees that are looked for at the same
/// time share one.
#[derive(Debug)]
pub struct Processes(Vec<Entry>);

impl Processes {
    /// Looks.
    pub fn now() -> Self {
        let mut found = Vec::new();
        let Ok(proc) = sys::openat2(None, c"/proc", libc::O_RDONLY | libc::O_DIRECTORY, 0, 0) else {
            return Self(found);
        };
        let mut buffer = vec![0; 16 << 10];
        while let Ok(count) = sys::getdents(&proc, &mut buffer)
            && count > 0
        {
            let entries = crate::files::Dirents::new(buffer.get(..count).unwrap_or(&[]));
            let pids = entries.filter_map(|entry| std::str::from_utf8(entry.name.to_bytes()).ok()?.parse::<i32>().ok());
            found.extend(pids.filter_map(|pid| Some(Entry { mark: mark_of(pid), ..stat_of(pid)? })));
        }
        Self(found)
    }

    /// Sends a signal to every live process of the tree; returns how many got it.
    ///
    /// Each is signalled through a pidfd after a second look, so that a number used again in between hits nobody.
    pub fn signal(&self, root: Root, signal: i32) -> usize {
        let own = std::process::id() as i32;
        let mut sent = 0;
        for member in self.members(root) {
            if member.pid == own || member.dead {
                continue;
            }
            let Ok(pidfd) = sys::pidfd_open(member.pid) else { continue };
            let same = stat_of(member.pid).is_some_and(|now| now.started == member.started);
            if same && sys::pidfd_signal(&pidfd, signal).is_ok() {
                sent += 1;
            }
        }
        sent
    }

    /// All processes of the tree.
    fn members(&self, root: Root) -> Vec<Entry> {
        let (mut inside, mut outside): (Vec<Entry>, Vec<Entry>) = self.0.iter().partition(|entry| {
            root.leader.is_some_and(|pid| entry.pid == pid || entry.session == pid || entry.group == pid)
                || (!entry.dead && root.mark.is_some() && entry.mark == root.mark)
        });
        // Children of members are members, until a pass finds no more.
        let mut pids: BTreeSet<i32> = inside.iter().map(|member| member.pid).collect();
        loop {
            let before = inside.len();
            outside.retain(|entry| {
                let child = pids.contains(&entry.parent);
                if child {
                    pids.insert(entry.pid);
                    inside.push(*entry);
                }
                !child
            });
            if inside.len() == before {
                return inside;
            }
        }
    }
}

/// Reads a small file of /proc/PID into the buffer.
fn read_of<'a>(pid: i32, file: &str, buffer: &'a mut [u8]) -> Result<&'a [u8]> {
    let path =
        std::ffi::CString::new(format!("/proc/{pid}/{file}")).map_err(|_| sys::Error::new("open", libc::EINVAL))?;
    let fd = sys::openat2(None, &path, libc::O_RDONLY, 0, 0)?;
    let count = sys::read(&fd, buffer)?;
    Ok(buffer.get(..count).unwrap_or(&[]))
}

fn stat_of(pid: i32) -> Option<Entry> {
    let mut buffer = [0; 1024];
    parse_stat(pid, read_of(pid, "stat", &mut buffer).ok()?)
}

/// Source: `proc_pid_stat(5)`. The name may hold anything, so fields are counted from its last parenthesis.
fn parse_stat(pid: i32, stat: &[u8]) -> Option<Entry> {
    let after = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = std::str::from_utf8(stat.get(after + 1..)?).ok()?.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    let session = fields.next()?.parse().ok()?;
    let started = fields.nth(15)?.parse().ok()?;
    Some(Entry { pid, parent, group, session, started, dead: matches!(state, "Z" | "X"), mark: None })
}

fn mark_of(pid: i32) -> Option<u64> {
    let mut buffer = [0; 2048];
    parse_mark(read_of(pid, "limits", &mut buffer).ok()?)
}

/// Source: `proc_pid_limits(5)`.
fn parse_mark(limits: &[u8]) -> Option<u64> {
    let line = limits.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Max realtime timeout"))?;
    std::str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_behind_a_name_full_of_traps() {
        let line = b"42 (a) R 1 2 (x) S 7 8 9 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 1234 99 1\n";
        let entry = parse_stat(42, line).unwrap();
        assert_eq!((entry.parent, entry.group, entry.session, entry.started, entry.dead), (7, 8, 9, 1234, false));
        assert_eq!(parse_stat(1, b"nothing"), None);
        assert_eq!(parse_stat(1, b"1 (x) S 1"), None);
    }

    #[test]
    fn the_mark_is_the_hard_limit() {
        let limits = b"Max realtime priority     0  0  \nMax realtime timeout      77     88      us        \n";
        assert_eq!(parse_mark(limits), Some(88));
        assert_eq!(parse_mark(b"Max realtime timeout      unlimited  unlimited us\n"), None);
    }

    #[test]
    fn this_process_is_among_all_processes() {
        let own = std::process::id() as i32;
        assert!(Processes::now().0.iter().any(|entry| entry.pid == own && !entry.dead));
    }
}
