//! CP-07: an agent that lies, floods or babbles harms nobody but its own sandbox.

use super::TestDoor;
use serde_json::Value;
use shoal_wire::{DATA_CHUNK, EOF, Exited, Failure, Header, Kind, STDERR, Started, WINDOW, Window};
use std::io::{Read as _, Write as _};
use std::sync::mpsc::{self, TryRecvError};

type Attack = fn(&mut super::AgentConn, u32);

/// What an agent may try on the channel of a running exec.
const ATTACKS: &[(&str, Attack)] = &[
    ("forged channel", |agent, _| agent.send(Kind::Data, 0, 77, b"x")),
    ("channel zero", |agent, _| agent.send(Kind::Data, 0, 0, b"x")),
    ("second ready", |agent, _| agent.ready(1)),
    ("unknown kind", |agent, _| agent.stream.write_all(&[0, 0, 0, 0, 1, 0, 0, 0, 0x99, 0, 0, 0]).unwrap()),
    ("reserved bytes", |agent, _| agent.stream.write_all(&[0, 0, 0, 0, 1, 0, 0, 0, 0x30, 1, 0, 1]).unwrap()),
    ("giant frame", |agent, channel| {
        let header = Header { len: u32::MAX, channel, kind: Kind::Data, flags: 0 };
        agent.stream.write_all(&header.encode()).unwrap();
    }),
    ("large frame of a small kind", |agent, channel| {
        let header = Header { len: 4 << 20, channel, kind: Kind::Exited, flags: 0 };
        agent.stream.write_all(&header.encode()).unwrap();
    }),
    ("large answer that nobody asked for", |agent, channel| {
        let header = Header { len: 4 << 20, channel, kind: Kind::Ok, flags: 0 };
        agent.stream.write_all(&header.encode()).unwrap();
    }),
    ("a request", |agent, channel| agent.send(Kind::ExecStart, 0, channel, b"")),
    ("ok on an exec", |agent, channel| agent.send(Kind::Ok, 0, channel, b"")),
    ("started twice", |agent, channel| agent.started(channel, Started::default())),
    ("window on an exec", |agent, channel| {
        agent.send(Kind::Window, 0, channel, &Window { consumed: 0 }.encode());
    }),
    ("malformed exit", |agent, channel| agent.send(Kind::Exited, 0, channel, b"short")),
    ("unknown outcome", |agent, channel| {
        let mut payload = Exited::default().encode();
        payload[0] = 200;
        agent.send(Kind::Exited, 0, channel, &payload);
    }),
    ("data after the stream's end", |agent, channel| {
        agent.send(Kind::Data, EOF, channel, b"x");
        agent.send(Kind::Data, 0, channel, b"x");
    }),
    ("empty data", |agent, channel| agent.send(Kind::Data, 0, channel, b"")),
    ("unknown data flags", |agent, channel| agent.send(Kind::Data, 0x80, channel, b"x")),
    ("one frame over the window", |agent, channel| {
        let header = Header { len: WINDOW as u32 + 1, channel, kind: Kind::Data, flags: 0 };
        agent.stream.write_all(&header.encode()).unwrap();
    }),
];

#[test]
fn cp_07_each_break_of_the_protocol_ends_this_sandbox_s_streams_as_lost() {
    let door = TestDoor::start();
    door.agent_as("sb-good", |mut agent| {
        loop {
            let (channel, _) = agent.start();
            agent.exited(channel, 0);
        }
    });
    let attacked: Vec<_> = ATTACKS
        .iter()
        .enumerate()
        .map(|(i, (name, attack))| {
            let sandbox = format!("sb-bad-{i}");
            door.agent_as(&sandbox, move |mut agent| {
                let (channel, _) = agent.start();
                attack(&mut agent, channel);
                agent.idle();
            });
            let mut client = door.client();
            let body = br#"{"argv":["x"]}"#;
            client.send(
                "POST",
                &format!("/v1/sandboxes/{sandbox}/execs"),
                &format!("Content-Length: {}\r\n", body.len()),
            );
            client.reader.get_mut().write_all(body).unwrap();
            (name, client)
        })
        .collect();
    for (name, mut client) in attacked {
        let answer = client.answer();
        let (kind, last) = answer.frames().pop().unwrap();
        assert_eq!(kind, 0x7f, "{name}");
        let problem: Value = serde_json::from_slice(&last).unwrap();
        assert_eq!(problem["code"], "sandbox_lost", "{name}");
        let why = problem["detail"].as_str().unwrap();
        assert!(why.starts_with("the guest agent broke the protocol: "), "{name}: {why}");
    }
    let answer = door.client().request("POST", "/v1/sandboxes/sb-good/execs", br#"{"argv":["x"]}"#);
    assert_eq!(answer.frames().len(), 2);
}

/// What an agent may try on the channel of a connection to a port.
const ATTACKS_ON_PORTS: &[(&str, Attack)] = &[
    ("started", |agent, channel| agent.started(channel, Started::default())),
    ("exited", |agent, channel| agent.exited(channel, 0)),
    ("ok twice", |agent, channel| agent.send(Kind::Ok, 0, channel, b"")),
    ("more than the window", |agent, channel| {
        // The client reads nothing; its socket takes a little.
        for _ in 0..4 * WINDOW as usize / DATA_CHUNK {
            agent.send(Kind::Data, 0, channel, &[b'x'; DATA_CHUNK]);
        }
    }),
    ("data after the end", |agent, channel| {
        agent.send(Kind::Data, EOF, channel, b"x");
        agent.send(Kind::Data, 0, channel, b"x");
    }),
    ("the end twice", |agent, channel| {
        agent.send(Kind::Data, EOF, channel, b"");
        agent.send(Kind::Data, EOF, channel, b"");
    }),
    ("a frame after an error", |agent, channel| {
        agent.send(Kind::Error, 0, channel, &Failure { errno: 104, what: vec![] }.encode());
        agent.send(Kind::Data, 0, channel, b"x");
    }),
    ("empty data", |agent, channel| agent.send(Kind::Data, 0, channel, b"")),
    ("data of a second stream", |agent, channel| agent.send(Kind::Data, STDERR, channel, b"x")),
    ("consumed what was not sent", |agent, channel| {
        agent.send(Kind::Window, 0, channel, &Window { consumed: 5 }.encode());
    }),
    ("consumed less than before", |agent, channel| {
        agent.send(Kind::Window, 0, channel, &Window { consumed: 4 }.encode());
        agent.send(Kind::Window, 0, channel, &Window { consumed: 3 }.encode());
    }),
];

#[test]
fn cp_07_each_break_of_a_port_s_rules_ends_this_sandbox_s_connections() {
    let door = TestDoor::start();
    let attacked: Vec<_> = ATTACKS_ON_PORTS
        .iter()
        .enumerate()
        .map(|(i, (name, attack))| {
            let sandbox = format!("sb-bad-{i}");
            let (tell, hung_up) = mpsc::channel();
            door.agent_as(&sandbox, move |mut agent| {
                let (channel, ..) = agent.expect(Kind::PortConnect);
                agent.send(Kind::Ok, 0, channel, b"");
                // What the client sends: the connection stands.
                agent.expect(Kind::Data);
                attack(&mut agent, channel);
                agent.idle();
                tell.send(()).unwrap();
            });
            let mut client = door.client();
            let headers = "Connection: Upgrade\r\nUpgrade: tcp\r\n";
            client.send("POST", &format!("/v1/sandboxes/{sandbox}/ports/80/connect"), headers);
            assert_eq!(client.head().0, 101, "{name}");
            client.raw("four");
            (name, sandbox, client, hung_up)
        })
        .collect();
    for (name, sandbox, mut client, hung_up) in attacked {
        hung_up.recv_timeout(super::PATIENCE).unwrap_or_else(|_| panic!("{name}: the door did not hang up"));
        client.reader.read_to_end(&mut Vec::new()).unwrap();
        super::eventually("the sandbox is lost", || {
            let path = format!("/v1/sandboxes/{sandbox}/execs");
            door.client().request("GET", &path, b"").problem().1 == "node_unavailable"
        });
    }
}

#[test]
fn cp_07_late_words_on_a_port_that_is_over_are_no_break() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::PortConnect);
        agent.send(Kind::Ok, 0, channel, b"");
        agent.expect(Kind::Data);
        let (_, flags, _) = agent.expect(Kind::Data);
        assert_eq!(flags, EOF);
        agent.send(Kind::Data, EOF, channel, b"");
        agent.send(Kind::Window, 0, channel, &Window { consumed: 4 }.encode());
        // Crosses with the end of the channel.
        agent.send(Kind::Window, 0, channel, &Window { consumed: 4 }.encode());
        agent.send(Kind::Error, 0, channel, &Failure { errno: 104, what: vec![] }.encode());
        loop {
            let Some((header, _)) = agent.receive() else { return };
            if header.kind == Kind::ExecStart {
                agent.started(header.channel, Started::default());
                agent.exited(header.channel, 0);
            }
        }
    });
    let mut client = door.client();
    client.send(
        "POST",
        &format!("/v1/sandboxes/{}/ports/80/connect", super::SANDBOX),
        "Connection: Upgrade\r\nUpgrade: tcp\r\n",
    );
    assert_eq!(client.head().0, 101);
    client.raw("four");
    client.reader.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.reader.read_to_end(&mut Vec::new()).unwrap(), 0);
    assert_eq!(door.request("POST", "execs", br#"{"argv":["x"]}"#).frames().len(), 2);
}

#[test]
fn cp_07_a_window_that_does_not_fit_ends_an_upload() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::FileWrite);
        agent.expect(Kind::Data);
        agent.send(Kind::Window, 0, channel, &Window { consumed: 1 << 40 }.encode());
        agent.idle();
    });
    let answer = door.request("PUT", "files/content?path=/a", b"x");
    assert_eq!(answer.problem(), (502, "sandbox_lost".to_owned()));
}

#[test]
fn cp_07_answers_that_make_no_sense_are_not_passed_on() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        for _ in 0..2 {
            let (channel, ..) = agent.receive().map(|(header, _)| (header.channel,)).unwrap();
            agent.send(Kind::Ok, 0, channel, b"\xff\xff\xff\xff");
        }
        agent.idle();
    });
    assert_eq!(door.request("GET", "files/info?path=/a", b"").problem(), (502, "sandbox_lost".to_owned()));
    assert_eq!(door.request("GET", "execs", b"").problem(), (502, "sandbox_lost".to_owned()));
}

#[test]
fn cp_07_frames_for_nobody_without_end_do_not_stop_the_others() {
    let door = TestDoor::start();
    let (stop, stopped) = mpsc::channel::<()>();
    door.agent_as("sb-flood", move |mut agent| {
        let (channel, _) = agent.start();
        agent.exited(channel, 0);
        let (next, _) = agent.start();
        let _ = agent.expect(Kind::Cancel);
        let flood: Vec<u8> = (0..1000).flat_map(|_| shoal_wire::frame(Kind::Window, 0, next, &[0; 8])).collect();
        while stopped.try_recv() == Err(TryRecvError::Empty) && agent.stream.write_all(&flood).is_ok() {}
    });
    let body = br#"{"argv":["x"]}"#;
    let flood = "/v1/sandboxes/sb-flood/execs";
    assert_eq!(door.client().request("POST", flood, body).frames().len(), 2);
    let mut gone = door.client();
    gone.send("POST", flood, &format!("Content-Length: {}\r\n", body.len()));
    gone.reader.get_mut().write_all(body).unwrap();
    gone.head();
    drop(gone);
    door.agent(|mut agent| {
        loop {
            let Some((header, _)) = agent.receive() else { return };
            if header.kind == Kind::ExecStart {
                agent.started(header.channel, Started::default());
                agent.exited(header.channel, 0);
            }
        }
    });
    for _ in 0..20 {
        assert_eq!(door.request("POST", "execs", body).frames().len(), 2);
    }
    stop.send(()).unwrap();
}

#[test]
fn cp_07_an_agent_that_hangs_up_again_and_again_is_lost() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        // The first frame, whatever it is, is its last.
        let _ = agent.receive();
    });
    let answer = door.request("POST", "execs", br#"{"argv":["x"]}"#);
    assert_eq!(answer.problem(), (502, "sandbox_lost".to_owned()));
}

#[test]
fn cp_07_first_offsets_at_the_end_of_all_numbers_are_survived() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::ExecStart);
        agent.started(channel, Started { stdout_offset: u64::MAX - 3, ..Started::default() });
        agent.send(Kind::Data, 0, channel, &[b'x'; DATA_CHUNK]);
        agent.send(Kind::Data, 0, channel, &[b'x'; DATA_CHUNK]);
        agent.exited(channel, 0);
        agent.idle();
    });
    let answer = door.request("POST", "execs", br#"{"argv":["x"]}"#);
    assert_eq!(answer.frames().len(), 3);
}

#[test]
fn cp_07_half_a_frame_stops_nobody_else() {
    let door = TestDoor::start();
    let body = br#"{"argv":["x"]}"#;
    let mut waiting = Vec::new();
    for i in 0..20 {
        door.agent_as(&format!("sb-half-{i}"), |mut agent| {
            let (channel, _) = agent.start();
            let header = Header { len: 1 << 20, channel, kind: Kind::Data, flags: 0 };
            agent.stream.write_all(&header.encode()).unwrap();
            agent.idle();
        });
        let mut client = door.client();
        let headers = format!("Content-Length: {}\r\n", body.len());
        client.send("POST", &format!("/v1/sandboxes/sb-half-{i}/execs"), &headers);
        client.reader.get_mut().write_all(body).unwrap();
        client.head();
        waiting.push(client);
    }
    door.agent(|mut agent| {
        let (channel, _) = agent.start();
        agent.exited(channel, 0);
        agent.idle();
    });
    assert_eq!(door.request("POST", "execs", body).frames().len(), 2);
}
