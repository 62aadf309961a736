//! Prints what the agent costs. Run with
//! `cargo test --release -p shoal-agent --test measure -- --ignored --nocapture --test-threads=1`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]
#![allow(clippy::cast_precision_loss, reason = "numbers for people")]

mod common;

use common::{Agent, Channel, exec, sh};
use shoal_wire::{FileRead, FileWrite, Kind};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Prints p50, p95, p99 and the largest of some times, in microseconds.
fn print(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_micros();
    println!("{what}: n={} p50={} us p95={} us p99={} us max={} us", times.len(), at(0.5), at(0.95), at(0.99), at(1.0));
}

#[test]
#[ignore = "prints numbers, checks nothing"]
fn sizes() {
    let size = std::fs::metadata(env!("CARGO_BIN_EXE_shoal-agent")).unwrap().len();
    let agent = Agent::start();
    let mut client = agent.connect();
    std::thread::sleep(Duration::from_millis(500));
    println!("binary: {} KiB; idle private memory: {} KiB", size >> 10, agent.private_kib());
    client.run(&exec("a", &["true"]));
    std::thread::sleep(Duration::from_millis(500));
    println!("idle private memory after one command: {} KiB", agent.private_kib());
}

#[test]
#[ignore = "prints numbers, checks nothing"]
fn starts() {
    let times = (0..100)
        .map(|_| {
            let begin = Instant::now();
            let agent = Agent::start();
            drop(agent.connect());
            begin.elapsed()
        })
        .collect();
    print("fork, exec and READY", times);
    let times = (0..100)
        .map(|_| {
            let begin = Instant::now();
            assert!(std::process::Command::new("/bin/true").status().unwrap().success());
            begin.elapsed()
        })
        .collect();
    print("fork, exec and exit of /bin/true, by std, to compare", times);
}

#[test]
#[ignore = "prints numbers, checks nothing"]
fn round_trips() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let times = (0..1000)
        .map(|n| {
            let begin = Instant::now();
            client.run(&exec(&format!("e{n}"), &["/bin/true"]));
            begin.elapsed()
        })
        .collect();
    print("exec of /bin/true, request to Exited", times);
    let times = (0..1000)
        .map(|_| {
            let begin = Instant::now();
            let done = std::process::Command::new("/bin/true").output().unwrap();
            assert!(done.status.success());
            begin.elapsed()
        })
        .collect();
    print("the same by std, to compare", times);
    let path = b"/etc/passwd".to_vec();
    let times = (0..1000)
        .map(|_| {
            let begin = Instant::now();
            let id =
                client.request(Kind::FileRead, &FileRead { path: path.clone(), offset: 0, length: u64::MAX }.encode());
            client.until(id, |channel| channel.eof[0]);
            begin.elapsed()
        })
        .collect();
    print("read of a small file", times);
}

#[test]
#[ignore = "prints numbers, checks nothing"]
fn throughput() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let bytes = 2 << 30;
    let begin = Instant::now();
    let id = client.start(&sh("zero", &format!("head -c {bytes} /dev/zero")));
    drain(&mut client, id);
    report("stdout", bytes, begin);
    let path = agent.scratch.path("big");
    let piece = vec![7; 128 << 10];
    let bytes = 512 << 20;
    let begin = Instant::now();
    let id = client.request(Kind::FileWrite, &FileWrite { path: path.clone(), ..FileWrite::default() }.encode());
    let mut sent = 0;
    while sent < bytes {
        client.until(id, |channel| sent + piece.len() as u64 <= channel.window + shoal_wire::WINDOW);
        client.send(Kind::Data, 0, id, &piece);
        sent += piece.len() as u64;
    }
    client.send(Kind::Data, shoal_wire::EOF, id, &[]);
    client.until(id, |channel| channel.ok.is_some());
    report("upload", bytes, begin);
    let begin = Instant::now();
    let id = client.request(Kind::FileRead, &FileRead { path, offset: 0, length: u64::MAX }.encode());
    drain(&mut client, id);
    report("download", bytes, begin);
}

/// Reads a stream to its end, keeping nothing.
fn drain(client: &mut common::Client, id: u32) {
    loop {
        client.until(id, |channel| channel.eof[0] || channel.ended() || channel.data[0].len() > 4 << 20);
        let channel = client.channels.get_mut(&id).unwrap();
        channel.base[0] += channel.data[0].len() as u64;
        channel.data[0].clear();
        if channel.eof[0] {
            break;
        }
    }
    if client.channels[&id].started.is_some() {
        client.until(id, Channel::ended);
    }
}

fn report(what: &str, bytes: u64, begin: Instant) {
    println!("{what}: {:.2} GB/s", bytes as f64 / 1e9 / begin.elapsed().as_secs_f64());
}

#[test]
#[ignore = "prints numbers, checks nothing"]
fn connections() {
    let agent = Agent::start();
    let times = (0..1000)
        .map(|_| {
            let begin = Instant::now();
            let client = agent.connect();
            let _: &UnixStream = &client.stream;
            begin.elapsed()
        })
        .collect();
    print("connect to READY", times);
}
