//! Ports: what goes in comes out, each half ends by itself, and what breaks is told.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

mod common;

use common::{Agent, Channel, Client, PATIENCE, eventually, exec, noise};
use shoal_wire::{DATA_CHUNK, EOF, Kind, PORT_WINDOW, PortConnect, WINDOW, Window};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

fn connect(client: &mut Client, port: u16) -> u32 {
    client.request(Kind::PortConnect, &PortConnect { port }.encode())
}

/// A listener, a channel to it, and the listener's end of the connection.
fn connected(client: &mut Client) -> (u32, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let id = connect(client, listener.local_addr().unwrap().port());
    assert_eq!(client.until(id, |channel| channel.ok.is_some() || channel.ended()).ok, Some(vec![]));
    (id, accept(&listener))
}

fn accept(listener: &TcpListener) -> TcpStream {
    let stream = listener.accept().unwrap().0;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Waits until the agent has acted on all that was sent before.
fn settle(client: &mut Client) {
    client.call(Kind::ExecList, &[]);
}

#[test]
fn bytes_go_both_ways_and_each_half_ends_by_itself() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let (id, mut server) = connected(&mut client);
    client.send(Kind::Data, 0, id, b"to the ");
    client.send(Kind::Data, EOF, id, b"server");
    let mut request = String::new();
    server.read_to_string(&mut request).unwrap();
    assert_eq!(request, "to the server");
    server.write_all(b"and back").unwrap();
    client.until(id, |channel| channel.data[0] == b"and back");
    drop(server);
    assert!(!client.until(id, |channel| channel.eof[0]).ended());
    // The channel is over: its number means nothing any more and may be used again.
    client.send(Kind::Cancel, 0, id, &[]);
    assert_eq!(client.run(&exec("after", &["true"])).exited().code, 0);
}

#[test]
fn the_server_may_end_its_half_first() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let (id, mut server) = connected(&mut client);
    server.write_all(b"bye").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.until(id, |channel| channel.eof[0]).data[0], b"bye");
    client.send(Kind::Data, 0, id, b"still ");
    settle(&mut client);
    client.send(Kind::Data, EOF, id, b"heard");
    let mut heard = String::new();
    server.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "still heard");
}

#[test]
fn nobody_listens() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let before = agent.open_fds();
    for _ in 0..50 {
        let id = connect(&mut client, port);
        assert_eq!(client.until(id, Channel::ended).errno(), libc::ECONNREFUSED);
    }
    assert_eq!(agent.open_fds(), before);
}

#[test]
fn a_connection_never_meets_itself() {
    let agent = Agent::start();
    let mut client = agent.connect();
    // A port of those that the kernel gives to sockets that connect, every other one of them in turn: one time it gives
    // the very port that is connected to.
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let mut ends = range.split_whitespace().map(|end| end.parse::<u16>().unwrap());
    let (first, last) = (ends.next().unwrap(), ends.next().unwrap());
    let port = (first..last).step_by(2).find(|port| TcpStream::connect(("127.0.0.1", *port)).is_err()).unwrap();
    for _ in first..last {
        let id = connect(&mut client, port);
        assert_eq!(client.until(id, |channel| channel.ok.is_some() || channel.ended()).errno(), libc::ECONNREFUSED);
        client.channels.remove(&id);
    }
}

#[test]
fn a_server_on_the_loopback_address_of_ipv6_is_found() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        let off = std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6").unwrap_or_default();
        assert_ne!(off.trim(), "0", "IPv6 is there and cannot be bound");
        return;
    };
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = connect(&mut client, listener.local_addr().unwrap().port());
    client.until(id, |channel| channel.ok.is_some());
    accept(&listener).write_all(b"six").unwrap();
    assert_eq!(client.until(id, |channel| channel.eof[0]).data[0], b"six");
}

#[test]
fn much_goes_both_ways_at_once_byte_for_byte() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let (id, server) = connected(&mut client);
    let (up, down) = (noise(20 << 20, 3), noise(20 << 20, 5));
    let (mut reader, mut writer) = (server.try_clone().unwrap(), server);
    let sent = down.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let reading = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut offset = 0;
    for piece in up.chunks(DATA_CHUNK) {
        client.until(id, |channel| offset + piece.len() as u64 <= channel.window + WINDOW);
        client.send(Kind::Data, 0, id, piece);
        offset += piece.len() as u64;
    }
    client.send(Kind::Data, EOF, id, &[]);
    assert!(client.until(id, |channel| channel.eof[0]).data[0] == down, "what came down differs");
    writing.join().unwrap();
    assert!(reading.join().unwrap() == up, "what went up differs");
}

#[test]
fn a_client_that_does_not_read_gets_a_window_and_stops_the_server() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.acknowledge = false;
    let (id, mut server) = connected(&mut client);
    server.set_nonblocking(true).unwrap();
    let mut written = 0;
    let piece = vec![7; 64 << 10];
    // Until nothing moves any more: the window is used up, and so are the buffers of the two sockets.
    loop {
        match server.write(&piece) {
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                settle(&mut client);
                if client.channels[&id].data[0].len() as u64 == PORT_WINDOW {
                    break;
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    settle(&mut client);
    assert_eq!(client.channels[&id].data[0].len() as u64, PORT_WINDOW);
    assert!(written as u64 > PORT_WINDOW);
    // Others are served meanwhile, the agent sleeps, and then it goes on.
    assert_eq!(client.run(&exec("other", &["true"])).exited().code, 0);
    agent.rests(std::time::Duration::from_millis(50));
    client.acknowledge = true;
    client.send(Kind::Window, 0, id, &Window { consumed: PORT_WINDOW }.encode());
    drop(server);
    client.until(id, |channel| channel.eof[0] || channel.ended());
    assert_eq!(client.channels[&id].data[0].len(), written);
}

#[test]
fn what_a_server_does_not_read_is_not_consumed() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let (id, mut server) = connected(&mut client);
    let bytes = noise(64 << 20, 1);
    let mut sent = 0;
    // Until no window comes: what the sockets hold is consumed, and one window is not.
    loop {
        let room = (client.channels[&id].window + WINDOW - sent).min(DATA_CHUNK as u64);
        if room == 0 {
            let before = client.channels[&id].window;
            settle(&mut client);
            if client.channels[&id].window == before {
                break;
            }
            continue;
        }
        client.send(Kind::Data, 0, id, &bytes[sent as usize..(sent + room) as usize]);
        sent += room;
    }
    assert!(sent < bytes.len() as u64);
    client.send(Kind::Data, EOF, id, &[]);
    let reading = std::thread::spawn(move || {
        let mut got = Vec::new();
        server.read_to_end(&mut got).unwrap();
        got
    });
    // The last word about it is that all of it was taken.
    client.until(id, |channel| channel.window == sent);
    assert!(reading.join().unwrap() == bytes[..sent as usize], "what went up differs");
}

/// Ends a connection with a reset.
fn reset(server: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let length = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: `length` is that of `linger`, which outlives the call.
    let done = unsafe {
        libc::setsockopt(server.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length)
    };
    assert_eq!(done, 0);
    drop(server);
}

#[test]
fn a_reset_is_an_error_and_no_end() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let (id, server) = connected(&mut client);
    reset(server);
    let channel = client.until(id, Channel::ended);
    assert_eq!((channel.errno(), channel.eof[0]), (libc::ECONNRESET, false));
    // Also when the server had ended its half before, and only then broke off.
    let (id, server) = connected(&mut client);
    server.shutdown(Shutdown::Write).unwrap();
    client.until(id, |channel| channel.eof[0]);
    reset(server);
    eventually("writing fails", || {
        client.send(Kind::Data, 0, id, b"x");
        settle(&mut client);
        client.channels[&id].ended()
    });
}

#[test]
fn an_answer_that_was_given_before_the_server_broke_off_arrives() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let (id, mut server) = connected(&mut client);
    client.send(Kind::Data, 0, id, &vec![1; 200_000]);
    server.read_exact(&mut [0; 1]).unwrap();
    server.write_all(b"no more, please").unwrap();
    // Closed with bytes unread, which makes it a reset.
    drop(server);
    client.until(id, |channel| channel.data[0] == b"no more, please");
    client.send(Kind::Data, 0, id, b"more");
    client.until(id, |channel| channel.eof[0] || channel.ended());
}

#[test]
fn who_goes_away_half_way_resets_and_who_has_ended_does_not() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let (id, mut server) = connected(&mut client);
    client.send(Kind::Data, 0, id, b"half");
    server.read_exact(&mut [0; 4]).unwrap();
    client.send(Kind::Cancel, 0, id, &[]);
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (id, mut server) = connected(&mut client);
    client.send(Kind::Data, EOF, id, b"whole");
    client.until(id, |channel| channel.window == 5);
    client.send(Kind::Cancel, 0, id, &[]);
    let mut got = String::new();
    server.read_to_string(&mut got).unwrap();
    assert_eq!(got, "whole");
}

#[test]
fn connections_end_with_the_client_s() {
    let agent = Agent::start();
    let mut other = agent.connect();
    let before = agent.open_fds();
    let mut client = agent.connect();
    let mut servers: Vec<TcpStream> = (0..100).map(|_| connected(&mut client).1).collect();
    drop(client);
    for server in &mut servers {
        assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    eventually("no descriptor is left", || agent.open_fds() == before);
    settle(&mut other);
}

#[test]
fn breaking_the_rules_of_a_port_s_channel_ends_the_connection() {
    type Break = fn(&mut Client, u32);
    let breaks: [(&str, Break); 4] = [
        ("more than the window", |client, id| {
            // The server reads nothing; its and the agent's sockets take some megabytes.
            let piece = vec![0; 1 << 20];
            for _ in 0..64 {
                if client.stream.write_all(&shoal_wire::frame(Kind::Data, 0, id, &piece)).is_err() {
                    return;
                }
            }
        }),
        ("data after the end", |client, id| {
            client.send(Kind::Data, EOF, id, b"x");
            client.send(Kind::Data, 0, id, b"x");
        }),
        ("consumed what was not sent", |client, id| {
            client.send(Kind::Window, 0, id, &Window { consumed: 1 }.encode());
        }),
        ("connected twice", |client, id| {
            client.send(Kind::PortConnect, 0, id, &PortConnect { port: 1 }.encode());
        }),
    ];
    let agent = Agent::start();
    for (what, act) in breaks {
        let mut client = agent.connect();
        let (id, _server) = connected(&mut client);
        act(&mut client, id);
        while client.take() {}
        assert!(client.channels[&id].end.is_none(), "{what}");
    }
    assert_eq!(agent.connect().run(&exec("after", &["true"])).exited().code, 0);
}
