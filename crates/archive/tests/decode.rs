//! IM-05, and IM-04 as far as parsing goes: what could be read in two ways is not read at all.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail like tests")]

mod common;

use std::io::Write;
use std::process::{Command, Stdio};

use common::{Header, Scratch, Tar, members, read, record};
use shoal_archive::{Entry, Error, Kind, Limits, MAX_META, Time, encode};

fn is_malformed(archive: &[u8], what: &str) {
    match members(archive) {
        Err(Error::Malformed { what: told, .. }) => assert!(told.contains(what), "{told:?} is not about {what:?}"),
        other => panic!("expected a malformed archive ({what}), got {other:?}"),
    }
}

#[test]
fn what_is_encoded_is_decoded_in_pieces_of_any_size() {
    let mut long = Entry::new("d/".repeat(80) + "naïve-file", Kind::File);
    long.mode = 0o4755;
    long.uid = 4_000_000;
    long.gid = 7;
    long.mtime = Time { secs: -3, nanos: 250_000_000 };
    long.xattrs = vec![(b"user.one".to_vec(), b"a\0=b\n".to_vec()), (b"security.capability".to_vec(), vec![1, 2])];
    let mut link = Entry::new("link", Kind::Symlink);
    link.link = "t/".repeat(200).into();
    let tar = Tar::new()
        .entry(long.clone(), &[7; 1000])
        .entry(link.clone(), b"")
        .directory("plain/")
        .file("empty", b"")
        .end();
    let whole = members(&tar).unwrap();
    long.size = 1000;
    assert_eq!(whole[0], (long, vec![7; 1000]));
    assert_eq!(whole[1].0, link);
    assert_eq!(whole[2].0.kind, Kind::Directory);
    for step in [1, 3, 511, 512, 513, 1024] {
        assert_eq!(read(&tar, step, Limits::default()).unwrap(), whole, "in pieces of {step}");
    }
}

#[test]
fn sizes_beyond_octal_go_to_pax_and_come_back() {
    let mut entry = Entry::new("huge", Kind::File);
    entry.size = 20 << 30;
    let header = encode(&entry).unwrap().header;
    let mut decoder = shoal_archive::Decoder::new(Limits::default());
    let mut input = header.as_slice();
    assert_eq!(decoder.next(&mut input).unwrap(), Some(shoal_archive::Event::Entry(entry)));
}

#[test]
fn gnu_long_names_and_base_256_are_read() {
    let name = "n".repeat(300);
    let tar = Tar::new()
        .raw(Header::new("././@LongLink", b'L', 301).put(257, b"ustar  \0"), (name.clone() + "\0").as_bytes())
        .raw(
            Header::new("cut", b'0', 0)
                .put(257, b"ustar  \0")
                .put(124, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3])
                .put(136, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]),
            b"abc",
        )
        .end();
    let all = members(&tar).unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].0.path, name.as_bytes());
    assert_eq!(all[0].0.mtime.secs, -2);
    assert_eq!(all[0].1, b"abc");
}

#[test]
fn im_05_a_wrong_checksum_is_refused() {
    let mut tar = Tar::new().file("a", b"1").end();
    tar[0] = b'b';
    is_malformed(&tar, "checksum");
}

#[test]
fn im_05_two_sizes_for_one_member_are_refused() {
    let tar = Tar::new().pax(&record("size", "600")).raw(Header::new("a", b'0', 10), &[0; 1024]).end();
    is_malformed(&tar, "two sizes");
    let tar = Tar::new().pax(&record("size", "10")).raw(Header::new("a", b'0', 0), b"0123456789").end();
    is_malformed(&tar, "two sizes");
    let tar = Tar::new().pax(&record("size", "10")).raw(Header::new("a", b'0', 10), b"0123456789").end();
    assert_eq!(members(&tar).unwrap()[0].1, b"0123456789");
}

#[test]
fn im_05_duplicate_headers_and_records_are_refused() {
    let twice = [record("path", "a"), record("path", "b")].concat();
    is_malformed(&Tar::new().pax(&twice).file("x", b"").end(), "given twice");
    let both = Tar::new().pax(&record("path", "a")).pax(&record("path", "b")).file("x", b"").end();
    is_malformed(&both, "two extended headers");
    let long = |tar: Tar| tar.raw(Header::new("././@LongLink", b'L', 5), b"long\0");
    is_malformed(&long(long(Tar::new())).file("x", b"").end(), "two extended headers");
    is_malformed(&long(Tar::new().pax(&record("path", "a"))).file("x", b"").end(), "both pax and GNU");
    is_malformed(&long(Tar::new()).pax(&record("path", "a")).file("x", b"").end(), "both pax and GNU");
}

#[test]
fn im_05_malformed_pax_records_are_refused() {
    for records in [
        &b"8 path=a\n"[..],
        b"11 path=a\n",
        b"08 path=\n",
        b"8 path=a ",
        b"7 path\n",
        b"99999999 path=a\n",
        b" path=a\n",
        b"-9 path=a\n",
        b"4 =\n",
        b"x",
        b"9 path=a\ngarbage",
    ] {
        let tar = Tar::new().pax(records).file("x", b"").end();
        assert!(matches!(members(&tar), Err(Error::Malformed { .. })), "{:?}", records.escape_ascii().to_string());
    }
    for (key, value) in [
        ("path", ""),
        ("path", "a\0b"),
        ("linkpath", ""),
        ("size", "-1"),
        ("size", "0x10"),
        ("size", "1_0"),
        ("size", "99999999999999999999"),
        ("size", "9223372036854775808"),
        ("uid", "4294967295"),
        ("uid", "4294967296"),
        ("gid", "-1"),
        ("mtime", "1e9"),
        ("mtime", "1.2.3"),
        ("mtime", "--1"),
        ("hdrcharset", "EBCDIC"),
        ("SCHILY.xattr.", "nameless"),
    ] {
        let tar = Tar::new().pax(&record(key, value)).file("x", b"").end();
        assert!(matches!(members(&tar), Err(Error::Malformed { .. })), "{key}={value:?}");
    }
}

#[test]
fn im_05_global_headers_may_only_comment() {
    let global =
        |records: &[u8]| Tar::new().raw(Header::new("g", b'g', records.len() as u64), records).file("x", b"").end();
    assert_eq!(members(&global(&record("comment", "0123abc"))).unwrap().len(), 1);
    is_malformed(&global(&record("path", "elsewhere")), "global header");
    is_malformed(&global(&record("size", "0")), "global header");
}

#[test]
fn im_05_numbers_that_are_cut_negative_or_no_numbers_are_refused() {
    for size in [
        &b"0000000001x\0"[..],
        b"-0000000001\0",
        b"00000000008\0",
        b"000 0000001\0",
        b"0000001\x00123\0",
        &[0xff; 12],
        &[0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        &[0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        &[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
        &[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 1],
    ] {
        let tar = Tar::new().raw(Header::new("a", b'0', 0).put(124, size), b"1").end();
        assert!(matches!(members(&tar), Err(Error::Malformed { .. } | Error::Limit { .. })), "{size:?}");
    }
}

#[test]
fn im_05_what_parsers_read_in_two_ways_is_refused() {
    is_malformed(&Tar::new().raw(Header::new("a/", b'0', 0), b"").end(), "slash");
    is_malformed(&Tar::new().raw(Header::new("a", b'5', 3), b"abc").end(), "content in what is no file");
    is_malformed(&Tar::new().raw(Header::new("a", b'1', 3).put(157, b"b"), b"abc").end(), "content in what is no file");
    is_malformed(&Tar::new().raw(Header::new("a", b'2', 0), b"").end(), "empty name");
    is_malformed(&Tar::new().raw(Header::new("", b'0', 0), b"").end(), "empty name");
    is_malformed(&Tar::new().raw(Header::new("a", b'V', 0), b"").end(), "unknown type");
    is_malformed(&Tar::new().raw(Header::new("a", b'0', 0).put(257, b"ustaR\x0000"), b"").end(), "unknown kind");
    is_malformed(&Tar::new().raw(Header::new("a", b'0', 0).put(508, b"tar\0"), b"").end(), "star");
    let old = Header::new("a", b'0', 0).put(257, b"ustar  \0").put(345, b"prefix-or-times");
    is_malformed(&Tar::new().raw(old, b"").end(), "old GNU");
    let stray = Tar::new().pax(&record("linkpath", "b")).file("a", b"").end();
    is_malformed(&stray, "link target of what is no link");
    // Before ustar a slash made a directory, and it still does.
    let v7 = Tar::new().raw(Header::new("a/", 0, 0).put(257, &[0; 8]), b"").end();
    assert_eq!(members(&v7).unwrap()[0].0.kind, Kind::Directory);
}

#[test]
fn im_05_trailing_data_is_refused() {
    let tar = Tar::new().file("a", b"1").end();
    let padded = [tar.clone(), vec![0; 9216]].concat();
    assert_eq!(members(&padded).unwrap().len(), 1);
    is_malformed(&[tar.clone(), b"x".to_vec()].concat(), "after the end");
    is_malformed(&[tar.clone(), tar.clone()].concat(), "after the end");
    let gap = [Tar::new().file("a", b"1").0, vec![0; 512], tar].concat();
    is_malformed(&gap, "after an end block");
    is_malformed(&Tar::new().pax(&record("path", "a")).end(), "without a member");
}

#[test]
fn im_05_an_archive_that_is_cut_anywhere_is_truncated() {
    let tar = Tar::new().pax(&record("path", "b")).file("a", &[1; 700]).directory("d").end();
    for length in 0..tar.len() {
        assert_eq!(members(&tar[..length]), Err(Error::Truncated), "at {length}");
    }
}

#[test]
fn im_04_sparse_maps_are_refused() {
    let refused = |tar: Vec<u8>| assert!(matches!(members(&tar), Err(Error::Refused { what: "sparse file", .. })));
    refused(Tar::new().raw(Header::new("a", b'S', 512).put(257, b"ustar  \0"), &[0; 512]).end());
    refused(Tar::new().pax(&record("GNU.sparse.major", "1")).file("a", b"").end());
    refused(Tar::new().pax(&record("GNU.sparse.map", "0,1,2,3")).file("a", b"").end());
    refused(Tar::new().pax(&record("SCHILY.realsize", "1099511627776")).file("a", b"").end());
}

#[test]
fn im_04_limits_end_an_archive_before_its_bytes_arrive() {
    let limit = |tar: &[u8], limits| match read(tar, 512, limits) {
        Err(Error::Limit { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    let limits = Limits { max_entries: 3, max_bytes: 1000, max_depth: 5 };
    let many = Tar::new().file("a", b"").file("b", b"").file("c", b"").file("d", b"").end();
    assert_eq!(limit(&many, limits), "members");
    assert_eq!(limit(&Tar::new().raw(Header::new("a", b'0', 1001), b"").0, limits), "bytes of content");
    assert_eq!(limit(&Tar::new().file("a/b/c/d/e/f", b"").end(), limits), "directories above a member");
    assert_eq!(
        limit(&Tar::new().raw(Header::new("p", b'x', MAX_META + 1), b"").0, limits),
        "bytes in an extended header"
    );
    assert_eq!(limit(&Tar::new().raw(Header::new("p", b'L', 1 << 30), b"").0, limits), "bytes in an extended header");
    assert_eq!(limit(&Tar::new().file(&"n/n".repeat(3000), b"").0, Limits::default()), "bytes in a name");
    let comments = (0..4).fold(Tar::new(), |tar, _| tar.raw(Header::new("g", b'g', 0), b"")).0;
    assert_eq!(limit(&comments, limits), "members");
    let zeros = [Tar::new().end(), vec![0; 2 << 20]].concat();
    assert_eq!(limit(&zeros, limits), "zero bytes after its end");
}

#[test]
fn random_damage_never_panics() {
    let tar = Tar::new().pax(&record("path", "b")).file("a", &[1; 700]).symlink("s", "t").directory("d/").end();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..20_000 {
        let mut damaged = tar.clone();
        for _ in 0..3 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let at = (seed >> 8) as usize % damaged.len();
            damaged[at] = seed as u8;
            // Past the checksum, so that the rest is reached.
            for block in damaged.chunks_exact_mut(512) {
                if block[257..262] == *b"ustar" {
                    block[148..156].fill(b' ');
                    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
        }
        let _ = members(&damaged);
    }
}

/// Names, sizes and kinds as Python's tarfile tells them.
fn listed_by_python(archive: &[u8]) -> Vec<String> {
    let code = "import sys, tarfile\n\
        for m in tarfile.open(fileobj=sys.stdin.buffer, mode='r|'):\n\
        \x20   print(m.name.rstrip('/'), m.size, m.isdir(), m.issym(), m.linkname)\n";
    let mut python =
        Command::new("python3").args(["-c", code]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    python.stdin.take().unwrap().write_all(archive).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

fn listed_by_us(archive: &[u8]) -> Vec<String> {
    let word = |truth: bool| if truth { "True" } else { "False" };
    members(archive)
        .unwrap()
        .into_iter()
        .map(|(entry, _)| {
            let path = String::from_utf8(entry.path).unwrap();
            let link = String::from_utf8(entry.link).unwrap();
            let (directory, symlink) = (entry.kind == Kind::Directory, entry.kind == Kind::Symlink);
            format!("{} {} {} {} {link}", path.trim_end_matches('/'), entry.size, word(directory), word(symlink))
        })
        .collect()
}

#[test]
fn im_05_two_independent_parsers_list_the_same_members() {
    let scratch = Scratch::new();
    let tree = scratch.make("tree");
    std::fs::create_dir_all(tree.join("x".repeat(120)).join("y".repeat(120))).unwrap();
    std::fs::write(tree.join("x".repeat(120)).join("y".repeat(120)).join("deep"), [1; 3000]).unwrap();
    std::fs::write(tree.join("plain"), b"1").unwrap();
    std::fs::hard_link(tree.join("plain"), tree.join("second")).unwrap();
    std::os::unix::fs::symlink("z".repeat(200), tree.join("link")).unwrap();
    for format in ["v7", "ustar", "gnu", "oldgnu", "posix"] {
        let output = Command::new("tar")
            .arg(format!("--format={format}"))
            .args(["--sort=name", "-C"])
            .arg(&scratch.0)
            .arg("-c")
            .args(if matches!(format, "v7" | "ustar") { vec!["tree/plain", "tree/second"] } else { vec!["tree"] })
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(listed_by_us(&output.stdout), listed_by_python(&output.stdout), "{format}");
    }
    let ours = Tar::new()
        .file(&("p/".repeat(90) + "long"), b"12345")
        .symlink("l", &"t".repeat(150))
        .directory("dir/")
        .hardlink("h", "dir")
        .end();
    assert_eq!(listed_by_us(&ours), listed_by_python(&ours));
}
