//! Archives made by hand, honest and hostile.

#![allow(dead_code, reason = "each test program uses some of it")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, missing_docs, reason = "helpers of tests")]

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use shoal_archive::{Decoder, Entry, Error, Event, Kind, Limits, Policy, Report, Unpack, encode, trailer};

/// A directory that goes away with its owner.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("shoal-archive-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// A directory in it.
    pub fn make(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn is_root() -> bool {
    // SAFETY: a plain call.
    unsafe { libc::geteuid() == 0 }
}

/// For what needs to change owners or make device nodes; says so when it cannot run.
#[macro_export]
macro_rules! need_root {
    () => {
        if !$crate::common::is_root() {
            eprintln!("not run: needs root, to change owners and make device nodes");
            return;
        }
    };
}

pub fn open_directory(path: &Path) -> OwnedFd {
    fs::File::open(path).unwrap().into()
}

/// An archive that is written member by member.
#[derive(Default, Clone)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn entry(mut self, mut entry: Entry, content: &[u8]) -> Self {
        entry.size = content.len() as u64;
        let encoded = encode(&entry).unwrap();
        self.0.extend_from_slice(&encoded.header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len() + encoded.padding, 0);
        self
    }

    #[must_use]
    pub fn file(self, path: &str, content: &[u8]) -> Self {
        let mut entry = Entry::new(path, Kind::File);
        entry.mode = 0o644;
        self.entry(entry, content)
    }

    #[must_use]
    pub fn directory(self, path: &str) -> Self {
        let mut entry = Entry::new(path, Kind::Directory);
        entry.mode = 0o755;
        self.entry(entry, b"")
    }

    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.link(Kind::Symlink, path, target)
    }

    #[must_use]
    pub fn hardlink(self, path: &str, target: &str) -> Self {
        self.link(Kind::Hardlink, path, target)
    }

    fn link(self, kind: Kind, path: &str, target: &str) -> Self {
        let mut entry = Entry::new(path, kind);
        entry.mode = 0o777;
        entry.link = target.into();
        self.entry(entry, b"")
    }

    /// A header made by hand, then content as it is.
    #[must_use]
    pub fn raw(mut self, header: Header, content: &[u8]) -> Self {
        self.0.extend_from_slice(&header.sealed());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A pax header with these records, whatever they say.
    #[must_use]
    pub fn pax(self, records: &[u8]) -> Self {
        self.raw(Header::new("pax", b'x', records.len() as u64), records)
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&trailer());
        self.0
    }
}

/// One record of a pax header.
pub fn record(key: &str, value: &str) -> Vec<u8> {
    let bare = key.len() + value.len() + 3;
    let mut length = bare;
    while bare + length.to_string().len() != length {
        length = bare + length.to_string().len();
    }
    format!("{length} {key}={value}\n").into_bytes()
}

/// A header block whose every byte can be changed.
#[derive(Clone)]
pub struct Header(pub [u8; 512]);

impl Header {
    pub fn new(path: &str, flag: u8, size: u64) -> Self {
        let mut entry = Entry::new("x", Kind::File);
        entry.mode = 0o644;
        let mut block: [u8; 512] = encode(&entry).unwrap().header.try_into().unwrap();
        block[..100].fill(0);
        block[..path.len()].copy_from_slice(path.as_bytes());
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        block[156] = flag;
        Self(block)
    }

    #[must_use]
    pub fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn sealed(mut self) -> [u8; 512] {
        self.0[148..156].fill(b' ');
        let sum: u32 = self.0.iter().map(|byte| u32::from(*byte)).sum();
        self.0[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

/// Members and content of an archive, fed in pieces of `step` bytes.
pub fn read(archive: &[u8], step: usize, limits: Limits) -> Result<Vec<(Entry, Vec<u8>)>, Error> {
    let mut decoder = Decoder::new(limits);
    let mut members = Vec::new();
    for mut piece in archive.chunks(step.max(1)) {
        while let Some(event) = decoder.next(&mut piece)? {
            match event {
                Event::Entry(entry) => members.push((entry, Vec::new())),
                Event::Data(data) => members.last_mut().unwrap().1.extend_from_slice(data),
                Event::Done => {}
            }
        }
    }
    decoder.finish()?;
    Ok(members)
}

pub fn members(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, Error> {
    read(archive, archive.len(), Limits::default())
}

pub fn unpack(archive: &[u8], target: &Path, policy: Policy) -> Result<Report, Error> {
    let mut unpack = Unpack::new(open_directory(target), policy, Limits::default());
    for piece in archive.chunks(777) {
        unpack.push(piece)?;
    }
    unpack.finish()
}

/// A client's upload as whoever runs the test.
pub fn upload() -> Policy {
    // SAFETY: plain calls.
    unsafe { Policy::Upload { uid: libc::geteuid(), gid: libc::getegid() } }
}

/// Every path below a directory with its kind and content, to compare before and after.
pub fn census(root: &Path) -> Vec<String> {
    fn walk(path: &Path, found: &mut Vec<String>) {
        let meta = fs::symlink_metadata(path).unwrap();
        let what = if meta.is_dir() {
            "directory".to_owned()
        } else if meta.is_symlink() {
            format!("-> {}", fs::read_link(path).unwrap().display())
        } else if meta.is_file() {
            format!("{:?}", fs::read(path).unwrap())
        } else {
            "special".to_owned()
        };
        found.push(format!("{} {what}", path.display()));
        if meta.is_dir() {
            let mut children: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
            children.sort();
            for child in children {
                walk(&child, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(root, &mut found);
    found
}
