//! A tree becomes an archive that other programs read as the same tree.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail like tests")]

mod common;

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Scratch, census, members, open_directory, unpack, upload};
use shoal_archive::{Error, Kind, Pack};

fn pack(parent: &Path, name: &str, member: &str, step: usize) -> Result<Vec<u8>, Error> {
    let parent = open_directory(parent);
    let mut pack = Pack::new(parent.as_fd(), name.as_bytes(), member.as_bytes())?;
    let mut all = Vec::new();
    while let Some(chunk) = pack.next_chunk(step)? {
        assert!(!chunk.is_empty() && chunk.len() <= step);
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

fn tree(scratch: &Scratch) -> std::path::PathBuf {
    let tree = scratch.make("tree");
    fs::create_dir_all(tree.join("d").join("e".repeat(150))).unwrap();
    fs::write(tree.join("d").join("e".repeat(150)).join("file"), vec![3; 70_000]).unwrap();
    fs::write(tree.join("empty"), b"").unwrap();
    fs::write(tree.join("naïve"), b"1").unwrap();
    symlink("/etc/passwd", tree.join("link")).unwrap();
    symlink(&tree, tree.join("loop")).unwrap();
    tree
}

#[test]
fn a_tree_comes_back_whole_in_chunks_of_any_size() {
    let scratch = Scratch::new();
    let tree = tree(&scratch);
    let whole = pack(&scratch.0, "tree", "copy", 1 << 20).unwrap();
    for step in [1000, 4096] {
        assert_eq!(pack(&scratch.0, "tree", "copy", step).unwrap(), whole);
    }
    let out = scratch.make("out");
    unpack(&whole, &out, upload()).unwrap();
    let strip = |lines: Vec<String>, root: &Path| -> Vec<String> {
        lines.into_iter().map(|line| line.replacen(root.to_str().unwrap(), "", 1)).collect()
    };
    assert_eq!(strip(census(&out.join("copy")), &out.join("copy")), strip(census(&tree), &tree));
}

#[test]
fn gnu_tar_unpacks_it() {
    let scratch = Scratch::new();
    let tree = tree(&scratch);
    let out = scratch.make("out");
    let mut tar = Command::new("tar").arg("-x").arg("-C").arg(&out).stdin(Stdio::piped()).spawn().unwrap();
    tar.stdin.take().unwrap().write_all(&pack(&scratch.0, "tree", "tree", 5000).unwrap()).unwrap();
    assert!(tar.wait().unwrap().success());
    let same = Command::new("diff").args(["-r", "--no-dereference"]).arg(&tree).arg(out.join("tree")).status();
    assert!(same.unwrap().success());
}

#[test]
fn the_empty_name_lists_only_what_is_inside() {
    let scratch = Scratch::new();
    tree(&scratch);
    let all = members(&pack(&scratch.0, "tree", "", 512).unwrap()).unwrap();
    let names: Vec<_> = all.iter().map(|(entry, _)| String::from_utf8_lossy(&entry.path).into_owned()).collect();
    assert_eq!(names.first().map(String::as_str), Some("d/"));
    assert!(names.contains(&"link".to_owned()) && !names.iter().any(|name| name.starts_with('/')));
}

#[test]
fn a_file_and_a_link_are_packed_by_themselves() {
    let scratch = Scratch::new();
    let tree = tree(&scratch);
    let file = members(&pack(&tree, "naïve", "renamed", 512).unwrap()).unwrap();
    assert_eq!((file[0].0.path.as_slice(), file[0].1.as_slice()), (&b"renamed"[..], &b"1"[..]));
    let link = members(&pack(&tree, "link", "l", 512).unwrap()).unwrap();
    assert_eq!((link[0].0.kind, link[0].0.link.as_slice()), (Kind::Symlink, &b"/etc/passwd"[..]));
    assert_eq!(pack(&tree, "missing", "x", 512).unwrap_err().errno(), Some(libc::ENOENT));
}

#[test]
fn pipes_and_sockets_are_left_out_and_named_in_a_comment() {
    let scratch = Scratch::new();
    let tree = tree(&scratch);
    let pipe = std::ffi::CString::new(tree.join("pipe").to_str().unwrap()).unwrap();
    // SAFETY: the path ends in NUL.
    assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
    let _socket = std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();
    let bytes = pack(&scratch.0, "tree", "t", 4096).unwrap();
    let all = members(&bytes).unwrap();
    assert!(!all.iter().any(|(entry, _)| entry.path.ends_with(b"pipe") || entry.path.ends_with(b"socket")));
    for comment in [&b"comment=left out, a FIFO: t/pipe\n"[..], b"comment=left out, a socket: t/socket\n"] {
        assert!(bytes.windows(comment.len()).any(|part| part == comment));
    }
    assert!(matches!(pack(&tree, "pipe", "x", 512), Err(Error::Refused { .. })));
}

#[test]
fn a_file_that_shrinks_is_filled_up_and_one_that_grows_is_cut() {
    let scratch = Scratch::new();
    fs::write(scratch.0.join("f"), [1; 10_000]).unwrap();
    let parent = open_directory(&scratch.0);
    for (length, shrunk) in [(3_000_u64, 1), (20_000, 0)] {
        fs::write(scratch.0.join("f"), [1; 10_000]).unwrap();
        let mut pack = Pack::new(parent.as_fd(), b"f", b"f").unwrap();
        let mut all = pack.next_chunk(1024).unwrap().unwrap();
        fs::OpenOptions::new().write(true).open(scratch.0.join("f")).unwrap().set_len(length).unwrap();
        while let Some(chunk) = pack.next_chunk(1024).unwrap() {
            all.extend_from_slice(&chunk);
        }
        assert_eq!(members(&all).unwrap()[0].1.len(), 10_000);
        assert_eq!(pack.packed().shrunk, shrunk);
    }
}

#[test]
fn a_very_deep_tree_is_an_error_and_no_crash() {
    let scratch = Scratch::new();
    let mut path = scratch.make("deep");
    for _ in 0..300 {
        path = path.join("d");
    }
    fs::create_dir_all(&path).unwrap();
    assert!(matches!(pack(&scratch.0, "deep", "deep", 1 << 16), Err(Error::Limit { .. })));
}
