//! Putting members below a directory.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::beneath::{self, c_string, check, file_type, is_whiteout};
use crate::error::last_errno;
use crate::{Decoder, Entry, Error, Event, Kind, Limits, Time};

/// Bytes of directory names that are remembered, so that their times can be set at the end.
const MAX_REMEMBERED: usize = 64 << 20;
/// How often a name that someone else keeps occupying is cleared again.
const RACES: usize = 16;
/// Mode of a directory that the archive implies but does not list.
const IMPLIED_MODE: u32 = 0o755;
const OPAQUE: &[u8] = b"user.overlay.opaque";

/// Whose archive it is, and so what its members may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Files that a client sends into a directory of a sandbox.
    ///
    /// All of them get one owner. A link among the parents of a member is refused, devices and
    /// pipes are refused, set-id bits and extended attributes are dropped. A directory that exists
    /// keeps its owner, mode and times; a file that exists is replaced, never written to.
    Upload {
        /// Owner of everything that is created.
        uid: u32,
        /// Its group.
        gid: u32,
    },
    /// A layer of an image, unpacked into an empty directory that will be a lower of overlayfs.
    ///
    /// Owners are kept, up to 65535. Links among the parents of a member are followed as if the
    /// directory were `/`. `.wh.NAME` becomes a whiteout (character device 0:0) and `.wh..wh..opq`
    /// the attribute `user.overlay.opaque`. Devices, pipes, set-id bits of files, and all extended
    /// attributes but `user.*` (without `user.overlay.*`) are dropped and counted: none could act
    /// in a sandbox, where mounts are `nodev,nosuid` and `no_new_privs` is set.
    ///
    /// An archive that lacks its end blocks is unpacked, and [`Report::unterminated`] tells: who
    /// knows its digest knows that nothing is missing, and nobody else should use it.
    Layer,
}

/// Largest owner in a layer: a sandbox's user namespace has no more.
const MAX_LAYER_ID: u32 = 65_535;

impl Policy {
    fn resolve(self) -> u64 {
        match self {
            Self::Upload { .. } => libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS,
            Self::Layer => libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_XDEV,
        }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Members in the archive.
    pub entries: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Whiteouts and opaque marks.
    pub whiteouts: u64,
    /// Devices and pipes that were left out.
    pub special_skipped: u64,
    /// Files that lost a set-id bit.
    pub set_id_dropped: u64,
    /// Extended attributes that were left out.
    pub xattrs_dropped: u64,
    /// The end blocks are missing, so members may be too.
    pub unterminated: bool,
}

/// Unpacks an archive that arrives in pieces.
///
/// Each [`push`](Self::push) does work in proportion to the bytes it is given. After an error the
/// members that are there stay; whoever owns the directory removes it.
pub struct Unpack {
    root: OwnedFd,
    policy: Policy,
    decoder: Decoder,
    report: Report,
    /// The file whose content is arriving.
    file: Option<(File, Entry)>,
    /// The directory that was looked up last, under the name it was looked up by.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// Something was removed since, maybe that directory.
    parent_is_stale: bool,
    /// Directories whose times are set at the end, because filling them changes them.
    times: Vec<(Vec<u8>, Time)>,
    remembered: usize,
    failed: bool,
}

impl Unpack {
    /// Starts unpacking below `root`, a directory opened for reading.
    pub fn new(root: OwnedFd, policy: Policy, limits: Limits) -> Self {
        Self {
            root,
            policy,
            decoder: Decoder::new(limits),
            report: Report::default(),
            file: None,
            parent: None,
            parent_is_stale: false,
            times: Vec::new(),
            remembered: 0,
            failed: false,
        }
    }

    /// Takes the next bytes of the archive.
    ///
    /// # Errors
    ///
    /// Why the archive cannot be unpacked; every later call fails as well.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.failed {
            return Err(Error::Truncated);
        }
        let result = self.advance(bytes);
        self.failed = result.is_err();
        result
    }

    /// Ends the archive: checks that it is complete and sets the times of directories.
    ///
    /// # Errors
    ///
    /// [`Error::Truncated`] when members or the end are missing.
    pub fn finish(mut self) -> Result<Report, Error> {
        if self.failed {
            return Err(Error::Truncated);
        }
        if self.policy == Policy::Layer && self.decoder.is_unterminated() {
            self.report.unterminated = true;
        } else {
            self.decoder.finish()?;
        }
        let times = std::mem::take(&mut self.times);
        for (path, time) in times.iter().rev() {
            self.set_directory_time(path, *time)?;
        }
        self.report.entries = self.decoder.entries();
        self.report.bytes = self.decoder.bytes();
        Ok(self.report)
    }

    fn advance(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while let Some(event) = self.decoder.next(&mut bytes)? {
            match event {
                Event::Entry(entry) => self.begin(entry)?,
                Event::Data(data) => {
                    if let Some((file, entry)) = &mut self.file {
                        file.write_all(data).map_err(|error| Error::Os {
                            call: "write",
                            path: entry.path.clone(),
                            errno: error.raw_os_error().unwrap_or(libc::EIO),
                        })?;
                    }
                }
                Event::Done => {
                    if let Some((file, entry)) = self.file.take() {
                        self.complete(file.as_fd(), &entry)?;
                        set_time(file.as_fd(), entry.mtime, &entry.path)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, entry: Entry) -> Result<(), Error> {
        let path = entry.path.clone();
        let parts = components(&path)?;
        self.check_owner(&entry)?;
        let Some((name, above)) = parts.split_last() else {
            return self.root_entry(&entry);
        };
        if self.policy == Policy::Layer {
            if above.iter().any(|part| part.starts_with(b".wh.")) {
                return Err(Error::refused("below a whiteout", &entry.path));
            }
            if let Some(hidden) = name.strip_prefix(b".wh.") {
                return self.whiteout(above, hidden, &entry);
            }
        }
        match entry.kind {
            Kind::File => {
                self.make_parent(above)?;
                let fd = self.create(name, &entry.path)?;
                self.file = Some((File::from(fd), entry));
                Ok(())
            }
            Kind::Directory => self.directory(above, name, &entry),
            Kind::Symlink => self.symlink(above, name, &entry),
            Kind::Hardlink => self.hardlink(above, name, &entry),
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => match self.policy {
                Policy::Upload { .. } => Err(Error::refused("device or pipe", &entry.path)),
                Policy::Layer => {
                    self.report.special_skipped += 1;
                    Ok(())
                }
            },
        }
    }

    fn check_owner(&self, entry: &Entry) -> Result<(), Error> {
        let outside = entry.uid > MAX_LAYER_ID || entry.gid > MAX_LAYER_ID;
        if self.policy == Policy::Layer && outside {
            return Err(Error::refused("owner above 65535", &entry.path));
        }
        Ok(())
    }

    /// The directory itself is a member, as `./`.
    fn root_entry(&mut self, entry: &Entry) -> Result<(), Error> {
        if entry.kind != Kind::Directory {
            return Err(Error::refused("would replace the directory itself", &entry.path));
        }
        if self.policy == Policy::Layer {
            let root = beneath::open_at(self.root.as_fd(), b".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
            self.complete(root.as_fd(), entry)?;
            self.remember(Vec::new(), entry.mtime)?;
        }
        Ok(())
    }

    fn directory(&mut self, above: &[&[u8]], name: &[u8], entry: &Entry) -> Result<(), Error> {
        self.make_parent(above)?;
        let (fd, is_new) = self.make_directory(name, &entry.path)?;
        if is_new || self.policy == Policy::Layer {
            self.complete(fd.as_fd(), entry)?;
            let mut path = above.join(&b'/');
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            self.remember(path, entry.mtime)?;
        }
        Ok(())
    }

    fn symlink(&mut self, above: &[&[u8]], name: &[u8], entry: &Entry) -> Result<(), Error> {
        self.make_parent(above)?;
        let target = c_string(&entry.link)?;
        let text = c_string(name)?;
        self.in_free_place("symlinkat", name, &entry.path, |parent| {
            // SAFETY: both strings end in NUL and outlive the call.
            unsafe { libc::symlinkat(target.as_ptr(), parent.as_raw_fd(), text.as_ptr()) }
        })?;
        let link = beneath::open_at(self.parent_fd(), name, libc::O_PATH, 0)?;
        own(link.as_fd(), libc::S_IFLNK, &entry.path)?;
        self.set_owner(link.as_fd(), entry)?;
        self.report.xattrs_dropped += entry.xattrs.len() as u64;
        set_time(link.as_fd(), entry.mtime, &entry.path)
    }

    fn hardlink(&mut self, above: &[&[u8]], name: &[u8], entry: &Entry) -> Result<(), Error> {
        let parts = components(&entry.link)?;
        let (source_name, source_above) =
            parts.split_last().ok_or(Error::refused("hard link to the directory itself", &entry.path))?;
        let source = beneath::open(
            self.root.as_fd(),
            &dotted(source_above),
            libc::O_PATH | libc::O_DIRECTORY,
            self.policy.resolve(),
        )
        .map_err(|error| match error.errno() {
            Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::EXDEV) => {
                Error::refused("hard link to what is not there", &entry.path)
            }
            _ => error,
        })?;
        let stat = beneath::stat_at(source.as_fd(), source_name)
            .map_err(|_| Error::refused("hard link to what is not there", &entry.path))?;
        if !matches!(file_type(&stat), libc::S_IFREG | libc::S_IFLNK) {
            return Err(Error::refused("hard link to what is no file", &entry.path));
        }
        self.make_parent(above)?;
        let there = beneath::stat_at(self.parent_fd(), name);
        if there.is_ok_and(|there| (there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino)) {
            return Ok(());
        }
        let (old, new) = (c_string(source_name)?, c_string(name)?);
        self.in_free_place("linkat", name, &entry.path, |parent| {
            // SAFETY: both strings end in NUL and outlive the call. Without AT_SYMLINK_FOLLOW a link
            // that took the source's place is linked itself, not followed.
            unsafe { libc::linkat(source.as_raw_fd(), old.as_ptr(), parent.as_raw_fd(), new.as_ptr(), 0) }
        })
    }

    fn whiteout(&mut self, above: &[&[u8]], hidden: &[u8], entry: &Entry) -> Result<(), Error> {
        if !matches!(entry.kind, Kind::File | Kind::Hardlink) || entry.size != 0 {
            return Err(Error::refused("whiteout that is no empty file", &entry.path));
        }
        if hidden == b".wh..opq" {
            self.make_parent(above)?;
            self.report.whiteouts += 1;
            let directory = beneath::open_at(self.parent_fd(), b".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
            return set_xattr(directory.as_fd(), OPAQUE, b"y", &entry.path);
        }
        // Bookkeeping of aufs, which no longer means anything.
        if hidden.starts_with(b".wh.") {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Error::refused("whiteout of nothing", &entry.path));
        }
        self.make_parent(above)?;
        self.report.whiteouts += 1;
        let text = c_string(hidden)?;
        // SAFETY: `text` ends in NUL and outlives the call. Device 0:0 needs no privilege.
        let made = unsafe { libc::mknodat(self.parent_fd().as_raw_fd(), text.as_ptr(), libc::S_IFCHR, 0) };
        if made == 0 {
            return Ok(());
        }
        if last_errno() != libc::EEXIST {
            return Err(Error::last("mknodat", &entry.path));
        }
        // The layer brings its own under this name. A file hides the lower one by itself; a
        // directory must be told not to show the lower one's entries.
        match beneath::open_at(self.parent_fd(), hidden, libc::O_RDONLY | libc::O_DIRECTORY, 0) {
            Ok(directory) => set_xattr(directory.as_fd(), OPAQUE, b"y", &entry.path),
            Err(error) if matches!(error.errno(), Some(libc::ENOTDIR | libc::ELOOP)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes the directory `above` the one that [`parent_fd`](Self::parent_fd) answers, with what is missing of it.
    fn make_parent(&mut self, above: &[&[u8]]) -> Result<(), Error> {
        let path = dotted(above);
        if std::mem::take(&mut self.parent_is_stale) {
            self.parent = None;
        }
        if self.parent.as_ref().is_some_and(|(known, _)| *known == path) {
            return Ok(());
        }
        match self.look_up(&path) {
            Ok(fd) => self.parent = Some((path, fd)),
            Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                self.parent = Some((b".".to_vec(), self.look_up(b".")?));
                for depth in 1..=above.len() {
                    let (Some(upper), Some(name)) = (above.get(..depth), above.get(depth - 1)) else { break };
                    let prefix = dotted(upper);
                    let fd = match self.look_up(&prefix) {
                        Ok(fd) => fd,
                        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                            self.imply(name, &prefix)?
                        }
                        Err(error) => return Err(error),
                    };
                    self.parent = Some((prefix, fd));
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn look_up(&self, path: &[u8]) -> Result<OwnedFd, Error> {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        beneath::open(self.root.as_fd(), path, flags, self.policy.resolve()).map_err(|error| match error.errno() {
            Some(libc::ELOOP) => Error::refused("a link among the directories above", path),
            Some(libc::EXDEV) => Error::refused("outside of the directory", path),
            _ => error,
        })
    }

    /// Makes a directory that the archive does not list, in the current parent.
    fn imply(&mut self, name: &[u8], path: &[u8]) -> Result<OwnedFd, Error> {
        let there = beneath::stat_at(self.parent_fd(), name);
        if there.is_ok_and(|stat| !is_whiteout(&stat)) {
            return Err(Error::refused("what is above is no directory", path));
        }
        let (fd, _) = self.make_directory(name, path)?;
        let mut entry = Entry::new(path, Kind::Directory);
        entry.mode = IMPLIED_MODE;
        self.complete(fd.as_fd(), &entry)?;
        Ok(fd)
    }

    fn parent_fd(&self) -> BorrowedFd<'_> {
        self.parent.as_ref().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd())
    }

    /// Creates a file that was not there, whatever was there before.
    fn create(&mut self, name: &[u8], path: &[u8]) -> Result<OwnedFd, Error> {
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL;
        for _ in 0..RACES {
            match beneath::open_at(self.parent_fd(), name, flags, 0o600) {
                Err(error) if error.errno() == Some(libc::EEXIST) => self.clear(name, path)?,
                result => return result,
            }
        }
        Err(Error::refused("name is occupied again and again", path))
    }

    /// Opens the directory `name`, made if need be; was it made?
    fn make_directory(&mut self, name: &[u8], path: &[u8]) -> Result<(OwnedFd, bool), Error> {
        let text = c_string(name)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let mut was_whiteout = false;
        for _ in 0..RACES {
            // SAFETY: `text` ends in NUL and outlives the call.
            let made = unsafe { libc::mkdirat(self.parent_fd().as_raw_fd(), text.as_ptr(), 0o700) };
            if made == 0 {
                let fd = beneath::open_at(self.parent_fd(), name, flags, 0)?;
                own(fd.as_fd(), libc::S_IFDIR, path)?;
                if was_whiteout {
                    set_xattr(fd.as_fd(), OPAQUE, b"y", path)?;
                }
                return Ok((fd, true));
            }
            if last_errno() != libc::EEXIST {
                return Err(Error::last("mkdirat", path));
            }
            match beneath::open_at(self.parent_fd(), name, flags, 0) {
                Ok(fd) => return Ok((fd, false)),
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                Err(error) if matches!(error.errno(), Some(libc::ENOTDIR | libc::ELOOP)) => {
                    let there = beneath::stat_at(self.parent_fd(), name);
                    was_whiteout = self.policy == Policy::Layer && there.is_ok_and(|stat| is_whiteout(&stat));
                    self.clear(name, path)?;
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::refused("name is occupied again and again", path))
    }

    /// Runs a call that makes `name` in the current parent, again when something had to go first.
    fn in_free_place(
        &mut self,
        call: &'static str,
        name: &[u8],
        path: &[u8],
        make: impl Fn(BorrowedFd<'_>) -> i32,
    ) -> Result<(), Error> {
        for _ in 0..RACES {
            if make(self.parent_fd()) == 0 {
                return Ok(());
            }
            if last_errno() != libc::EEXIST {
                return Err(Error::last(call, path));
            }
            self.clear(name, path)?;
        }
        Err(Error::refused("name is occupied again and again", path))
    }

    /// Removes what lies under `name` in the current parent; a directory only when it is empty.
    fn clear(&mut self, name: &[u8], path: &[u8]) -> Result<(), Error> {
        let text = c_string(name)?;
        self.parent_is_stale = true;
        let parent = self.parent_fd().as_raw_fd();
        // SAFETY: `text` ends in NUL and outlives the call.
        let mut gone = unsafe { libc::unlinkat(parent, text.as_ptr(), 0) };
        if gone < 0 && matches!(last_errno(), libc::EISDIR | libc::EPERM) {
            // SAFETY: as above.
            gone = unsafe { libc::unlinkat(parent, text.as_ptr(), libc::AT_REMOVEDIR) };
        }
        if gone == 0 || last_errno() == libc::ENOENT {
            return Ok(());
        }
        if matches!(last_errno(), libc::ENOTEMPTY | libc::EEXIST) {
            return Err(Error::refused("would replace a directory that is not empty", path));
        }
        Err(Error::last("unlinkat", path))
    }

    /// Owner, attributes and mode; in this order, because a change of owner clears mode bits.
    fn complete(&mut self, fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), Error> {
        self.set_owner(fd, entry)?;
        for (name, value) in &entry.xattrs {
            let kept = name.starts_with(b"user.") && !name.starts_with(b"user.overlay.");
            if self.policy == Policy::Layer && kept {
                set_xattr(fd, name, value, &entry.path)?;
            } else {
                self.report.xattrs_dropped += 1;
            }
        }
        let mut mode = entry.mode & 0o7777;
        // Set-group-id on a directory hands on the group and gives nobody anything.
        let keeps_group = entry.kind == Kind::Directory && self.policy == Policy::Layer;
        let allowed = if keeps_group { 0o3777 } else { 0o1777 };
        if mode & !allowed != 0 {
            self.report.set_id_dropped += 1;
            mode &= allowed;
        }
        // SAFETY: a plain call on a descriptor that is open.
        check("fchmod", &entry.path, unsafe { libc::fchmod(fd.as_raw_fd(), mode) })
    }

    fn set_owner(&self, fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), Error> {
        let (uid, gid) = match self.policy {
            Policy::Upload { uid, gid } => (uid, gid),
            Policy::Layer => (entry.uid, entry.gid),
        };
        // SAFETY: the empty string ends in NUL; with AT_EMPTY_PATH the descriptor itself is meant.
        let done = unsafe { libc::fchownat(fd.as_raw_fd(), c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH) };
        check("fchownat", &entry.path, done)
    }

    fn remember(&mut self, path: Vec<u8>, time: Time) -> Result<(), Error> {
        self.remembered += path.len() + size_of::<(Vec<u8>, Time)>();
        if self.remembered > MAX_REMEMBERED {
            return Err(Error::Limit { what: "bytes of directory names", limit: MAX_REMEMBERED as u64 });
        }
        self.times.push((path, time));
        Ok(())
    }

    fn set_directory_time(&self, path: &[u8], time: Time) -> Result<(), Error> {
        let shown = if path.is_empty() { b".".as_slice() } else { path };
        // Without O_PATH a link in the last place would be followed, so the policy's rule for
        // parents holds for it too. What is gone or no directory any more needs no time.
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        match beneath::open(self.root.as_fd(), shown, flags, self.policy.resolve()) {
            Ok(fd) => set_time(fd.as_fd(), time, path),
            Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::EXDEV)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Splits a name into what lies between its slashes.
///
/// `.` is dropped, a leading slash too (`/etc` in an archive means `etc`); `..` is refused.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, Error> {
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    for part in &parts {
        if *part == b".." {
            return Err(Error::refused("`..` in a name", path));
        }
        if part.len() > 255 {
            return Err(Error::Limit { what: "bytes in a component of a name", limit: 255 });
        }
    }
    Ok(parts)
}

/// A relative path of these components; the directory itself is `.`.
fn dotted(parts: &[&[u8]]) -> Vec<u8> {
    if parts.is_empty() { b".".to_vec() } else { parts.join(&b'/') }
}

/// Checks that what was opened after it was made is what was made.
///
/// Between the two calls a process of the sandbox may have put something else there. It cannot put
/// there a link or directory that belongs to this process, so the owner tells.
fn own(fd: BorrowedFd<'_>, kind: u32, path: &[u8]) -> Result<(), Error> {
    let stat = beneath::stat(fd, path)?;
    // SAFETY: a plain call without arguments.
    let me = unsafe { libc::geteuid() };
    if file_type(&stat) == kind && stat.st_uid == me {
        Ok(())
    } else {
        Err(Error::refused("changed by somebody else meanwhile", path))
    }
}

fn set_xattr(fd: BorrowedFd<'_>, name: &[u8], value: &[u8], path: &[u8]) -> Result<(), Error> {
    let name = c_string(name)?;
    // SAFETY: `name` ends in NUL, `value` is valid for its length, both outlive the call.
    let done = unsafe { libc::fsetxattr(fd.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    check("fsetxattr", path, done)
}

fn set_time(fd: BorrowedFd<'_>, time: Time, path: &[u8]) -> Result<(), Error> {
    let stamp = libc::timespec { tv_sec: time.secs, tv_nsec: i64::from(time.nanos) };
    let stamps = [stamp, stamp];
    // SAFETY: two timespecs as utimensat(2) wants them, and an empty string that ends in NUL; both
    // outlive the call. With AT_EMPTY_PATH the descriptor itself is meant, a link as well.
    let done = unsafe { libc::utimensat(fd.as_raw_fd(), c"".as_ptr(), stamps.as_ptr(), libc::AT_EMPTY_PATH) };
    check("utimensat", path, done)
}
