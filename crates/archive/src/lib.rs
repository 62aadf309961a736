//! Strict tar reading and writing, and unpacking below a directory.
//!
//! An archive is hostile input here: a member's name, a link's target, a header's numbers were
//! chosen by a stranger. So there are four layers, each small enough to read at a sitting:
//!
//! - [`Decoder`] turns bytes into [`Event`]s and refuses whatever two parsers could read in two
//!   ways. It does no I/O and holds at most [`MAX_META`] bytes.
//! - [`encode`] writes what the decoder (and any other tar) reads.
//! - [`Unpack`] puts members below a directory. Every path goes through `openat2` from that
//!   directory; nothing outside it is ever named.
//! - [`Pack`] turns a file or a tree into an archive, a chunk at a time.
//!
//! `Unpack` and `Pack` are state machines that do a bounded amount of work per call, for a caller
//! with one thread and a poll loop.
//!
//! Source: `pax(1)` of POSIX.1-2017, "ustar Interchange Format" and "pax Header Block"; `tar(5)` of
//! libarchive; the GNU tar manual, "Basic Tar Format"; OCI image-spec, `layer.md`.

mod beneath;
mod decode;
mod encode;
mod error;
mod pack;
mod unpack;

pub use decode::{Decoder, Event, Limits, MAX_META};
pub use encode::{Encoded, encode, trailer};
pub use error::Error;
pub use pack::{Pack, Packed};
pub use unpack::{Policy, Report, Unpack};

/// Bytes of a tar block: headers are one block, contents are padded to whole blocks.
pub const BLOCK: usize = 512;

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link; its target is in [`Entry::link`].
    Symlink,
    /// Another name of an earlier member, which [`Entry::link`] names.
    Hardlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
}

/// A point in time, as a file system keeps it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds since 1970; negative before.
    pub secs: i64,
    /// Nanoseconds after `secs`, below 1,000,000,000.
    pub nanos: u32,
}

/// A member's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name as the archive has it: not empty, without NUL; not yet checked for `..`.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Target of a symbolic or hard link, else empty.
    pub link: Vec<u8>,
    /// Permission bits, at most `0o7777`.
    pub mode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Bytes of content; 0 for all but files.
    pub size: u64,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes, by full name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    /// A member of this name and kind, owned by root, with no content and no permissions.
    pub fn new(path: impl Into<Vec<u8>>, kind: Kind) -> Self {
        Self {
            path: path.into(),
            kind,
            link: Vec::new(),
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Time::default(),
            xattrs: Vec::new(),
        }
    }
}
