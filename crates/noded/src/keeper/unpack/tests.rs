//! IM-01 to IM-05 and IM-07 through the real worker: as root, on a real file system.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "helpers of tests fail like tests")]

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use shoal_archive::{Entry, Kind, encode, trailer};

use super::super::error::Error;
use super::super::sys;
use super::{Request, Unpacked, Worker, outcome, spawn};

/// Far from what a node gives to sandboxes; nothing but these tests runs as these ids.
const HOST_ID: u32 = 2_000_000_000;

macro_rules! need_root {
    () => {
        // SAFETY: a plain call.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("not run: needs root, as the worker's walls are namespaces and an idmapped mount");
            return;
        }
    };
}

/// A target directory with a neighbour that must not change.
struct Yard {
    path: PathBuf,
}

impl Yard {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("shoal-unpack-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        fs::create_dir(path.join("target")).unwrap();
        fs::create_dir(path.join("outside")).unwrap();
        fs::set_permissions(path.join("outside"), fs::Permissions::from_mode(0o777)).unwrap();
        fs::write(path.join("outside/file"), b"untouched").unwrap();
        fs::set_permissions(path.join("outside/file"), fs::Permissions::from_mode(0o666)).unwrap();
        Self { path }
    }

    fn target(&self, name: &str) -> PathBuf {
        self.path.join("target").join(name)
    }

    fn is_untouched(&self) {
        let names = |path: &Path| {
            let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&self.path.join("outside")), ["file"]);
        assert_eq!(fs::read(self.path.join("outside/file")).unwrap(), b"untouched");
        assert_eq!(names(&self.path).len(), 2 + usize::from(self.path.join("blob").exists()));
    }

    fn unpack(&self, blob: &[u8]) -> Result<Unpacked, Error> {
        self.unpack_with(blob, &Settings::default())
    }

    fn unpack_with(&self, blob: &[u8], settings: &Settings) -> Result<Unpacked, Error> {
        fs::write(self.path.join("blob"), blob).unwrap();
        as_keeper(|| {
            let worker = self.start(settings).map_err(|error| (error, 0))?;
            finish(&worker)
        })
    }

    fn start(&self, settings: &Settings) -> Result<Worker, Error> {
        let blob = fs::File::open(self.path.join("blob")).unwrap();
        let target = fs::File::open(self.path.join("target")).unwrap();
        spawn(&Request {
            blob: blob.as_fd(),
            length: settings.length,
            target: target.as_fd(),
            host_id: HOST_ID,
            max_bytes: settings.max_bytes,
            max_entries: settings.max_entries,
            cpu_seconds: settings.cpu_seconds,
        })
    }
}

impl Drop for Yard {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

struct Settings {
    length: Option<u64>,
    max_bytes: u64,
    max_entries: u64,
    cpu_seconds: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { length: None, max_bytes: 64 << 20, max_entries: 10_000, cpu_seconds: 60 }
    }
}

/// Waits for a worker as the keeper's poll loop does.
fn finish(worker: &Worker) -> Result<(Unpacked, i32), (Error, i32)> {
    let mut report = Vec::new();
    let end = Instant::now() + Duration::from_mins(2);
    loop {
        let mut poll = libc::pollfd { fd: worker.report.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, which outlives the call.
        unsafe { libc::poll(&raw mut poll, 1, 1000) };
        if worker.read(&mut report).map_err(|error| (error, 0))? {
            break;
        }
        assert!(Instant::now() < end, "the worker is silent");
    }
    let mut status = 0;
    // SAFETY: room for one status.
    unsafe { libc::waitpid(worker.pid, &raw mut status, 0) };
    outcome(&report, status).map(|unpacked| (unpacked, status)).map_err(|error| (error, status))
}

/// Runs `body` in a process of one thread, which the keeper is and a test is not.
fn as_keeper(body: impl FnOnce() -> Result<(Unpacked, i32), (Error, i32)>) -> Result<Unpacked, Error> {
    let (read, write) = sys::pipe().unwrap();
    // SAFETY: the C library makes its own state whole in the child; the child ends in `_exit`.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let told = match body() {
            Ok((unpacked, _)) => serde_json::to_vec(&Ok::<_, (String, String, i32)>(unpacked)),
            Err((error, _)) => {
                serde_json::to_vec(&Err::<Unpacked, _>((error.code.to_owned(), error.message, error.errno)))
            }
        };
        // SAFETY: the descriptor is this process's own; it ends right after.
        let mut pipe = unsafe { fs::File::from_raw_fd(write.as_raw_fd()) };
        let _ = pipe.write_all(&told.unwrap());
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) };
    }
    drop(write);
    let mut told = Vec::new();
    fs::File::from(read).read_to_end(&mut told).unwrap();
    sys::wait(pid);
    let told: Result<Unpacked, (String, String, i32)> = serde_json::from_slice(&told).unwrap();
    told.map_err(|(code, message, errno)| {
        let code = if code == "bad_layer" { "bad_layer" } else { "other" };
        let mut error = Error::other(code, message);
        error.errno = errno;
        error
    })
}

fn bad(result: Result<Unpacked, Error>, about: &str) {
    match result {
        Err(error) if error.code == "bad_layer" => {
            assert!(error.message.contains(about), "{:?} is not about {about:?}", error.message);
        }
        other => panic!("expected a bad layer ({about}), got {other:?}"),
    }
}

#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(mut self, mut entry: Entry, content: &[u8]) -> Self {
        entry.size = content.len() as u64;
        let encoded = encode(&entry).unwrap();
        self.0.extend_from_slice(&encoded.header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len() + encoded.padding, 0);
        self
    }

    fn file(self, path: &str, content: &[u8]) -> Self {
        let mut entry = Entry::new(path, Kind::File);
        entry.mode = 0o644;
        self.entry(entry, content)
    }

    fn directory(self, path: &str) -> Self {
        let mut entry = Entry::new(path, Kind::Directory);
        entry.mode = 0o755;
        self.entry(entry, b"")
    }

    fn link(self, kind: Kind, path: &str, target: &str) -> Self {
        let mut entry = Entry::new(path, kind);
        entry.link = target.into();
        self.entry(entry, b"")
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&trailer());
        self.0
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

fn hex_sha256(bytes: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn sample() -> Vec<u8> {
    let mut owned = Entry::new("home/user/file", Kind::File);
    (owned.uid, owned.gid, owned.mode) = (1000, 65_535, 0o600);
    Tar::default().directory("./").entry(owned, &vec![5; 200_000]).link(Kind::Symlink, "bin", "usr/bin").end()
}

#[test]
fn a_layer_lands_with_its_own_ids_whatever_its_compression() {
    need_root!();
    let tar = sample();
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &zstd(&tar)].concat();
    let halves = [gzip(&tar[..1000]), gzip(&tar[1000..])].concat();
    let frames = [zstd(&tar[..1000]), zstd(&tar[1000..])].concat();
    for (blob, compression) in [
        (tar.clone(), "none"),
        (gzip(&tar), "gzip"),
        (halves, "gzip"),
        (zstd(&tar), "zstd"),
        (frames, "zstd"),
        (skippable, "zstd"),
    ] {
        let yard = Yard::new();
        let unpacked = yard.unpack(&blob).unwrap();
        assert_eq!(unpacked.compression, compression);
        assert_eq!(unpacked.diff_id, hex_sha256(&tar));
        assert_eq!((unpacked.entries, unpacked.bytes), (3, 200_000));
        let file = fs::metadata(yard.target("home/user/file")).unwrap();
        assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777, file.len()), (1000, 65_535, 0o600, 200_000));
        let implied = fs::metadata(yard.target("home")).unwrap();
        assert_eq!((implied.uid(), implied.gid()), (0, 0));
    }
}

#[test]
fn a_layer_in_the_middle_of_a_file_is_read_from_there_to_its_length() {
    need_root!();
    let yard = Yard::new();
    let tar = sample();
    fs::write(yard.path.join("blob"), [b"before".as_slice(), &tar, b"after"].concat()).unwrap();
    let unpacked = as_keeper(|| {
        let mut blob = fs::File::open(yard.path.join("blob")).unwrap();
        let target = fs::File::open(yard.path.join("target")).unwrap();
        std::io::Seek::seek(&mut blob, std::io::SeekFrom::Start(6)).unwrap();
        let worker = spawn(&Request {
            blob: blob.as_fd(),
            length: Some(tar.len() as u64),
            target: target.as_fd(),
            host_id: HOST_ID,
            max_bytes: 1 << 20,
            max_entries: 10,
            cpu_seconds: 10,
        })
        .map_err(|error| (error, 0))?;
        finish(&worker)
    })
    .unwrap();
    assert_eq!(unpacked.diff_id, hex_sha256(&tar));
}

#[test]
fn a_layer_is_unpacked_however_many_descriptors_the_keeper_has() {
    need_root!();
    let yard = Yard::new();
    let tar = sample();
    fs::write(yard.path.join("blob"), &tar).unwrap();
    let unpacked = as_keeper(|| {
        let _sandboxes: Vec<fs::File> = (0..500).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let blob = fs::File::open(yard.path.join("blob")).unwrap();
        let target = fs::File::open(yard.path.join("target")).unwrap();
        let worker = spawn(&Request {
            blob: blob.as_fd(),
            length: None,
            target: target.as_fd(),
            host_id: HOST_ID,
            max_bytes: 1 << 20,
            max_entries: 10,
            cpu_seconds: 10,
        })
        .map_err(|error| (error, 0))?;
        finish(&worker)
    })
    .unwrap();
    assert_eq!(unpacked.diff_id, hex_sha256(&tar));
}

#[test]
fn im_01_members_that_point_outside_touch_nothing_there() {
    need_root!();
    let yard = Yard::new();
    let outside = yard.path.join("outside");
    let outside = outside.to_str().unwrap();
    bad(yard.unpack(&Tar::default().file("../outside/file", b"bad").end()), "`..`");
    let _ = yard.unpack(&Tar::default().file(&format!("{outside}/file"), b"bad").end());
    let _ = yard.unpack(&Tar::default().link(Kind::Symlink, "l", outside).file("l/file", b"bad").end());
    let _ = yard.unpack(&Tar::default().link(Kind::Symlink, "m", "../outside").file("m/file", b"bad").end());
    bad(yard.unpack(&Tar::default().link(Kind::Hardlink, "h", "../outside/file").end()), "`..`");
    yard.is_untouched();
}

/// IM-02: links that lie in the target already, and a process that swaps them, lead nowhere.
#[test]
fn im_02_a_swapper_and_links_in_the_target_gain_nothing() {
    need_root!();
    let yard = Yard::new();
    symlink(yard.path.join("outside"), yard.target("link")).unwrap();
    fs::create_dir(yard.target("dir")).unwrap();
    std::os::unix::fs::chown(yard.target("dir"), Some(0), Some(0)).unwrap();
    let tar = Tar::default()
        .file("dir/file", b"bad")
        .file("link/file", b"bad")
        .file("dir/.wh.file", b"")
        .file("link/.wh..wh..opq", b"")
        .link(Kind::Hardlink, "link/hard", "dir/file")
        .end();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let name = |name: &str| std::ffi::CString::new(yard.target(name).to_str().unwrap()).unwrap();
            let (one, other) = (name("link"), name("dir"));
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: both paths end in NUL.
                unsafe {
                    libc::renameat2(
                        libc::AT_FDCWD,
                        one.as_ptr(),
                        libc::AT_FDCWD,
                        other.as_ptr(),
                        libc::RENAME_EXCHANGE,
                    );
                }
            }
        });
        for _ in 0..60 {
            if let Err(error) = yard.unpack(&tar) {
                assert!(error.code == "bad_layer" || error.errno != 0, "{}", error.message);
                assert!(!error.message.contains("mount"), "{}", error.message);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    yard.is_untouched();
}

#[test]
fn im_03_what_could_act_is_neutralised() {
    need_root!();
    let yard = Yard::new();
    let mut suid = Entry::new("su", Kind::File);
    suid.mode = 0o6755;
    suid.xattrs = vec![(b"security.capability".to_vec(), vec![0; 20]), (b"user.kept".to_vec(), b"1".to_vec())];
    let tar = Tar::default()
        .entry(suid, b"x")
        .entry(Entry::new("dev/sda", Kind::BlockDevice), b"")
        .entry(Entry::new("dev/null", Kind::CharDevice), b"")
        .entry(Entry::new("pipe", Kind::Fifo), b"")
        .file(".wh.gone", b"")
        .directory("o")
        .file("o/.wh..wh..opq", b"")
        .end();
    let unpacked = yard.unpack(&tar).unwrap();
    assert_eq!(
        (unpacked.special_skipped, unpacked.set_id_dropped, unpacked.xattrs_dropped, unpacked.whiteouts),
        (3, 1, 1, 2)
    );
    assert_eq!(fs::metadata(yard.target("su")).unwrap().mode() & 0o7777, 0o755);
    let whiteout = fs::symlink_metadata(yard.target("gone")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    assert!(!yard.target("dev/sda").exists() && !yard.target("pipe").exists());
}

#[test]
fn im_04_bombs_end_with_a_coded_error_within_their_limits() {
    need_root!();
    let yard = Yard::new();
    let settings = Settings { max_bytes: 4 << 20, max_entries: 100, ..Settings::default() };
    let start = Instant::now();
    // 16 MiB of content announced, a few KiB compressed.
    let bomb = Tar::default().file("zeros", &vec![0; 16 << 20]).end();
    bad(yard.unpack_with(&gzip(&bomb), &settings), "bytes of content");
    bad(yard.unpack_with(&zstd(&bomb), &settings), "bytes of content");
    // No content at all: headers, records and padding without end.
    let many = (0..101).fold(Tar::default(), |tar, n| tar.file(&n.to_string(), b"")).end();
    bad(yard.unpack_with(&gzip(&many), &settings), "members");
    let mut giant = Entry::new("giant", Kind::File);
    giant.xattrs = vec![(b"user.x".to_vec(), vec![b'x'; 2 << 20])];
    bad(yard.unpack_with(&gzip(&Tar::default().entry(giant, b"").end()), &settings), "extended header");
    bad(
        yard.unpack_with(&gzip(&Tar::default().file(&"d/".repeat(300).replace("d/", "d/d"), b"").end()), &settings),
        "",
    );
    bad(yard.unpack_with(&gzip(&vec![0; 8 << 20]), &settings), "zero bytes after its end");
    assert!(start.elapsed() < Duration::from_mins(1));
}

#[test]
fn im_04_a_worker_that_uses_up_its_time_is_ended() {
    need_root!();
    let yard = Yard::new();
    // Endless members, each replacing the last: within the limits on bytes and members for long.
    let tar = (0..1000).fold(Tar::default(), |tar, _| tar.file("same", b"x")).0;
    let settings = Settings { max_entries: 1 << 40, max_bytes: 1 << 40, cpu_seconds: 1, length: None };
    bad(yard.unpack_with(&gzip(&tar.repeat(1000)), &settings), "ran out of time");
}

#[test]
fn im_05_what_is_malformed_is_a_bad_layer() {
    need_root!();
    let yard = Yard::new();
    let tar = sample();
    bad(yard.unpack(b""), "ends early");
    bad(yard.unpack(&gzip(b"")), "ends early");
    bad(yard.unpack(b"this is no tar"), "ends early");
    bad(yard.unpack(&[b'x'; 1024]), "checksum");
    assert!(yard.unpack(&tar[..tar.len() - 1024]).unwrap().unterminated);
    bad(yard.unpack(&tar[..1000]), "ends early");
    bad(yard.unpack(&[tar.as_slice(), b"trailing"].concat()), "after the end");
    let compressed = gzip(&tar);
    bad(yard.unpack(&compressed[..compressed.len() / 2]), "early");
    bad(yard.unpack(&[compressed.as_slice(), b"trailing bytes, no member"].concat()), "decompress");
    let mut damaged = compressed.clone();
    let at = damaged.len() - 6;
    damaged[at] ^= 1;
    bad(yard.unpack(&damaged), "decompress");
    let framed = zstd(&tar);
    bad(yard.unpack(&framed[..framed.len() / 2]), "");
    bad(yard.unpack(&[framed.as_slice(), b"trailing bytes, no frame"].concat()), "decompress");
    // A window of 3.75 TiB, in the first frame.
    bad(yard.unpack(&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff, 0x01, 0x00, 0x00]), "decompress");
}

#[test]
fn im_04_a_killed_worker_is_gone_and_says_so() {
    need_root!();
    let yard = Yard::new();
    // A pipe that nobody fills: the worker waits for its layer until it is killed.
    let result = as_keeper(|| {
        let (blob, _held) = sys::pipe().unwrap();
        let target = fs::File::open(yard.path.join("target")).unwrap();
        let worker = spawn(&Request {
            blob: blob.as_fd(),
            length: None,
            target: target.as_fd(),
            host_id: HOST_ID,
            max_bytes: 1,
            max_entries: 1,
            cpu_seconds: 10,
        })
        .map_err(|error| (error, 0))?;
        sys::pidfd_kill(worker.pidfd.as_fd(), libc::SIGKILL).unwrap();
        finish(&worker)
    });
    bad(result, "signal 9");
    assert_eq!(fs::read_dir(yard.path.join("target")).unwrap().count(), 0);
}

/// IM-07: what the worker is, as the host sees it.
#[test]
fn im_07_the_worker_has_no_privileges_no_network_and_no_files() {
    need_root!();
    let yard = Yard::new();
    let seen = as_keeper(|| {
        let (blob, held) = sys::pipe().unwrap();
        let target = fs::File::open(yard.path.join("target")).unwrap();
        let worker = spawn(&Request {
            blob: blob.as_fd(),
            length: None,
            target: target.as_fd(),
            host_id: HOST_ID,
            max_bytes: 1 << 20,
            max_entries: 10,
            cpu_seconds: 10,
        })
        .map_err(|error| (error, 0))?;
        let proc = format!("/proc/{}", worker.pid);
        let wanted = [
            "Seccomp:\t2".to_owned(),
            "NoNewPrivs:\t1".to_owned(),
            "CapEff:\t000000000000001b".to_owned(),
            "CapPrm:\t000000000000001b".to_owned(),
            "CapBnd:\t0000000000000000".to_owned(),
            "CapInh:\t0000000000000000".to_owned(),
            "CapAmb:\t0000000000000000".to_owned(),
            format!("Uid:\t{HOST_ID}\t{HOST_ID}\t{HOST_ID}\t{HOST_ID}"),
            format!("Gid:\t{HOST_ID}\t{HOST_ID}\t{HOST_ID}\t{HOST_ID}"),
            "Groups:\t ".to_owned(),
        ];
        let end = Instant::now() + Duration::from_secs(10);
        let mut missing = String::new();
        while Instant::now() < end {
            let status = fs::read_to_string(format!("{proc}/status")).unwrap_or_default();
            missing = wanted.iter().filter(|line| !status.lines().any(|own| own == *line)).cloned().collect();
            if missing.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut problems = missing;
        for namespace in ["mnt", "pid_for_children", "net", "ipc", "uts", "user", "cgroup"] {
            let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
            if of(&worker.pid.to_string()) == of("self") {
                problems += namespace;
            }
        }
        let mut fds: Vec<_> =
            fs::read_dir(format!("{proc}/fd")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        fds.sort();
        if fds != ["0", "1", "2"] {
            problems.extend(["descriptors ".to_owned(), format!("{fds:?}")]);
        }
        let mounts = fs::read_to_string(format!("{proc}/mountinfo")).unwrap();
        let flags = ["nosuid", "nodev", "noexec", "idmapped"];
        if mounts.lines().count() != 1 || !flags.iter().all(|flag| mounts.contains(flag)) {
            problems += &mounts;
        }
        let devices = fs::read_to_string(format!("{proc}/net/dev")).unwrap();
        if devices.lines().count() != 3 || !devices.contains("lo:") {
            problems += &devices;
        }
        drop(held);
        let _ = finish(&worker);
        Err((Error::other("bad_layer", format!("problems: [{problems}]")), 0))
    });
    bad(seen, "problems: []");
}

/// The worker dies with the keeper; what is left of its work is in the target alone.
#[test]
fn a_worker_does_not_outlive_the_keeper() {
    need_root!();
    let yard = Yard::new();
    let (read, write) = sys::pipe().unwrap();
    // SAFETY: the child ends in `_exit`.
    let keeper = unsafe { libc::fork() };
    if keeper == 0 {
        let (blob, _held) = sys::pipe().unwrap();
        let target = fs::File::open(yard.path.join("target")).unwrap();
        let worker = spawn(&Request {
            blob: blob.as_fd(),
            length: None,
            target: target.as_fd(),
            host_id: HOST_ID,
            max_bytes: 1,
            max_entries: 1,
            cpu_seconds: 10,
        });
        let pid = worker.map_or(0, |worker| worker.pid);
        let mut pipe = fs::File::from(write);
        let _ = pipe.write_all(&pid.to_ne_bytes());
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) };
    }
    drop(write);
    let mut pid = [0; 4];
    fs::File::from(read).read_exact(&mut pid).unwrap();
    sys::wait(keeper);
    // It may go at any moment, also between two looks at it.
    let status = format!("/proc/{}/status", i32::from_ne_bytes(pid));
    let end = Instant::now() + Duration::from_secs(10);
    while fs::read_to_string(&status).is_ok_and(|status| status.contains(&HOST_ID.to_string())) {
        assert!(Instant::now() < end, "still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}
