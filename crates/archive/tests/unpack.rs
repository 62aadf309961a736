//! IM-01 to IM-03 and CP-01: whatever an archive says, nothing outside of the target is touched.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail like tests")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Scratch, Tar, census, open_directory, unpack, upload};
use shoal_archive::{Entry, Error, Kind, Limits, Policy, Time, Unpack};

/// A target with a neighbour that must not change, and what the neighbour looked like.
struct Yard {
    scratch: Scratch,
    outside: Vec<String>,
}

impl Yard {
    fn new() -> Self {
        let scratch = Scratch::new();
        let outside = scratch.make("outside");
        scratch.make("target");
        fs::write(outside.join("file"), b"untouched").unwrap();
        fs::create_dir(outside.join("empty")).unwrap();
        let outside = census(&outside);
        Self { scratch, outside }
    }

    fn target(&self) -> std::path::PathBuf {
        self.scratch.0.join("target")
    }

    fn outside(&self) -> String {
        self.scratch.0.join("outside").to_str().unwrap().to_owned()
    }

    fn is_untouched(&self) {
        assert_eq!(census(Path::new(&self.outside())), self.outside);
        let mut beside: Vec<_> = fs::read_dir(&self.scratch.0).unwrap().map(|e| e.unwrap().file_name()).collect();
        beside.sort();
        assert_eq!(beside, ["outside", "target"]);
    }
}

fn policies() -> Vec<Policy> {
    if common::is_root() {
        return vec![upload(), Policy::Layer];
    }
    eprintln!("layers not tried: needs root, to change owners");
    vec![upload()]
}

#[test]
fn members_come_out_as_they_went_in() {
    let yard = Yard::new();
    let mut file = Entry::new("./a/b/file", Kind::File);
    file.mode = 0o640;
    file.mtime = Time { secs: 1_000_000_000, nanos: 123_456_789 };
    let mut directory = Entry::new("a", Kind::Directory);
    directory.mode = 0o750;
    directory.mtime = Time { secs: 5, nanos: 0 };
    let tar = Tar::new()
        .entry(directory, b"")
        .entry(file, &vec![9; 100_000])
        .symlink("a/link", "/etc/passwd")
        .hardlink("a/second", "a/b/file")
        .file("a/b/empty", b"")
        .end();
    let report = unpack(&tar, &yard.target(), upload()).unwrap();
    assert_eq!((report.entries, report.bytes), (5, 100_000));
    let at = |name: &str| fs::symlink_metadata(yard.target().join(name)).unwrap();
    assert_eq!(fs::read(yard.target().join("a/second")).unwrap(), vec![9; 100_000]);
    assert_eq!(at("a/second").ino(), at("a/b/file").ino());
    assert_eq!(at("a/b/file").permissions().mode() & 0o7777, 0o640);
    assert_eq!((at("a/b/file").mtime(), at("a/b/file").mtime_nsec()), (1_000_000_000, 123_456_789));
    assert_eq!((at("a").mtime(), at("a").permissions().mode() & 0o7777), (5, 0o750));
    assert_eq!(at("a/b").permissions().mode() & 0o7777, 0o755);
    assert_eq!(fs::read_link(yard.target().join("a/link")).unwrap(), Path::new("/etc/passwd"));
    yard.is_untouched();
}

#[test]
fn im_01_dot_dot_is_refused() {
    for policy in policies() {
        for path in ["../outside/new", "a/../../outside/file", "..", "./..", "a/..", "/../outside/new"] {
            let yard = Yard::new();
            let tar = Tar::new().directory("a").file(path, b"bad").end();
            let error = unpack(&tar, &yard.target(), policy).unwrap_err();
            assert!(matches!(error, Error::Refused { .. }), "{path}: {error}");
            let linked = Tar::new().hardlink("stolen", "../outside/file").end();
            assert!(unpack(&linked, &yard.target(), policy).is_err());
            yard.is_untouched();
        }
    }
}

#[test]
fn im_01_absolute_names_lie_below_the_target() {
    for policy in policies() {
        let yard = Yard::new();
        let path = format!("{}/file", yard.outside());
        unpack(&Tar::new().file(&path, b"inside").end(), &yard.target(), policy).unwrap();
        assert_eq!(fs::read(yard.target().join(path.trim_start_matches('/'))).unwrap(), b"inside");
        yard.is_untouched();
    }
}

#[test]
fn im_01_im_02_links_among_the_parents_lead_nowhere_outside() {
    for policy in policies() {
        for target in ["OUTSIDE", "../outside", "/proc/self/root/etc", "up/../../outside", "."] {
            let yard = Yard::new();
            let target = target.replace("OUTSIDE", &yard.outside());
            for tar in [
                Tar::new().symlink("l", &target).file("l/file", b"bad").end(),
                Tar::new().symlink("l", &target).file("l/empty/new", b"bad").end(),
                Tar::new().symlink("l", &target).symlink("m", "l").file("m/file", b"bad").end(),
                Tar::new().symlink("l", &target).hardlink("stolen", "l/file").end(),
                Tar::new().symlink("l", &target).hardlink("l/stolen", "l/file").end(),
                Tar::new().symlink("l", &target).directory("l/empty").end(),
                Tar::new().symlink("l", &target).file("l/.wh.file", b"").end(),
                Tar::new().symlink("l", &target).file("l/.wh..wh..opq", b"").end(),
            ] {
                let result = unpack(&tar, &yard.target(), policy);
                if matches!(policy, Policy::Upload { .. }) {
                    assert!(result.is_err(), "a link to {target} was followed");
                }
                yard.is_untouched();
                fs::remove_dir_all(yard.target()).unwrap();
                fs::create_dir(yard.target()).unwrap();
            }
        }
    }
}

#[test]
fn im_02_a_member_over_a_link_replaces_the_link() {
    for policy in policies() {
        let yard = Yard::new();
        let file = format!("{}/file", yard.outside());
        let empty = format!("{}/empty", yard.outside());
        symlink(&file, yard.target().join("planted")).unwrap();
        fs::hard_link(&file, yard.target().join("same")).unwrap();
        let tar = Tar::new()
            .symlink("f", &file)
            .file("f", b"new")
            .symlink("d", &empty)
            .directory("d")
            .file("d/x", b"new")
            .symlink("s", &file)
            .symlink("s", "elsewhere")
            .file("planted", b"new")
            .file("same", b"new")
            .end();
        unpack(&tar, &yard.target(), policy).unwrap();
        for name in ["f", "d/x", "planted", "same"] {
            assert_eq!(fs::read(yard.target().join(name)).unwrap(), b"new", "{name}");
        }
        yard.is_untouched();
    }
}

#[test]
fn im_02_hard_links_only_go_to_files_inside() {
    for policy in policies() {
        for (target, ok) in [("missing", false), ("d", false), (".", false), ("a", true), ("/a", true), ("s", true)] {
            let yard = Yard::new();
            let tar = Tar::new().file("a", b"1").directory("d").symlink("s", "/etc/passwd").hardlink("h", target).end();
            assert_eq!(unpack(&tar, &yard.target(), policy).is_ok(), ok, "{target}");
            yard.is_untouched();
        }
        let yard = Yard::new();
        let tar = Tar::new().file("a", b"1").hardlink("a", "a").hardlink("b", "a").hardlink("b", "a").end();
        unpack(&tar, &yard.target(), policy).unwrap();
        assert_eq!(fs::read(yard.target().join("b")).unwrap(), b"1");
    }
}

#[test]
fn im_03_an_upload_refuses_devices_and_pipes_and_drops_set_id() {
    for kind in [Kind::CharDevice, Kind::BlockDevice, Kind::Fifo] {
        let yard = Yard::new();
        let tar = Tar::new().entry(Entry::new("dev", kind), b"").end();
        assert!(matches!(unpack(&tar, &yard.target(), upload()), Err(Error::Refused { .. })));
        assert_eq!(fs::read_dir(yard.target()).unwrap().count(), 0);
    }
    let yard = Yard::new();
    let mut file = Entry::new("suid", Kind::File);
    file.mode = 0o6755;
    file.xattrs = vec![(b"user.note".to_vec(), b"1".to_vec())];
    let mut directory = Entry::new("sticky", Kind::Directory);
    directory.mode = 0o3777;
    let tar = Tar::new().entry(file, b"x").entry(directory, b"").end();
    let report = unpack(&tar, &yard.target(), upload()).unwrap();
    assert_eq!((report.set_id_dropped, report.xattrs_dropped), (2, 1));
    let mode = |name: &str| fs::metadata(yard.target().join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("suid"), mode("sticky")), (0o755, 0o1777));
}

#[test]
fn an_upload_keeps_directories_that_exist_and_replaces_files() {
    let yard = Yard::new();
    fs::create_dir(yard.target().join("d")).unwrap();
    fs::set_permissions(yard.target().join("d"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(yard.target().join("d/f"), b"old and long").unwrap();
    let tar = Tar::new().directory("./").directory("d").file("d/f", b"new").end();
    unpack(&tar, &yard.target(), upload()).unwrap();
    assert_eq!(fs::read(yard.target().join("d/f")).unwrap(), b"new");
    assert_eq!(fs::metadata(yard.target().join("d")).unwrap().mode() & 0o7777, 0o700);
    let over = unpack(&Tar::new().file("d", b"file").end(), &yard.target(), upload()).unwrap_err();
    assert!(over.to_string().contains("not empty"), "{over}");
    let root = unpack(&Tar::new().file("./", b"").end(), &yard.target(), upload());
    assert!(root.is_err());
}

#[test]
fn an_error_is_final() {
    let yard = Yard::new();
    let mut unpack = Unpack::new(open_directory(&yard.target()), upload(), Limits::default());
    assert!(unpack.push(&Tar::new().file("../x", b"").0).is_err());
    assert!(unpack.push(&Tar::new().file("fine", b"").0).is_err());
    assert!(unpack.finish().is_err());
}

#[test]
fn what_is_replaced_while_it_is_the_parent_is_looked_up_again() {
    let yard = Yard::new();
    let tar = Tar::new()
        .directory("real")
        .directory("a")
        .directory("a/b")
        .file("a/b", b"a directory no longer")
        .directory("a/c")
        .file("a/c/x", b"1")
        .end();
    unpack(&tar, &yard.target(), upload()).unwrap();
    assert_eq!(fs::read(yard.target().join("a/c/x")).unwrap(), b"1");
}

#[test]
fn im_03_a_layer_neutralises_what_could_act() {
    need_root!();
    let yard = Yard::new();
    let mut device = Entry::new("dev/null", Kind::CharDevice);
    device.mode = 0o666;
    let mut suid = Entry::new("bin/su", Kind::File);
    suid.mode = 0o6755;
    suid.uid = 7;
    suid.gid = 8;
    suid.xattrs = vec![
        (b"security.capability".to_vec(), vec![1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (b"trusted.overlay.opaque".to_vec(), b"y".to_vec()),
        (b"user.overlay.redirect".to_vec(), b"/etc".to_vec()),
        (b"system.posix_acl_access".to_vec(), vec![2, 0, 0, 0]),
        (b"user.kept".to_vec(), b"yes".to_vec()),
    ];
    let mut mail = Entry::new("var/mail", Kind::Directory);
    mail.mode = 0o2775;
    mail.gid = 8;
    let tar = Tar::new()
        .entry(device, b"")
        .entry(Entry::new("disk", Kind::BlockDevice), b"")
        .entry(Entry::new("pipe", Kind::Fifo), b"")
        .entry(suid, b"#!")
        .entry(mail, b"")
        .end();
    let report = unpack(&tar, &yard.target(), Policy::Layer).unwrap();
    assert_eq!((report.special_skipped, report.set_id_dropped, report.xattrs_dropped), (3, 1, 4));
    for gone in ["dev/null", "disk", "pipe"] {
        assert!(fs::symlink_metadata(yard.target().join(gone)).is_err(), "{gone}");
    }
    let su = fs::metadata(yard.target().join("bin/su")).unwrap();
    assert_eq!((su.mode() & 0o7777, su.uid(), su.gid()), (0o755, 7, 8));
    assert_eq!(fs::metadata(yard.target().join("var/mail")).unwrap().mode() & 0o7777, 0o2775);
    let listed = std::process::Command::new("python3")
        .args(["-c", "import os, sys; print(os.listxattr(sys.argv[1]))"])
        .arg(yard.target().join("bin/su"))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(listed.stdout).unwrap().trim(), "['user.kept']");
    let mut far = Entry::new("far", Kind::File);
    far.uid = 65_536;
    assert!(unpack(&Tar::new().entry(far, b"").end(), &yard.target(), Policy::Layer).is_err());
}

fn is_opaque(path: &Path) -> bool {
    let listed = std::process::Command::new("python3")
        .args(["-c", "import os, sys; print(os.listxattr(sys.argv[1]))"])
        .arg(path)
        .output()
        .unwrap();
    String::from_utf8(listed.stdout).unwrap().contains("user.overlay.opaque")
}

fn is_whiteout(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let meta = fs::symlink_metadata(path).unwrap();
    meta.file_type().is_char_device() && meta.rdev() == 0
}

#[test]
fn im_02_whiteouts_hide_names_of_this_directory_only() {
    need_root!();
    let yard = Yard::new();
    let tar = Tar::new()
        .file(".wh.gone", b"")
        .directory("opaque")
        .file("opaque/.wh..wh..opq", b"")
        .file("deep/er/.wh.x", b"")
        // Removed below and made again here: the directory must not show what the lower one has.
        .file(".wh.again", b"")
        .directory("again")
        .directory("before")
        .file(".wh.before", b"")
        .file(".wh.implied", b"")
        .file("implied/file", b"1")
        .file("kept", b"mine")
        .file(".wh.kept", b"")
        .file(".wh..wh.plnk", b"")
        .end();
    let report = unpack(&tar, &yard.target(), Policy::Layer).unwrap();
    assert_eq!(report.whiteouts, 7);
    let at = |name: &str| yard.target().join(name);
    assert!(is_whiteout(&at("gone")) && is_whiteout(&at("deep/er/x")));
    for opaque in ["opaque", "again", "before", "implied"] {
        assert!(is_opaque(&at(opaque)), "{opaque}");
    }
    assert!(!is_opaque(&at("deep/er")));
    assert_eq!(fs::read(at("kept")).unwrap(), b"mine");
    assert!(fs::symlink_metadata(at(".wh..wh.plnk")).is_err());
    for bad in [".wh.", ".wh...", ".wh..", "a/.wh.b/c"] {
        let yard = Yard::new();
        let tar = Tar::new().file(bad, b"").end();
        assert!(unpack(&tar, &yard.target(), Policy::Layer).is_err(), "{bad}");
        yard.is_untouched();
    }
    assert!(unpack(&Tar::new().file(".wh.full", b"1").end(), &yard.target(), Policy::Layer).is_err());
    assert!(unpack(&Tar::new().symlink(".wh.link", "x").end(), &yard.target(), Policy::Layer).is_err());
}

#[test]
fn im_05_a_layer_without_its_end_is_told_and_a_cut_one_is_refused() {
    need_root!();
    let yard = Yard::new();
    let whole = Tar::new().file("a", &[1; 700]).file("b", b"1").0;
    for (cut, unterminated) in [(0, true), (1, true), (511, true)] {
        let report = unpack(&whole[..whole.len() - cut], &yard.target(), Policy::Layer).unwrap();
        assert_eq!(report.unterminated, unterminated, "without the last {cut} bytes");
    }
    let half_ended = [whole.clone(), vec![0; 512]].concat();
    assert!(unpack(&half_ended, &yard.target(), Policy::Layer).unwrap().unterminated);
    let ended = [whole.clone(), vec![0; 1024]].concat();
    assert!(!unpack(&ended, &yard.target(), Policy::Layer).unwrap().unterminated);
    for length in [0, 1, 511, 512, 1000, 1211] {
        assert_eq!(unpack(&whole[..length], &yard.target(), Policy::Layer), Err(Error::Truncated), "at {length}");
    }
    assert_eq!(unpack(&whole, &yard.target(), upload()), Err(Error::Truncated));
}

#[test]
fn a_layer_follows_its_own_links_as_if_it_were_the_root() {
    need_root!();
    let yard = Yard::new();
    let tar = Tar::new()
        .directory("run")
        .directory("var")
        .symlink("var/run", "/run")
        .file("var/run/pid", b"1")
        .symlink("up", "../../../run")
        .file("up/there", b"2")
        .end();
    unpack(&tar, &yard.target(), Policy::Layer).unwrap();
    assert_eq!(fs::read(yard.target().join("run/pid")).unwrap(), b"1");
    assert_eq!(fs::read(yard.target().join("run/there")).unwrap(), b"2");
    let dangling = Tar::new().symlink("l", "/nowhere").file("l/x", b"").end();
    assert!(unpack(&dangling, &yard.target(), Policy::Layer).is_err());
    yard.is_untouched();
}

/// IM-02 and CP-01: another process exchanges directories with links to the outside all the time.
#[test]
fn im_02_cp_01_a_concurrent_swapper_gains_nothing() {
    for policy in policies() {
        let yard = Yard::new();
        let (target, outside) = (yard.target(), yard.outside());
        for name in ["a", "b"] {
            fs::create_dir(target.join(name)).unwrap();
            symlink(&outside, target.join(format!("{name}.link"))).unwrap();
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let path = |name: String| std::ffi::CString::new(target.join(name).to_str().unwrap()).unwrap();
                let pairs: Vec<_> = ["a", "b"].map(|name| (path(name.to_owned()), path(format!("{name}.link")))).into();
                while !stop.load(Ordering::Relaxed) {
                    for (one, other) in &pairs {
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
                }
            });
            let tar = Tar::new()
                .file("a/file", b"bad")
                .file("b/file", b"bad")
                .directory("a/empty")
                .file("a/.wh.file", b"")
                .hardlink("b/hard", "a/file")
                .symlink("a/soft", "x")
                .file("b/empty/new", b"bad")
                .end();
            let mut done = 0;
            for _ in 0..2000 {
                done += u32::from(unpack(&tar, &target, policy).is_ok());
            }
            stop.store(true, Ordering::Relaxed);
            eprintln!("{done} of 2000 went through");
        });
        yard.is_untouched();
    }
}
