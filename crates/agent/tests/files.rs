//! Files: what is read, written, listed, removed, packed, and what is refused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

mod common;

use common::{Agent, Channel, Client, End, Mode, exec, is_root, noise};
use shoal_wire::{
    EOF, Failure, FileChange, FileInfo, FileKind, FileList, FileListing, FileRead, FileRename, FileUnpack, FileWrite,
    Kind, PathRequest,
};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

fn read(client: &mut Client, path: &[u8], offset: u64, length: u64) -> u32 {
    client.request(Kind::FileRead, &FileRead { path: path.to_vec(), offset, length }.encode())
}

fn read_all(client: &mut Client, path: &[u8]) -> Vec<u8> {
    let id = read(client, path, 0, u64::MAX);
    client.until(id, |channel| channel.eof[0] || channel.ended()).data[0].clone()
}

fn write(client: &mut Client, path: &[u8], bytes: &[u8], mode: u32) -> Channel {
    let request = FileWrite { path: path.to_vec(), mode, ..FileWrite::default() };
    let id = client.request(Kind::FileWrite, &request.encode());
    client.upload(id, bytes, 100_000);
    client.channels.remove(&id).unwrap()
}

fn path_request(path: &[u8], bits: u32) -> Vec<u8> {
    PathRequest { path: path.to_vec(), user: vec![], bits }.encode()
}

fn info(channel: &Channel) -> FileInfo {
    FileInfo::decode(channel.ok.as_ref().unwrap_or_else(|| panic!("{:?}", channel.end))).unwrap()
}

#[test]
fn a_file_comes_back_as_it_was_written() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let path = agent.scratch.path("file");
    for length in [0, 1, 131_072, 131_073, 30 << 20] {
        let bytes = noise(length, 9);
        let written = info(&write(&mut client, &path, &bytes, 0o4751));
        assert_eq!((written.size, written.mode, written.kind), (length as u64, 0o4751, FileKind::File));
        assert!(read_all(&mut client, &path) == bytes, "{length} bytes differ");
    }
    let bytes = noise(30 << 20, 9);
    for (offset, length) in
        [(0, 10), (1_000_000, 2_000_000), (bytes.len() as u64 - 5, 100), (bytes.len() as u64, 1), (1 << 40, 1)]
    {
        let id = read(&mut client, &path, offset, length);
        let channel = client.until(id, |channel| channel.eof[0]);
        assert_eq!(info(channel).size, bytes.len() as u64);
        let from = (offset as usize).min(bytes.len());
        let upto = from.saturating_add(length as usize).min(bytes.len());
        assert!(channel.data[0] == bytes[from..upto], "{offset} {length}");
    }
    // No temporary file is left, only the socket and the file.
    assert_eq!(std::fs::read_dir(&agent.scratch.0).unwrap().count(), 2);
}

#[test]
fn a_file_that_is_replaced_keeps_its_mode() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let path = agent.scratch.path("file");
    assert_eq!(info(&write(&mut client, &path, b"x", u32::MAX)).mode, 0o644);
    std::fs::set_permissions(agent.scratch.0.join("file"), std::fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(info(&write(&mut client, &path, b"y", u32::MAX)).mode, 0o700);
}

#[test]
fn a_broken_upload_leaves_the_old_file_and_nothing_else() {
    let agent = Agent::start();
    let path = agent.scratch.path("file");
    std::fs::write(agent.scratch.0.join("file"), "old").unwrap();
    let request = FileWrite { path, mode: 0o600, ..FileWrite::default() }.encode();
    let mut client = agent.connect();
    let cancelled = client.request(Kind::FileWrite, &request);
    client.send(Kind::Data, 0, cancelled, b"new");
    client.send(Kind::Cancel, 0, cancelled, &[]);
    client.send(Kind::Data, EOF, cancelled, b"late");
    assert_eq!(client.run(&exec("sync", &["true"])).exited().code, 0);
    let count = || std::fs::read_dir(&agent.scratch.0).unwrap().count();
    assert_eq!(count(), 2);
    let id = client.request(Kind::FileWrite, &request);
    client.send(Kind::Data, 0, id, b"new");
    drop(client);
    common::eventually("the temporary file is gone", || count() == 2);
    assert_eq!(std::fs::read(agent.scratch.0.join("file")).unwrap(), b"old");
}

#[test]
fn parents_are_made_when_asked_for() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let path = agent.scratch.path("a/b/c");
    assert_eq!(write(&mut client, &path, b"x", 0o600).errno(), libc::ENOENT);
    let request = FileWrite { path: path.clone(), mode: 0o600, parents: true, ..FileWrite::default() };
    let id = client.request(Kind::FileWrite, &request.encode());
    assert!(client.upload(id, b"x", 10).ok.is_some());
    assert_eq!(read_all(&mut client, &path), b"x");
}

#[test]
fn files_of_proc_are_read_to_their_end() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let bytes = read_all(&mut client, b"/proc/self/status");
    assert!(bytes.starts_with(b"Name:\tshoal-agent\n") && bytes.len() > 500);
    assert!(read_all(&mut client, b"/proc/kallsyms").len() > 500_000);
    let id = read(&mut client, b"/proc/self/status", 6, 11);
    assert_eq!(client.until(id, |channel| channel.eof[0]).stdout(), "shoal-agent");
}

#[test]
fn what_is_no_regular_file_is_refused_without_waiting() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let fifo = agent.scratch.path("fifo");
    let name = std::ffi::CString::new(fifo.clone()).unwrap();
    // SAFETY: the path ends in NUL.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    symlink("fifo", agent.scratch.0.join("to_fifo")).unwrap();
    for (path, errno) in [
        (fifo.clone(), libc::EINVAL),
        (agent.scratch.path("to_fifo"), libc::EINVAL),
        (agent.scratch.path("agent.sock"), libc::EINVAL),
        (b"/dev/tty".to_vec(), libc::EINVAL),
        (b"/dev/zero".to_vec(), libc::EINVAL),
        (b"/tmp".to_vec(), libc::EISDIR),
        (b"/".to_vec(), libc::EISDIR),
        (b"/no/such".to_vec(), libc::ENOENT),
        (b"/etc/passwd/x".to_vec(), libc::ENOTDIR),
        (b"relative".to_vec(), libc::EINVAL),
        (b"".to_vec(), libc::EINVAL),
        (b"/a\0b".to_vec(), libc::EINVAL),
        ([b"/".as_slice(), &[b'x'; 300]].concat(), libc::ENAMETOOLONG),
        (b"/x".repeat(4000), libc::ENAMETOOLONG),
        (b"/proc/self/fd/0".to_vec(), libc::ELOOP),
        (b"/proc/self/exe".to_vec(), libc::ELOOP),
        (b"/proc/self/root/etc/passwd".to_vec(), libc::ELOOP),
    ] {
        let id = read(&mut client, &path, 0, u64::MAX);
        assert_eq!(client.until(id, Channel::ended).errno(), errno, "read {:?}", String::from_utf8_lossy(&path));
    }
    for (path, errno) in [
        (fifo, libc::EINVAL),
        (b"/dev/null".to_vec(), libc::EINVAL),
        (agent.scratch.path(""), libc::EISDIR),
        (b"/".to_vec(), libc::EBUSY),
        (b"/tmp/..".to_vec(), libc::EINVAL),
        (b"/proc/self/cwd/tmp/x".to_vec(), libc::ELOOP),
        (b"/proc/x".to_vec(), libc::ENOENT),
    ] {
        let written = write(&mut client, &path, b"x", 0o600);
        assert_eq!(written.errno(), errno, "write {:?}", String::from_utf8_lossy(&path));
    }
}

#[test]
fn links_are_told_and_not_followed_by_stat() {
    let agent = Agent::start();
    let mut client = agent.connect();
    symlink("/no/where", agent.scratch.0.join("link")).unwrap();
    let link = info(client.call(Kind::FileStat, &path_request(&agent.scratch.path("link"), 0)));
    assert_eq!((link.kind, link.target.as_slice()), (FileKind::Symlink, b"/no/where" as &[u8]));
    let null = info(client.call(Kind::FileStat, &path_request(b"/dev/null", 0)));
    assert_eq!((null.kind, null.mode), (FileKind::Other, 0o666));
    let root = info(client.call(Kind::FileStat, &path_request(b"/", 0)));
    assert_eq!(root.kind, FileKind::Directory);
    assert_eq!(client.call(Kind::FileStat, &path_request(b"/no/such", 0)).errno(), libc::ENOENT);
}

#[test]
fn a_listing_goes_as_deep_as_asked_and_follows_no_link() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let root = agent.scratch.0.join("tree");
    std::fs::create_dir_all(root.join("a/b/c")).unwrap();
    std::fs::write(root.join("a/file"), "12345").unwrap();
    symlink("..", root.join("a/up")).unwrap();
    for n in 0..700 {
        std::fs::write(root.join(format!("a/b/{n:05}")), "").unwrap();
    }
    let mut list = |depth| {
        let request = FileList { path: agent.scratch.path("tree/"), depth };
        let channel = client.call(Kind::FileList, &request.encode());
        FileListing::decode(channel.ok.as_ref().unwrap()).unwrap().entries
    };
    assert_eq!(list(1).len(), 1);
    assert_eq!(list(2).len(), 4);
    let all = list(u32::MAX);
    assert_eq!(all.len(), 705);
    let file = all.iter().find(|entry| entry.path.ends_with(b"/tree/a/file")).unwrap();
    assert_eq!((file.kind, file.size), (FileKind::File, 5));
    let up = all.iter().find(|entry| entry.path.ends_with(b"/tree/a/up")).unwrap();
    assert_eq!((up.kind, up.target.as_slice()), (FileKind::Symlink, b".." as &[u8]));
    let request = FileList { path: b"/etc/passwd".to_vec(), depth: 1 };
    assert_eq!(client.call(Kind::FileList, &request.encode()).errno(), libc::ENOTDIR);
}

#[test]
fn a_listing_too_long_for_a_frame_is_an_error() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let root = agent.scratch.0.join("many");
    std::fs::create_dir(&root).unwrap();
    let name = "x".repeat(240);
    for n in 0..14_000 {
        std::fs::write(root.join(format!("{name}{n:06}")), "").unwrap();
    }
    let request = FileList { path: agent.scratch.path("many"), depth: 1 };
    let id = client.request(Kind::FileList, &request.encode());
    // Others are served in between.
    assert_eq!(client.run(&exec("a", &["echo", "hi"])).stdout(), "hi\n");
    assert_eq!(client.until(id, |channel| channel.ok.is_some() || channel.ended()).errno(), libc::EOVERFLOW);
    assert!(client.call(Kind::FileRemove, &path_request(&agent.scratch.path("many"), 1)).ok.is_some());
    assert!(!root.exists());
}

#[test]
fn directories_are_made_renamed_and_removed() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let at = |name: &str| agent.scratch.path(name);
    assert_eq!(client.call(Kind::FileMakeDir, &path_request(&at("a/b"), 0)).errno(), libc::ENOENT);
    assert_eq!(info(client.call(Kind::FileMakeDir, &path_request(&at("a/b"), 1))).kind, FileKind::Directory);
    assert!(client.call(Kind::FileMakeDir, &path_request(&at("a/b"), 1)).ok.is_some());
    assert_eq!(client.call(Kind::FileMakeDir, &path_request(&at("a/b"), 0)).errno(), libc::EEXIST);
    let rename = |from: &str, to: &str| FileRename { from: at(from), to: at(to) }.encode();
    assert!(client.call(Kind::FileRename, &rename("a", "z")).ok.is_some());
    assert_eq!(client.call(Kind::FileRename, &rename("a", "y")).errno(), libc::ENOENT);
    std::fs::write(agent.scratch.0.join("z/f"), "1").unwrap();
    std::fs::write(agent.scratch.0.join("z/g"), "2").unwrap();
    assert!(client.call(Kind::FileRename, &rename("z/f", "z/g")).ok.is_some());
    assert_eq!(std::fs::read(agent.scratch.0.join("z/g")).unwrap(), b"1");
    symlink("/etc", agent.scratch.0.join("z/b/out")).unwrap();
    assert_eq!(client.call(Kind::FileRemove, &path_request(&at("z"), 0)).errno(), libc::ENOTEMPTY);
    assert!(client.call(Kind::FileRemove, &path_request(&at("z"), 1)).ok.is_some());
    assert!(!agent.scratch.0.join("z").exists() && std::path::Path::new("/etc/passwd").exists());
    assert_eq!(client.call(Kind::FileRemove, &path_request(&at("z"), 1)).errno(), libc::ENOENT);
    std::fs::write(agent.scratch.0.join("single"), "").unwrap();
    symlink("single", agent.scratch.0.join("link")).unwrap();
    assert!(client.call(Kind::FileRemove, &path_request(&at("link"), 1)).ok.is_some());
    assert!(client.call(Kind::FileRemove, &path_request(&at("single"), 0)).ok.is_some());
    for path in [b"/" as &[u8], b"//", b"/tmp/..", b"/tmp/."] {
        assert!(client.call(Kind::FileRemove, &path_request(path, 1)).ended(), "{path:?}");
    }
}

#[test]
fn a_deep_tree_is_removed() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let script = format!(
        "cd {}; mkdir deep; cd deep; for i in $(seq 1 600); do mkdir d; echo > f; cd d; done",
        agent.scratch.0.display()
    );
    assert_eq!(client.run(&common::sh("deep", &script)).exited().code, 0);
    assert!(client.call(Kind::FileRemove, &path_request(&agent.scratch.path("deep"), 1)).ok.is_some());
    assert!(!agent.scratch.0.join("deep").exists());
}

#[test]
fn a_tree_packed_and_unpacked_is_the_same() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let root = agent.scratch.0.join("from");
    std::fs::create_dir_all(root.join("d/e")).unwrap();
    std::fs::write(root.join("d/big"), noise(9 << 20, 3)).unwrap();
    std::fs::set_permissions(root.join("d/big"), std::fs::Permissions::from_mode(0o741)).unwrap();
    symlink("big", root.join("d/link")).unwrap();
    let id = client.request(Kind::FilePack, &path_request(&agent.scratch.path("from"), 0));
    let archive = client.until(id, |channel| channel.eof[0] || channel.ended()).data[0].clone();
    // Another program reads it, and we read what another program writes.
    std::fs::write(agent.scratch.0.join("a.tar"), &archive).unwrap();
    let tar = |arguments: &[&str]| {
        let done = std::process::Command::new("tar").current_dir(&agent.scratch.0).args(arguments).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        done.stdout
    };
    let names = String::from_utf8(tar(&["tf", "a.tar"])).unwrap();
    assert_eq!(names.lines().collect::<Vec<_>>(), ["d/", "d/big", "d/e/", "d/link"]);
    tar(&["cf", "b.tar", "-C", "from", "d"]);
    for (archive, to) in [(archive, "to1"), (std::fs::read(agent.scratch.0.join("b.tar")).unwrap(), "x/to2")] {
        let request = FileUnpack { path: agent.scratch.path(to), user: vec![] };
        let id = client.request(Kind::FileUnpack, &request.encode());
        let channel = client.upload(id, &archive, 70_001);
        assert!(channel.ok.is_some(), "{:?}", channel.end);
        let done = std::process::Command::new("diff")
            .args(["-r", "--no-dereference"])
            .args([root.clone(), agent.scratch.0.join(to)])
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        assert_eq!(std::fs::metadata(agent.scratch.0.join(to).join("d/big")).unwrap().mode() & 0o7777, 0o741);
    }
    // A single file comes under its name.
    let id = client.request(Kind::FilePack, &path_request(&agent.scratch.path("from/d/big"), 0));
    let archive = client.until(id, |channel| channel.eof[0] || channel.ended()).data[0].clone();
    std::fs::write(agent.scratch.0.join("c.tar"), &archive).unwrap();
    assert_eq!(tar(&["tf", "c.tar"]), b"big\n");
    let id = client.request(Kind::FilePack, &path_request(b"/no/such", 0));
    assert_eq!(client.until(id, Channel::ended).errno(), libc::ENOENT);
}

#[test]
fn an_archive_that_climbs_or_ends_early_is_refused() {
    let agent = Agent::start();
    let mut client = agent.connect();
    std::fs::write(agent.scratch.0.join("evil"), "x").unwrap();
    let tar = std::process::Command::new("tar")
        .current_dir(&agent.scratch.0)
        .args(["cf", "-", "--absolute-names", "--transform=s,evil,../../escaped,", "evil"])
        .output()
        .unwrap()
        .stdout;
    for bytes in [tar.clone(), tar[..700].to_vec(), b"no tar at all".repeat(100)] {
        let request = FileUnpack { path: agent.scratch.path("in/here"), user: vec![] };
        let id = client.request(Kind::FileUnpack, &request.encode());
        assert_eq!(client.upload(id, &bytes, 1000).errno(), libc::EINVAL);
    }
    assert!(!agent.scratch.0.join("escaped").exists());
    assert!(!agent.scratch.0.parent().unwrap().join("escaped").exists());
}

#[test]
fn a_long_read_does_not_hold_up_a_command() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let path = agent.scratch.path("big");
    std::fs::write(agent.scratch.0.join("big"), noise(200 << 20, 8)).unwrap();
    let id = read(&mut client, &path, 0, u64::MAX);
    client.until(id, |channel| !channel.data[0].is_empty());
    let run = client.start(&exec("a", &["echo", "hi"]));
    client.until(run, Channel::ended);
    assert!(!client.channels[&id].eof[0], "the command had to wait for the file");
    client.until(id, |channel| channel.eof[0]);
    assert_eq!(client.channels[&id].data[0].len(), 200 << 20);
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.acknowledge = false;
    let path = agent.scratch.path("big");
    std::fs::write(agent.scratch.0.join("big"), noise(4 << 20, 8)).unwrap();
    let id = read(&mut client, &path, 0, u64::MAX);
    client.until(id, |channel| channel.data[0].len() == 1 << 20);
    std::fs::write(agent.scratch.0.join("big"), "short").unwrap();
    client.send(Kind::Window, 0, id, &shoal_wire::Window { consumed: 1 << 20 }.encode());
    assert_eq!(client.until(id, Channel::ended).errno(), libc::EIO);
}

#[test]
fn what_is_made_belongs_to_whom_it_should() {
    if !is_root() {
        return;
    }
    let agent = Agent::start_as(Mode::Guest, &[]);
    let mut client = agent.connect();
    let owner = |path: &std::path::Path| {
        let stat = std::fs::metadata(path).unwrap();
        (stat.uid(), stat.gid())
    };
    let mut put = |name: &str, user: &str| {
        let request = FileWrite { path: agent.scratch.path(name), mode: 0o600, user: user.into(), parents: true };
        let id = client.request(Kind::FileWrite, &request.encode());
        let channel = client.upload(id, b"x", 10);
        assert!(channel.ok.is_some(), "{:?}", channel.end);
    };
    put("a/plain", "");
    put("b/other", "1234:5678");
    assert_eq!(owner(&agent.scratch.0.join("a")), (0, 0));
    assert_eq!(owner(&agent.scratch.0.join("a/plain")), (0, 0));
    assert_eq!(owner(&agent.scratch.0.join("b")), (1234, 5678));
    assert_eq!(owner(&agent.scratch.0.join("b/other")), (1234, 5678));
    put("b/other", "");
    assert_eq!(owner(&agent.scratch.0.join("b/other")), (1234, 5678), "the owner of what is replaced stays");
    let request = PathRequest { path: agent.scratch.path("c/d"), user: b"12:34".to_vec(), bits: 1 };
    assert_eq!(info(client.call(Kind::FileMakeDir, &request.encode())).uid, 12);
    assert_eq!(owner(&agent.scratch.0.join("c")), (12, 34));
}

#[test]
fn a_user_that_the_image_does_not_know_is_named_and_nothing_is_made() {
    let agent = Agent::start_as(if is_root() { Mode::Guest } else { Mode::Plain }, &[]);
    let mut client = agent.connect();
    let path = agent.scratch.path("new/file");
    for user in ["no-such-user", "0:no-such-group", "65536", ":"] {
        let (path, user) = (path.clone(), user.as_bytes().to_vec());
        let write = FileWrite { path: path.clone(), user: user.clone(), parents: true, mode: u32::MAX };
        let make = PathRequest { path: path.clone(), user: user.clone(), bits: 1 };
        let unpack = FileUnpack { path: path.clone(), user: user.clone() };
        let change = FileChange { path: agent.scratch.path(""), user: user.clone(), mode: u32::MAX };
        for (kind, payload) in [
            (Kind::FileWrite, write.encode()),
            (Kind::FileMakeDir, make.encode()),
            (Kind::FileUnpack, unpack.encode()),
            (Kind::FileChange, change.encode()),
        ] {
            let channel = client.call(kind, &payload);
            let Some(End::Error(Failure { errno: 0, what })) = &channel.end else { panic!("{kind:?}: {channel:?}") };
            assert!(what.windows(user.len()).any(|part| part == user), "{}", String::from_utf8_lossy(what));
        }
    }
    assert!(!agent.scratch.0.join("new").exists());
}
