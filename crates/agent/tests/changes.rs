//! Changes: what a watcher is told, and that nothing is missed and nothing left behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

mod common;

use common::{Agent, Client, Mode, eventually, is_root};
use shoal_wire::{FileChange, FileInfo, FileWatch, FileWrite, Kind};
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

const READY: &str = r#"{"type":"ready"}"#;
const OVERFLOW: &str = r#"{"type":"overflow"}"#;

/// A watcher of the directory `tree` of an agent's own directory.
struct Watcher {
    client: Client,
    id: u32,
    tree: PathBuf,
}

impl Watcher {
    fn new(agent: &Agent, recursive: bool) -> Self {
        let tree = agent.scratch.0.join("tree");
        let _ = std::fs::create_dir(&tree);
        Self::of(agent, &tree.clone(), tree, recursive)
    }

    fn of(agent: &Agent, path: &Path, tree: PathBuf, recursive: bool) -> Self {
        let mut client = agent.connect();
        let request = FileWatch { path: path.as_os_str().as_bytes().to_vec(), recursive };
        let id = client.request(Kind::FileWatch, &request.encode());
        client.until(id, |channel| channel.stdout().starts_with(READY) || channel.ended());
        assert!(client.channels[&id].ok.is_some(), "{:?}", client.channels[&id].end);
        Self { client, id, tree }
    }

    /// The lines that came, in short: kind and paths below the tree; `/` behind a directory's.
    fn lines(&self) -> Vec<String> {
        let text = self.client.channels[&self.id].stdout();
        let prefix = self.tree.to_str().unwrap();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut lines: Vec<String> = whole.lines().map(|line| short(line, prefix)).collect();
        // Two writes are one line or two, as they happen to be looked at.
        lines.dedup_by(|one, other| one == other && one.starts_with("write"));
        lines
    }

    /// Waits for a line, and returns all lines that came so far.
    fn until(&mut self, line: &str) -> Vec<String> {
        let deadline = std::time::Instant::now() + common::PATIENCE;
        while !self.lines().iter().any(|told| told == line) {
            assert!(std::time::Instant::now() < deadline, "no {line} in {:?}", self.lines());
            assert!(self.client.take(), "closed: {:?}", self.client.channels[&self.id]);
            assert!(!self.client.channels[&self.id].ended(), "{:?}", self.client.channels[&self.id].end);
        }
        self.lines()
    }

    /// Changes something that is told last.
    fn until_marked(&mut self) -> Vec<String> {
        std::fs::write(self.tree.join("mark"), "").unwrap();
        let mut lines = self.until("create mark");
        lines.retain(|line| !line.ends_with(" mark") && line != "ready");
        lines
    }
}

fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!("\"{name}\":\""))?;
    rest.split_once('"').map(|(value, _)| value)
}

fn short(line: &str, prefix: &str) -> String {
    let below = |path: &str| path.strip_prefix(prefix).unwrap_or(path).trim_start_matches('/').to_owned();
    let kind = field(line, "type").unwrap_or_else(|| panic!("{line}"));
    let Some(path) = field(line, "path") else { return kind.to_owned() };
    let target = field(line, "target").map(|target| format!(" -> {}", below(target))).unwrap_or_default();
    let slash = if line.ends_with("\"directory\":true}") { "/" } else { "" };
    format!("{kind} {}{target}{slash}", below(path))
}

#[test]
fn every_kind_of_change_is_told_once_and_in_order() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    let at = |name: &str| watcher.tree.join(name);
    let (a, b, dir) = (at("a"), at("b"), at("dir"));
    std::fs::write(&a, "one").unwrap();
    std::fs::write(&a, "two").unwrap();
    std::fs::set_permissions(&a, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(&a, &b).unwrap();
    std::fs::create_dir(&dir).unwrap();
    watcher.until("create dir/");
    std::fs::write(dir.join("c"), "").unwrap();
    watcher.until("create dir/c");
    std::fs::rename(&b, dir.join("b")).unwrap();
    std::fs::remove_file(dir.join("c")).unwrap();
    std::fs::remove_file(dir.join("b")).unwrap();
    std::fs::remove_dir(&dir).unwrap();
    let expected = [
        "create a",
        "write a",
        "chmod a",
        "rename a -> b",
        "create dir/",
        "create dir/c",
        "rename b -> dir/b",
        "remove dir/c",
        "remove dir/b",
        "remove dir/",
    ];
    assert_eq!(watcher.until_marked(), expected);
}

#[test]
fn what_is_in_a_new_directory_already_is_told_and_told_once() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    // Deep at once, so that most of it is there before anybody can look.
    let mut expected = BTreeSet::new();
    for number in 0..200 {
        let deep = format!("{number}/x/y");
        std::fs::create_dir_all(watcher.tree.join(&deep)).unwrap();
        std::fs::write(watcher.tree.join(&deep).join("z"), "").unwrap();
        for path in [format!("{number}/"), format!("{number}/x/"), format!("{number}/x/y/"), format!("{deep}/z")] {
            expected.insert(format!("create {path}"));
        }
    }
    let mut created: Vec<String> = watcher.until_marked();
    while created.len() < expected.len() {
        assert!(watcher.client.take());
        created = watcher.lines();
        created.retain(|line| !line.ends_with(" mark") && line != "ready");
    }
    assert_eq!(created.len(), expected.len(), "something was told twice");
    assert_eq!(created.into_iter().collect::<BTreeSet<_>>(), expected);
    // And all of it is watched.
    for number in 0..200 {
        std::fs::write(watcher.tree.join(format!("{number}/x/y/z")), "more").unwrap();
        watcher.until(&format!("write {number}/x/y/z"));
    }
}

#[test]
fn a_move_out_of_the_tree_is_a_removal_and_one_into_it_a_creation() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    let outside = agent.scratch.0.join("outside");
    std::fs::create_dir_all(outside.join("sub")).unwrap();
    std::fs::write(outside.join("sub/f"), "").unwrap();
    let inside = watcher.tree.join("in");
    std::fs::rename(&outside, &inside).unwrap();
    watcher.until("create in/sub/f");
    std::fs::rename(&inside, &outside).unwrap();
    watcher.until("remove in/");
    // It is watched no longer, under whatever name.
    std::fs::write(outside.join("sub/f"), "x").unwrap();
    std::fs::write(outside.join("sub/g"), "x").unwrap();
    let told = watcher.until_marked();
    assert_eq!(told, ["create in/", "create in/sub/", "create in/sub/f", "remove in/"]);
}

#[test]
fn a_directory_that_gets_another_name_is_told_of_by_its_new_one() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    std::fs::create_dir_all(watcher.tree.join("a/b/c")).unwrap();
    watcher.until("create a/b/c/");
    std::fs::rename(watcher.tree.join("a/b"), watcher.tree.join("d")).unwrap();
    std::fs::write(watcher.tree.join("d/c/f"), "").unwrap();
    watcher.until("create d/c/f");
    // A name that another directory had.
    std::fs::create_dir(watcher.tree.join("a/b")).unwrap();
    std::fs::write(watcher.tree.join("a/b/g"), "").unwrap();
    watcher.until("create a/b/g");
    std::fs::write(watcher.tree.join("d/c/f"), "x").unwrap();
    let told = watcher.until_marked();
    assert!(told.contains(&"rename a/b -> d/".to_owned()), "{told:?}");
    assert_eq!(told.last().unwrap(), "write d/c/f");
}

#[test]
fn without_recursion_only_the_directory_itself_counts() {
    let agent = Agent::start();
    let tree = agent.scratch.0.join("tree");
    std::fs::create_dir_all(tree.join("dir")).unwrap();
    symlink("/etc", tree.join("link")).unwrap();
    let mut watcher = Watcher::new(&agent, false);
    std::fs::write(tree.join("dir/f"), "").unwrap();
    std::fs::create_dir(tree.join("new")).unwrap();
    std::fs::write(tree.join("new/f"), "").unwrap();
    assert_eq!(watcher.until_marked(), ["create new/"]);
}

#[test]
fn a_file_is_watched_through_its_replacements() {
    let agent = Agent::start();
    let tree = agent.scratch.0.join("tree");
    std::fs::create_dir(&tree).unwrap();
    let file = tree.join("f");
    std::fs::write(&file, "").unwrap();
    let mut watcher = Watcher::of(&agent, &file, tree.clone(), true);
    std::fs::write(tree.join("other"), "").unwrap();
    std::fs::write(tree.join("new"), "x").unwrap();
    std::fs::rename(tree.join("new"), &file).unwrap();
    watcher.until("create f");
    std::fs::write(&file, "more").unwrap();
    watcher.until("write f");
    std::fs::remove_file(&file).unwrap();
    let told = watcher.until("remove f");
    assert_eq!(told, ["ready", "create f", "write f", "remove f"]);
}

#[test]
fn a_file_that_a_client_writes_appears_whole() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    let path = watcher.tree.join("f").into_os_string().into_encoded_bytes();
    let request = FileWrite { path, mode: 0o600, ..FileWrite::default() };
    let id = watcher.client.request(Kind::FileWrite, &request.encode());
    assert!(watcher.client.upload(id, &common::noise(3_000_000, 7), 100_000).ok.is_some());
    assert_eq!(watcher.until_marked(), ["create f"]);
}

#[test]
fn the_end_of_the_watched_directory_is_told() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    std::fs::create_dir(watcher.tree.join("d")).unwrap();
    watcher.until("create d/");
    std::fs::remove_dir_all(&watcher.tree).unwrap();
    assert_eq!(watcher.until("remove /"), ["ready", "create d/", "remove d/", "remove /"]);
}

#[test]
fn names_that_are_no_utf_8_travel_in_base64_too() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    std::fs::write(watcher.tree.join(std::ffi::OsStr::from_bytes(b"\xff\"")), "").unwrap();
    watcher.until_marked();
    let text = watcher.client.channels[&watcher.id].stdout();
    let line = text.lines().nth(1).unwrap();
    assert!(line.contains("\u{fffd}\\\"\",\"path_b64\":\""), "{line}");
}

#[test]
fn an_overflow_is_told_once_and_everything_after_it_is_seen() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    std::fs::create_dir(watcher.tree.join("d")).unwrap();
    watcher.until("create d/");
    let queue: u64 = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    // Nobody reads: a window of lines (a hundred bytes each, at the least), then the kernel's queue.
    let count = queue + shoal_wire::WINDOW / 50;
    for number in 0..count / 2 {
        let file = watcher.tree.join(format!("d/{number}"));
        std::fs::write(&file, "").unwrap();
        std::fs::remove_file(&file).unwrap();
    }
    std::fs::create_dir(watcher.tree.join("d/late")).unwrap();
    watcher.until("overflow");
    std::fs::write(watcher.tree.join("d/late/f"), "").unwrap();
    let told = watcher.until("create d/late/f");
    assert_eq!(told.iter().filter(|line| *line == "overflow").count(), 1);
    assert!(watcher.client.channels[&watcher.id].stdout().contains(OVERFLOW));
}

#[test]
fn a_watch_ends_with_its_channel_and_leaves_nothing() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    std::fs::create_dir_all(watcher.tree.join("a/b")).unwrap();
    watcher.until("create a/b/");
    let held = agent.open_fds();
    watcher.client.send(Kind::Cancel, 0, watcher.id, &[]);
    let more: Vec<_> = (0..5).map(|_| Watcher::new(&agent, true)).collect();
    drop(more);
    eventually("the watchers' descriptors are closed", || !is_root() || agent.open_fds() < held);
    // The connection that cancelled serves on.
    assert_eq!(watcher.client.run(&common::exec("true", &["true"])).exited().code, 0);
}

#[test]
fn a_watcher_with_nothing_to_tell_costs_no_time() {
    let agent = Agent::start();
    let mut watcher = Watcher::new(&agent, true);
    std::fs::write(watcher.tree.join("f"), "").unwrap();
    watcher.until("create f");
    agent.rests(std::time::Duration::from_millis(300));
}

#[test]
fn what_cannot_be_watched_is_refused() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut refused = |path: &[u8]| {
        client.call(Kind::FileWatch, &FileWatch { path: path.to_vec(), recursive: true }.encode()).errno()
    };
    assert_eq!(refused(&agent.scratch.path("none")), libc::ENOENT);
    assert_eq!(refused(b"relative"), libc::EINVAL);
    symlink("loop", agent.scratch.0.join("loop")).unwrap();
    assert_eq!(refused(&agent.scratch.path("loop")), libc::ELOOP);
    let watchers: Vec<_> = (0..16).map(|_| Watcher::new(&agent, false)).collect();
    assert_eq!(refused(&agent.scratch.path("")), libc::EMFILE);
    drop(watchers);
}

#[test]
fn more_directories_than_may_be_watched_end_the_watch_and_nothing_else() {
    let agent = Agent::start();
    // In memory: a disk takes a minute for so many.
    let tree = common::Scratch(format!("/dev/shm/shoal-agent-changes-{}", std::process::id()).into());
    for hundred in 0..660 {
        std::fs::create_dir_all(tree.0.join(hundred.to_string())).unwrap();
        for number in 0..100 {
            std::fs::create_dir(tree.0.join(format!("{hundred}/{number}"))).unwrap();
        }
    }
    let mut client = agent.connect();
    let request = FileWatch { path: tree.path(""), recursive: true };
    let refused = client.call(Kind::FileWatch, &request.encode());
    assert_eq!((refused.errno(), refused.ok.is_some()), (libc::ENOSPC, false));
    // All of them are free again.
    let mut watcher = Watcher::of(&agent, &tree.0.join("1"), tree.0.join("1"), true);
    std::fs::write(tree.0.join("1/2/f"), "").unwrap();
    watcher.until("create 2/f");
}

#[test]
fn attributes_change_through_links_and_in_the_right_order() {
    let agent = Agent::start_as(if is_root() { Mode::Guest } else { Mode::Plain }, &[]);
    std::fs::set_permissions(&agent.scratch.0, std::fs::Permissions::from_mode(0o777)).unwrap();
    let mut client = agent.connect();
    let file = agent.scratch.0.join("file");
    std::fs::write(&file, "x").unwrap();
    symlink("file", agent.scratch.0.join("link")).unwrap();
    let mut change = |name: &str, mode: u32, user: &str| {
        let request = FileChange { path: agent.scratch.path(name), mode, user: user.into() };
        let channel = client.call(Kind::FileChange, &request.encode());
        channel.ok.as_ref().map(|payload| FileInfo::decode(payload).unwrap()).ok_or_else(|| channel.errno())
    };
    if is_root() {
        let info = change("link", 0o4750, "1234:5678").unwrap();
        assert_eq!((info.mode, info.uid, info.gid), (0o4750, 1234, 5678));
    }
    assert_eq!(change("file", 0o604, "").unwrap().mode, 0o604);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o604);
    assert_eq!(change("none", 0o600, "").unwrap_err(), libc::ENOENT);
    // A FIFO is not opened for it.
    let fifo = std::ffi::CString::new(agent.scratch.path("fifo")).unwrap();
    // SAFETY: the path ends in NUL.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o666) }, 0);
    if is_root() {
        assert_eq!(change("fifo", 0o620, "").unwrap().mode, 0o620);
    }
}
