//! Who gets in, and what HTTP must look like.

use super::{SANDBOX, TOKEN, TestDoor};
use shoal_wire::Kind;
use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

#[test]
fn cp_04_only_the_sandbox_s_own_token_opens_its_data_plane() {
    let door = TestDoor::start();
    door.agent(|mut agent| assert!(agent.receive().is_none()));
    door.agent_as("sb-other", |mut agent| assert!(agent.receive().is_none()));
    let wrong = [
        String::new(),
        "Authorization: Bearer \r\n".to_owned(),
        "Authorization: Bearer f00\r\n".to_owned(),
        "Authorization: Bearer f00dd\r\n".to_owned(),
        "Authorization: Bearer F00D\r\n".to_owned(),
        format!("Authorization: Basic {TOKEN}\r\n"),
        format!("Authorization: {TOKEN}\r\n"),
    ];
    for header in wrong {
        for (method, tail) in [("GET", "execs"), ("PUT", "files/content?path=/a"), ("GET", "files/nothing")] {
            let mut client = door.client();
            client.raw(&format!("{method} /v1/sandboxes/{SANDBOX}/{tail} HTTP/1.1\r\nHost: x\r\n{header}\r\n"));
            let answer = client.answer();
            assert_eq!(answer.problem(), (401, "unauthenticated".to_owned()), "{header:?}");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
            assert!(!String::from_utf8(answer.body).unwrap().contains(TOKEN));
        }
    }
}

#[test]
fn unknown_routes_and_methods_are_told() {
    let door = TestDoor::start();
    door.agent(|mut agent| assert!(agent.receive().is_none()));
    for tail in ["files/nothing", "execs/e1/nothing", "execs/e1/stream/x", "files/content/"] {
        assert_eq!(door.request("GET", tail, b"").problem(), (404, "not_found".to_owned()), "{tail}");
    }
    for (method, tail, allow) in [
        ("PATCH", "execs", "GET, POST"),
        ("GET", "files", "DELETE"),
        ("POST", "files/content", "GET, PUT"),
        ("PUT", "execs/e1/stdin", "POST"),
    ] {
        let answer = door.request(method, tail, b"");
        assert_eq!(answer.problem(), (405, "invalid_argument".to_owned()), "{method} {tail}");
        assert_eq!(answer.headers["allow"], allow);
    }
}

#[test]
fn cp_06_heads_are_bounded_in_size_and_time() {
    let door = TestDoor::start();
    let mut client = door.client();
    client.raw(&format!("GET /{} HTTP/1.1\r\nHost: x\r\n", "a".repeat(60)));
    for _ in 0..300 {
        client.raw(&format!("X-Long: {}\r\n", "a".repeat(1000)));
    }
    client.raw("\r\n");
    assert_eq!(client.head().0, 431);
    let mut client = door.client();
    client.raw("rubbish\r\n\r\n");
    assert_eq!(client.head().0, 400);
    // Slowly, and never whole.
    let door = TestDoor::with(|config| config.header_timeout = Duration::from_millis(200));
    let mut client = door.client();
    client.raw("GET / HTTP/1.1\r\nHost:");
    let mut rest = Vec::new();
    client.reader.read_to_end(&mut rest).unwrap();
}

#[test]
fn cp_06_one_connection_too_many_is_refused_in_words() {
    let door = TestDoor::with(|config| config.max_connections = 2);
    let (one, two) = (door.client(), door.client());
    let mut three = door.client();
    let answer = three.answer();
    assert_eq!(answer.problem(), (503, "resource_exhausted".to_owned()));
    assert_eq!(answer.headers["retry-after"], "1");
    drop((one, two));
    super::eventually("there is room again", || {
        let (status, code) = door.client().request("GET", "/v1/node", b"").problem();
        assert_eq!(status, 503);
        code == "node_unavailable"
    });
}

#[test]
fn a_connection_serves_many_requests_also_over_tcp() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let door = TestDoor::with(|config| config.public.push(listener.into()));
    door.agent(|mut agent| {
        while let Some((header, _)) = agent.receive() {
            assert_eq!(header.kind, Kind::ExecSignal);
            agent.send(Kind::Ok, 0, header.channel, b"");
        }
    });
    let mut client = door.client();
    for _ in 0..3 {
        let answer = client.request("POST", &format!("/v1/sandboxes/{SANDBOX}/execs/e/signal"), br#"{"signal":9}"#);
        assert_eq!(answer.status, 204);
    }
    let mut stream = TcpStream::connect(address).unwrap();
    let body = r#"{"signal":9}"#;
    std::io::Write::write_all(
        &mut stream,
        format!(
            "POST /v1/sandboxes/{SANDBOX}/execs/e/signal HTTP/1.1\r\nHost: x\r\nAuthorization: bearer {TOKEN}\r\n\
             Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .as_bytes(),
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
}
