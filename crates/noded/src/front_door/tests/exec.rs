//! Execs: output, back-pressure, stdin, cancel.

use super::{SANDBOX, TestDoor, frames};
use serde_json::json;
use shoal_wire::{
    DETACH, EOF, ExecAttach, ExecInput, ExecList, ExecResize, ExecSignal, ExecStatus, Exited, Failure, Kind, Outcome,
    STDERR, Stage, Started, WINDOW, Window,
};
use std::io::{Read as _, Write as _};
use std::sync::mpsc;
use std::time::Duration;

#[test]
fn a_short_command_streams_started_output_and_exit() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    door.agent(move |mut agent| {
        let (channel, start) = agent.start();
        tell.send(start).unwrap();
        agent.send(Kind::Data, 0, channel, b"out");
        agent.send(Kind::Data, STDERR, channel, b"err");
        agent.send(Kind::Data, EOF, channel, b"");
        let exited = Exited {
            outcome: Outcome::Exited,
            code: 3,
            wall_ns: 1_500_000_000,
            user_us: 250_000,
            max_rss_kib: 2,
            ..Exited::default()
        };
        agent.send(Kind::Exited, 0, channel, &exited.encode());
        agent.idle();
    });
    let body = json!({"argv": ["sh", "-c", "x"], "exec_id": "e1", "env": {"B": "2"}, "stdin": true, "timeout": 1.5});
    let answer = door.request("POST", "execs", body.to_string().as_bytes());
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "application/vnd.shoal.stream");
    let frames = answer.frames();
    assert_eq!(frames.len(), 4);
    let started: serde_json::Value = serde_json::from_slice(&frames[0].1).unwrap();
    let expected = json!({"exec_id": "e1", "pid": 7, "existing": false, "stdout_offset": 0, "stderr_offset": 0, "detached": false});
    assert_eq!((frames[0].0, started), (1, expected));
    assert_eq!(frames[1], (2, b"out".to_vec()));
    assert_eq!(frames[2], (3, b"err".to_vec()));
    let exit: serde_json::Value = serde_json::from_slice(&frames[3].1).unwrap();
    let usage = json!({"wall_s": 1.5, "user_s": 0.25, "system_s": 0.0, "max_rss_bytes": 2048, "read_bytes": 0,
                       "written_bytes": 0});
    let expected =
        json!({"outcome": "exited", "exit_code": 3, "signal": null, "errno": null, "stage": null, "usage": usage});
    assert_eq!((frames[3].0, exit), (4, expected));
    let start = told.recv().unwrap();
    assert_eq!(start.env, [b"PATH=/bin".to_vec(), b"A=1".to_vec(), b"B=2".to_vec()]);
    assert_eq!((start.cwd, start.make_cwd, start.user), (b"/app".to_vec(), true, b"dev".to_vec()));
    assert_eq!((start.stdin, start.timeout_ms), (true, 1500));
}

#[test]
fn a_command_that_does_not_start_is_an_answer_and_no_error() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::ExecStart);
        let exited =
            Exited { outcome: Outcome::NotStarted, code: -1, errno: 2, stage: Stage::Exec, ..Exited::default() };
        agent.send(Kind::Exited, 0, channel, &exited.encode());
        agent.idle();
    });
    let answer = door.request("POST", "execs", br#"{"argv":["nothing"]}"#);
    assert_eq!(answer.status, 200);
    let frames = answer.frames();
    assert_eq!((frames.len(), frames[0].0), (1, 4));
    let exit: serde_json::Value = serde_json::from_slice(&frames[0].1).unwrap();
    assert_eq!((&exit["outcome"], &exit["errno"], &exit["stage"]), (&json!("not_started"), &json!(2), &json!("exec")));
    assert_eq!(exit["exit_code"], json!(null));
}

#[test]
fn much_output_arrives_whole_and_in_order() {
    let door = TestDoor::start();
    const LENGTH: usize = 20_000_000;
    fn pattern(i: usize) -> u8 {
        (i.wrapping_mul(2_654_435_761) >> 11) as u8
    }
    door.agent(|mut agent| {
        let (channel, _) = agent.start();
        let (mut sent, mut consumed, mut step) = (0, 0, 1);
        let source: Vec<u8> = (0..LENGTH).map(pattern).collect();
        while sent < LENGTH {
            // Sizes on both sides of what is copied together.
            step = step * 7 % 130_001;
            let size = (step + 1).min(LENGTH - sent);
            while sent + size > consumed + WINDOW as usize {
                let (_, _, payload) = agent.expect(Kind::Window);
                consumed = Window::decode(&payload).unwrap().consumed as usize;
            }
            agent.send(Kind::Data, 0, channel, &source[sent..sent + size]);
            sent += size;
        }
        agent.exited(channel, 0);
        agent.idle();
    });
    let answer = door.request("POST", "execs", br#"{"argv":["yes"]}"#);
    let frames = answer.frames();
    assert_eq!(frames.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [1, 2, 4]);
    assert_eq!(frames[1].1.len(), LENGTH);
    assert!(frames[1].1.iter().enumerate().all(|(i, byte)| *byte == pattern(i)));
}

#[test]
fn rs_09_a_client_that_stops_reading_stalls_only_its_own_stream() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    let (go, may_go) = mpsc::channel();
    door.agent(move |mut agent| {
        let (stalled, _) = agent.start();
        // As much as is taken with nobody reading; the door may not take more than it says.
        let (mut sent, mut consumed) = (0, 0);
        agent.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        loop {
            while sent < consumed + WINDOW {
                agent.send(Kind::Data, 0, stalled, &[b'x'; 64 << 10]);
                sent += 64 << 10;
            }
            match agent.receive() {
                Some((header, payload)) => {
                    assert_eq!(header.kind, Kind::Window);
                    consumed = Window::decode(&payload).unwrap().consumed;
                }
                None => break,
            }
        }
        // Should the door have been slow: what it still says of this one is passed over.
        agent.ended.insert(stalled);
        tell.send((sent, consumed)).unwrap();
        agent.stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
        // Another one goes on.
        let (other, _) = agent.start();
        agent.pump(other, 0, 32 << 20);
        agent.exited(other, 0);
        may_go.recv().unwrap();
        agent.exited(stalled, 0);
        agent.idle();
    });
    let mut stopped = door.client();
    let body = br#"{"argv":["yes"]}"#;
    stopped.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), &format!("Content-Length: {}\r\n", body.len()));
    stopped.reader.get_mut().write_all(body).unwrap();
    let (sent, consumed) = told.recv_timeout(super::PATIENCE).unwrap();
    // Consumed is what the socket took: the kernel's buffer for it, and not a byte that only hyper has.
    assert!(consumed < 512 << 10, "{consumed} bytes are said to be consumed");
    assert_eq!(sent, consumed.next_multiple_of(64 << 10) + WINDOW);
    let other = door.request("POST", "execs", body);
    assert_eq!(other.frames()[1].1.len(), 32 << 20);
    go.send(()).unwrap();
    // It reads on, and nothing is lost.
    let answer = stopped.answer();
    assert_eq!(answer.frames()[1].1.len() as u64, sent);
}

#[test]
fn an_agent_short_of_memory_is_told_of_every_bit() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, _) = agent.start();
        // It keeps 16 KiB and waits until all of it is consumed.
        for round in 1..=100 {
            agent.send(Kind::Data, 0, channel, &[b'x'; 16 << 10]);
            let (_, _, payload) = agent.expect(Kind::Window);
            assert_eq!(Window::decode(&payload).unwrap().consumed, round * (16 << 10));
        }
        agent.exited(channel, 0);
        agent.idle();
    });
    let answer = door.request("POST", "execs", br#"{"argv":["yes"]}"#);
    assert_eq!(answer.frames()[1].1.len(), 100 * (16 << 10));
}

#[test]
fn what_a_client_took_is_consumed_in_the_end_and_the_channel_is_closed() {
    // The command may end before the client has taken its output, or after.
    for taken_first in [false, true] {
        let door = TestDoor::start();
        let (tell, told) = mpsc::channel();
        let (go, may_go) = mpsc::channel();
        door.agent(move |mut agent| {
            let (channel, _) = agent.start();
            agent.send(Kind::Data, EOF, channel, b"12345");
            if taken_first {
                may_go.recv_timeout(super::PATIENCE).unwrap();
            }
            agent.send(Kind::Data, EOF | STDERR, channel, b"");
            agent.exited(channel, 0);
            let (window, payload) = agent.receive_any().unwrap();
            assert_eq!((window.kind, window.channel, window.flags), (Kind::Window, channel, 0));
            assert_eq!(Window::decode(&payload).unwrap().consumed, 5);
            let (cancel, _) = agent.receive_any().unwrap();
            assert_eq!((cancel.kind, cancel.channel), (Kind::Cancel, channel));
            tell.send(()).unwrap();
            agent.idle();
        });
        let mut client = door.client();
        let body = br#"{"argv":["x"]}"#;
        client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), &format!("Content-Length: {}\r\n", body.len()));
        client.reader.get_mut().write_all(body).unwrap();
        client.head();
        let mut stream = client.chunks_until(b"12345");
        // Nobody may wait for it.
        let _ = go.send(());
        stream.extend(client.rest());
        assert_eq!(frames(&stream).len(), 3);
        told.recv_timeout(super::PATIENCE).unwrap();
    }
}

#[test]
fn a_client_that_goes_away_cancels_its_channel() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    door.agent(move |mut agent| {
        let (channel, _) = agent.start();
        agent.send(Kind::Data, 0, channel, b"here");
        let (cancelled, ..) = agent.expect(Kind::Cancel);
        // What was under way is dropped, and harms nobody.
        agent.send(Kind::Data, 0, channel, b"late");
        agent.exited(channel, 0);
        tell.send((channel, cancelled)).unwrap();
        let (next, _) = agent.start();
        agent.exited(next, 0);
        agent.idle();
    });
    let mut client = door.client();
    let body = br#"{"argv":["sleep"]}"#;
    client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), &format!("Content-Length: {}\r\n", body.len()));
    client.reader.get_mut().write_all(body).unwrap();
    client.head();
    client.chunk().unwrap();
    drop(client);
    let (channel, cancelled) = told.recv_timeout(super::PATIENCE).unwrap();
    assert_eq!(channel, cancelled);
    assert_eq!(door.request("POST", "execs", body).frames().len(), 2);
}

#[test]
fn an_exec_is_attached_to_by_offset() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, _, payload) = agent.expect(Kind::ExecAttach);
        let attach = ExecAttach::decode(&payload).unwrap();
        assert_eq!((attach.exec_id.as_slice(), attach.stdout_offset, attach.stderr_offset), (&b"e1"[..], 5, 0));
        let started = Started { pid: 9, existing: true, stdout_offset: 5, stderr_offset: 2, ..Started::default() };
        agent.started(channel, started);
        agent.send(Kind::Data, 0, channel, b"rest");
        agent.exited(channel, 0);
        let (channel, ..) = agent.expect(Kind::ExecAttach);
        let failure = Failure { errno: libc::ENOENT, what: b"no such exec".to_vec() };
        agent.send(Kind::Error, 0, channel, &failure.encode());
        agent.idle();
    });
    let answer = door.request("GET", "execs/e1/stream?stdout_offset=5", b"");
    let frames = answer.frames();
    let started: serde_json::Value = serde_json::from_slice(&frames[0].1).unwrap();
    assert_eq!((&started["existing"], &started["stderr_offset"]), (&json!(true), &json!(2)));
    assert_eq!(frames[1], (2, b"rest".to_vec()));
    assert_eq!(door.request("GET", "execs/e2/stream", b"").problem(), (404, "exec_not_found".to_owned()));
}

#[test]
fn stdin_is_forwarded_as_it_arrives_and_as_the_window_allows() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    door.agent(move |mut agent| {
        let (channel, _, payload) = agent.expect(Kind::ExecInput);
        let input = ExecInput::decode(&payload).unwrap();
        assert_eq!((input.exec_id.as_slice(), input.offset), (&b"e1"[..], u64::MAX));
        let (_, flags, data) = agent.expect(Kind::Data);
        assert_eq!((flags, data), (0, b"first".to_vec()));
        tell.send(()).unwrap();
        // It sends a window and no more, until it is told that this was consumed.
        let mut received = 5;
        while received < WINDOW {
            received += agent.expect(Kind::Data).2.len() as u64;
        }
        assert_eq!(received, WINDOW);
        agent.stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert!(agent.receive().is_none(), "it sent more than the window");
        agent.stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
        agent.send(Kind::Window, 0, channel, &Window { consumed: received }.encode());
        loop {
            let (_, flags, data) = agent.expect(Kind::Data);
            received += data.len() as u64;
            if flags == EOF {
                break;
            }
            assert_eq!(flags, 0);
        }
        assert_eq!(received, 5 + (WINDOW + 100_000));
        agent.send(Kind::Ok, 0, channel, b"");
        let (channel, _, payload) = agent.expect(Kind::ExecInput);
        assert_eq!(ExecInput::decode(&payload).unwrap().offset, 7);
        let (_, flags, _) = agent.expect(Kind::Data);
        assert_eq!(flags, 0);
        let (_, flags, _) = agent.expect(Kind::Data);
        assert_eq!(flags, DETACH);
        agent.send(Kind::Ok, 0, channel, b"");
        agent.idle();
    });
    let mut client = door.client();
    client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs/e1/stdin?eof=true"), "Transfer-Encoding: chunked\r\n");
    client.raw("5\r\nfirst\r\n");
    told.recv_timeout(super::PATIENCE).unwrap();
    let rest = vec![b'y'; WINDOW as usize + 100_000];
    client.raw(&format!("{:x}\r\n", rest.len()));
    client.reader.get_mut().write_all(&rest).unwrap();
    client.raw("\r\n0\r\n\r\n");
    assert_eq!(client.answer().status, 204);
    assert_eq!(door.request("POST", "execs/e1/stdin?offset=7", b"more").status, 204);
}

#[test]
fn stdin_that_is_closed_is_told_at_once() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::ExecInput);
        let failure = Failure { errno: libc::EPIPE, what: b"stdin".to_vec() };
        agent.send(Kind::Error, 0, channel, &failure.encode());
        agent.idle();
    });
    // Far more than any window: it is answered in the middle, and the client still reads the answer.
    let answer = door.request("POST", "execs/e1/stdin", &vec![0; 8 << 20]);
    assert_eq!(answer.problem(), (409, "conflict".to_owned()));
    assert_eq!(answer.json()["details"]["errno"], libc::EPIPE);
    assert_eq!(answer.json()["detail"], "stdin: broken pipe");
}

#[test]
fn signal_resize_forget_and_list_reach_the_agent() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, _, payload) = agent.expect(Kind::ExecSignal);
        let signal = ExecSignal::decode(&payload).unwrap();
        assert_eq!((signal.signal, signal.tree), (15, false));
        agent.send(Kind::Ok, 0, channel, b"");
        let (channel, _, payload) = agent.expect(Kind::ExecResize);
        let resize = ExecResize::decode(&payload).unwrap();
        assert_eq!((resize.rows, resize.cols), (5, 6));
        agent.send(Kind::Ok, 0, channel, b"");
        let (channel, _, payload) = agent.expect(Kind::ExecForget);
        assert_eq!(payload, b"\x02\0\0\0e1");
        agent.send(Kind::Ok, 0, channel, b"");
        let (channel, ..) = agent.expect(Kind::ExecList);
        let status = ExecStatus {
            exec_id: b"e1".to_vec(),
            pid: 3,
            argv: vec![b"a\xff".to_vec()],
            outcome: Outcome::Running,
            code: -1,
            pty: true,
        };
        agent.send(Kind::Ok, 0, channel, &ExecList { execs: vec![status; 3000] }.encode());
        agent.idle();
    });
    assert_eq!(door.request("POST", "execs/e1/signal", br#"{"signal":15,"tree":false}"#).status, 204);
    assert_eq!(door.request("POST", "execs/e1/resize", br#"{"rows":5,"cols":6}"#).status, 204);
    assert_eq!(door.request("DELETE", "execs/e1", b"").status, 204);
    let list = door.request("GET", "execs", b"").json();
    let expected =
        json!({"exec_id": "e1", "pid": 3, "argv": ["a\u{fffd}"], "outcome": "running", "exit_code": null, "pty": true});
    assert_eq!(list["execs"].as_array().unwrap().len(), 3000);
    assert_eq!(list["execs"][0], expected);
    assert_eq!(door.request("POST", "execs/e1/signal", br#"{"signal":0}"#).problem().0, 400);
    assert_eq!(door.request("POST", "execs/e%2F1/signal", br#"{"signal":9}"#).problem().0, 400);
}

#[test]
fn a_stream_survives_a_broken_connection_to_the_agent() {
    let door = TestDoor::patient();
    let (go, may_go) = mpsc::channel();
    let mut connection = 0;
    door.agent(move |mut agent| {
        connection += 1;
        if connection == 1 {
            let (channel, _) = agent.start();
            agent.send(Kind::Data, 0, channel, b"one");
            may_go.recv_timeout(super::PATIENCE).unwrap();
            return;
        }
        let (channel, _, payload) = agent.expect(Kind::ExecAttach);
        let attach = ExecAttach::decode(&payload).unwrap();
        assert_eq!((attach.exec_id.as_slice(), attach.stdout_offset), (&b"e1"[..], 3));
        agent.started(channel, Started { pid: 7, existing: true, stdout_offset: 3, ..Started::default() });
        agent.send(Kind::Data, 0, channel, b"two");
        agent.exited(channel, 0);
        agent.idle();
    });
    let mut client = door.client();
    let body = br#"{"argv":["x"],"exec_id":"e1"}"#;
    client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), &format!("Content-Length: {}\r\n", body.len()));
    client.reader.get_mut().write_all(body).unwrap();
    client.head();
    let mut stream = client.chunks_until(b"one");
    go.send(()).unwrap();
    stream.extend(client.rest());
    let frames = frames(&stream);
    assert_eq!(frames[1], (2, b"onetwo".to_vec()));
    assert_eq!(frames[2].0, 4);
}

#[test]
fn an_end_is_waited_for_across_a_broken_connection_and_for_so_long_only() {
    let door = TestDoor::patient();
    let mut connection = 0;
    let running = Started { pid: 7, existing: true, ..Started::default() };
    door.agent(move |mut agent| {
        connection += 1;
        let (channel, _, payload) = agent.expect(Kind::ExecWait);
        assert_eq!(payload, b"\x02\0\0\0e1");
        agent.started(channel, running.clone());
        if connection == 1 {
            return;
        }
        let exited = Exited { outcome: Outcome::Signaled, signal: 9, pid: 7, ..Exited::default() };
        agent.send(Kind::Exited, 0, channel, &exited.encode());
        let (channel, ..) = agent.expect(Kind::ExecWait);
        agent.started(channel, running.clone());
        let (cancelled, ..) = agent.expect(Kind::Cancel);
        assert_eq!(cancelled, channel);
        let (channel, ..) = agent.expect(Kind::ExecWait);
        let failure = Failure { errno: libc::ENOENT, what: b"e1".to_vec() };
        agent.send(Kind::Error, 0, channel, &failure.encode());
        agent.idle();
    });
    let answer = door.request("GET", "execs/e1?wait=60", b"").json();
    assert_eq!((&answer["pid"], &answer["exit"]["outcome"]), (&json!(7), &json!("signaled")));
    assert_eq!((&answer["exit"]["signal"], &answer["exit"]["exit_code"]), (&json!(9), &json!(null)));
    let answer = door.request("GET", "execs/e1", b"").json();
    assert_eq!(answer, json!({"exec_id": "e1", "pid": 7, "exit": null}));
    assert_eq!(door.request("GET", "execs/e1?wait=1", b"").problem().1, "exec_not_found");
    for wait in ["601", "-1", "x"] {
        assert_eq!(door.request("GET", &format!("execs/e1?wait={wait}"), b"").problem().0, 400, "{wait}");
    }
}

#[test]
fn a_start_that_was_not_answered_is_sent_again_on_the_next_connection() {
    let door = TestDoor::patient();
    let mut connection = 0;
    door.agent(move |mut agent| {
        connection += 1;
        if connection == 1 {
            agent.expect(Kind::ExecStart);
            return;
        }
        let (channel, start) = agent.start();
        assert_eq!(start.exec_id, b"e1");
        agent.exited(channel, 0);
        agent.idle();
    });
    assert_eq!(door.request("POST", "execs", br#"{"argv":["x"],"exec_id":"e1"}"#).frames().len(), 2);
}

#[test]
fn a_refused_start_is_a_problem() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        let (channel, ..) = agent.expect(Kind::ExecStart);
        let failure = Failure { errno: libc::EAGAIN, what: b"too many execs".to_vec() };
        agent.send(Kind::Error, 0, channel, &failure.encode());
        agent.idle();
    });
    let answer = door.request("POST", "execs", br#"{"argv":["x"]}"#);
    assert_eq!(answer.problem(), (429, "resource_exhausted".to_owned()));
}

#[test]
fn the_answer_to_a_short_command_takes_few_writes() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        loop {
            let Some((header, _)) = agent.receive() else { return };
            if header.kind != Kind::ExecStart {
                continue;
            }
            let mut all = shoal_wire::frame(Kind::Started, 0, header.channel, &Started::default().encode());
            all.extend(shoal_wire::frame(Kind::Data, 0, header.channel, b"42\n"));
            all.extend(shoal_wire::frame(Kind::Exited, 0, header.channel, &Exited::default().encode()));
            agent.stream.write_all(&all).unwrap();
        }
    });
    let mut client = door.client();
    let body = br#"{"argv":["x"]}"#;
    let head = format!(
        "POST /v1/sandboxes/{SANDBOX}/execs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\r\n",
        super::TOKEN,
        body.len()
    );
    client.reader.get_mut().write_all(&[head.as_bytes(), body].concat()).unwrap();
    // One read takes it all: head, started, output, exit, last chunk.
    let mut bytes = vec![0; 64 << 10];
    let count = client.reader.get_mut().read(&mut bytes).unwrap();
    assert!(bytes[..count].ends_with(b"0\r\n\r\n"), "{}", String::from_utf8_lossy(&bytes[..count]));
}

#[test]
fn a_detached_start_is_answered_at_once_and_not_read() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    door.agent(move |mut agent| {
        let (channel, start) = agent.start();
        agent.send(Kind::Data, 0, channel, b"nobody reads this");
        let (cancelled, ..) = agent.expect(Kind::Cancel);
        tell.send((start.detached, cancelled == channel)).unwrap();
        agent.idle();
    });
    let answer = door.request("POST", "execs", br#"{"argv":["yes"],"detached":true,"exec_id":"e"}"#);
    let expected =
        json!({"exec_id": "e", "pid": 7, "existing": false, "stdout_offset": 0, "stderr_offset": 0, "detached": true});
    assert_eq!((answer.status, answer.json()), (201, expected));
    assert_eq!(told.recv_timeout(super::PATIENCE).unwrap(), (true, true));
}

#[test]
fn output_is_consumed_as_far_as_a_client_says_that_asked_to_say_so() {
    let door = TestDoor::start();
    let (tell, told) = mpsc::channel();
    let (go, may_go) = mpsc::channel();
    door.agent(move |mut agent| {
        let (channel, _) = agent.start();
        agent.send(Kind::Data, 0, channel, &[b'x'; 100_000]);
        agent.send(Kind::Data, STDERR, channel, &[b'y'; 50_000]);
        for _ in 0..2 {
            let (_, flags, payload) = agent.expect(Kind::Window);
            tell.send((flags, Window::decode(&payload).unwrap().consumed)).unwrap();
        }
        may_go.recv().unwrap();
        agent.exited(channel, 0);
        // After the end of the stream nobody reads; what the client says then is said by an attach.
        let (late, _, payload) = agent.expect(Kind::ExecAttach);
        let attach = ExecAttach::decode(&payload).unwrap();
        tell.send((9, attach.stdout_offset)).unwrap();
        agent.started(
            late,
            Started { pid: 7, existing: true, stdout_offset: 100_000, stderr_offset: 50_000, ..Started::default() },
        );
        let (unknown, ..) = agent.expect(Kind::Cancel);
        assert_eq!(unknown, late);
        let (unknown, ..) = agent.expect(Kind::ExecAttach);
        let failure = Failure { errno: libc::ENOENT, what: b"f".to_vec() };
        agent.send(Kind::Error, 0, unknown, &failure.encode());
        agent.idle();
    });
    let mut reader = door.client();
    let body = br#"{"argv":["yes"],"exec_id":"e"}"#;
    let path = format!("/v1/sandboxes/{SANDBOX}/execs?ack=client");
    reader.send("POST", &path, &format!("Content-Length: {}\r\n", body.len()));
    reader.reader.get_mut().write_all(body).unwrap();
    assert_eq!(reader.head().0, 200);
    reader.chunks_until(&[b'y'; 50_000]);
    assert!(told.recv_timeout(Duration::from_millis(200)).is_err(), "the socket's progress was told");
    let say = |exec: &str, stdout: u64| {
        let body = json!({"stdout": stdout, "stderr": 0}).to_string();
        door.request("POST", &format!("execs/{exec}/consumed"), body.as_bytes())
    };
    assert_eq!(say("e", 70_000).status, 204);
    assert_eq!(told.recv_timeout(super::PATIENCE).unwrap(), (0, 70_000));
    // It never goes back, and never beyond what was handed over.
    assert_eq!(say("e", 60_000).status, 204);
    assert_eq!(say("e", u64::MAX).status, 204);
    assert_eq!(told.recv_timeout(super::PATIENCE).unwrap(), (0, 100_000));
    go.send(()).unwrap();
    reader.rest();
    assert_eq!(say("e", 100_000).status, 204);
    assert_eq!(told.recv_timeout(super::PATIENCE).unwrap(), (9, 100_000));
    assert_eq!(say("f", 1).problem(), (404, "exec_not_found".to_owned()));
    let wrong = door.request("GET", "execs/e/stream?ack=socket", b"");
    assert_eq!(wrong.problem(), (400, "invalid_argument".to_owned()));
}
