//! What is passed on to the Python server.

use super::{Client, SANDBOX, TestDoor, eventually};
use std::io::{BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};

/// A server that hands each connection to `script`.
fn server(door: &TestDoor, mut script: impl FnMut(Client) + Send + 'static) {
    let listener = UnixListener::bind(door.dir.join("server.sock")).unwrap();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
            script(connection(stream));
        }
    });
}

fn connection(stream: UnixStream) -> Client {
    Client { reader: BufReader::new(stream) }
}

/// Reads a request's head: the request line, then its headers joined.
fn request_head(client: &mut Client) -> (String, String) {
    let line = client.line();
    let mut headers = String::new();
    loop {
        let next = client.line();
        if next.is_empty() {
            return (line, headers.to_lowercase());
        }
        headers += &next;
        headers += "\n";
    }
}

/// A server that hands each request to `script` with its number on its connection, which ends when that returns false
/// or the door closes it. Connections are served side by side: when one is free again only the door knows.
fn each_request(
    door: &TestDoor,
    script: impl Fn(u32, &(String, String), &mut Client) -> bool + Clone + Send + 'static,
) {
    server(door, move |mut conn| {
        let script = script.clone();
        std::thread::spawn(move || {
            for number in 1.. {
                let head = request_head(&mut conn);
                if head.0.is_empty() || !script(number, &head, &mut conn) {
                    return;
                }
            }
        });
    });
}

const EMPTY: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

/// A server that breaks off at a connection's second request, after these bytes; and how often it did.
fn forgetful_server(door: &TestDoor, last_words: &'static str) -> Arc<AtomicU32> {
    let broken = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&broken);
    each_request(door, move |number, _, conn| {
        if number == 1 {
            conn.raw(EMPTY);
            return true;
        }
        conn.raw(last_words);
        count.fetch_add(1, Ordering::SeqCst);
        false
    });
    broken
}

#[test]
fn a_connection_that_is_free_is_used_again() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    each_request(&door, move |number, _, conn| {
        tell.send(number).unwrap();
        conn.raw(EMPTY);
        true
    });
    eventually("a connection has served three requests", || {
        assert_eq!(door.client().request("GET", "/v1/node", b"").status, 200);
        told.recv_timeout(super::PATIENCE).unwrap() == 3
    });
}

#[test]
fn a_request_on_a_connection_that_the_server_closed_meanwhile_is_sent_again() {
    for method in ["GET", "HEAD", "DELETE"] {
        let door = TestDoor::start();
        let broken = forgetful_server(&door, "");
        eventually("connections broke under a request", || {
            assert_eq!(door.client().request(method, "/v1/node", b"").status, 200, "{method}");
            broken.load(Ordering::SeqCst) >= 3
        });
    }
}

#[test]
fn what_may_have_been_done_or_answered_is_not_sent_again() {
    let once = [("POST", "", ""), ("PUT", "body", ""), ("DELETE", "body", ""), ("GET", "", "HTTP/1.1 2")];
    for (method, body, last_words) in once {
        let door = TestDoor::start();
        let broken = forgetful_server(&door, last_words);
        eventually("a connection broke under a request", || {
            let answer = door.client().request(method, "/v1/node", body.as_bytes());
            if answer.status == 200 {
                assert_eq!(broken.load(Ordering::SeqCst), 0, "{method} was sent again");
                return false;
            }
            assert_eq!(answer.problem(), (503, "node_unavailable".to_owned()));
            true
        });
    }
}

#[test]
fn a_request_is_sent_again_once_and_no_more() {
    let door = TestDoor::start();
    let well = Arc::new(AtomicBool::new(true));
    let seen = Arc::new(AtomicU32::new(0));
    let (is_well, count) = (Arc::clone(&well), Arc::clone(&seen));
    each_request(&door, move |_, _, conn| {
        count.fetch_add(1, Ordering::SeqCst);
        if is_well.load(Ordering::SeqCst) {
            conn.raw(EMPTY);
            return true;
        }
        false
    });
    eventually("a used connection broke, and then a fresh one", || {
        well.store(true, Ordering::SeqCst);
        assert_eq!(door.client().request("GET", "/v1/node", b"").status, 200);
        well.store(false, Ordering::SeqCst);
        seen.store(0, Ordering::SeqCst);
        assert_eq!(door.client().request("GET", "/v1/node", b"").problem(), (503, "node_unavailable".to_owned()));
        let seen = seen.load(Ordering::SeqCst);
        assert!((1..=2).contains(&seen), "sent {seen} times");
        seen == 2
    });
}

#[test]
fn what_is_not_the_data_plane_is_passed_on() {
    let door = TestDoor::start();
    door.agent(|mut agent| assert!(agent.receive().is_none()));
    let (tell, told) = mpsc::channel();
    each_request(&door, move |_, head, conn| {
        tell.send(head.clone()).unwrap();
        conn.raw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nKeep-Alive: 5\r\nConnection: X-Drop\r\nX-Drop: 1\r\nX-Keep: 1\r\n\r\nok");
        true
    });
    for (path, headers) in [
        (format!("/v1/sandboxes/{SANDBOX}"), ""),
        (format!("/v1/sandboxes/{SANDBOX}/connect"), ""),
        ("/v1/sandboxes/sb-unknown/execs".to_owned(), ""),
        (
            "/v1/images/a%2Fb?x=%20&y=+".to_owned(),
            "Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nTE: trailers\r\nX-End: 1\r\n",
        ),
        ("/".to_owned(), ""),
    ] {
        let mut client = door.client();
        client.send("GET", &path, headers);
        let answer = client.answer();
        assert_eq!((answer.status, answer.body.as_slice()), (200, &b"ok"[..]));
        assert!(answer.headers.contains_key("x-keep"));
        assert!(!answer.headers.contains_key("x-drop") && !answer.headers.contains_key("keep-alive"));
        let (line, seen) = told.recv_timeout(super::PATIENCE).unwrap();
        assert_eq!(line, format!("GET {path} HTTP/1.1"));
        assert!(seen.contains("authorization: bearer f00d") && seen.contains("host: x"), "{seen}");
        assert!(!seen.contains("x-hop") && !seen.contains("te: "), "{seen}");
        assert_eq!(seen.contains("x-end"), !headers.is_empty());
    }
}

#[test]
fn bodies_stream_both_ways() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    server(&door, move |mut conn| {
        request_head(&mut conn);
        // The first chunk comes before the client has sent the second.
        assert_eq!(conn.chunk().unwrap(), b"one");
        tell.send(()).unwrap();
        let mut length = 0;
        while let Some(chunk) = conn.chunk() {
            if chunk.is_empty() {
                break;
            }
            length += chunk.len();
        }
        assert_eq!(length, 20 << 20);
        conn.raw("HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
        tell.send(()).unwrap();
        let block = vec![b'z'; 1 << 20];
        for _ in 0..20 {
            conn.raw("100000\r\n");
            conn.reader.get_mut().write_all(&block).unwrap();
            conn.raw("\r\n");
        }
        conn.raw("0\r\n\r\n");
    });
    let mut client = door.client();
    client.send("POST", "/v1/images?name=a", "Transfer-Encoding: chunked\r\n");
    client.raw("3\r\none\r\n");
    told.recv_timeout(super::PATIENCE).unwrap();
    let block = vec![b'y'; 1 << 20];
    for _ in 0..20 {
        client.raw("100000\r\n");
        client.reader.get_mut().write_all(&block).unwrap();
        client.raw("\r\n");
    }
    client.raw("0\r\n\r\n");
    told.recv_timeout(super::PATIENCE).unwrap();
    let answer = client.answer();
    assert_eq!((answer.status, answer.body.len(), answer.whole), (201, 3 + (20 << 20), true));
}

#[test]
fn a_server_that_is_not_there_or_breaks_off_is_unavailable() {
    let door = TestDoor::start();
    let answer = door.client().request("GET", "/v1/node", b"");
    assert_eq!(answer.problem(), (503, "node_unavailable".to_owned()));
    assert!(answer.json()["is_infra"].as_bool().unwrap() && !answer.json()["hint"].as_str().unwrap().is_empty());
    server(&door, |mut conn| {
        request_head(&mut conn);
    });
    assert_eq!(door.client().request("GET", "/v1/node", b"").problem(), (503, "node_unavailable".to_owned()));
}

#[test]
fn an_idle_connection_that_the_server_closed_is_not_used_again() {
    let door = TestDoor::start();
    server(&door, |mut conn| {
        request_head(&mut conn);
        conn.raw("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        // And closes.
    });
    for _ in 0..20 {
        assert_eq!(door.client().request("GET", "/v1/node", b"").status, 200);
    }
}

#[test]
fn an_answer_that_breaks_off_is_not_passed_off_as_whole() {
    let door = TestDoor::start();
    server(&door, |mut conn| {
        request_head(&mut conn);
        conn.raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
    });
    let mut client = door.client();
    client.send("GET", "/v1/node", "");
    let (status, _) = client.head();
    let mut body = Vec::new();
    let _ = client.reader.read_to_end(&mut body);
    assert_eq!((status, body.as_slice()), (200, &b"half"[..]));
}
