//! Files: read, write, list, pack, and how failures are told.

use super::{SANDBOX, TestDoor};
use serde_json::json;
use shoal_wire::{
    EOF, Failure, FileChange, FileInfo, FileKind, FileList, FileListing, FileRead, FileRename, FileUnpack, FileWatch,
    FileWrite, Kind, PathRequest, WINDOW, Window,
};
use std::io::Write as _;
use std::sync::mpsc;

fn info(path: &str, size: u64) -> FileInfo {
    FileInfo {
        path: path.into(),
        kind: FileKind::File,
        size,
        mode: 0o644,
        uid: 1,
        gid: 2,
        mtime_ns: 1_500_000_000,
        target: Vec::new(),
    }
}

#[test]
fn a_file_is_read_with_its_length() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, _, payload) = agent.expect(Kind::FileRead);
        let request = FileRead::decode(&payload).unwrap();
        assert_eq!(request, FileRead { path: b"/a b".to_vec(), offset: 10, length: u64::MAX });
        let size = 10 + (5 << 20);
        agent.send(Kind::Ok, 0, channel, &info("/a b", size).encode());
        agent.pump(channel, 0, 5 << 20);
        agent.send(Kind::Data, EOF, channel, b"");
        // Windows that were under way.
        while let Some((header, _)) = agent.receive() {
            if header.kind == Kind::FileRead {
                // One of /proc: empty by its own account.
                agent.send(Kind::Ok, 0, header.channel, &info("/proc/x", 0).encode());
                agent.send(Kind::Data, EOF, header.channel, b"proc");
                break;
            }
            assert!(matches!(header.kind, Kind::Window | Kind::Cancel));
        }
        agent.idle();
    });
    let answer = door.request("GET", "files/content?path=%2Fa+b&offset=10", b"");
    assert_eq!((answer.status, answer.body.len(), answer.whole), (200, 5 << 20, true));
    assert_eq!(answer.headers["content-length"], (5 << 20).to_string());
    let answer = door.request("GET", "files/content?path=/proc/x", b"");
    assert_eq!(answer.body, b"proc");
    assert!(!answer.headers.contains_key("content-length"));
}

#[test]
fn a_file_that_shrinks_or_fails_while_it_is_read_breaks_the_answer_off() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::FileRead);
        agent.send(Kind::Ok, 0, channel, &info("/a", 100).encode());
        agent.send(Kind::Data, EOF, channel, b"short");
        let (channel, ..) = agent.expect(Kind::FilePack);
        agent.send(Kind::Ok, 0, channel, b"");
        agent.send(Kind::Data, 0, channel, b"tar");
        let failure = Failure { errno: libc::EIO, what: b"read".to_vec() };
        agent.send(Kind::Error, 0, channel, &failure.encode());
        agent.idle();
    });
    let answer = door.request("GET", "files/content?path=/a", b"");
    assert_eq!((answer.status, answer.whole), (200, false));
    let answer = door.request("GET", "files/archive?path=/a", b"");
    assert_eq!((answer.status, answer.whole, answer.body), (200, false, b"tar".to_vec()));
}

#[test]
fn a_file_that_grows_while_it_is_read_is_cut_at_its_promised_length() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::FileRead);
        agent.send(Kind::Ok, 0, channel, &info("/a", 3).encode());
        agent.send(Kind::Data, 0, channel, b"abcdef");
        agent.expect(Kind::Cancel);
        agent.idle();
    });
    let answer = door.request("GET", "files/content?path=/a", b"");
    assert_eq!((answer.status, answer.whole, answer.body), (200, true, b"abc".to_vec()));
}

#[test]
fn a_download_in_frames_says_why_it_broke_off() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        for end in [Some(libc::EIO), None] {
            let (channel, ..) = agent.expect(Kind::FilePack);
            agent.send(Kind::Ok, 0, channel, b"");
            agent.send(Kind::Data, 0, channel, b"tar");
            agent.send(Kind::Data, 0, channel, &[b'x'; 100_000]);
            match end {
                Some(errno) => {
                    agent.send(Kind::Error, 0, channel, &Failure { errno, what: b"a/b".to_vec() }.encode());
                }
                None => agent.send(Kind::Data, EOF, channel, b"s"),
            }
        }
        let (channel, ..) = agent.expect(Kind::FileRead);
        agent.send(Kind::Ok, 0, channel, &info("/a", 9).encode());
        agent.send(Kind::Data, EOF, channel, b"short");
        agent.idle();
    });
    let answer = door.request("GET", "files/archive?path=/a&framed=true", b"");
    assert_eq!((answer.status, answer.whole), (200, true));
    let frames = answer.frames();
    let bytes = [&b"tar"[..], &[b'x'; 100_000]].concat();
    assert_eq!((frames.len(), &frames[0], frames[1].0), (2, &(2, bytes.clone()), 0x7f));
    let problem: serde_json::Value = serde_json::from_slice(&frames[1].1).unwrap();
    assert_eq!((&problem["code"], &problem["details"]["errno"]), (&json!("path_error"), &json!(libc::EIO)));
    let frames = door.request("GET", "files/archive?path=/a&framed=true", b"").frames();
    assert_eq!(frames, [(2, [bytes, b"s".to_vec()].concat())]);
    let frames = door.request("GET", "files/content?path=/a&framed=true", b"").frames();
    let problem: serde_json::Value = serde_json::from_slice(&frames[1].1).unwrap();
    assert_eq!((&frames[0], &problem["code"]), (&(2, b"short".to_vec()), &json!("conflict")));
}

#[test]
fn a_file_is_written_as_it_arrives() {
    let door = TestDoor::start();
    const LENGTH: usize = 10_000_000;
    door.agent(|mut agent| {
        let (channel, _, payload) = agent.expect(Kind::FileWrite);
        let request = FileWrite::decode(&payload).unwrap();
        assert_eq!(request, FileWrite { path: b"/a".to_vec(), mode: 0o755, user: b"dev".to_vec(), parents: true });
        let mut received = Vec::new();
        loop {
            let (_, flags, data) = agent.expect(Kind::Data);
            received.extend(data);
            if flags == EOF {
                break;
            }
            agent.send(Kind::Window, 0, channel, &Window { consumed: received.len() as u64 }.encode());
        }
        assert!(received.len() == LENGTH && received.iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8));
        agent.send(Kind::Ok, 0, channel, &info("/a", LENGTH as u64).encode());
        agent.idle();
    });
    let body: Vec<u8> = (0..LENGTH).map(|i| (i % 251) as u8).collect();
    let answer = door.request("PUT", "files/content?path=/a&mode=0755&user=dev&parents=true", &body);
    assert_eq!(answer.status, 200);
    let expected = json!({"path": "/a", "kind": "file", "size": LENGTH, "mode": 0o644, "uid": 1, "gid": 2, "mtime": 1.5,
                          "target": null});
    assert_eq!(answer.json(), expected);
}

#[test]
fn an_upload_whose_client_goes_away_is_cancelled() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    door.agent(move |mut agent| {
        let (channel, ..) = agent.expect(Kind::FileWrite);
        agent.expect(Kind::Data);
        tell.send(true).unwrap();
        let (cancelled, ..) = agent.expect(Kind::Cancel);
        tell.send(channel == cancelled).unwrap();
        agent.idle();
    });
    let mut client = door.client();
    client.send("PUT", &format!("/v1/sandboxes/{SANDBOX}/files/content?path=/a"), "Content-Length: 100\r\n");
    client.raw("half");
    told.recv_timeout(super::PATIENCE).unwrap();
    drop(client);
    assert!(told.recv_timeout(super::PATIENCE).unwrap());
}

#[test]
fn an_upload_that_the_disk_has_no_room_for_is_told_at_once() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::FileWrite);
        let mut received = 0;
        while received < WINDOW {
            received += agent.expect(Kind::Data).2.len() as u64;
        }
        let failure = Failure { errno: libc::EDQUOT, what: b"write /a".to_vec() };
        agent.send(Kind::Error, 0, channel, &failure.encode());
        agent.idle();
    });
    let answer = door.request("PUT", "files/content?path=/a", &vec![1; 16 << 20]);
    assert_eq!(answer.problem(), (422, "path_error".to_owned()));
    let problem = answer.json();
    assert_eq!(problem["details"]["errno"], libc::EDQUOT);
    assert_eq!(problem["detail"], "write /a: disk quota exceeded");
    assert!(problem["hint"].as_str().unwrap().contains("disk_mib"));
}

#[test]
fn archives_go_both_ways() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, _, payload) = agent.expect(Kind::FilePack);
        assert_eq!(PathRequest::decode(&payload).unwrap().path, b"/d");
        agent.send(Kind::Ok, 0, channel, b"");
        agent.send(Kind::Data, 0, channel, b"tar ");
        agent.send(Kind::Data, EOF, channel, b"bytes");
        let (channel, _, payload) = agent.expect(Kind::FileUnpack);
        assert_eq!(FileUnpack::decode(&payload).unwrap(), FileUnpack { path: b"/d".to_vec(), user: Vec::new() });
        assert_eq!(agent.expect(Kind::Data).2, b"tar");
        assert_eq!(agent.expect(Kind::Data).1, EOF);
        agent.send(Kind::Ok, 0, channel, b"");
        let (channel, ..) = agent.expect(Kind::FileUnpack);
        let failure = Failure { errno: 0, what: b"member 3 is no tar header".to_vec() };
        agent.expect(Kind::Data);
        agent.expect(Kind::Data);
        agent.send(Kind::Error, 0, channel, &failure.encode());
        agent.idle();
    });
    let answer = door.request("GET", "files/archive?path=/d", b"");
    assert_eq!((answer.status, answer.body.as_slice()), (200, &b"tar bytes"[..]));
    assert_eq!(answer.headers["content-type"], "application/x-tar");
    assert_eq!(door.request("PUT", "files/archive?path=/d", b"tar").status, 204);
    assert_eq!(
        door.request("PUT", "files/archive?path=/d", b"rubbish").problem(),
        (400, "invalid_argument".to_owned())
    );
}

#[test]
fn the_other_file_routes_reach_the_agent() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::FileStat);
        let link = FileInfo { kind: FileKind::Symlink, target: b"/t".to_vec(), ..info("/l", 2) };
        agent.send(Kind::Ok, 0, channel, &link.encode());
        let (channel, _, payload) = agent.expect(Kind::FileList);
        assert_eq!(FileList::decode(&payload).unwrap(), FileList { path: b"/d".to_vec(), depth: 3 });
        // More than a small frame holds.
        let entries = (0..5000).rev().map(|i| info(&format!("/d/{i:04}"), i)).collect();
        agent.send(Kind::Ok, 0, channel, &FileListing { entries }.encode());
        let (channel, _, payload) = agent.expect(Kind::FileMakeDir);
        let request = PathRequest::decode(&payload).unwrap();
        assert_eq!(request, PathRequest { path: b"/n".to_vec(), user: b"u".to_vec(), bits: 1 });
        agent.send(Kind::Ok, 0, channel, &FileInfo { kind: FileKind::Directory, ..info("/n", 0) }.encode());
        let (channel, _, payload) = agent.expect(Kind::FileRemove);
        assert_eq!(PathRequest::decode(&payload).unwrap().bits, 0);
        agent.send(Kind::Ok, 0, channel, b"");
        let (channel, _, payload) = agent.expect(Kind::FileRename);
        assert_eq!(FileRename::decode(&payload).unwrap(), FileRename { from: b"/x".to_vec(), to: b"/y".to_vec() });
        agent.send(Kind::Ok, 0, channel, b"");
        agent.idle();
    });
    let stat = door.request("GET", "files/info?path=/l", b"").json();
    assert_eq!((&stat["kind"], &stat["target"]), (&json!("symlink"), &json!("/t")));
    let list = door.request("GET", "files/list?path=/d&depth=3", b"").json();
    assert_eq!(list["entries"].as_array().unwrap().len(), 5000);
    assert_eq!(list["entries"][7]["path"], "/d/0007");
    let made = door.request("POST", "files/directory?path=/n&user=u&parents=true", b"").json();
    assert_eq!(made["kind"], "directory");
    assert_eq!(door.request("DELETE", "files?path=/n", b"").status, 204);
    assert_eq!(door.request("POST", "files/rename", br#"{"from":"/x","to":"/y"}"#).status, 204);
}

#[test]
fn failures_of_paths_are_told_by_errno() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        for errno in [libc::ENOENT, libc::EACCES, 0] {
            let (channel, ..) = agent.expect(Kind::FileStat);
            agent.send(Kind::Error, 0, channel, &Failure { errno, what: b"/a".to_vec() }.encode());
        }
        agent.idle();
    });
    let answer = door.request("GET", "files/info?path=/a", b"");
    assert_eq!(answer.problem(), (404, "path_not_found".to_owned()));
    assert_eq!(answer.json()["detail"], "/a: no such file or directory");
    assert_eq!(door.request("GET", "files/info?path=/a", b"").problem(), (422, "path_error".to_owned()));
    assert_eq!(door.request("GET", "files/info?path=/a", b"").problem(), (400, "invalid_argument".to_owned()));
}

#[test]
fn requests_that_make_no_sense_never_reach_the_agent() {
    let door = TestDoor::start();
    door.agent(|mut agent| assert!(agent.receive().is_none()));
    for (method, tail) in [
        ("GET", "files/content"),
        ("GET", "files/content?path=relative"),
        ("GET", "files/content?path=/a%00b"),
        ("GET", "files/content?path=/a%zz"),
        ("GET", "files/content?path=/a&offset=-1"),
        ("GET", "files/content?path=/a&path=/b"),
        ("GET", "files/content?path=/a&other=1"),
        ("GET", "files/list?path=/a&depth=0"),
        ("PUT", "files/content?path=/a&mode=rw"),
        ("DELETE", "files?path=/a&recursive=maybe"),
        ("POST", "files/rename"),
        ("POST", "files/attributes?path=/a"),
        ("GET", "files/watch"),
        ("GET", "files/watch?path=/a&recursive=maybe"),
    ] {
        assert_eq!(door.request(method, tail, b"").problem(), (400, "invalid_argument".to_owned()), "{method} {tail}");
    }
    let mut client = door.client();
    client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/files/rename"), "Content-Length: 90000000\r\n");
    assert_eq!(client.answer().problem(), (413, "invalid_argument".to_owned()));
    let mut client = door.client();
    client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), "Transfer-Encoding: chunked\r\n");
    let megabyte = "x".repeat(1 << 20);
    for _ in 0..9 {
        client.raw(&format!("100000\r\n{megabyte}\r\n"));
    }
    let _ = client.reader.get_mut().flush();
    client.raw("0\r\n\r\n");
    assert_eq!(client.answer().problem(), (413, "invalid_argument".to_owned()));
}

#[test]
fn attributes_and_watches_reach_the_agent() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    door.agent(move |mut agent| {
        let (channel, _, payload) = agent.expect(Kind::FileChange);
        let request = FileChange::decode(&payload).unwrap();
        assert_eq!(request, FileChange { path: b"/a".to_vec(), mode: 0o755, user: b"dev".to_vec() });
        agent.send(Kind::Ok, 0, channel, &info("/a", 1).encode());
        let (channel, _, payload) = agent.expect(Kind::FileChange);
        assert_eq!(FileChange::decode(&payload).unwrap().mode, u32::MAX);
        agent.send(Kind::Ok, 0, channel, &info("/a", 1).encode());
        let (channel, ..) = agent.expect(Kind::FileWatch);
        agent.send(Kind::Error, 0, channel, &Failure { errno: libc::ENOSPC, what: b"/a".to_vec() }.encode());
        let (channel, _, payload) = agent.expect(Kind::FileWatch);
        assert_eq!(FileWatch::decode(&payload).unwrap(), FileWatch { path: b"/a".to_vec(), recursive: false });
        agent.send(Kind::Ok, 0, channel, b"");
        agent.send(Kind::Data, 0, channel, b"{\"type\":\"ready\"}\n");
        let (cancelled, ..) = agent.expect(Kind::Cancel);
        tell.send(cancelled == channel).unwrap();
        agent.idle();
    });
    assert_eq!(door.request("POST", "files/attributes?path=/a&mode=0755&user=dev", b"").status, 200);
    assert_eq!(door.request("POST", "files/attributes?path=/a&user=dev", b"").status, 200);
    let refused = door.request("GET", "files/watch?path=/a", b"");
    assert_eq!(refused.problem(), (429, "resource_exhausted".to_owned()));
    let mut client = door.client();
    client.send("GET", &format!("/v1/sandboxes/{SANDBOX}/files/watch?path=/a&recursive=false"), "");
    let (status, headers) = client.head();
    assert_eq!((status, headers["content-type"].as_str()), (200, "application/x-ndjson"));
    assert_eq!(client.chunk().unwrap(), b"{\"type\":\"ready\"}\n");
    drop(client);
    assert!(told.recv_timeout(super::PATIENCE).unwrap());
}
