//! File requests that take many steps, so that none of them holds up the others.

use std::collections::VecDeque;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use shoal_archive::Pack;
use shoal_wire::{DATA_CHUNK, EOF, FileInfo, FileListing, HEADER_LEN, Header, Kind, MAX_PAYLOAD, WINDOW};

use crate::files::{self, Dirents};
use crate::sys::{self, Error, Result};

/// Directory entries looked at in one step.
const ENTRIES_A_STEP: usize = 128;
/// Directories that a removal may be inside at once; each takes a descriptor.
const MAX_DEPTH: usize = 1024;
/// Times a directory that fills again while it is emptied is emptied again.
const MAX_PASSES: u32 = 16;
/// Bytes of a listed entry besides path and target.
const ENTRY_BYTES: usize = 37;
/// Bytes of an archive made in one step.
const PACK_CHUNK: u64 = 64 << 10;
/// Buffer for directory entries, in bytes.
const DIRENT_BUFFER: usize = 8 << 10;

/// What a step came to.
#[derive(Debug)]
pub enum Step {
    /// Go on at once.
    More,
    /// Go on when the receiver has consumed more.
    Wait,
    /// Finished; the last frame is written.
    Done,
}

/// Sends a file.
#[derive(Debug)]
pub struct Reading {
    file: OwnedFd,
    position: u64,
    /// Bytes still promised; `None` for files whose size says nothing (/proc), which are read to their end.
    left: Option<u64>,
    /// Bytes at the most.
    limit: u64,
    sent: u64,
    consumed: u64,
}

impl Reading {
    /// Opens `path` to send `length` bytes from `offset` on; returns also what is to be told first.
    pub fn new(path: &[u8], offset: u64, length: u64) -> Result<(Self, FileInfo)> {
        let (file, info) = files::open_to_read(path)?;
        let left = (info.size > 0).then(|| info.size.saturating_sub(offset).min(length));
        Ok((Self { file, position: offset, left, limit: length, sent: 0, consumed: 0 }, info))
    }

    /// Takes the receiver's progress; false when it claims more than was sent.
    pub fn consumed(&mut self, offset: u64) -> bool {
        self.consumed = self.consumed.max(offset);
        offset <= self.sent
    }

    /// Sends one chunk, read straight into the outgoing bytes.
    ///
    /// # Errors
    /// When reading fails, or the file is shorter now than it was said to be.
    pub fn step(&mut self, channel: u32, out: &mut Vec<u8>) -> Result<Step> {
        let window = (self.consumed + WINDOW).saturating_sub(self.sent);
        let wanted = self.left.unwrap_or(u64::MAX).min(self.limit - self.sent.min(self.limit));
        if wanted > 0 && window == 0 {
            return Ok(Step::Wait);
        }
        let count = wanted.min(window).min(DATA_CHUNK as u64) as usize;
        let begin = out.len();
        out.resize(begin + HEADER_LEN + count, 0);
        let room = out.get_mut(begin + HEADER_LEN..).unwrap_or(&mut []);
        let got = if count == 0 { Ok(0) } else { sys::pread(&self.file, room, self.position) };
        let got = match got {
            Ok(0) if self.left.is_some_and(|left| left > 0) => Err(Error::new("file shrank", libc::EIO)),
            other => other,
        };
        let got = match got {
            Ok(got) => got,
            Err(error) => {
                out.truncate(begin);
                return Err(error);
            }
        };
        out.truncate(begin + HEADER_LEN + got);
        self.position += got as u64;
        self.sent += got as u64;
        self.left = self.left.map(|left| left - got as u64);
        let last = self.left.map_or(got == 0 || self.sent >= self.limit, |left| left == 0);
        let flags = if last { EOF } else { 0 };
        let header = Header { len: got as u32, channel, kind: Kind::Data, flags }.encode();
        if let Some(place) = out.get_mut(begin..begin + HEADER_LEN) {
            place.copy_from_slice(&header);
        }
        Ok(if last { Step::Done } else { Step::More })
    }
}

/// Lists a directory, breadth first.
#[derive(Debug)]
pub struct Listing {
    root: OwnedFd,
    root_path: Vec<u8>,
    /// Directories to go into, relative to the root, with the levels that are left there.
    queue: VecDeque<(Vec<u8>, u32)>,
    current: Option<(OwnedFd, Vec<u8>, u32)>,
    packed: Vec<u8>,
    taken: usize,
    entries: Vec<FileInfo>,
    bytes: usize,
}

impl Listing {
    /// Opens `path`, to go down `depth` levels.
    pub fn new(path: &[u8], depth: u32) -> Result<Self> {
        let root = files::open_to_list(path)?;
        let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |at| at + 1);
        Ok(Self {
            root,
            root_path: path.get(..end).unwrap_or(&[]).to_vec(),
            queue: VecDeque::from([(Vec::new(), depth.max(1))]),
            current: None,
            packed: Vec::new(),
            taken: 0,
            entries: Vec::new(),
            bytes: 4,
        })
    }

    /// Goes on; `Some` is the whole listing's payload.
    ///
    /// # Errors
    /// `EOVERFLOW` when the listing does not fit one frame.
    pub fn step(&mut self) -> Result<Option<Vec<u8>>> {
        let mut left = ENTRIES_A_STEP;
        while left > 0 {
            if self.taken >= self.packed.len() && !self.refill()? {
                let listing = FileListing { entries: std::mem::take(&mut self.entries) };
                return Ok(Some(listing.encode()));
            }
            let mut entries = Dirents::new(self.packed.get(self.taken..).unwrap_or(&[]));
            while left > 0
                && let Some(entry) = entries.next()
            {
                left -= 1;
                let Some((dir, below, levels)) = &self.current else { break };
                let relative = if below.is_empty() {
                    entry.name.to_bytes().to_vec()
                } else {
                    [below, b"/" as &[u8], entry.name.to_bytes()].concat()
                };
                let path = [&self.root_path, b"/" as &[u8], &relative].concat();
                let info = match files::stat_at(dir, entry.name, path) {
                    Ok(info) => info,
                    // It went away meanwhile.
                    Err(Error { errno: libc::ENOENT, .. }) => continue,
                    Err(error) => return Err(error),
                };
                self.bytes += info.path.len() + info.target.len() + ENTRY_BYTES;
                if self.bytes > MAX_PAYLOAD {
                    return Err(Error::new("listing too long", libc::EOVERFLOW));
                }
                if info.kind == shoal_wire::FileKind::Directory && *levels > 1 {
                    self.queue.push_back((relative, levels - 1));
                }
                self.entries.push(info);
            }
            self.taken = self.packed.len() - entries.remaining();
            if left > 0 {
                // Only `.` and `..` may be left over.
                self.taken = self.packed.len();
            }
        }
        Ok(None)
    }

    /// Gets the next entries, of the next directory if need be; false when there are none.
    fn refill(&mut self) -> Result<bool> {
        loop {
            if let Some((dir, ..)) = &self.current {
                self.packed.resize(DIRENT_BUFFER, 0);
                let count = match sys::getdents(dir, &mut self.packed) {
                    // The directory was removed while we were in it.
                    Err(Error { errno: libc::ENOENT, .. }) => 0,
                    other => other?,
                };
                self.packed.truncate(count);
                self.taken = 0;
                if count > 0 {
                    return Ok(true);
                }
                self.current = None;
            }
            let Some((relative, levels)) = self.queue.pop_front() else { return Ok(false) };
            let name = if relative.is_empty() { b"." as &[u8] } else { &relative };
            let name = CString::new(name).map_err(|_| Error::new("path", libc::EINVAL))?;
            let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NONBLOCK;
            match sys::openat2(Some(self.root.as_fd()), &name, flags, 0, sys::BENEATH | sys::NO_SYMLINKS) {
                Ok(fd) => self.current = Some((fd, relative, levels)),
                // Replaced by something else meanwhile.
                Err(Error { errno: libc::ENOENT | libc::ENOTDIR | libc::ELOOP, .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// One directory that a removal is inside of.
#[derive(Debug)]
struct Level {
    dir: OwnedFd,
    name: CString,
    packed: Vec<u8>,
    taken: usize,
    passes: u32,
}

/// Removes a path, with everything in it if asked to.
#[derive(Debug)]
pub struct Removal {
    at: files::Place,
    levels: Vec<Level>,
}

impl Removal {
    /// Begins; a single name is gone right away and `None` comes back.
    pub fn new(path: &[u8], recursive: bool) -> Result<Option<Self>> {
        let at = files::place(path)?;
        let stat = sys::fstatat(&at.dir, &at.name)?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFDIR {
            sys::unlinkat(&at.dir, &at.name, 0)?;
            return Ok(None);
        }
        if !recursive {
            sys::unlinkat(&at.dir, &at.name, libc::AT_REMOVEDIR)?;
            return Ok(None);
        }
        let mut removal = Self { at, levels: Vec::new() };
        let name = removal.at.name.clone();
        removal.enter(name)?;
        Ok(Some(removal))
    }

    /// Goes into a directory of the innermost level.
    fn enter(&mut self, name: CString) -> Result<()> {
        if self.levels.len() >= MAX_DEPTH {
            return Err(Error::new("directories too deep", libc::ENAMETOOLONG));
        }
        let parent = self.levels.last().map_or(&self.at.dir, |level| &level.dir);
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        // Never into another mount: what is mounted there is not the path's own.
        let dir = sys::openat2(Some(parent.as_fd()), &name, flags, 0, sys::BENEATH | sys::NO_SYMLINKS | sys::NO_XDEV)?;
        self.levels.push(Level { dir, name, packed: Vec::new(), taken: 0, passes: 0 });
        Ok(())
    }

    /// Goes on; true when all is gone.
    pub fn step(&mut self) -> Result<bool> {
        for _ in 0..ENTRIES_A_STEP {
            let Some(level) = self.levels.last_mut() else { return Ok(true) };
            let mut entries = Dirents::new(level.packed.get(level.taken..).unwrap_or(&[]));
            if let Some(entry) = entries.next() {
                level.taken = level.packed.len() - entries.remaining();
                let name = entry.name.to_owned();
                let removed = if entry.kind == libc::DT_DIR {
                    Err(Error::new("unlinkat", libc::EISDIR))
                } else {
                    sys::unlinkat(&level.dir, &name, 0)
                };
                match removed {
                    Ok(()) | Err(Error { errno: libc::ENOENT, .. }) => {}
                    Err(Error { errno: libc::EISDIR, .. }) => match self.enter(name) {
                        // Gone or replaced meanwhile; the next pass sees what is there.
                        Ok(()) | Err(Error { errno: libc::ENOENT | libc::ENOTDIR | libc::ELOOP, .. }) => {}
                        Err(error) => return Err(error),
                    },
                    Err(error) => return Err(error),
                }
                continue;
            }
            level.packed.resize(DIRENT_BUFFER, 0);
            let count = match sys::getdents(&level.dir, &mut level.packed) {
                Err(Error { errno: libc::ENOENT, .. }) => 0,
                other => other?,
            };
            level.packed.truncate(count);
            level.taken = 0;
            if count == 0 {
                self.leave()?;
            }
        }
        Ok(self.levels.is_empty())
    }

    /// Removes the innermost directory, or empties it once more where something came in meanwhile.
    fn leave(&mut self) -> Result<()> {
        let Some(mut level) = self.levels.pop() else { return Ok(()) };
        let parent = self.levels.last().map_or(&self.at.dir, |level| &level.dir);
        match sys::unlinkat(parent, &level.name, libc::AT_REMOVEDIR) {
            Ok(()) | Err(Error { errno: libc::ENOENT, .. }) => Ok(()),
            Err(Error { errno: libc::ENOTEMPTY | libc::EEXIST, .. }) if level.passes < MAX_PASSES => {
                sys::rewind(&level.dir)?;
                level.passes += 1;
                self.levels.push(level);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Sends a tree as an archive.
pub struct Packing {
    pack: Pack,
    sent: u64,
    consumed: u64,
}

impl Packing {
    /// Begins to pack `path`: a directory's entries come without the directory's own name, a file under its name.
    pub fn new(path: &[u8]) -> std::result::Result<Self, shoal_archive::Error> {
        let os = |error: Error| shoal_archive::Error::Os { call: error.call, path: path.to_vec(), errno: error.errno };
        let at = if path.iter().all(|byte| *byte == b'/') {
            // The root has no name in a directory above it.
            let dir = files::open_to_list(path).map_err(os)?;
            files::Place { dir, name: c".".to_owned() }
        } else {
            files::place_followed(path).map_err(os)?
        };
        let stat = sys::fstatat(&at.dir, &at.name).map_err(os)?;
        let directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let name = path.split(|byte| *byte == b'/').rfind(|part| !part.is_empty()).unwrap_or(b"");
        let member = if directory { b"" } else { name };
        let pack = Pack::new(at.dir.as_fd(), at.name.to_bytes(), member)?;
        Ok(Self { pack, sent: 0, consumed: 0 })
    }

    /// Takes the receiver's progress; false when it claims more than was sent.
    pub fn consumed(&mut self, offset: u64) -> bool {
        self.consumed = self.consumed.max(offset);
        offset <= self.sent
    }

    /// Sends one chunk.
    pub fn step(&mut self, channel: u32, out: &mut Vec<u8>) -> std::result::Result<Step, shoal_archive::Error> {
        let window = (self.consumed + WINDOW).saturating_sub(self.sent);
        if window == 0 {
            return Ok(Step::Wait);
        }
        let chunk = self.pack.next_chunk(window.min(PACK_CHUNK) as usize)?;
        let (flags, bytes) = chunk.as_ref().map_or((EOF, &[] as &[u8]), |bytes| (0, bytes));
        crate::conn::push(out, Kind::Data, flags, channel, bytes);
        self.sent += bytes.len() as u64;
        Ok(if chunk.is_some() { Step::More } else { Step::Done })
    }
}
