//! Turning a file or a tree into an archive.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};

use crate::beneath::{self, c_string, file_type};
use crate::encode::left_out;
use crate::error::last_errno;
use crate::{Entry, Error, Kind, Time, encode, trailer};

/// Directories above a file, below the one that is packed: each holds a descriptor open.
const MAX_DEPTH: usize = 256;
/// Bytes of names in the directories that are open at one time.
const MAX_NAMES: usize = 32 << 20;

/// What was packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Members.
    pub entries: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Devices, pipes and sockets, which were left out.
    pub special_skipped: u64,
    /// Files that became shorter while they were read; the rest was filled with zeros.
    pub shrunk: u64,
}

/// A directory on the way down.
struct Level {
    fd: OwnedFd,
    /// Its entries that are still to come, last first.
    names: Vec<Vec<u8>>,
    bytes: usize,
    /// Its name in the archive, with a slash at the end unless it is empty.
    prefix: Vec<u8>,
}

/// The file whose content is being read.
struct Content {
    file: File,
    left: u64,
    padding: usize,
    path: Vec<u8>,
    /// It ended before `left` did.
    ended: bool,
}

/// Packs what lies under a name, piece by piece.
///
/// Links are packed as links and never followed; a hard link is packed as a copy. Entries of a
/// directory come sorted by name. A directory where another file system is mounted comes empty. In the place of
/// what is in it, and of a device, pipe or socket, stands a comment: `left out, a FIFO: PATH`.
pub struct Pack {
    levels: Vec<Level>,
    names: usize,
    /// The file system that the top lies in.
    device: Option<libc::dev_t>,
    content: Option<Content>,
    ready: Vec<u8>,
    done: bool,
    packed: Packed,
}

impl Pack {
    /// Starts to pack `name`, one component, in the directory `parent`.
    ///
    /// `member` is what it is called in the archive: with `out`, a directory becomes `out/`,
    /// `out/a`, …; with the empty name it is not listed itself and its entries are `a`, ….
    ///
    /// # Errors
    ///
    /// [`Error::Os`] when it is not there, [`Error::Refused`] when it is a device or the like.
    pub fn new(parent: BorrowedFd<'_>, name: &[u8], member: &[u8]) -> Result<Self, Error> {
        let mut pack = Self {
            levels: Vec::new(),
            names: 0,
            device: None,
            content: None,
            ready: Vec::new(),
            done: false,
            packed: Packed::default(),
        };
        pack.add(parent, name, member.to_vec())?;
        if pack.packed.special_skipped > 0 {
            return Err(Error::refused("no file, directory or link", name));
        }
        Ok(pack)
    }

    /// The next bytes of the archive, at most `most` (and not 0); `None` at its end.
    ///
    /// # Errors
    ///
    /// What could not be read. The archive is incomplete then.
    pub fn next_chunk(&mut self, most: usize) -> Result<Option<Vec<u8>>, Error> {
        let most = most.max(1);
        while self.ready.len() < most && !self.done {
            self.advance(most)?;
        }
        if self.ready.is_empty() {
            return Ok(None);
        }
        let rest = self.ready.split_off(most.min(self.ready.len()));
        Ok(Some(std::mem::replace(&mut self.ready, rest)))
    }

    /// What has been packed so far.
    pub fn packed(&self) -> Packed {
        self.packed
    }

    fn advance(&mut self, most: usize) -> Result<(), Error> {
        if self.content.is_some() {
            return self.read(most);
        }
        let Some(level) = self.levels.last_mut() else {
            self.ready.extend_from_slice(&trailer());
            self.done = true;
            return Ok(());
        };
        let Some(name) = level.names.pop() else {
            self.names -= level.bytes;
            self.levels.pop();
            return Ok(());
        };
        let member = [level.prefix.as_slice(), name.as_slice()].concat();
        let Some(level) = self.levels.pop() else { return Ok(()) };
        // The level goes back under what `add` may have put on the stack.
        let at = self.levels.len();
        let added = self.add(level.fd.as_fd(), &name, member.clone());
        self.levels.insert(at, level);
        match added {
            // It was removed after its directory was listed.
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(()),
            Err(Error::Os { call, errno, .. }) => Err(Error::Os { call, path: member, errno }),
            added => added,
        }
    }

    fn read(&mut self, most: usize) -> Result<(), Error> {
        let Some(content) = &mut self.content else { return Ok(()) };
        let room = (most - self.ready.len()).min(usize::try_from(content.left).unwrap_or(usize::MAX));
        let start = self.ready.len();
        self.ready.resize(start + room, 0);
        let buffer = self.ready.get_mut(start..).unwrap_or_default();
        let read = match content.file.read(buffer) {
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {
                self.ready.truncate(start);
                return Ok(());
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                return Err(Error::Os { call: "read", path: content.path.clone(), errno });
            }
        };
        if read == 0 && room > 0 {
            // It became shorter; the header has promised this many bytes, and zeros stand for them.
            self.packed.shrunk += u64::from(!std::mem::replace(&mut content.ended, true));
            content.left -= room as u64;
        } else {
            self.ready.truncate(start + read);
            content.left -= read as u64;
        }
        if content.left == 0 {
            let padding = content.padding;
            self.ready.resize(self.ready.len() + padding, 0);
            self.content = None;
        }
        Ok(())
    }

    fn add(&mut self, parent: BorrowedFd<'_>, name: &[u8], member: Vec<u8>) -> Result<(), Error> {
        let stat = beneath::stat_at(parent, name)?;
        match file_type(&stat) {
            libc::S_IFREG => {
                // Another file may have taken the name: not to block on a pipe, and look again.
                let fd = beneath::open_at(parent, name, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY, 0)?;
                let stat = beneath::stat(fd.as_fd(), name)?;
                if file_type(&stat) != libc::S_IFREG {
                    self.leave_out(&stat, &member);
                    return Ok(());
                }
                let size = u64::try_from(stat.st_size).unwrap_or(0);
                let padding = self.header(&stat, Kind::File, &member, size, Vec::new())?;
                self.packed.bytes += size;
                if size > 0 {
                    self.content =
                        Some(Content { file: File::from(fd), left: size, padding, path: member, ended: false });
                }
                Ok(())
            }
            libc::S_IFDIR => {
                let fd = beneath::open_at(parent, name, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
                let stat = beneath::stat(fd.as_fd(), name)?;
                let mut prefix = member;
                if !prefix.is_empty() {
                    prefix.push(b'/');
                    self.header(&stat, Kind::Directory, &prefix, 0, Vec::new())?;
                }
                if *self.device.get_or_insert(stat.st_dev) != stat.st_dev {
                    self.ready.extend_from_slice(&left_out(&prefix, "another file system"));
                    return Ok(());
                }
                self.descend(fd, prefix)
            }
            libc::S_IFLNK => {
                let link = read_link(parent, name)?;
                self.header(&stat, Kind::Symlink, &member, 0, link)?;
                Ok(())
            }
            _ => {
                self.leave_out(&stat, &member);
                Ok(())
            }
        }
    }

    fn leave_out(&mut self, stat: &libc::stat, member: &[u8]) {
        let why = match file_type(stat) {
            libc::S_IFIFO => "a FIFO",
            libc::S_IFSOCK => "a socket",
            _ => "a device",
        };
        self.packed.special_skipped += 1;
        self.ready.extend_from_slice(&left_out(member, why));
    }

    fn header(
        &mut self,
        stat: &libc::stat,
        kind: Kind,
        member: &[u8],
        size: u64,
        link: Vec<u8>,
    ) -> Result<usize, Error> {
        let encoded = encode(&Entry {
            path: member.to_vec(),
            kind,
            link,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size,
            mtime: Time { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
            xattrs: Vec::new(),
        })?;
        self.packed.entries += 1;
        self.ready.extend_from_slice(&encoded.header);
        Ok(encoded.padding)
    }

    fn descend(&mut self, fd: OwnedFd, prefix: Vec<u8>) -> Result<(), Error> {
        if self.levels.len() >= MAX_DEPTH {
            return Err(Error::Limit { what: "directories above a member", limit: MAX_DEPTH as u64 });
        }
        let mut names = list(fd.as_fd(), &prefix)?;
        let bytes = names.iter().map(|name| name.len() + size_of::<Vec<u8>>()).sum();
        self.names += bytes;
        if self.names > MAX_NAMES {
            return Err(Error::Limit { what: "bytes of names in its directories", limit: MAX_NAMES as u64 });
        }
        names.sort_unstable_by(|one, other| other.cmp(one));
        self.levels.push(Level { fd, names, bytes, prefix });
        Ok(())
    }
}

fn read_link(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>, Error> {
    let text = c_string(name)?;
    let mut target = vec![0_u8; 4096];
    // SAFETY: `text` ends in NUL, `target` is writable for its length, both outlive the call.
    let length =
        unsafe { libc::readlinkat(parent.as_raw_fd(), text.as_ptr(), target.as_mut_ptr().cast(), target.len()) };
    let length = usize::try_from(length).map_err(|_| Error::last("readlinkat", name))?;
    target.truncate(length);
    Ok(target)
}

/// A directory stream that closes itself.
struct Stream(*mut libc::DIR);

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the pointer came from fdopendir and is closed here only.
        unsafe { libc::closedir(self.0) };
    }
}

/// Names in a directory, without `.` and `..`.
fn list(directory: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    // A descriptor of its own: the stream moves the position and closes it.
    let own = beneath::open_at(directory, b".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?.into_raw_fd();
    // SAFETY: `own` is open, and the stream owns it from here on.
    let raw = unsafe { libc::fdopendir(own) };
    if raw.is_null() {
        let error = Error::last("fdopendir", path);
        // SAFETY: fdopendir has failed, so it is still ours to close.
        unsafe { libc::close(own) };
        return Err(error);
    }
    let stream = Stream(raw);
    let mut names = Vec::new();
    let mut bytes = 0;
    loop {
        // SAFETY: errno is this thread's own; readdir tells an error from the end only by it.
        unsafe { *libc::__errno_location() = 0 };
        // SAFETY: the stream is open and used by this thread only.
        let entry = unsafe { libc::readdir64(stream.0) };
        if entry.is_null() {
            if last_errno() != 0 {
                return Err(Error::last("readdir", path));
            }
            return Ok(names);
        }
        // SAFETY: d_name of an entry that readdir returned ends in NUL and is valid until the next
        // call; only that field is touched, as the record may be shorter than the struct.
        let name = unsafe { std::ffi::CStr::from_ptr((&raw const (*entry).d_name).cast()) }.to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        bytes += name.len() + size_of::<Vec<u8>>();
        if bytes > MAX_NAMES {
            return Err(Error::Limit { what: "bytes of names in its directories", limit: MAX_NAMES as u64 });
        }
        names.push(name.to_vec());
    }
}
