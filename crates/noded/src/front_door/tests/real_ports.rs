//! Ports with the real guest agent. It runs in this process's network, so the servers are threads of the tests.

use super::real::Real;
use super::{Answer, Client, PATIENCE, SANDBOX, TOKEN};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A server that handles each connection with `script`, one after the other; its port.
fn server(mut script: impl FnMut(Peer) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            script(Peer { reader: BufReader::new(stream) });
        }
    });
    port
}

/// The server's end of a connection.
struct Peer {
    reader: BufReader<TcpStream>,
}

impl Peer {
    /// The head of a request, in lower case.
    fn head(&mut self) -> String {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.reader.read_line(&mut head).unwrap() == 0 {
                break;
            }
        }
        head.to_lowercase()
    }
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.reader.get_mut().write_all(bytes.as_ref()).unwrap();
    }
}

/// A request for a port on a connection of its own.
fn ask(real: &Real, port: u16, request: &str, headers: &str) -> Client {
    let mut client = real.door.client();
    client.raw(&format!(
        "{request} HTTP/1.1\r\nHost: {port}-{SANDBOX}.localhost\r\nX-Shoal-Token: {TOKEN}\r\n{headers}\r\n"
    ));
    client
}

fn get(real: &Real, port: u16) -> Answer {
    ask(real, port, "GET /", "").answer()
}

fn connect(real: &Real, port: u16) -> UnixStream {
    let mut client = real.door.client();
    let headers = "Connection: Upgrade\r\nUpgrade: tcp\r\n";
    client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/ports/{port}/connect"), headers);
    assert_eq!(client.head().0, 101);
    assert!(client.reader.buffer().is_empty());
    client.reader.into_inner()
}

fn noise(length: u32) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[test]
fn real_servers_of_every_age_are_understood() {
    let real = Real::start();
    let body = noise(3_000_000);
    for (head, chunked) in [
        ("HTTP/1.0 200 OK\r\nServer: old\r\n\r\n".to_owned(), false),
        (format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()), false),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(), true),
    ] {
        let sent = body.clone();
        let port = server(move |mut peer| {
            assert!(peer.head().starts_with("get / http/1.1\r\n"));
            peer.send(&head);
            for chunk in sent.chunks(100_000) {
                if chunked {
                    peer.send(format!("{:x}\r\n", chunk.len()));
                }
                peer.send(chunk);
                if chunked {
                    peer.send("\r\n");
                }
            }
            if chunked {
                peer.send("0\r\n\r\n");
            }
        });
        // One connection of the client, many requests.
        let mut client = real.door.client();
        for _ in 0..3 {
            client
                .raw(&format!("GET / HTTP/1.1\r\nHost: {port}-{SANDBOX}.localhost\r\nX-Shoal-Token: {TOKEN}\r\n\r\n"));
            let answer = client.answer();
            assert!(answer.status == 200 && answer.whole && answer.body == body);
        }
    }
}

#[test]
fn real_bodies_go_up_whole_and_as_they_come() {
    let real = Real::start();
    let body = noise(5_000_000);
    let expected = body.clone();
    let port = server(move |mut peer| {
        let head = peer.head();
        let mut got = Vec::new();
        if head.contains("content-length: 5000000\r\n") {
            (&mut peer.reader).take(5_000_000).read_to_end(&mut got).unwrap();
        } else {
            assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
            loop {
                let mut line = String::new();
                peer.reader.read_line(&mut line).unwrap();
                let length = u64::from_str_radix(line.trim_end(), 16).unwrap();
                (&mut peer.reader).take(length).read_to_end(&mut got).unwrap();
                peer.reader.read_exact(&mut [0; 2]).unwrap();
                if length == 0 {
                    break;
                }
            }
        }
        assert!(got == expected, "{} bytes came", got.len());
        peer.send("HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok");
    });
    let mut client = ask(&real, port, "PUT /x", &format!("Content-Length: {}\r\n", body.len()));
    client.reader.get_mut().write_all(&body).unwrap();
    assert_eq!(client.answer().body, b"ok");
    let mut client = ask(&real, port, "POST /x", "Transfer-Encoding: chunked\r\n");
    for chunk in body.chunks(70_000) {
        client.raw(&format!("{:x}\r\n", chunk.len()));
        client.reader.get_mut().write_all(chunk).unwrap();
        client.raw("\r\n");
    }
    client.raw("0\r\n\r\n");
    assert_eq!(client.answer().status, 201);
}

#[test]
fn real_events_arrive_one_by_one_and_a_client_that_leaves_is_noticed() {
    let real = Real::start();
    let (go, next) = mpsc::channel::<()>();
    let (tell, gone) = mpsc::channel();
    let port = server(move |mut peer| {
        peer.head();
        peer.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
        for event in ["data: 0\n\n", "data: 1\n\n", "data: 2\n\n"] {
            peer.send(format!("{:x}\r\n{event}\r\n", event.len()));
            // Not before the client has read this one.
            next.recv_timeout(PATIENCE).unwrap();
        }
        // An end or a reset, and nothing else ever.
        tell.send(matches!(peer.reader.read(&mut [0]), Ok(0) | Err(_))).unwrap();
    });
    let mut client = ask(&real, port, "GET /", "");
    assert_eq!(client.head().0, 200);
    for event in 0..3 {
        assert_eq!(client.chunk().unwrap(), format!("data: {event}\n\n").into_bytes());
        go.send(()).unwrap();
    }
    drop(client);
    assert!(gone.recv_timeout(PATIENCE).unwrap());
}

#[test]
fn real_websockets_go_both_ways_and_may_be_silent() {
    let real = Real::with(|config| config.header_timeout = Duration::from_millis(200));
    let port = server(|mut peer| {
        let head = peer.head();
        assert!(head.contains("connection: upgrade\r\n") && head.contains("upgrade: websocket\r\n"), "{head}");
        assert!(head.contains("sec-websocket-key: x\r\n") && !head.contains("shoal-token"), "{head}");
        if head.starts_with("get /no ") {
            peer.send("HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n");
            return;
        }
        // The first bytes of the new protocol come with the head.
        peer.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n");
        peer.send("Sec-WebSocket-Accept: y\r\n\r\nfirst");
        let mut bytes = [0; 4096];
        loop {
            match peer.reader.read(&mut bytes).unwrap() {
                0 => return peer.send("last"),
                count => peer.send(bytes[..count].to_ascii_uppercase()),
            }
        }
    });
    let headers = "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n";
    let mut client = ask(&real, port, "GET /ws", headers);
    let (status, answer) = client.head();
    assert_eq!((status, answer["upgrade"].as_str()), (101, "websocket"));
    assert_eq!((answer["connection"].as_str(), answer["sec-websocket-accept"].as_str()), ("upgrade", "y"));
    let mut first = [0; 5];
    client.reader.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"first");
    for word in ["one", "two"] {
        // For longer than a client may take for a request's head.
        std::thread::sleep(Duration::from_millis(400));
        client.raw(word);
        let mut echo = [0; 3];
        client.reader.read_exact(&mut echo).unwrap();
        assert_eq!(echo, word.to_uppercase().as_bytes());
    }
    client.reader.get_mut().shutdown(Shutdown::Write).unwrap();
    let mut rest = String::new();
    client.reader.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "last");
    assert_eq!(ask(&real, port, "GET /no", headers).answer().status, 426);
}

#[test]
fn real_raw_bytes_go_both_ways_and_each_half_ends_by_itself() {
    let real = Real::start();
    let (up, down) = (noise(20_000_000), noise(30_000_000));
    let (expected, sent) = (up.clone(), down.clone());
    let port = server(move |mut peer| {
        let mut writer = peer.reader.get_ref().try_clone().unwrap();
        let sent = sent.clone();
        let writing = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        peer.reader.read_to_end(&mut got).unwrap();
        assert!(got == expected, "{} bytes came", got.len());
        writing.join().unwrap();
    });
    let mut stream = connect(&real, port);
    let mut writer = stream.try_clone().unwrap();
    let writing: JoinHandle<()> = std::thread::spawn(move || {
        writer.write_all(&up).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got == down, "{} bytes came", got.len());
    writing.join().unwrap();
}

#[test]
fn real_what_was_sent_before_an_end_is_read_however_late() {
    let real = Real::start();
    let (go, may_go) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    let port = server(move |mut peer| {
        // Ends its half at once, and reads much later.
        peer.reader.get_ref().shutdown(Shutdown::Write).unwrap();
        may_go.recv_timeout(PATIENCE).unwrap();
        let mut got = Vec::new();
        tell.send(peer.reader.read_to_end(&mut got).map(|_| got.len())).unwrap();
    });
    let mut stream = connect(&real, port);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    // More than the sockets on the way take, so that a part of it is with the door or the agent.
    let writing = std::thread::spawn(move || {
        stream.write_all(&noise(12_000_000)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    std::thread::sleep(Duration::from_millis(100));
    go.send(()).unwrap();
    assert_eq!(told.recv_timeout(PATIENCE).unwrap().unwrap(), 12_000_000);
    writing.join().unwrap();
}

#[test]
fn real_an_answer_that_breaks_off_is_not_whole() {
    let real = Real::start();
    let port = server(|mut peer| {
        peer.head();
        peer.send("HTTP/1.0 200 OK\r\n\r\nhalf of it");
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        let length = size_of::<libc::linger>() as libc::socklen_t;
        let fd = std::os::fd::AsRawFd::as_raw_fd(peer.reader.get_ref());
        // SAFETY: `length` is that of `linger`, which outlives the call.
        unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length) };
    });
    // Its reset may also overtake what it said.
    let answer = ask(&real, port, "GET /", "").answer();
    assert!(answer.status == 502 || !answer.whole, "{answer:?}");
    let silent = server(|mut peer| {
        peer.head();
    });
    assert_eq!(get(&real, silent).problem(), (502, "port_unreachable".to_owned()));
    let babble = server(|mut peer| {
        peer.head();
        peer.send("220 this is no web server\r\n");
    });
    assert_eq!(get(&real, babble).problem(), (502, "port_unreachable".to_owned()));
}

#[test]
fn real_a_server_that_says_no_to_a_body_is_heard() {
    let real = Real::start();
    let port = server(|mut peer| {
        peer.head();
        peer.send("HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nless");
        peer.reader.get_ref().shutdown(Shutdown::Both).unwrap();
    });
    let mut client = ask(&real, port, "PUT /", "Content-Length: 100000000\r\n");
    client.reader.get_ref().set_nonblocking(true).unwrap();
    let body = noise(1_000_000);
    // As much as is taken: nobody reads it.
    while !matches!(client.reader.get_mut().write(&body), Err(error) if error.kind() != ErrorKind::Interrupted) {}
    client.reader.get_ref().set_nonblocking(false).unwrap();
    let answer = client.answer();
    assert_eq!((answer.status, answer.body.as_slice()), (413, b"less".as_slice()));
}

#[test]
fn real_a_port_is_waited_for() {
    let real = Real::start();
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    assert_eq!(get(&real, port).problem(), (502, "port_unreachable".to_owned()));
    assert_eq!(real.door.request("GET", &format!("ports/{port}/wait?timeout=0.1"), b"").problem().0, 408);
    let mut client = real.door.client();
    client.send("GET", &format!("/v1/sandboxes/{SANDBOX}/ports/{port}/wait?timeout=20"), "");
    std::thread::sleep(Duration::from_millis(100));
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    assert_eq!(client.answer().status, 204);
    // Whoever looked has gone, as one that has ended.
    let mut seen = listener.accept().unwrap().0;
    seen.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(seen.read(&mut [0]).unwrap(), 0);
}

fn call(real: &Real, request: &Value) -> Value {
    real.door.control().call(request)
}

fn probe(real: &Real, probe: &Value, main: Option<&str>) -> Value {
    let request = json!({"op": "probe", "sandbox": SANDBOX, "probe": probe, "main": main, "deadline_ms": 2000});
    let answer = call(real, &request);
    answer.get("ok").unwrap_or(&answer).clone()
}

#[test]
fn real_probes_see_what_is_ready() {
    let real = Real::start();
    let port = server(|mut peer| {
        let head = peer.head();
        let status = head.strip_prefix("get /").map_or("", |rest| &rest[..rest.len().min(3)]).to_owned();
        if !status.trim().is_empty() && head.contains("host: localhost:") {
            peer.send(format!("HTTP/1.0 {status} Word\r\n\r\nbody"));
        }
    });
    let ready = |kind: Value| probe(&real, &kind, None);
    assert_eq!(ready(json!({"port": port})), json!({"ready": true, "detail": "", "ended": null}));
    for (path, good) in [("/200", true), ("/204", true), ("/302", true), ("/404", false), ("/503", false), ("/", false)]
    {
        let seen = ready(json!({"port": port, "path": path}));
        assert_eq!(seen["ready"], good, "{path}: {seen}");
        assert_eq!(seen["detail"].as_str().unwrap().is_empty(), good, "{path}: {seen}");
    }
    assert_eq!(
        ready(json!({"port": port, "path": "/503"}))["detail"],
        format!("GET /503 on port {port} gives 503 Service Unavailable")
    );
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for kind in [json!({"port": free}), json!({"port": free, "path": "/"})] {
        let seen = ready(kind);
        assert_eq!(
            (&seen["ready"], &seen["detail"]),
            (&json!(false), &json!(format!("port {free}: nothing listens there")))
        );
    }
    assert_eq!(ready(json!({"command": ["true"]}))["ready"], true);
    let seen = ready(json!({"command": ["sh", "-c", "echo out; echo not yet >&2; exit 3"]}));
    assert_eq!(seen["ready"], false);
    let detail = seen["detail"].as_str().unwrap();
    assert!(detail.starts_with("sh exited with 3: ") && detail.contains("not yet"), "{detail}");
    let detail = ready(json!({"command": ["no-such-program"]}))["detail"].as_str().unwrap().to_owned();
    assert_eq!(detail, "no-such-program did not start: no such file or directory (errno 2, stage exec)");
    let slow = json!({"op": "probe", "sandbox": SANDBOX, "probe": {"command": ["sleep", "60"]}, "deadline_ms": 100});
    assert_eq!(call(&real, &slow)["ok"]["detail"], "sleep did not end in time");
    // Nothing of it is left.
    assert_eq!(real.door.request("GET", "execs", b"").json(), json!({"execs": []}));
    for bad in [json!({}), json!({"path": "/"}), json!({"port": 70000}), json!({"port": 1, "command": ["x"]})] {
        assert_eq!(ready(bad.clone())["error"]["code"], "invalid_request", "{bad}");
    }
    assert_eq!(ready(json!({"command": []}))["error"]["code"], "invalid_argument");
    assert_eq!(ready(json!({"port": port, "path": "no slash"}))["error"]["code"], "invalid_argument");
    let unknown = json!({"op": "probe", "sandbox": "sb-never", "probe": {"port": 1}});
    assert_eq!(call(&real, &unknown)["error"]["code"], "sandbox_not_found");
}

#[test]
fn real_a_server_that_hangs_makes_no_probe_wait_for_ever() {
    let real = Real::start();
    let (_keep, kept) = mpsc::channel::<()>();
    let port = server(move |mut peer| {
        peer.head();
        let _ = kept.recv();
    });
    let look = json!({"op": "probe", "sandbox": SANDBOX, "probe": {"port": port, "path": "/"}, "deadline_ms": 100});
    assert_eq!(call(&real, &look)["ok"]["detail"], format!("GET / on port {port} was not answered in time"));
}

#[test]
fn real_commands_are_started_for_the_server() {
    let real = Real::start();
    let start = |exec_id: &str, argv: &[&str]| {
        call(&real, &json!({"op": "exec", "sandbox": SANDBOX, "exec_id": exec_id, "argv": argv}))
    };
    let said = real.door.dir.join("said");
    let script = format!("echo said; touch {}; exec sleep 60", said.display());
    let pid = start("main", &["sh", "-c", &script])["ok"]["pid"].as_u64().unwrap();
    assert!(pid > 0);
    super::eventually("it has spoken", || said.exists());
    // Again: it is the same one.
    assert_eq!(start("main", &["other"])["ok"]["pid"], pid);
    let running = probe(&real, &json!({"command": ["true"]}), Some("main"));
    assert_eq!((&running["ready"], &running["ended"]), (&json!(true), &Value::Null));
    assert_eq!(real.door.request("POST", "execs/main/signal", br#"{"signal":9}"#).status, 204);
    super::eventually("its end is seen", || {
        let seen = probe(&real, &json!({"command": ["false"]}), Some("main"));
        assert_eq!(seen["ready"], false);
        seen["ended"]
            == json!({"outcome": "killed", "exit_code": null, "signal": 9, "stdout_tail": "said\n", "stderr_tail": ""})
    });
    // What it said is there for who asks.
    let frames = real.door.request("GET", "execs/main/stream", b"").frames();
    assert_eq!(frames[1], (2, b"said\n".to_vec()));
    // As much of both streams as helps; and no half of a character.
    start("short", &["sh", "-c", "yes è | head -c 3000000; yes wrong | head -n 1000 >&2; echo at last >&2; exit 4"]);
    super::eventually("its end is seen", || {
        let seen = probe(&real, &json!({"command": ["false"]}), Some("short"));
        let ended = &seen["ended"];
        if ended["exit_code"].is_null() {
            return false;
        }
        let tail = |name: &str| ended[name].as_str().unwrap().to_owned();
        let (stdout, stderr) = (tail("stdout_tail"), tail("stderr_tail"));
        assert!(stdout.starts_with("\nè") && stdout.ends_with("è\n") && stdout.len() == 2047, "{stdout}");
        assert!(stderr.ends_with("wrong\nat last\n") && stderr.len() == 2048, "{} {stderr}", stderr.len());
        assert_eq!((&ended["outcome"], &ended["exit_code"]), (&json!("exited"), &json!(4)));
        true
    });
    let failed = start("bad", &["no-such-program"]);
    assert_eq!(failed["error"]["code"], "not_started");
    assert_eq!(
        failed["error"]["message"],
        "no-such-program did not start: no such file or directory (errno 2, stage exec)"
    );
    assert_eq!((&failed["error"]["errno"], &failed["error"]["stage"]), (&json!(2), &json!("exec")));
    let refused = start("a/b", &["true"]);
    assert_eq!((&refused["error"]["code"], &refused["error"]["errno"]), (&json!("invalid_argument"), &Value::Null));
    assert_eq!(start("empty", &[])["error"]["code"], "invalid_argument");
    let unknown = json!({"op": "exec", "sandbox": "sb-never", "exec_id": "e", "argv": ["true"]});
    assert_eq!(call(&real, &unknown)["error"]["code"], "sandbox_not_found");
    let unknown = probe(&real, &json!({"command": ["true"]}), Some("never"));
    assert_eq!(unknown["error"]["code"], "exec_not_found");
}

#[test]
fn real_a_command_s_start_is_waited_for_as_long_as_was_said() {
    let real = Real::start();
    let agent = real.agent.id() as i32;
    // SAFETY: no pointer; the agent is a child of this test, which waits for it only at its end.
    assert_eq!(unsafe { libc::kill(agent, libc::SIGSTOP) }, 0);
    let begin = Instant::now();
    let request = json!({"op": "exec", "sandbox": SANDBOX, "exec_id": "e", "argv": ["true"], "deadline_ms": 100});
    assert_eq!(call(&real, &request)["error"]["code"], "deadline_exceeded");
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    // SAFETY: as above.
    assert_eq!(unsafe { libc::kill(agent, libc::SIGCONT) }, 0);
}
