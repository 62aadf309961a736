//! Ports: who is let in, what is kept from whom, and what the agent is asked. The agents here are played.

use super::{AgentConn, Answer, Client, PATIENCE, SANDBOX, TOKEN, TestDoor, attach_request, listen};
use serde_json::{Value, json};
use shoal_wire::{EOF, Failure, Kind, PORT_WINDOW, PortConnect};
use std::fmt::Write as _;
use std::io::{BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

const HOST: &str = "8000-sb-abc.localhost:4000";

/// Made with the token of [`SANDBOX`] for port 8000, good for a long time.
fn port_token(expires: u64) -> String {
    use hmac::{Hmac, KeyInit as _, Mac as _};
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(TOKEN.as_bytes()).unwrap();
    mac.update(format!("port:{SANDBOX}:8000:{expires}").as_bytes());
    let mut token = format!("{expires}.");
    for byte in mac.finalize().into_bytes() {
        write!(token, "{byte:02x}").unwrap();
    }
    token
}

const FAR: u64 = 4_000_000_000;

impl TestDoor {
    /// A door that listens on TCP too.
    fn on_tcp() -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (Self::with(|config| config.public.push(listener.into())), address)
    }

    /// Sends a head as it stands and reads the answer.
    fn exchange(&self, head: &str) -> Answer {
        let mut client = self.client();
        client.raw(head);
        client.answer()
    }
}

/// As [`TestDoor::exchange`], over TCP.
fn exchange_tcp(address: SocketAddr, head: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// An agent in whose sandbox a server gives `answer` to each request, and tells what it was asked.
fn http_agent(door: &TestDoor, answer: &'static str) -> mpsc::Receiver<String> {
    let (tell, told) = mpsc::channel();
    door.agent(move |mut agent| {
        while let Some((header, payload)) = agent.receive() {
            match header.kind {
                Kind::PortConnect => {
                    assert_eq!(PortConnect::decode(&payload).unwrap().port, 8000);
                    agent.send(Kind::Ok, 0, header.channel, b"");
                }
                Kind::Data if !payload.is_empty() => {
                    tell.send(String::from_utf8(payload).unwrap()).unwrap();
                    agent.send(Kind::Data, EOF, header.channel, answer.as_bytes());
                }
                _ => {}
            }
        }
    });
    told
}

const HELLO: &str = "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nhello";

#[test]
fn a_port_is_served_under_its_host_or_with_two_headers() {
    let door = TestDoor::start();
    let told = http_agent(&door, HELLO);
    for head in [
        format!("Host: {HOST}\r\nX-Shoal-Token: {TOKEN}\r\n"),
        format!("Host: 8000-SB-abc.ports.example.com\r\nX-Shoal-Token: {TOKEN}\r\n"),
        format!("Host: x\r\nX-Shoal-Sandbox: {SANDBOX}\r\nX-Shoal-Port: 8000\r\nX-Shoal-Token: {TOKEN}\r\n"),
        format!("Host: {HOST}\r\nCookie: shoal_port={}\r\n", port_token(FAR)),
        format!("Host: {HOST}\r\nX-Shoal-Token: {}\r\n", port_token(FAR)),
        format!("Host: {HOST}\r\nCookie: shoal_port=other; shoal_port={}\r\n", port_token(FAR)),
    ] {
        let answer = door.exchange(&format!("GET /v1/sandboxes?a=b HTTP/1.1\r\n{head}\r\n"));
        assert_eq!((answer.status, answer.body.as_slice()), (200, b"hello".as_slice()), "{head}");
        assert!(told.recv_timeout(PATIENCE).unwrap().starts_with("GET /v1/sandboxes?a=b HTTP/1.1\r\n"));
    }
}

#[test]
fn pt_02_a_server_sees_the_request_without_what_let_it_in() {
    let door = TestDoor::start();
    let told = http_agent(&door, HELLO);
    for secret in [
        format!("X-Shoal-Token: {TOKEN}\r\nCookie: a=1; shoal_port={TOKEN}; b=2\r\n"),
        format!("Cookie: a=1; shoal_port={}; b=2\r\n", port_token(FAR)),
    ] {
        let answer = door.exchange(&format!(
            "GET / HTTP/1.1\r\nHost: {HOST}\r\n{secret}Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\n\
             Keep-Alive: timeout=5\r\nTE: trailers\r\nX-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: gopher\r\n\
             Forwarded: for=6.6.6.6\r\nAuthorization: Basic app\r\nX-App: kept\r\n\r\n"
        ));
        assert_eq!(answer.status, 200);
        let seen = told.recv_timeout(PATIENCE).unwrap().to_lowercase();
        assert!(!seen.contains(TOKEN) && !seen.contains("shoal") && !seen.contains(&port_token(FAR)), "{seen}");
        for gone in ["x-hop", "keep-alive", "te:", "6.6.6.6", "gopher", "\r\nforwarded"] {
            assert!(!seen.contains(gone), "{gone}: {seen}");
        }
        for kept in [
            "\r\nhost: 8000-sb-abc.localhost:4000\r\n",
            "\r\ncookie: a=1; b=2\r\n",
            "\r\nauthorization: basic app\r\n",
            "\r\nx-app: kept\r\n",
            "\r\nx-forwarded-for: 127.0.0.1\r\n",
            "\r\nx-forwarded-host: 8000-sb-abc.localhost:4000\r\n",
            "\r\nx-forwarded-proto: http\r\n",
        ] {
            assert!(seen.contains(kept), "{kept}: {seen}");
        }
    }
}

#[test]
fn pt_01_a_port_opens_to_its_token_only() {
    let door = TestDoor::start();
    door.agent(|mut agent| assert!(agent.receive().is_none()));
    let with = |headers: &str| door.exchange(&format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n{headers}\r\n"));
    let other_port = format!("Host: 8001-sb-abc.localhost\r\nX-Shoal-Token: {}\r\n", port_token(FAR));
    let refused = door.exchange(&format!("GET / HTTP/1.1\r\n{other_port}\r\n"));
    assert_eq!(refused.problem(), (401, "unauthenticated".to_owned()));
    for headers in [
        String::new(),
        format!("Authorization: Bearer {TOKEN}\r\n"),
        "X-Shoal-Token: f00\r\n".to_owned(),
        "Cookie: shoal_port=f00\r\n".to_owned(),
        format!("X-Shoal-Token: f00\r\nCookie: shoal_port={TOKEN}\r\n"),
        format!("X-Shoal-Token: {}\r\n", port_token(1_000_000_000)),
        format!("X-Shoal-Token: {}0\r\n", port_token(FAR)),
        // A browser holds tokens for a port only: what the port serves may get at them.
        format!("Cookie: shoal_port={TOKEN}\r\n"),
    ] {
        let answer = with(&headers);
        assert_eq!(answer.problem(), (401, "unauthenticated".to_owned()), "{headers}");
        assert!(!String::from_utf8(answer.body).unwrap().contains(TOKEN));
    }
    let expired = with(&format!("X-Shoal-Token: {}\r\n", port_token(1_000_000_000))).json();
    assert_eq!(expired["detail"], "the token for this port has expired");
}

#[test]
fn pt_03_an_unknown_sandbox_is_the_same_404_whatever_was_asked() {
    let door = TestDoor::start();
    door.agent_as("sb-known", |mut agent| assert!(agent.receive().is_none()));
    door.agent_as("sb-ended", |mut agent| assert!(agent.receive().is_none()));
    door.control().call(&json!({"op": "detach", "sandbox": "sb-ended", "reason": "timeout"}));
    let mut answers = Vec::new();
    for sandbox in ["sb-never", "sb-ended", "sb-", "sb-x--y"] {
        for token in ["", "X-Shoal-Token: f00d\r\n", "Cookie: shoal_port=f00d\r\nOrigin: http://evil\r\n"] {
            for request in ["GET /", "POST /.shoal/enter", "GET /.shoal/enter"] {
                let head = format!("{request} HTTP/1.1\r\nHost: 80-{sandbox}.localhost\r\n{token}\r\n");
                let mut answer = door.exchange(&head);
                assert_eq!(answer.problem(), (404, "sandbox_not_found".to_owned()), "{head}");
                answer.headers.remove("date");
                answers.push((answer.headers, answer.body));
            }
        }
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn what_names_no_port_or_half_of_it_is_refused_or_goes_to_the_node() {
    let door = TestDoor::start();
    door.agent(|mut agent| assert!(agent.receive().is_none()));
    for headers in [
        "Host: 0-sb-abc.localhost\r\n",
        "Host: 65536-sb-abc.localhost\r\n",
        "Host: x\r\nX-Shoal-Sandbox: sb-abc\r\n",
        "Host: x\r\nX-Shoal-Port: 80\r\n",
        "Host: x\r\nX-Shoal-Sandbox: sb-abc\r\nX-Shoal-Port: http\r\n",
        "Host: x\r\nHost: 80-sb-abc.localhost\r\n",
        "Host: 08000-sb-abc.localhost\r\n",
        "Host: x\r\nX-Shoal-Sandbox: sb-abc\r\nX-Shoal-Port: 08000\r\n",
        "Host: 8000-sb-abc.localhost@evil.example\r\n",
    ] {
        let answer = door.exchange(&format!("GET / HTTP/1.1\r\n{headers}X-Shoal-Token: {TOKEN}\r\n\r\n"));
        assert_eq!(answer.problem(), (400, "invalid_argument".to_owned()), "{headers}");
    }
    let answer = door.exchange("GET /v1/node HTTP/1.1\r\nHost: 8000-sb-abc\r\n\r\n");
    assert_eq!(answer.problem(), (503, "node_unavailable".to_owned()));
}

#[test]
fn a_public_port_needs_no_token_until_it_is_taken_back() {
    let door = TestDoor::start();
    let socket = door.dir.join("a");
    let _agent = listen(&socket, |mut agent: AgentConn| {
        while let Some((header, payload)) = agent.receive() {
            match header.kind {
                Kind::PortConnect => agent.send(Kind::Ok, 0, header.channel, b""),
                Kind::Data if !payload.is_empty() => agent.send(Kind::Data, EOF, header.channel, HELLO.as_bytes()),
                _ => {}
            }
        }
    });
    let mut control = door.control();
    let mut request = attach_request(SANDBOX, &socket);
    request["public_ports"] = json!([8000]);
    assert!(control.call(&request).get("ok").is_some());
    let status = |port: u16| {
        door.exchange(&format!("GET / HTTP/1.1\r\nHost: {port}-sb-abc.localhost\r\nX-Shoal-Token: bad\r\n\r\n")).status
    };
    assert_eq!((status(8000), status(8001)), (200, 401));
    let mut publish = |ports: Value| control.call(&json!({"op": "ports", "sandbox": SANDBOX, "public_ports": ports}));
    assert_eq!(publish(json!([8001, 8002]))["ok"], json!({}));
    assert_eq!((status(8000), status(8001)), (401, 200));
    assert_eq!(publish(json!([]))["ok"], json!({}));
    assert_eq!((status(8000), status(8001)), (401, 401));
    assert_eq!(publish(json!([70000]))["error"]["code"], "invalid_request");
    // A server that was started anew says it again.
    request["public_ports"] = json!([8001]);
    assert!(control.call(&request).get("ok").is_some());
    assert_eq!((status(8000), status(8001)), (401, 200));
    let unknown = json!({"op": "ports", "sandbox": "sb-never", "public_ports": []});
    assert_eq!(control.call(&unknown)["error"]["code"], "sandbox_not_found");
}

#[test]
fn pt_04_a_foreign_page_cannot_use_a_browser_s_cookie() {
    let door = TestDoor::start();
    let _told = http_agent(&door, HELLO);
    let status = |request: &str, headers: &str| {
        let body = if request.starts_with("POST") { "Content-Length: 0\r\n" } else { "" };
        door.exchange(&format!("{request} / HTTP/1.1\r\nHost: {HOST}\r\n{headers}{body}\r\n")).status
    };
    let cookie = format!("Cookie: shoal_port={}\r\n", port_token(FAR));
    let websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    for origin in
        ["http://evil.example", "null", "http://8001-sb-abc.localhost:4000", "http://8000-sb-abc.localhost", "file://"]
    {
        let origin = format!("Origin: {origin}\r\n");
        for method in ["POST", "PUT", "DELETE", "PATCH"] {
            assert_eq!(status(method, &format!("{cookie}{origin}")), 403, "{method} {origin}");
        }
        assert_eq!(status("GET", &format!("{cookie}{origin}{websocket}")), 403, "{origin}");
        assert_eq!(status("GET", &format!("{cookie}{origin}")), 200);
        // Who sends the token itself is no page that borrows a cookie.
        assert_eq!(status("POST", &format!("X-Shoal-Token: {TOKEN}\r\n{origin}")), 200);
    }
    for origin in
        ["Origin: http://8000-sb-abc.localhost:4000\r\n", "Origin: https://8000-SB-abc.localhost:4000\r\n", ""]
    {
        assert_eq!(status("POST", &format!("{cookie}{origin}")), 200, "{origin}");
        assert_eq!(status("GET", &format!("{cookie}{origin}{websocket}")), 200, "{origin}");
    }
}

#[test]
fn a_browser_is_let_in_by_a_page_and_a_cookie() {
    let door = TestDoor::start();
    let _told = http_agent(&door, HELLO);
    let page = door.exchange(&format!("GET /.shoal/enter HTTP/1.1\r\nHost: {HOST}\r\n\r\n"));
    assert_eq!((page.status, page.headers["cache-control"].as_str()), (200, "no-store"));
    assert!(page.headers["content-security-policy"].starts_with("default-src 'none'; script-src 'sha256-"));
    let enter = |token: &str, headers: &str| {
        let length = token.len();
        door.exchange(&format!(
            "POST /.shoal/enter HTTP/1.1\r\nHost: {HOST}\r\n{headers}Content-Length: {length}\r\n\r\n{token}"
        ))
    };
    let token = port_token(FAR);
    let own = "Origin: http://8000-sb-abc.localhost:4000\r\n";
    let answer = enter(&token, own);
    assert_eq!(answer.status, 204);
    let cookie = &answer.headers["set-cookie"];
    assert_eq!(*cookie, format!("shoal_port={token}; HttpOnly; SameSite=Strict; Path=/"));
    let pair = cookie.split(';').next().unwrap();
    let answer = door.exchange(&format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: {pair}\r\n\r\n"));
    assert_eq!(answer.body, b"hello");
    assert_eq!(enter("wrong", own).problem(), (401, "unauthenticated".to_owned()));
    assert_eq!(enter(TOKEN, own).problem(), (401, "unauthenticated".to_owned()));
    assert_eq!(enter(&port_token(1), own).problem(), (401, "unauthenticated".to_owned()));
    assert_eq!(enter(&token, "Origin: http://evil\r\n").problem(), (403, "forbidden".to_owned()));
    assert_eq!(enter(&"x".repeat(2000), own).problem(), (413, "invalid_argument".to_owned()));
    let other = door.exchange(&format!("PUT /.shoal/enter HTTP/1.1\r\nHost: {HOST}\r\n\r\n"));
    assert_eq!(other.problem(), (405, "invalid_argument".to_owned()));
}

#[test]
fn cp_04_the_access_token_does_not_reach_the_sandbox_by_habit() {
    let door = TestDoor::start();
    let told = http_agent(&door, HELLO);
    let head =
        format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nX-Shoal-Token: {TOKEN}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n");
    assert_eq!(door.exchange(&head).status, 200);
    let seen = told.recv_timeout(PATIENCE).unwrap();
    assert!(!seen.contains(TOKEN), "{seen}");
}

#[test]
fn cp_04_a_server_cannot_put_another_token_into_a_browser() {
    let door = TestDoor::start();
    let _told = http_agent(
        &door,
        "HTTP/1.1 200 OK\r\nSet-Cookie: app=shoal_port=1\r\nSet-Cookie: shoal_port\r\nset-cookie:  shoal_port =y\r\n\
         Set-Cookie: shoal_port=x; Path=/\r\nContent-Length: 5\r\n\r\nhello",
    );
    let answer = door.exchange(&format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nX-Shoal-Token: {TOKEN}\r\n\r\n"));
    assert_eq!((answer.headers["set-cookie"].as_str(), answer.body.as_slice()), ("app=shoal_port=1", &b"hello"[..]));
}

#[test]
fn cp_07_a_length_that_a_server_says_twice_or_wrongly_is_said_once_and_rightly() {
    for (answer, length) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n", Some("5")),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", None),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", None),
    ] {
        let door = TestDoor::start();
        let _told = http_agent(&door, answer);
        let answer = door.exchange(&format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nX-Shoal-Token: {TOKEN}\r\n\r\n"));
        assert_eq!(answer.headers.get("content-length").map(String::as_str), length);
        assert_eq!((answer.body.as_slice(), answer.whole), (&b"hello"[..], true));
    }
}

#[test]
fn cp_05_who_came_in_by_a_public_port_is_out_when_it_is_taken_back() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        while let Some((header, payload)) = agent.receive() {
            match header.kind {
                Kind::PortConnect => agent.send(Kind::Ok, 0, header.channel, b""),
                Kind::Data if payload.starts_with(b"GET /ws") => {
                    let switched = "HTTP/1.1 101 Go on\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
                    agent.send(Kind::Data, 0, header.channel, switched.as_bytes());
                }
                Kind::Data if !payload.is_empty() => {
                    agent.send(Kind::Data, 0, header.channel, b"HTTP/1.1 200 OK\r\n\r\nbegun");
                }
                _ => {}
            }
        }
    });
    let mut control = door.control();
    let mut publish = |ports: Value| {
        let answer = control.call(&json!({"op": "ports", "sandbox": SANDBOX, "public_ports": ports}));
        assert_eq!(answer["ok"], json!({}));
    };
    publish(json!([8000]));
    let begin = |path: &str, headers: &str| {
        let mut client = door.client();
        client.raw(&format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\n{headers}\r\n"));
        client.head();
        client
    };
    let websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    let mut stream = begin("/", "");
    assert_eq!(stream.chunk().as_deref(), Some(&b"begun"[..]));
    let mut socket = begin("/ws", websocket);
    publish(json!([8000, 8001]));
    publish(json!([8001]));
    for client in [&mut stream, &mut socket] {
        // Sooner than the agent's own patience ends.
        client.reader.get_mut().set_read_timeout(Some(PATIENCE / 4)).unwrap();
        assert_eq!(client.reader.read_to_end(&mut Vec::new()).unwrap(), 0);
    }
    // Who holds a token has it still.
    let token = format!("X-Shoal-Token: {TOKEN}\r\n");
    publish(json!([]));
    let mut kept = begin("/ws", &format!("{token}{websocket}"));
    publish(json!([8000]));
    publish(json!([]));
    kept.reader.get_mut().set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
    assert_eq!(kept.reader.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn pt_05_no_page_reaches_the_control_or_data_plane() {
    let (door, address) = TestDoor::on_tcp();
    door.agent(|mut agent| assert!(agent.receive().is_none()));
    for path in ["/v1/node", "/v1/sandboxes/sb-abc/execs", "/v1/sandboxes/sb-abc/ports/80/wait", "/"] {
        for origin in ["http://localhost", "null", "http://8000-sb-abc.localhost:4000"] {
            let head =
                format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nOrigin: {origin}\r\n");
            let answer = door.exchange(&format!("{head}\r\n"));
            assert_eq!(answer.problem(), (403, "forbidden".to_owned()), "{path}");
            let answer = exchange_tcp(address, &format!("{head}Connection: close\r\n\r\n"));
            assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        }
    }
}

#[test]
fn pt_06_over_tcp_there_is_no_control_plane() {
    let (door, address) = TestDoor::on_tcp();
    door.agent(|mut agent| {
        while let Some((header, _)) = agent.receive() {
            assert_eq!(header.kind, Kind::ExecSignal);
            agent.send(Kind::Ok, 0, header.channel, b"");
        }
    });
    for request in
        ["GET /v1/node", "POST /v1/sandboxes", "PUT /v1/sandboxes/sb-abc/ports/80", "GET /v1/sandboxes/sb-no/execs"]
    {
        let tail = "HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer f00d\r\nConnection: close\r\n\r\n";
        let answer = exchange_tcp(address, &format!("{request} {tail}"));
        assert!(answer.starts_with("HTTP/1.1 401 ") && answer.contains("\"unauthenticated\""), "{request}: {answer}");
        let answer = door.exchange(&format!("{request} {tail}"));
        assert_eq!(answer.problem(), (503, "node_unavailable".to_owned()), "{request}");
    }
    let body = r#"{"signal":9}"#;
    let head = format!("POST /v1/sandboxes/{SANDBOX}/execs/e/signal HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
    let token = format!("Authorization: Bearer {TOKEN}\r\n");
    let length = format!("Content-Length: {}\r\n\r\n{body}", body.len());
    assert!(exchange_tcp(address, &format!("{head}{token}{length}")).starts_with("HTTP/1.1 204 "));
    assert!(exchange_tcp(address, &format!("{head}{length}")).starts_with("HTTP/1.1 401 "));
}

#[test]
fn cp_06_strangers_on_tcp_leave_room_for_the_owner() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let door = TestDoor::with(|config| {
        config.max_connections = 4;
        config.public.push(listener.into());
    });
    let strangers: Vec<TcpStream> = (0..2).map(|_| TcpStream::connect(address).unwrap()).collect();
    super::eventually("the third is refused", || exchange_tcp(address, "").starts_with("HTTP/1.1 503 "));
    assert_eq!(door.client().request("GET", "/v1/node", b"").problem().1, "node_unavailable");
    drop(strangers);
}

#[test]
fn what_the_agent_cannot_connect_to_is_unreachable() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        while let Some((header, _)) = agent.receive() {
            if header.kind == Kind::PortConnect {
                let failure = Failure { errno: libc::ECONNREFUSED, what: b"connect".to_vec() };
                agent.send(Kind::Error, 0, header.channel, &failure.encode());
            }
        }
    });
    let answer = door.exchange(&format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nX-Shoal-Token: {TOKEN}\r\n\r\n"));
    assert_eq!(answer.problem(), (502, "port_unreachable".to_owned()));
    assert_eq!(answer.json()["details"]["port"], 8000);
    assert!(answer.json()["hint"].as_str().unwrap().contains("start a server"));
    let mut client = door.client();
    client.send(
        "POST",
        &format!("/v1/sandboxes/{SANDBOX}/ports/80/connect"),
        "Connection: upgrade\r\nUpgrade: tcp\r\n",
    );
    assert_eq!(client.answer().problem(), (502, "port_unreachable".to_owned()));
    assert_eq!(door.request("GET", "ports/80/wait?timeout=0.05", b"").problem(), (408, "deadline_exceeded".to_owned()));
    assert_eq!(door.request("GET", "ports/80/wait?timeout=0", b"").problem(), (408, "deadline_exceeded".to_owned()));
    for (method, tail, problem) in [
        ("GET", "ports/80/wait?timeout=601", (400, "invalid_argument")),
        ("GET", "ports/80/wait?timeout=soon", (400, "invalid_argument")),
        ("GET", "ports/0/wait", (400, "invalid_argument")),
        ("GET", "ports/65536/wait", (400, "invalid_argument")),
        ("GET", "ports/%2B80/wait", (400, "invalid_argument")),
        ("POST", "ports/80/connect", (400, "invalid_argument")),
        ("GET", "ports/80/connect", (405, "invalid_argument")),
        ("POST", "ports/80/wait", (405, "invalid_argument")),
        ("GET", "ports/80/other", (404, "not_found")),
    ] {
        assert_eq!(door.request(method, tail, b"").problem(), (problem.0, problem.1.to_owned()), "{method} {tail}");
    }
    // A port by itself is the server's.
    assert_eq!(door.request("PUT", "ports/80", b"").problem(), (503, "node_unavailable".to_owned()));
}

/// A raw connection to a port.
fn connect(door: &TestDoor, port: u16) -> BufReader<UnixStream> {
    let Client { reader } = {
        let mut client = door.client();
        let headers = "Connection: Upgrade\r\nUpgrade: tcp\r\n";
        client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/ports/{port}/connect"), headers);
        let (status, headers) = client.head();
        assert_eq!((status, headers["upgrade"].as_str()), (101, "tcp"));
        client
    };
    reader
}

#[test]
fn a_client_that_stops_reading_costs_a_window() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    door.agent(move |mut agent| {
        let (channel, ..) = agent.expect(Kind::PortConnect);
        agent.send(Kind::Ok, 0, channel, b"");
        let sent = agent.pump_within(PORT_WINDOW, channel, 0, 24 << 20);
        agent.send(Kind::Data, EOF, channel, b"");
        tell.send(sent).unwrap();
        agent.idle();
    });
    let mut reader = connect(&door, 80);
    // The agent waits for windows that do not come: the socket to the client holds far less than all of it.
    assert!(told.recv_timeout(std::time::Duration::from_millis(300)).is_err());
    let mut got = Vec::new();
    let reading = std::thread::spawn(move || reader.read_to_end(&mut got).map(|_| got.len()));
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), 24 << 20);
    assert_eq!(reading.join().unwrap().unwrap(), 24 << 20);
}

#[test]
fn pt_07_ports_leave_room_for_the_owner_s_calls() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        while let Some((header, _)) = agent.receive() {
            match header.kind {
                Kind::PortConnect | Kind::ExecSignal => agent.send(Kind::Ok, 0, header.channel, b""),
                // Its client's end is the server's reason to end too.
                Kind::Data => agent.send(Kind::Data, EOF, header.channel, b""),
                _ => {}
            }
        }
    });
    let open: Vec<_> = (0..crate::front_door::link::MAX_PORTS).map(|_| connect(&door, 80)).collect();
    let mut client = door.client();
    client.send(
        "POST",
        &format!("/v1/sandboxes/{SANDBOX}/ports/80/connect"),
        "Connection: upgrade\r\nUpgrade: tcp\r\n",
    );
    assert_eq!(client.answer().problem(), (429, "resource_exhausted".to_owned()));
    assert_eq!(door.request("POST", "execs/e/signal", br#"{"signal":9}"#).status, 204);
    drop(open);
    super::eventually("there is room again", || {
        let mut client = door.client();
        let headers = "Connection: upgrade\r\nUpgrade: tcp\r\n";
        client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/ports/80/connect"), headers);
        client.head().0 == 101
    });
}

#[test]
fn both_ends_end_when_the_sandbox_or_the_client_goes() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    door.agent(move |mut agent| {
        while let Some((header, payload)) = agent.receive() {
            match header.kind {
                Kind::PortConnect => agent.send(Kind::Ok, 0, header.channel, b""),
                Kind::Data => tell.send((header.flags, payload)).unwrap(),
                Kind::Cancel => tell.send((0xff, vec![])).unwrap(),
                _ => {}
            }
        }
    });
    // The client closes: that is an end first, for it might still listen.
    drop(connect(&door, 80));
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), (EOF, vec![]));
    let mut reader = connect(&door, 80);
    door.control().call(&json!({"op": "detach", "sandbox": SANDBOX, "reason": "timeout"}));
    assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0);
}

#[test]
fn half_a_connection_that_is_silent_ends_and_a_whole_one_does_not() {
    let door = TestDoor::with(|config| {
        config.half_closed = std::time::Duration::from_millis(100);
        config.header_timeout = std::time::Duration::from_millis(100);
    });
    let (tell, told) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    door.agent(move |mut agent| {
        let (channel, ..) = agent.expect(Kind::PortConnect);
        agent.send(Kind::Ok, 0, channel, b"");
        may_go.recv_timeout(PATIENCE).unwrap();
        agent.send(Kind::Data, 0, channel, b"late");
        let (header, _) = agent.receive().unwrap();
        assert_eq!((header.kind, header.flags), (Kind::Data, EOF));
        // The agent keeps its half open, and says nothing.
        let (header, _) = agent.receive().unwrap();
        tell.send(header.kind).unwrap();
        agent.idle();
    });
    let mut reader = connect(&door, 80);
    // Silent for longer than either limit.
    std::thread::sleep(std::time::Duration::from_millis(500));
    go.send(()).unwrap();
    let mut late = [0; 4];
    reader.read_exact(&mut late).unwrap();
    assert_eq!(&late, b"late");
    reader.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0);
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Kind::Cancel);
}
