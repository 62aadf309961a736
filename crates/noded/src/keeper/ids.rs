//! Blocks of host ids: a node takes one when it needs it, and no two nodes on a machine have the same.
//!
//! A block is a byte of one file that everybody locks. The kernel gives the lock back when the
//! keeper ends, however it ends.

use std::os::fd::{AsRawFd, OwnedFd};

use super::error::{Error, Result};
use super::spec::{FIRST_ID, IDS_PER_SANDBOX};

/// Ranges in a block; one sandbox needs one.
pub const BLOCK: u32 = 512;
/// Blocks that fit below `(uid_t)-1`.
const BLOCKS: u32 = (u32::MAX - FIRST_ID) / IDS_PER_SANDBOX / BLOCK;

/// The blocks that this node has.
pub struct Ids {
    file: OwnedFd,
    /// Number of each block.
    blocks: Vec<u32>,
}

impl Ids {
    /// Starts with none, on the file that all nodes of the machine share.
    pub fn open(path: &str) -> Result<Self> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|error| Error::io("open", path, &error))?;
        Ok(Self { file: file.into(), blocks: Vec::new() })
    }

    /// Takes the lowest block that nobody has; its first range's number.
    pub fn claim(&mut self) -> Result<u32> {
        for block in (0..BLOCKS).filter(|block| !self.blocks.contains(block)) {
            // SAFETY: all-zero is a valid flock structure.
            let mut lock: libc::flock = unsafe { std::mem::zeroed() };
            lock.l_type = libc::F_WRLCK as libc::c_short;
            lock.l_whence = libc::SEEK_SET as libc::c_short;
            lock.l_start = libc::off_t::from(block);
            lock.l_len = 1;
            // SAFETY: one structure. This kind of lock belongs to our opening of the file, not to the process.
            if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
                self.blocks.push(block);
                return Ok(block * BLOCK);
            }
            let error = Error::last("F_OFD_SETLK", "ids");
            if error.errno != libc::EAGAIN && error.errno != libc::EACCES {
                return Err(error);
            }
        }
        Err(Error::other("ids_exhausted", "all ranges of host ids are taken"))
    }

    /// The blocks taken so far, each by its first range's number.
    pub fn blocks(&self) -> Vec<u32> {
        self.blocks.iter().map(|block| block * BLOCK).collect()
    }

    /// Whether the range that begins with this host id is in a block of ours.
    pub fn has(&self, host_id: u32) -> bool {
        host_id.checked_sub(FIRST_ID).is_some_and(|offset| self.blocks.contains(&(offset / IDS_PER_SANDBOX / BLOCK)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_nodes_never_have_the_same_block_and_a_dead_one_has_none() {
        let path = std::env::temp_dir().join(format!("shoal-ids-{}", std::process::id()));
        let path = path.to_str().unwrap();
        let mut one = Ids::open(path).unwrap();
        let mut other = Ids::open(path).unwrap();
        assert_eq!((one.claim().unwrap(), other.claim().unwrap(), one.claim().unwrap()), (0, BLOCK, 2 * BLOCK));
        assert_eq!(one.blocks(), [0, 2 * BLOCK]);
        assert!(one.has(FIRST_ID) && one.has(FIRST_ID + IDS_PER_SANDBOX * (BLOCK - 1)));
        assert!(!one.has(FIRST_ID + IDS_PER_SANDBOX * BLOCK) && !one.has(FIRST_ID - 1));
        drop(one);
        assert_eq!(other.claim().unwrap(), 0);
        while let Ok(first) = other.claim() {
            let last = u64::from(FIRST_ID) + u64::from(first + BLOCK) * u64::from(IDS_PER_SANDBOX);
            assert!(u32::try_from(last).is_ok());
        }
        assert_eq!(other.claim().unwrap_err().code, "ids_exhausted");
        std::fs::remove_file(path).unwrap();
    }
}
