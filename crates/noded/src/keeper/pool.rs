//! The disk pool: a btrfs file system in a loop file, with simple quotas.
//!
//! A subvolume with a hard limit costs about 0.05 ms to make and 0.03 ms to drop, the offender alone
//! gets EDQUOT, and a snapshot of an upper directory is one more call of the same kind. The pool is
//! mounted in the keeper's own mount namespace and nowhere else, from a loop device that clears
//! itself: when the keeper and the last sandbox are gone, so are mount and device.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use super::error::{Error, Result};
use super::sys::{self, FsContext};

/// The mounted pool.
pub struct Pool {
    mount: OwnedFd,
    layers: OwnedFd,
    sandboxes: OwnedFd,
}

/// A layer on its way has this before its name.
const UNCOMMITTED: &str = ".new-";

impl Pool {
    /// Mounts the pool file as a detached mount; attach [`Pool::mount`] before layers are cloned.
    pub fn open(file: &str) -> Result<OwnedFd> {
        let device = attach_loop(file)?;
        let context = FsContext::open("btrfs")?;
        context.set("source", &device.path)?;
        // What a sandbox wrote means nothing after a crash, so the log need not be flushed often.
        context.set("commit", "120")?;
        context.set("discard", "async")?;
        let mount = context.mount(sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV | sys::MOUNT_ATTR_NOATIME)?;
        drop(device);
        Ok(mount)
    }

    /// Takes the pool at the place where it is attached now, and drops what a dead keeper left in it.
    pub fn take(path: &str) -> Result<Self> {
        let mount = sys::open(path, libc::O_RDONLY | libc::O_DIRECTORY)?;
        enable_simple_quotas(mount.as_fd())?;
        for name in ["layers", "sandboxes"] {
            match sys::mkdirat(mount.as_fd(), name, 0o700) {
                Err(error) if error.errno != libc::EEXIST => return Err(error),
                _ => {}
            }
        }
        let layers = sys::open(&format!("{path}/layers"), libc::O_RDONLY | libc::O_DIRECTORY)?;
        let sandboxes = sys::open(&format!("{path}/sandboxes"), libc::O_RDONLY | libc::O_DIRECTORY)?;
        let pool = Self { mount, layers, sandboxes };
        for name in names(pool.sandboxes.as_fd())? {
            drop_subvolume(pool.sandboxes.as_fd(), &name)?;
        }
        pool.discard_uncommitted()?;
        Ok(pool)
    }

    /// The pool's root directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Bytes in all, and bytes free.
    pub fn space(&self) -> Result<(u64, u64)> {
        // SAFETY: all-zero is a valid statfs, which the kernel fills.
        let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: an open descriptor and room for one structure.
        if unsafe { libc::fstatfs(self.mount.as_raw_fd(), &raw mut stat) } < 0 {
            return Err(Error::last("fstatfs", "pool"));
        }
        let block = stat.f_bsize as u64;
        Ok((stat.f_blocks * block, stat.f_bavail * block))
    }

    /// Makes a sandbox's writable directories `upper` and `work`, limited to `limit` bytes together.
    pub fn make_sandbox(&self, id: &str, limit: u64) -> Result<()> {
        let volume = make_subvolume(self.sandboxes.as_fd(), id, limit)?;
        sys::mkdirat(volume.as_fd(), "upper", 0o755)?;
        sys::mkdirat(volume.as_fd(), "work", 0o700)
    }

    /// Drops a sandbox's directories; none is no error.
    pub fn drop_sandbox(&self, id: &str) -> Result<()> {
        drop_subvolume(self.sandboxes.as_fd(), id)
    }

    /// Makes an empty directory for a layer to come, limited to `limit` bytes.
    pub fn make_layer(&self, name: &str, limit: u64) -> Result<OwnedFd> {
        make_subvolume(self.layers.as_fd(), &format!("{UNCOMMITTED}{name}"), limit)
    }

    /// Drops a layer that was not committed; none is no error.
    pub fn discard_layer(&self, name: &str) -> Result<()> {
        drop_subvolume(self.layers.as_fd(), &format!("{UNCOMMITTED}{name}"))
    }

    /// Drops all layers that were not committed: whoever unpacked them is gone.
    pub fn discard_uncommitted(&self) -> Result<()> {
        for name in names(self.layers.as_fd())? {
            if name.starts_with(UNCOMMITTED) {
                drop_subvolume(self.layers.as_fd(), &name)?;
            }
        }
        Ok(())
    }

    /// Gives a layer its final name; true when it was there already, and then the new one is dropped.
    pub fn commit_layer(&self, name: &str, diff_id: &str) -> Result<bool> {
        let from = sys::c_string(format!("{UNCOMMITTED}{name}"))?;
        let to = sys::c_string(diff_id)?;
        let layers = self.layers.as_raw_fd();
        // SAFETY: both names end in NUL and outlive the call.
        let moved = unsafe { libc::renameat2(layers, from.as_ptr(), layers, to.as_ptr(), libc::RENAME_NOREPLACE) };
        if moved == 0 {
            return Ok(false);
        }
        let error = Error::last("renameat2", diff_id);
        if error.errno != libc::EEXIST {
            return Err(error);
        }
        self.discard_layer(name)?;
        Ok(true)
    }

    /// Removes a layer; none is no error.
    pub fn remove_layer(&self, diff_id: &str) -> Result<()> {
        drop_subvolume(self.layers.as_fd(), diff_id)
    }

    /// diffIDs of the layers that are there.
    pub fn layers(&self) -> Result<Vec<String>> {
        Ok(names(self.layers.as_fd())?.into_iter().filter(|name| !name.starts_with(UNCOMMITTED)).collect())
    }
}

/// Names in a directory.
fn names(dir: BorrowedFd<'_>) -> Result<Vec<String>> {
    let path = format!("/proc/self/fd/{}", dir.as_raw_fd());
    let entries = std::fs::read_dir(&path).map_err(|error| Error::io("opendir", "pool", &error))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("readdir", "pool", &error))?;
        found.push(entry.file_name().to_string_lossy().into_owned());
    }
    Ok(found)
}

struct LoopDevice {
    path: String,
    /// Held until the mount holds the device itself: it clears itself when nobody has it open.
    _open: OwnedFd,
}

/// The loop device over `file`: the one a dead keeper's sandboxes may still use, or a new one.
///
/// A second device over the same file would be a second, unaware owner of one file system.
fn attach_loop(file: &str) -> Result<LoopDevice> {
    // As the kernel names it, for the comparison below.
    let file = std::fs::canonicalize(file).map_err(|error| Error::io("realpath", file, &error))?;
    let file = &*file.to_string_lossy();
    let backing = sys::open(file, libc::O_RDWR)?;
    let meta = std::fs::metadata(format!("/proc/self/fd/{}", backing.as_raw_fd()))
        .map_err(|error| Error::io("stat", file, &error))?;
    if let Ok(entries) = std::fs::read_dir("/sys/block") {
        for name in entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()) {
            let path = format!("/dev/{name}");
            if name.starts_with("loop") && std::fs::exists(format!("/sys/block/{name}/loop")).unwrap_or(false) {
                let device = sys::open(&path, libc::O_RDWR)?;
                if loop_backing(device.as_fd()) == Some(meta.ino()) && backing_path(&name).as_deref() == Some(file) {
                    return Ok(LoopDevice { path, _open: device });
                }
            }
        }
    }
    let control = sys::open("/dev/loop-control", libc::O_RDWR)?;
    let mut last = Error::other("syscall_failed", "no free loop device");
    // Another process may take the number that we were told; then ask again.
    for _ in 0..64 {
        // SAFETY: this request takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(Error::last("LOOP_CTL_GET_FREE", file));
        }
        let path = format!("/dev/loop{number}");
        let device = sys::open(&path, libc::O_RDWR)?;
        // SAFETY: all-zero is a valid loop_config.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = backing.as_raw_fd() as u32;
        config.block_size = 4096;
        config.info.flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
        // SAFETY: the structure is what the request takes.
        if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } == 0 {
            return Ok(LoopDevice { path, _open: device });
        }
        last = Error::last("LOOP_CONFIGURE", path);
        if last.errno == libc::EINVAL && config.info.flags & LO_FLAGS_DIRECT_IO != 0 {
            // The file system under the pool cannot do direct I/O.
            config.info.flags &= !LO_FLAGS_DIRECT_IO;
            // SAFETY: as above.
            if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } == 0 {
                return Ok(LoopDevice { path: format!("/dev/loop{number}"), _open: device });
            }
        }
        if last.errno != libc::EBUSY {
            break;
        }
    }
    Err(last)
}

fn loop_backing(device: BorrowedFd<'_>) -> Option<u64> {
    // SAFETY: all-zero is a valid loop_info64, which the kernel fills.
    let mut info: LoopInfo = unsafe { std::mem::zeroed() };
    // SAFETY: room for one structure.
    let got = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
    (got == 0).then_some(info.inode)
}

fn backing_path(name: &str) -> Option<String> {
    Some(std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?.trim_end().to_owned())
}

fn enable_simple_quotas(root: BorrowedFd<'_>) -> Result<()> {
    let mut control = QuotaControl { command: QUOTA_CTL_ENABLE_SIMPLE, status: 0 };
    // SAFETY: the structure is what the request takes.
    if unsafe { libc::ioctl(root.as_raw_fd(), BTRFS_IOC_QUOTA_CTL, &raw mut control) } < 0 {
        return Err(Error::last("BTRFS_IOC_QUOTA_CTL", "simple quotas"));
    }
    Ok(())
}

fn volume_args(name: &str) -> Result<Box<VolumeArgs>> {
    let mut args = Box::new(VolumeArgs { fd: 0, name: [0; 4088] });
    let bytes = CString::new(name).map_err(|_| Error::invalid("a NUL byte in a name"))?;
    let bytes = bytes.as_bytes_with_nul();
    args.name.get_mut(..bytes.len()).ok_or_else(|| Error::invalid("name too long"))?.copy_from_slice(bytes);
    Ok(args)
}

fn make_subvolume(parent: BorrowedFd<'_>, name: &str, limit: u64) -> Result<OwnedFd> {
    let args = volume_args(name)?;
    // SAFETY: the structure is what the request takes.
    if unsafe { libc::ioctl(parent.as_raw_fd(), BTRFS_IOC_SUBVOL_CREATE, &raw const *args) } < 0 {
        return Err(Error::last("BTRFS_IOC_SUBVOL_CREATE", name));
    }
    let limited = limit_subvolume(parent, name, limit);
    if limited.is_err() {
        drop_subvolume(parent, name)?;
    }
    limited
}

fn limit_subvolume(parent: BorrowedFd<'_>, name: &str, limit: u64) -> Result<OwnedFd> {
    let c_name = sys::c_string(name)?;
    // SAFETY: the name ends in NUL and outlives the call.
    let fd = unsafe {
        libc::openat(
            parent.as_raw_fd(),
            c_name.as_ptr(),
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(Error::last("openat", name));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let volume = unsafe { OwnedFd::from_raw_fd(fd) };
    let args = QgroupLimit { qgroup: 0, flags: QGROUP_LIMIT_MAX_RFER, max_rfer: limit, rest: [0; 3] };
    // SAFETY: the structure is what the request takes; group 0 is the subvolume's own.
    if unsafe { libc::ioctl(volume.as_raw_fd(), BTRFS_IOC_QGROUP_LIMIT, &raw const args) } < 0 {
        return Err(Error::last("BTRFS_IOC_QGROUP_LIMIT", name));
    }
    Ok(volume)
}

fn drop_subvolume(parent: BorrowedFd<'_>, name: &str) -> Result<()> {
    let args = volume_args(name)?;
    // SAFETY: the structure is what the request takes.
    if unsafe { libc::ioctl(parent.as_raw_fd(), BTRFS_IOC_SNAP_DESTROY, &raw const *args) } < 0 {
        let error = Error::last("BTRFS_IOC_SNAP_DESTROY", name);
        if error.errno != libc::ENOENT {
            return Err(error);
        }
    }
    Ok(())
}

/// Source: linux/loop.h, `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    names: [u8; 160],
    init: [u64; 2],
}

/// Source: linux/loop.h, `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// Source: linux/btrfs.h, `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct VolumeArgs {
    fd: i64,
    name: [u8; 4088],
}

/// Source: linux/btrfs.h, `struct btrfs_ioctl_quota_ctl_args`.
#[repr(C)]
struct QuotaControl {
    command: u64,
    status: u64,
}

/// Source: linux/btrfs.h, `struct btrfs_ioctl_qgroup_limit_args`.
#[repr(C)]
struct QgroupLimit {
    qgroup: u64,
    flags: u64,
    max_rfer: u64,
    rest: [u64; 3],
}

const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const BTRFS_IOC_SUBVOL_CREATE: libc::Ioctl = 0x5000_940e;
const BTRFS_IOC_SNAP_DESTROY: libc::Ioctl = 0x5000_940f;
const BTRFS_IOC_QUOTA_CTL: libc::Ioctl = 0xc010_9428;
const BTRFS_IOC_QGROUP_LIMIT: libc::Ioctl = 0x8030_942b;
/// Source: linux/btrfs.h, `BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA`; since Linux 6.7.
const QUOTA_CTL_ENABLE_SIMPLE: u64 = 4;
const QGROUP_LIMIT_MAX_RFER: u64 = 1;
