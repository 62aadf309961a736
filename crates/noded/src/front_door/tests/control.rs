//! Attach and detach.

use super::{AgentConn, PATIENCE, SANDBOX, TestDoor, attach_request, listen};
use serde_json::json;
use shoal_wire::{Kind, Ready};
use std::os::unix::net::UnixListener;
use std::sync::mpsc;

#[test]
fn attach_answers_when_the_agent_is_ready() {
    let door = TestDoor::start();
    let mut control = door.control();
    assert_eq!(control.call(&json!({"op": "hello"}))["ok"]["version"], env!("CARGO_PKG_VERSION"));
    let socket = door.dir.join("a");
    let listener = UnixListener::bind(&socket).unwrap();
    let (go, may_go) = mpsc::channel();
    let agent = std::thread::spawn(move || {
        let mut agent = AgentConn::new(listener.accept().unwrap().0);
        may_go.recv_timeout(PATIENCE).unwrap();
        agent.ready(42);
        agent.idle();
    });
    let mut request = attach_request(SANDBOX, &socket);
    request["id"] = json!("attach");
    request["deadline_ms"] = json!(PATIENCE.as_millis() as u64);
    control.send(&request.to_string());
    // What is asked later is answered first: the agent is not ready.
    assert_eq!(control.call(&json!({"op": "detach", "sandbox": "sb-other"}))["id"], 1);
    go.send(()).unwrap();
    let answer = control.line();
    assert_eq!(answer["id"], "attach");
    assert_eq!((&answer["ok"]["generation"], &answer["ok"]["version"]), (&json!(42), &json!(1)));
    assert!(answer["ok"]["ready_us"].as_u64().unwrap() > 0);
    // Again, as a server does that was started anew.
    assert_eq!(control.call(&attach_request(SANDBOX, &socket))["ok"]["generation"], 42);
    assert_eq!(control.call(&json!({"op": "detach", "sandbox": SANDBOX}))["ok"], json!({}));
    agent.join().unwrap();
    assert_eq!(control.call(&json!({"op": "detach", "sandbox": SANDBOX}))["ok"], json!({}));
}

#[test]
fn an_agent_that_is_silent_or_no_agent_is_told_apart() {
    let door = TestDoor::start();
    let mut control = door.control();
    let missing = control.call(&attach_request(SANDBOX, &door.dir.join("nothing")));
    assert_eq!(missing["error"]["code"], "start_failed");
    let silent = door.dir.join("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    // Each waits as long as it says: the one that was sent first is still waiting when the other one gives up.
    let mut request = attach_request("sb-patient", &silent);
    request["id"] = json!("patient");
    request["deadline_ms"] = json!(PATIENCE.as_millis() as u64 * 10);
    control.send(&request.to_string());
    let mut request = attach_request(SANDBOX, &silent);
    request["deadline_ms"] = json!(50);
    let answer = control.call(&request);
    assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(1), &json!("start_timeout")));
    for (name, first) in [
        ("version", shoal_wire::frame(Kind::Ready, 0, 0, &Ready { version: 9, ..Ready::default() }.encode())),
        ("kind", shoal_wire::frame(Kind::Ok, 0, 0, &Ready::default().encode())),
        ("channel", shoal_wire::frame(Kind::Ready, 0, 1, &Ready::default().encode())),
        ("rubbish", b"HTTP/1.1 200 OK\r\n\r\n".to_vec()),
        ("end", Vec::new()),
    ] {
        let socket = door.dir.join(name);
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            std::io::Write::write_all(&mut stream, &first).unwrap();
        });
        assert_eq!(control.call(&attach_request(SANDBOX, &socket))["error"]["code"], "start_failed", "{name}");
    }
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_connection_goes_on() {
    let door = TestDoor::start();
    let mut control = door.control();
    control.send("rubbish");
    assert_eq!(control.line()["error"]["code"], "invalid_request");
    for bad in [
        json!({"op": "fly"}),
        json!({"op": "attach"}),
        json!({"op": "attach", "sandbox": "../x", "socket": "/x", "token": "t"}),
        json!({"op": "attach", "sandbox": "sb-a", "socket": "/x", "token": ""}),
        json!({"op": "attach", "sandbox": "sb-a", "socket": "/x", "token": "t", "other": 1}),
        json!({"op": "detach"}),
    ] {
        assert_eq!(control.call(&bad)["error"]["code"], "invalid_request", "{bad}");
    }
}

#[test]
fn detach_ends_streams_as_gone_with_the_reason() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        agent.start();
        agent.idle();
    });
    let mut client = door.client();
    let body = br#"{"argv":["sleep"]}"#;
    client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), &format!("Content-Length: {}\r\n", body.len()));
    client.raw(std::str::from_utf8(body).unwrap());
    client.head();
    client.chunk().unwrap();
    door.control().call(&json!({"op": "detach", "sandbox": SANDBOX, "reason": "timeout"}));
    let last = client.chunk().unwrap();
    assert_eq!(last[0], 0x7f);
    let problem: serde_json::Value = serde_json::from_slice(&last[8..]).unwrap();
    assert_eq!((&problem["code"], &problem["details"]["reason"]), (&json!("sandbox_gone"), &json!("timeout")));
    assert_eq!(client.chunk().unwrap(), b"");
    // From now on its server is asked.
    assert_eq!(door.request("GET", "execs", b"").problem(), (503, "node_unavailable".to_owned()));
}

#[test]
fn cr_02_a_dead_agent_is_lost_within_the_grace_and_the_server_is_told() {
    let door = TestDoor::start();
    let socket = door.dir.join("a");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        let mut agent = AgentConn::new(listener.accept().unwrap().0);
        drop(listener);
        agent.ready(1);
        let (channel, _) = agent.start();
        agent.send(Kind::Data, 0, channel, b"partial");
    });
    let mut control = door.control();
    control.call(&attach_request(SANDBOX, &socket));
    let answer = door.request("POST", "execs", br#"{"argv":["x"]}"#);
    let frames = answer.frames();
    assert_eq!(frames[1], (2, b"partial".to_vec()));
    assert_eq!(frames[2].0, 0x7f);
    let problem: serde_json::Value = serde_json::from_slice(&frames[2].1).unwrap();
    assert_eq!((&problem["code"], &problem["is_infra"]), (&json!("sandbox_lost"), &json!(true)));
    let event = control.line();
    assert_eq!((&event["event"], &event["sandbox"]), (&json!("sandbox_lost"), &json!(SANDBOX)));
}

#[test]
fn an_agent_whose_connection_breaks_as_it_is_detached_is_gone_and_not_lost() {
    let door = TestDoor::patient();
    let socket = door.dir.join("a");
    let listener = UnixListener::bind(&socket).unwrap();
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut agent = AgentConn::new(listener.accept().unwrap().0);
        drop(listener);
        agent.ready(1);
        agent.start();
        drop(agent);
        tell.send(()).unwrap();
    });
    let mut control = door.control();
    control.call(&attach_request(SANDBOX, &socket));
    let detach = std::thread::spawn(move || {
        told.recv_timeout(PATIENCE).unwrap();
        control.call(&json!({"op": "detach", "sandbox": SANDBOX}));
    });
    let answer = door.request("POST", "execs", br#"{"argv":["x"]}"#);
    detach.join().unwrap();
    let (kind, last) = answer.frames().pop().unwrap();
    let problem: serde_json::Value = serde_json::from_slice(&last).unwrap();
    assert_eq!((kind, &problem["code"]), (0x7f, &json!("sandbox_gone")));
}

#[test]
fn another_generation_is_another_agent() {
    let door = TestDoor::start();
    let socket = door.dir.join("a");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for generation in 1..4 {
            let mut agent = AgentConn::new(listener.accept().unwrap().0);
            agent.ready(generation);
            if generation == 1 {
                agent.start();
            } else {
                assert!(agent.receive().is_none());
            }
        }
    });
    door.control().call(&attach_request(SANDBOX, &socket));
    let answer = door.request("POST", "execs", br#"{"argv":["x"]}"#);
    let (_, last) = answer.frames().pop().unwrap();
    let problem: serde_json::Value = serde_json::from_slice(&last).unwrap();
    assert_eq!(problem["code"], "sandbox_lost");
}

#[test]
fn many_sandboxes_are_attached_at_once() {
    let door = TestDoor::start();
    let mut control = door.control();
    for i in 0..200 {
        let sandbox = format!("sb-{i}");
        let socket = door.dir.join(&sandbox);
        listen(&socket, |mut agent| agent.idle());
        let mut request = attach_request(&sandbox, &socket);
        request["id"] = json!(i);
        control.send(&request.to_string());
    }
    let mut answered: Vec<u64> = (0..200)
        .map(|_| {
            let answer = control.line();
            assert!(answer.get("ok").is_some(), "{answer}");
            answer["id"].as_u64().unwrap()
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..200).collect::<Vec<_>>());
}
