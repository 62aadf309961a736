//! Paths of the sandbox: looked up without magic links, opened without waiting, changed through directory descriptors.
//!
//! The agent may do more than the user's processes, so it never follows `/proc/PID/fd`, `root`, `cwd` or `exe` for a
//! client: those would hand out files by a route that no path in the sandbox has.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use shoal_wire::{FileInfo, FileKind};

use crate::sys::{self, Error, Result};

/// Most symbolic links that a path to write may end in.
const MAX_LINKS: usize = 40;
/// Permission bits of a directory that we make.
const DIRECTORY_MODE: u32 = 0o755;

/// What the name of a [`Draft`] begins with.
const DRAFT: &str = ".shoal-";

/// Whether a name is that of a [`Draft`], a file that is not there yet.
pub fn is_draft(name: &[u8]) -> bool {
    let digits = name.strip_prefix(DRAFT.as_bytes());
    digits.is_some_and(|digits| digits.len() == 16 && digits.iter().all(u8::is_ascii_hexdigit))
}

/// Who will own what is made.
pub type Owner = (u32, u32);

/// One entry of getdents64(2).
#[derive(Clone, Copy, Debug)]
pub struct Dirent<'a> {
    /// The name, never `.` or `..`.
    pub name: &'a CStr,
    /// `DT_*`; `DT_UNKNOWN` where the filesystem does not say.
    pub kind: u8,
}

/// Takes packed directory entries apart.
#[derive(Clone, Debug)]
pub struct Dirents<'a>(&'a [u8]);

impl<'a> Dirents<'a> {
    /// Starts at the first entry.
    pub fn new(packed: &'a [u8]) -> Self {
        Self(packed)
    }
    /// Bytes that are not taken yet.
    pub fn remaining(&self) -> usize {
        self.0.len()
    }
}

impl<'a> Iterator for Dirents<'a> {
    type Item = Dirent<'a>;

    /// Source: `getdents64(2)`: u64 inode, i64 offset, u16 length, u8 type, name.
    fn next(&mut self) -> Option<Dirent<'a>> {
        loop {
            let length = u16::from_ne_bytes([*self.0.get(16)?, *self.0.get(17)?]) as usize;
            let (entry, rest) = self.0.split_at_checked(length)?;
            self.0 = rest;
            let kind = *entry.get(18)?;
            let name = CStr::from_bytes_until_nul(entry.get(19..)?).ok()?;
            if name != c"." && name != c".." {
                return Some(Dirent { name, kind });
            }
        }
    }
}

/// Checks that a path is absolute and holds no NUL.
pub fn absolute(path: &[u8]) -> Result<CString> {
    if path.first() != Some(&b'/') {
        return Err(Error::new("path", libc::EINVAL));
    }
    CString::new(path).map_err(|_| Error::new("path", libc::EINVAL))
}

/// A name in a directory that is held open.
#[derive(Debug)]
pub struct Place {
    /// The directory.
    pub dir: OwnedFd,
    /// The last component; no slash in it.
    pub name: CString,
}

/// Splits a path into directory and last component, trailing slashes ignored.
fn split(path: &[u8]) -> Result<(&[u8], &[u8])> {
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |at| at + 1);
    let path = path.get(..end).unwrap_or(&[]);
    let at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let (dir, name) = path.split_at(at);
    match name {
        b"" | b"." | b".." => Err(Error::new("path", if path.is_empty() { libc::EBUSY } else { libc::EINVAL })),
        _ => Ok((dir, name)),
    }
}

/// Opens a directory to work in.
fn open_dir(from: Option<BorrowedFd<'_>>, path: &[u8]) -> Result<OwnedFd> {
    let path = if path.is_empty() { b"." as &[u8] } else { path };
    let path = CString::new(path).map_err(|_| Error::new("path", libc::EINVAL))?;
    sys::openat2(from, &path, libc::O_PATH | libc::O_DIRECTORY, 0, 0)
}

/// Finds the place that an absolute path names; its last component is not followed and need not exist.
pub fn place(path: &[u8]) -> Result<Place> {
    absolute(path)?;
    let (dir, name) = split(path)?;
    let name = CString::new(name).map_err(|_| Error::new("path", libc::EINVAL))?;
    Ok(Place { dir: open_dir(None, dir)?, name })
}

/// As [`place`], but where the last component is a symbolic link, the place that it points to in the end.
pub fn place_followed(path: &[u8]) -> Result<Place> {
    let mut at = place(path)?;
    for _ in 0..MAX_LINKS {
        match sys::fstatat(&at.dir, &at.name) {
            Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFLNK => {}
            Ok(_) | Err(Error { errno: libc::ENOENT, .. }) => return Ok(at),
            Err(error) => return Err(error),
        }
        let target = sys::readlinkat(&at.dir, &at.name)?;
        let (dir, name) = split(&target)?;
        let from = if target.first() == Some(&b'/') { None } else { Some(at.dir.as_fd()) };
        let dir = open_dir(from, dir)?;
        at = Place { dir, name: CString::new(name).map_err(|_| Error::new("path", libc::EINVAL))? };
    }
    Err(Error::new("path", libc::ELOOP))
}

/// Describes what `stat` found.
pub fn info(path: Vec<u8>, stat: &libc::stat, target: Vec<u8>) -> FileInfo {
    let kind = match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => FileKind::File,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::Symlink,
        _ => FileKind::Other,
    };
    FileInfo {
        path,
        kind,
        size: stat.st_size as u64,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_ns: stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(stat.st_mtime_nsec),
        target,
    }
}

/// Describes one path; its last component is not followed.
pub fn stat(path: &[u8]) -> Result<FileInfo> {
    let text = absolute(path)?;
    let fd = sys::openat2(None, &text, libc::O_PATH | libc::O_NOFOLLOW, 0, 0)?;
    let stat = sys::fstat(&fd)?;
    let link = stat.st_mode & libc::S_IFMT == libc::S_IFLNK;
    let target = if link { sys::readlinkat(&fd, c"")? } else { Vec::new() };
    Ok(info(path.to_vec(), &stat, target))
}

/// Describes a name in a directory.
pub fn stat_at(dir: &OwnedFd, name: &CStr, path: Vec<u8>) -> Result<FileInfo> {
    let stat = sys::fstatat(dir, name)?;
    let link = stat.st_mode & libc::S_IFMT == libc::S_IFLNK;
    let target = if link { sys::readlinkat(dir, name)? } else { Vec::new() };
    Ok(info(path, &stat, target))
}

/// Refuses what is not a regular file.
fn only_regular(stat: &libc::stat) -> Result<()> {
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => Ok(()),
        libc::S_IFDIR => Err(Error::new("open", libc::EISDIR)),
        _ => Err(Error::new("open", libc::EINVAL)),
    }
}

/// Opens a regular file to read.
///
/// # Errors
/// `EISDIR` for a directory, `EINVAL` for a FIFO, socket or device; none of these is ever opened, for an open may
/// wait for somebody or make something.
pub fn open_to_read(path: &[u8]) -> Result<(OwnedFd, FileInfo)> {
    let text = absolute(path)?;
    only_regular(&sys::fstat(&sys::openat2(None, &text, libc::O_PATH, 0, 0)?)?)?;
    let fd = sys::openat2(None, &text, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY, 0, 0)?;
    // Looked at again: the path may mean something else by now.
    let stat = sys::fstat(&fd)?;
    only_regular(&stat)?;
    Ok((fd, info(path.to_vec(), &stat, Vec::new())))
}

/// Opens a directory to list.
pub fn open_to_list(path: &[u8]) -> Result<OwnedFd> {
    sys::openat2(None, &absolute(path)?, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NONBLOCK, 0, 0)
}

/// Finds the directory to watch for changes of a path, and the one name in it that counts when the path is no directory.
pub fn open_to_watch(path: &[u8]) -> Result<(OwnedFd, Option<Vec<u8>>)> {
    match open_to_list(path) {
        Err(Error { errno: libc::ENOTDIR, .. }) => {
            // A file that is replaced is another one of the same name.
            let Place { dir, name } = place_followed(path)?;
            sys::fstatat(&dir, &name)?;
            Ok((dir, Some(name.into_bytes())))
        }
        opened => Ok((opened?, None)),
    }
}

/// Makes the directories of a path that are missing, each owned by `owner`.
///
/// Returns whether the last one was made now.
pub fn make_dirs(path: &[u8], owner: Option<Owner>) -> Result<bool> {
    absolute(path)?;
    let mut dir = open_dir(None, b"/")?;
    let mut made = false;
    for part in path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".") {
        let name = CString::new(part).map_err(|_| Error::new("path", libc::EINVAL))?;
        made = false;
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        dir = match sys::openat2(Some(dir.as_fd()), &name, flags, 0, 0) {
            Err(Error { errno: libc::ENOENT, .. }) => {
                made = make_one(&dir, &name, owner)?;
                sys::openat2(Some(dir.as_fd()), &name, flags, 0, 0)?
            }
            other => other?,
        };
    }
    Ok(made)
}

/// Makes one directory; false when somebody else made it meanwhile.
fn make_one(dir: &OwnedFd, name: &CStr, owner: Option<Owner>) -> Result<bool> {
    match sys::mkdirat(dir, name, DIRECTORY_MODE) {
        Err(Error { errno: libc::EEXIST, .. }) => return Ok(false),
        other => other?,
    }
    if let Some((uid, gid)) = owner {
        sys::fchownat(dir, name, uid, gid)?;
    }
    Ok(true)
}

/// Makes a directory; with `parents` those above it too, and an existing one is fine.
pub fn make_dir(path: &[u8], parents: bool, owner: Option<Owner>) -> Result<FileInfo> {
    if parents {
        make_dirs(path, owner)?;
        // A link to a directory is as good as one; say what it leads to.
        let fd = sys::openat2(None, &absolute(path)?, libc::O_PATH | libc::O_DIRECTORY, 0, 0)?;
        return Ok(info(path.to_vec(), &sys::fstat(&fd)?, Vec::new()));
    }
    let at = place(path)?;
    if !make_one(&at.dir, &at.name, owner)? {
        return Err(Error::new("mkdirat", libc::EEXIST));
    }
    stat_at(&at.dir, &at.name, path.to_vec())
}

/// Renames within the sandbox; a file at `to` is replaced.
pub fn rename(from: &[u8], to: &[u8]) -> Result<()> {
    let (from, to) = (place(from)?, place(to)?);
    sys::renameat(&from.dir, &from.name, &to.dir, &to.name)
}

/// Changes permission bits and owner of a path, links followed; `mode` `u32::MAX` and `owner` `None` change nothing.
pub fn change(path: &[u8], mode: u32, owner: Option<Owner>) -> Result<FileInfo> {
    let fd = sys::openat2(None, &absolute(path)?, libc::O_PATH, 0, 0)?;
    if let Some((uid, gid)) = owner {
        sys::chown_path(&fd, uid, gid)?;
    }
    // After the owner: a change of owner clears the set-id bits.
    if mode != u32::MAX {
        sys::chmod_path(&fd, mode & 0o7777)?;
    }
    Ok(info(path.to_vec(), &sys::fstat(&fd)?, Vec::new()))
}

/// Writes /etc/hosts where the image has none; that it cannot is no fault.
pub fn make_hosts(owner: Option<Owner>) {
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
    let Ok(fd) = sys::openat2(None, c"/etc/hosts", flags, 0o644, sys::NO_SYMLINKS) else { return };
    if let Some((uid, gid)) = owner {
        let _ = sys::fchown(&fd, uid, gid);
    }
    let _ = sys::write(&fd, b"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
}

/// A file on its way into place: written beside its target under another name, then renamed.
///
/// Dropped before [`Draft::publish`], it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    file: OwnedFd,
    at: Place,
    temporary: CString,
    path: Vec<u8>,
    mode: u32,
    owner: Option<Owner>,
    published: bool,
}

impl Draft {
    /// Begins a file at `path`.
    ///
    /// `mode` `u32::MAX`: that of the file it replaces, else 0644. `owner` `None`: that of the file it replaces, else
    /// `default_owner`.
    pub fn new(path: &[u8], mode: u32, owner: Option<Owner>, default_owner: Option<Owner>) -> Result<Self> {
        let at = place_followed(path)?;
        let replaced = match sys::fstatat(&at.dir, &at.name) {
            Ok(stat) => {
                only_regular(&stat)?;
                Some(stat)
            }
            Err(Error { errno: libc::ENOENT, .. }) => None,
            Err(error) => return Err(error),
        };
        let replaced_mode = replaced.map_or(0o644, |stat| stat.st_mode & 0o7777);
        let mode = if mode == u32::MAX { replaced_mode } else { mode & 0o7777 };
        let owner = owner.or(replaced.map(|stat| (stat.st_uid, stat.st_gid))).or(default_owner);
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
        loop {
            let name = format!("{DRAFT}{:016x}", sys::random());
            let temporary = CString::new(name).map_err(|_| Error::new("path", libc::EINVAL))?;
            match sys::openat2(Some(at.dir.as_fd()), &temporary, flags, 0o600, 0) {
                Err(Error { errno: libc::EEXIST, .. }) => {}
                other => {
                    let file = other?;
                    let path = path.to_vec();
                    return Ok(Self { file, at, temporary, path, mode, owner, published: false });
                }
            }
        }
    }

    /// Appends all of the bytes.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let count = sys::write(&self.file, bytes)?;
            bytes = bytes.get(count..).unwrap_or(&[]);
        }
        Ok(())
    }

    /// Puts the file in place.
    pub fn publish(mut self) -> Result<FileInfo> {
        let now = sys::fstat(&self.file)?;
        if let Some((uid, gid)) = self.owner.filter(|owner| *owner != (now.st_uid, now.st_gid)) {
            sys::fchown(&self.file, uid, gid)?;
        }
        // After the owner: a change of owner clears the set-id bits.
        sys::fchmod(&self.file, self.mode)?;
        sys::renameat(&self.at.dir, &self.temporary, &self.at.dir, &self.at.name)?;
        self.published = true;
        Ok(info(std::mem::take(&mut self.path), &sys::fstat(&self.file)?, Vec::new()))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            let _ = sys::unlinkat(&self.at.dir, &self.temporary, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::PathBuf;

    /// A directory that goes with its test.
    struct Scratch(PathBuf);
    impl Scratch {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("shoal-agent-{:x}", sys::random()));
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }
        fn path(&self, name: &str) -> Vec<u8> {
            self.0.join(name).into_os_string().into_encoded_bytes()
        }
    }
    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_path_splits_into_directory_and_name() {
        assert_eq!(split(b"/a/b/").unwrap(), (b"/a/" as &[u8], b"b" as &[u8]));
        assert_eq!(split(b"b").unwrap(), (b"" as &[u8], b"b" as &[u8]));
        for path in [b"/" as &[u8], b"//", b"/a/..", b"/a/.", b""] {
            assert!(split(path).is_err(), "{path:?}");
        }
    }

    #[test]
    fn a_draft_that_is_dropped_leaves_nothing_and_the_old_file() {
        let scratch = Scratch::new();
        std::fs::write(scratch.0.join("f"), "old").unwrap();
        let mut draft = Draft::new(&scratch.path("f"), u32::MAX, None, None).unwrap();
        draft.write(b"new").unwrap();
        drop(draft);
        assert_eq!(std::fs::read(scratch.0.join("f")).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 1);
    }

    #[test]
    fn a_file_written_through_a_link_lands_where_it_points() {
        let scratch = Scratch::new();
        std::fs::create_dir(scratch.0.join("d")).unwrap();
        symlink("d/real", scratch.0.join("link")).unwrap();
        let mut draft = Draft::new(&scratch.path("link"), 0o640, None, None).unwrap();
        draft.write(b"x").unwrap();
        draft.publish().unwrap();
        assert_eq!(std::fs::metadata(scratch.0.join("d/real")).unwrap().mode() & 0o7777, 0o640);
        assert!(scratch.0.join("link").is_symlink());
        symlink("loop", scratch.0.join("loop")).unwrap();
        assert_eq!(Draft::new(&scratch.path("loop"), 0, None, None).unwrap_err().errno, libc::ELOOP);
    }

    #[test]
    fn only_regular_files_are_opened() {
        let scratch = Scratch::new();
        let fifo = CString::new(scratch.path("fifo")).unwrap();
        // SAFETY: the path ends in NUL.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        for (path, errno) in [
            (scratch.path("fifo"), libc::EINVAL),
            (scratch.path(""), libc::EISDIR),
            (scratch.path("none"), libc::ENOENT),
            (b"/dev/null".to_vec(), libc::EINVAL),
            (b"/proc/self/fd/0".to_vec(), libc::ELOOP),
            (b"relative".to_vec(), libc::EINVAL),
            (b"/a\0b".to_vec(), libc::EINVAL),
        ] {
            assert_eq!(open_to_read(&path).unwrap_err().errno, errno, "{path:?}");
        }
        assert_eq!(Draft::new(&scratch.path("fifo"), 0, None, None).unwrap_err().errno, libc::EINVAL);
    }

    #[test]
    fn missing_directories_are_made_once() {
        let scratch = Scratch::new();
        assert!(make_dirs(&scratch.path("a/b/c"), None).unwrap());
        assert!(!make_dirs(&scratch.path("a/b/c"), None).unwrap());
        assert_eq!(make_dir(&scratch.path("a/b"), false, None).unwrap_err().errno, libc::EEXIST);
        assert_eq!(make_dir(&scratch.path("x/y"), false, None).unwrap_err().errno, libc::ENOENT);
        assert_eq!(make_dir(&scratch.path("x"), false, None).unwrap().kind, FileKind::Directory);
    }
}
