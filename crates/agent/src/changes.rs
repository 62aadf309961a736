//! Tells of changes below a path.
//!
//! inotify(7) tells of the names in single directories, so each directory of a tree has a watch of its own, and one
//! that appears is watched before it is looked into: what is in it by then is told as created, what comes later by the
//! kernel. The kernel's queue is read only as far as the client reads, so it is the kernel that bounds what waits; when
//! its queue was full, the whole tree is watched anew before the client is told to look for itself.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use shoal_wire::{DATA_CHUNK, Kind, WINDOW};

use crate::agent::{CHANGES, MS};
use crate::conn::{self, Step, Target};
use crate::files::{self, Dirents};
use crate::slab::{Key, Slab};
use crate::sys::{self, Epoll, Error, Result};

/// Directories that all watchers together may watch; each takes about 200 bytes here and a kilobyte in the kernel.
const MAX_DIRS: usize = 65_536;
/// Events and directory entries looked at in one step.
const WORK_A_STEP: usize = 128;
/// Bytes of lines that may wait for the client before the kernel's queue is left alone.
const MOST_LINES: usize = 64 << 10;
/// Events read ahead at the most.
const MOST_EVENTS: usize = 4096;
/// Announced names remembered, lest the kernel's own event tells of them again.
const MOST_TOLD: usize = 16_384;
/// Time after which the second half of a move will not come: the kernel queues both at once.
const HALF_MOVE_NS: u64 = 10 * MS;
/// Buffer for events and for directory entries, in bytes.
const BUFFER: usize = 8 << 10;

const EVENTS: u32 = libc::IN_CREATE
    | libc::IN_MODIFY
    | libc::IN_ATTRIB
    | libc::IN_DELETE
    | libc::IN_MOVED_FROM
    | libc::IN_MOVED_TO
    | libc::IN_DELETE_SELF
    | libc::IN_MOVE_SELF
    | libc::IN_EXCL_UNLINK
    | libc::IN_ONLYDIR;

/// Directories watched now.
static WATCHED: AtomicUsize = AtomicUsize::new(0);

/// Finds a channel that tells of changes.
#[derive(Debug)]
pub struct Notice {
    /// The channel.
    pub target: Target,
    /// When it is to look again, whatever happens.
    pub due: Option<u64>,
}

/// A directory that is watched.
#[derive(Debug)]
struct Dir {
    /// The watch of the directory that it is in; 0 for the root.
    parent: i32,
    name: Vec<u8>,
}

/// Source: `inotify(7)`, `struct inotify_event`.
#[derive(Debug)]
struct Event {
    watch: i32,
    mask: u32,
    cookie: u32,
    name: Vec<u8>,
    read_ns: u64,
}

/// A directory whose entries are being looked at.
#[derive(Debug)]
struct Scan {
    dir: OwnedFd,
    watch: i32,
    packed: Vec<u8>,
    taken: usize,
}

/// What the event queue came to.
enum Next {
    Did,
    /// Nothing can be said before this time, unless an event comes.
    Hold(u64),
    Idle,
}

/// Tells of changes below a path.
#[derive(Debug)]
pub struct Changes {
    /// Its [`Notice`].
    pub key: Key,
    inotify: OwnedFd,
    /// The path as asked for, without slashes at its end.
    path: Vec<u8>,
    /// The one name in the root that counts.
    only: Option<Vec<u8>>,
    recursive: bool,
    root_watch: i32,
    dirs: BTreeMap<i32, Dir>,
    below: BTreeMap<(i32, Vec<u8>), i32>,
    /// Directories to look into.
    to_scan: VecDeque<i32>,
    scan: Option<Scan>,
    /// What the first line after the directories at hand will be; until then what is found is not told.
    opening: Option<&'static str>,
    /// Directories that have left the tree, with all below them.
    leaving: Vec<i32>,
    /// Names that were announced and of whose creation an event may be queued.
    told: BTreeSet<(i32, Vec<u8>)>,
    events: VecDeque<Event>,
    lines: Vec<u8>,
    /// Where the last of the lines begins.
    last_line: usize,
    answered: bool,
    sent: u64,
    consumed: u64,
}

impl Changes {
    /// Begins to watch `path`.
    ///
    /// # Errors
    /// `ENOSPC` or `EMFILE` at a limit on watches or watchers.
    pub fn new(key: Key, path: &[u8], recursive: bool, epoll: &Epoll) -> Result<Self> {
        let (root, only) = files::open_to_watch(path)?;
        let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |at| at + 1);
        let mut changes = Self {
            key,
            inotify: sys::inotify()?,
            path: path.get(..end).unwrap_or(&[]).to_vec(),
            recursive: recursive && only.is_none(),
            only,
            root_watch: 0,
            dirs: BTreeMap::new(),
            below: BTreeMap::new(),
            to_scan: VecDeque::new(),
            scan: None,
            opening: None,
            leaving: Vec::new(),
            told: BTreeSet::new(),
            events: VecDeque::new(),
            lines: Vec::new(),
            last_line: 0,
            answered: false,
            sent: 0,
            consumed: 0,
        };
        changes.watch_root(&root, "ready", epoll)?;
        Ok(changes)
    }

    /// Watches the root; it is not kept open, for then the kernel would not tell of its end.
    fn watch_root(&mut self, root: &OwnedFd, opening: &'static str, epoll: &Epoll) -> Result<()> {
        epoll.add(&self.inotify, libc::EPOLLIN | libc::EPOLLONESHOT, self.key.token(CHANGES))?;
        self.root_watch = sys::inotify_add(&self.inotify, root, EVENTS)?;
        self.insert(self.root_watch, Dir { parent: 0, name: Vec::new() })?;
        if self.recursive {
            self.to_scan.push_back(self.root_watch);
        }
        self.opening = Some(opening);
        Ok(())
    }

    /// Events were lost: watches everything anew.
    fn begin_again(&mut self, epoll: &Epoll) -> Result<()> {
        let root = if self.recursive { self.open_root()? } else { None };
        let Some(root) = root else {
            // There is nothing but the root, or not even that.
            self.tell_only("overflow");
            return Ok(());
        };
        self.inotify = sys::inotify()?;
        self.clear();
        self.below.clear();
        self.to_scan.clear();
        self.scan = None;
        self.leaving.clear();
        self.told.clear();
        self.events.clear();
        self.watch_root(&root, "overflow", epoll)
    }

    /// Opens the root; `None` when its path leads to something else by now, or nowhere.
    fn open_root(&self) -> Result<Option<OwnedFd>> {
        let opened = if self.path.is_empty() { files::open_to_watch(b"/") } else { files::open_to_watch(&self.path) };
        let Ok((root, _)) = opened else { return Ok(None) };
        let watch = sys::inotify_add(&self.inotify, &root, EVENTS)?;
        if watch == self.root_watch {
            return Ok(Some(root));
        }
        sys::inotify_remove(&self.inotify, watch);
        Ok(None)
    }

    /// Takes the receiver's progress; false when it claims more than was sent.
    pub fn consumed(&mut self, offset: u64) -> bool {
        self.consumed = self.consumed.max(offset);
        offset <= self.sent
    }

    /// Looks at a bounded number of things and sends what there is to tell.
    ///
    /// # Errors
    /// `ENOSPC` when there are more directories than may be watched.
    pub fn step(&mut self, id: u32, out: &mut Vec<u8>, epoll: &Epoll, notices: &mut Slab<Notice>) -> Result<Step> {
        let mut idle = false;
        for _ in 0..WORK_A_STEP {
            if self.lines.len() >= MOST_LINES {
                break;
            }
            if let Some(watch) = self.leaving.pop() {
                self.leave(watch);
                continue;
            }
            if self.look()? {
                continue;
            }
            if let Some(opening) = self.opening.take() {
                if !self.answered {
                    self.answered = true;
                    conn::push(out, Kind::Ok, 0, id, &[]);
                }
                self.tell_only(opening);
                continue;
            }
            match self.next(epoll)? {
                Next::Did => continue,
                Next::Hold(due) => {
                    if let Some(notice) = notices.get_mut(self.key) {
                        notice.due = Some(due);
                    }
                }
                Next::Idle => {}
            }
            epoll.modify(&self.inotify, libc::EPOLLIN | libc::EPOLLONESHOT, self.key.token(CHANGES))?;
            idle = true;
            break;
        }
        let room = (self.consumed + WINDOW).saturating_sub(self.sent);
        let count = room.min(self.lines.len().min(DATA_CHUNK) as u64) as usize;
        if count > 0 {
            conn::push(out, Kind::Data, 0, id, self.lines.get(..count).unwrap_or(&[]));
            self.lines.drain(..count);
            self.last_line = self.lines.len();
            self.sent += count as u64;
        }
        let stuck = self.lines.len() >= MOST_LINES;
        Ok(if (idle && self.lines.is_empty()) || stuck || (idle && count == 0) { Step::Wait } else { Step::More })
    }

    /// Looks at one entry of the directories that are to be looked into; false when there is none.
    fn look(&mut self) -> Result<bool> {
        let Some(scan) = &mut self.scan else {
            let Some(watch) = self.to_scan.pop_front() else { return Ok(false) };
            if let Some(dir) = self.open(watch)? {
                self.scan = Some(Scan { dir, watch, packed: Vec::new(), taken: 0 });
            }
            return Ok(true);
        };
        let mut entries = Dirents::new(scan.packed.get(scan.taken..).unwrap_or(&[]));
        let Some(entry) = entries.next() else {
            scan.packed.resize(BUFFER, 0);
            let count = match sys::getdents(&scan.dir, &mut scan.packed) {
                Err(Error { errno: libc::ENOENT, .. }) => 0,
                other => other?,
            };
            scan.packed.truncate(count);
            scan.taken = 0;
            if count == 0 {
                self.scan = None;
            }
            return Ok(true);
        };
        let directory = match entry.kind {
            libc::DT_UNKNOWN => {
                sys::fstatat(&scan.dir, entry.name).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
            }
            kind => kind == libc::DT_DIR,
        };
        let (watch, name) = (scan.watch, entry.name.to_bytes().to_vec());
        scan.taken = scan.packed.len() - entries.remaining();
        if self.opening.is_none() && !files::is_draft(&name) {
            if self.told.len() < MOST_TOLD {
                self.told.insert((watch, name.clone()));
            }
            self.tell("create", &self.path_of(watch, &name), None, directory);
        }
        if directory {
            self.adopt(watch, name)?;
        }
        Ok(true)
    }

    /// Watches a directory of the tree, and has it looked into unless it was watched before.
    fn adopt(&mut self, parent: i32, name: Vec<u8>) -> Result<()> {
        let Some(path) = self.relative(parent, &name) else { return Ok(()) };
        let Some(dir) = self.open_below(&path)? else { return Ok(()) };
        let watch = sys::inotify_add(&self.inotify, &dir, EVENTS)?;
        if let Some(known) = self.dirs.get_mut(&watch) {
            // It came here under another name, of which the event is still to be looked at.
            let former =
                (std::mem::replace(&mut known.parent, parent), std::mem::replace(&mut known.name, name.clone()));
            if self.below.get(&former) == Some(&watch) {
                self.below.remove(&former);
            }
        } else {
            self.insert(watch, Dir { parent, name: name.clone() })?;
            self.to_scan.push_back(watch);
        }
        self.below.insert((parent, name), watch);
        Ok(())
    }

    fn insert(&mut self, watch: i32, dir: Dir) -> Result<()> {
        if WATCHED.load(Ordering::Relaxed) >= MAX_DIRS {
            return Err(Error::new("watched directories", libc::ENOSPC));
        }
        if self.dirs.insert(watch, dir).is_none() {
            WATCHED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Knows a watch no longer.
    fn remove(&mut self, watch: i32) {
        let Some(dir) = self.dirs.remove(&watch) else { return };
        WATCHED.fetch_sub(1, Ordering::Relaxed);
        let place = (dir.parent, dir.name);
        if self.below.get(&place) == Some(&watch) {
            self.below.remove(&place);
        }
    }

    fn clear(&mut self) {
        WATCHED.fetch_sub(self.dirs.len(), Ordering::Relaxed);
        self.dirs.clear();
    }

    /// Lets go of a directory that is no longer in the tree; those below it come after it.
    fn leave(&mut self, watch: i32) {
        sys::inotify_remove(&self.inotify, watch);
        self.remove(watch);
        let inside = self.below.range((watch, Vec::new())..).take_while(|((parent, _), _)| *parent == watch);
        self.leaving.extend(inside.map(|(_, watch)| *watch));
    }

    /// Opens a watched directory; `None` when it is not there any more.
    fn open(&self, watch: i32) -> Result<Option<OwnedFd>> {
        let place = self.dirs.get(&watch).and_then(|dir| match dir.parent {
            0 => Some(b".".to_vec()),
            parent => self.relative(parent, &dir.name),
        });
        place.map_or(Ok(None), |path| self.open_below(&path))
    }

    fn open_below(&self, path: &[u8]) -> Result<Option<OwnedFd>> {
        let path = CString::new(path).map_err(|_| Error::new("path", libc::EINVAL))?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        // What is mounted in the tree is not the tree's own; /proc would never end.
        let resolve = sys::BENEATH | sys::NO_SYMLINKS | sys::NO_XDEV;
        let Some(root) = self.open_root()? else { return Ok(None) };
        match sys::openat2(Some(root.as_fd()), &path, flags, 0, resolve) {
            Ok(dir) => Ok(Some(dir)),
            // Gone or replaced meanwhile, not ours to look into, or deeper than any path reaches.
            Err(Error {
                errno: libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::EXDEV | libc::EACCES | libc::ENAMETOOLONG,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The path of a name in a watched directory, from the root on.
    fn relative(&self, watch: i32, name: &[u8]) -> Option<Vec<u8>> {
        let mut parts = vec![name];
        let mut at = watch;
        while at != self.root_watch {
            let dir = self.dirs.get(&at)?;
            // Names that changed while they were looked at can form a ring for a moment.
            if parts.len() > self.dirs.len() {
                return None;
            }
            parts.push(&dir.name);
            at = dir.parent;
        }
        parts.reverse();
        Some(parts.join(&b'/'))
    }

    /// The path to tell for a name in a watched directory.
    fn path_of(&self, watch: i32, name: &[u8]) -> Vec<u8> {
        if self.only.is_some() {
            return self.path.clone();
        }
        let relative = self.relative(watch, name).unwrap_or_else(|| name.to_vec());
        [&self.path, b"/" as &[u8], &relative].concat()
    }

    /// Looks at the next event.
    fn next(&mut self, epoll: &Epoll) -> Result<Next> {
        let Some(event) = self.events.front() else {
            if self.read()? {
                return Ok(Next::Did);
            }
            // Every event up to the last look into a directory has been seen.
            self.told.clear();
            return Ok(Next::Idle);
        };
        if event.mask & libc::IN_MOVED_FROM != 0 && self.other_half(event.cookie).is_none() {
            let due = event.read_ns + HALF_MOVE_NS;
            if self.events.len() < MOST_EVENTS && self.read()? {
                return Ok(Next::Did);
            }
            if sys::now_ns() < due {
                return Ok(Next::Hold(due));
            }
        }
        if let Some(event) = self.events.pop_front() {
            self.take(event, epoll)?;
        }
        Ok(Next::Did)
    }

    /// Where the event stands that says where something was moved to.
    fn other_half(&self, cookie: u32) -> Option<usize> {
        self.events.iter().position(|event| event.mask & libc::IN_MOVED_TO != 0 && event.cookie == cookie)
    }

    /// Takes events off the kernel's queue; false when there are none.
    fn read(&mut self) -> Result<bool> {
        let mut buffer = [0; BUFFER];
        let count = match sys::read(&self.inotify, &mut buffer) {
            Err(Error { errno: libc::EAGAIN, .. }) => return Ok(false),
            other => other?,
        };
        let read_ns = sys::now_ns();
        let mut rest = buffer.get(..count).unwrap_or(&[]);
        while let Some((watch, after)) = rest.split_first_chunk::<4>()
            && let Some((mask, after)) = after.split_first_chunk::<4>()
            && let Some((cookie, after)) = after.split_first_chunk::<4>()
            && let Some((length, after)) = after.split_first_chunk::<4>()
            && let Some((name, after)) = after.split_at_checked(u32::from_ne_bytes(*length) as usize)
        {
            self.events.push_back(Event {
                watch: i32::from_ne_bytes(*watch),
                mask: u32::from_ne_bytes(*mask),
                cookie: u32::from_ne_bytes(*cookie),
                name: CStr::from_bytes_until_nul(name).map_or(&[] as &[u8], CStr::to_bytes).to_vec(),
                read_ns,
            });
            rest = after;
        }
        Ok(true)
    }

    fn take(&mut self, event: Event, epoll: &Epoll) -> Result<()> {
        let Event { watch, mask, cookie, name, .. } = event;
        let directory = mask & libc::IN_ISDIR != 0;
        if mask & libc::IN_Q_OVERFLOW != 0 {
            return self.begin_again(epoll);
        }
        if mask & libc::IN_IGNORED != 0 {
            self.remove(watch);
            return Ok(());
        }
        if !self.dirs.contains_key(&watch) {
            return Ok(());
        }
        if name.is_empty() {
            self.take_own(watch, mask);
            return Ok(());
        }
        if files::is_draft(&name) {
            // Of a file that we write only its appearance is told: the other half of the move.
            return Ok(());
        }
        if mask & libc::IN_MOVED_FROM != 0
            && let Some(to) = self.other_half(cookie).and_then(|at| self.events.remove(at))
            && self.dirs.contains_key(&to.watch)
        {
            return self.moved(&(watch, name), (to.watch, to.name), directory);
        }
        if self.only.as_ref().is_some_and(|only| *only != name) {
            return Ok(());
        }
        let path = self.path_of(watch, &name);
        if mask & (libc::IN_CREATE | libc::IN_MOVED_TO) != 0 {
            if !self.told.remove(&(watch, name.clone())) {
                self.tell("create", &path, None, directory);
            }
            if directory && self.recursive {
                self.adopt(watch, name)?;
            }
        } else if mask & (libc::IN_DELETE | libc::IN_MOVED_FROM) != 0 {
            let place = (watch, name);
            self.told.remove(&place);
            self.tell("remove", &path, None, directory);
            if mask & libc::IN_MOVED_FROM != 0 {
                self.leaving.extend(self.below.get(&place));
            }
        } else if mask & libc::IN_MODIFY != 0 {
            self.tell("write", &path, None, directory);
        } else if mask & libc::IN_ATTRIB != 0 {
            self.tell("chmod", &path, None, directory);
        }
        Ok(())
    }

    /// An event of a watched directory itself: the one above it tells of it, but nothing is above the root.
    fn take_own(&mut self, watch: i32, mask: u32) {
        if watch != self.root_watch || self.only.is_some() {
            return;
        }
        let path = if self.path.is_empty() { b"/".to_vec() } else { self.path.clone() };
        if mask & (libc::IN_DELETE_SELF | libc::IN_MOVE_SELF) != 0 {
            self.tell("remove", &path, None, true);
            self.leaving.push(watch);
        } else if mask & libc::IN_ATTRIB != 0 {
            self.tell("chmod", &path, None, true);
        }
    }

    /// Something got another name within the tree.
    fn moved(&mut self, from: &(i32, Vec<u8>), to: (i32, Vec<u8>), directory: bool) -> Result<()> {
        if let Some(only) = &self.only {
            let kind = if to.1 == *only { "create" } else { "remove" };
            if to.1 == *only || from.1 == *only {
                self.tell(kind, &self.path.clone(), None, directory);
            }
            return Ok(());
        }
        self.told.remove(from);
        self.told.remove(&to);
        let (path, target) = (self.path_of(from.0, &from.1), self.path_of(to.0, &to.1));
        self.tell("rename", &path, Some(&target), directory);
        if !directory || !self.recursive {
            return Ok(());
        }
        if let Some(watch) = self.below.remove(from) {
            if let Some(dir) = self.dirs.get_mut(&watch) {
                (dir.parent, dir.name) = to.clone();
            }
            self.below.insert(to.clone(), watch);
        }
        self.adopt(to.0, to.1)
    }

    fn begin_line(&mut self, kind: &str) {
        self.last_line = self.lines.len();
        self.lines.extend_from_slice(b"{\"type\":\"");
        self.lines.extend_from_slice(kind.as_bytes());
        self.lines.push(b'"');
    }

    /// Appends a line that is about nothing in particular.
    fn tell_only(&mut self, kind: &str) {
        self.begin_line(kind);
        self.lines.extend_from_slice(b"}\n");
    }

    /// Appends a line, unless it says what the one before it says.
    fn tell(&mut self, kind: &str, path: &[u8], target: Option<&[u8]>, directory: bool) {
        let former = self.last_line;
        self.begin_line(kind);
        push_path(&mut self.lines, "path", path);
        if let Some(target) = target {
            push_path(&mut self.lines, "target", target);
        }
        let rest = if directory { b",\"directory\":true}\n" as &[u8] } else { b",\"directory\":false}\n" };
        self.lines.extend_from_slice(rest);
        let (before, line) = self.lines.split_at(self.last_line);
        if matches!(kind, "write" | "chmod") && before.get(former..) == Some(line) {
            self.lines.truncate(self.last_line);
            self.last_line = former;
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Appends a path as a member of a JSON object; one that is not UTF-8 also in base64.
fn push_path(out: &mut Vec<u8>, name: &str, path: &[u8]) {
    let text = String::from_utf8_lossy(path);
    out.extend_from_slice(format!(",\"{name}\":\"").as_bytes());
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            0..0x20 => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
            _ => out.push(byte),
        }
    }
    out.push(b'"');
    if matches!(text, std::borrow::Cow::Owned(_)) {
        out.extend_from_slice(format!(",\"{name}_b64\":\"").as_bytes());
        push_base64(out, path);
        out.push(b'"');
    }
}

/// Source: RFC 4648, 4.
fn push_base64(out: &mut Vec<u8>, bytes: &[u8]) {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = (word >> (18 - 6 * digit)) as usize & 63;
            let letter = ALPHABET.get(value).copied().filter(|_| digit <= chunk.len());
            out.push(letter.unwrap_or(b'='));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_json_string_whatever_is_in_it() {
        let mut out = Vec::new();
        push_path(&mut out, "path", "/a\"\\\n\u{e9}".as_bytes());
        assert_eq!(String::from_utf8(out).unwrap(), ",\"path\":\"/a\\\"\\\\\\u000a\u{e9}\"");
        let mut out = Vec::new();
        push_path(&mut out, "target", b"/\xff");
        assert_eq!(String::from_utf8(out).unwrap(), ",\"target\":\"/\u{fffd}\",\"target_b64\":\"L/8=\"");
    }

    #[test]
    fn base64_is_padded_to_whole_words() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")] {
            let mut out = Vec::new();
            push_base64(&mut out, bytes.as_bytes());
            assert_eq!(out, text.as_bytes());
        }
    }
}
