//! Prints what the front door itself costs, beside a fake agent in the same process. Run by hand:
//! `cargo test --release -p shoal-noded -- --ignored --nocapture bench`.

use super::{SANDBOX, TestDoor};
use shoal_wire::{EOF, Exited, FileInfo, Kind, Started, Window};
use std::io::{Read as _, Write as _};
use std::time::Instant;

/// CPU seconds that all threads whose name begins so have used.
pub fn cpu_of(name: &str) -> f64 {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        let (head, tail) = stat.rsplit_once(") ").unwrap();
        if head.split_once('(').unwrap().1.starts_with(name) {
            let fields: Vec<&str> = tail.split(' ').collect();
            ticks += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    ticks as f64 / 100.0
}

#[test]
#[ignore = "a measurement"]
fn bench_exec_round_trip() {
    let door = TestDoor::start();
    door.agent(|mut agent| {
        while let Some((header, _)) = agent.receive() {
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
    let mut times = Vec::new();
    for _ in 0..10_000 {
        let begin = Instant::now();
        let answer = client.request("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), br#"{"argv":["x"]}"#);
        assert_eq!(answer.status, 200);
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!("exec round trip n=10000 p50={:?} p95={:?} p99={:?} max={:?}", at(0.5), at(0.95), at(0.99), at(1.0));
}

#[test]
#[ignore = "a measurement"]
fn bench_throughput() {
    const LENGTH: u64 = 4 << 30;
    let door = TestDoor::start();
    door.agent(|mut agent| {
        while let Some((header, _)) = agent.receive() {
            match header.kind {
                Kind::ExecStart => {
                    agent.started(header.channel, Started::default());
                    agent.pump(header.channel, 0, LENGTH);
                    agent.exited(header.channel, 0);
                }
                Kind::FileRead => {
                    agent.send(Kind::Ok, 0, header.channel, &FileInfo { size: LENGTH, ..FileInfo::default() }.encode());
                    agent.pump(header.channel, 0, LENGTH);
                    agent.send(Kind::Data, EOF, header.channel, b"");
                }
                Kind::FileWrite => {
                    let (mut received, mut told) = (0, 0);
                    let mut payload = vec![0; 1 << 20];
                    loop {
                        let mut bytes = [0; 12];
                        agent.stream.read_exact(&mut bytes).unwrap();
                        let data = shoal_wire::Header::decode(bytes).unwrap();
                        agent.stream.read_exact(&mut payload[..data.len as usize]).unwrap();
                        received += u64::from(data.len);
                        if data.flags & EOF != 0 {
                            break;
                        }
                        if received - told >= 128 << 10 {
                            told = received;
                            agent.send(Kind::Window, 0, header.channel, &Window { consumed: received }.encode());
                        }
                    }
                    agent.send(Kind::Ok, 0, header.channel, &FileInfo::default().encode());
                }
                _ => {}
            }
        }
    });
    let measure = |what: &str, act: &dyn Fn()| {
        let (begin, cpu) = (Instant::now(), cpu_of("door"));
        act();
        let (wall, cpu) = (begin.elapsed().as_secs_f64(), cpu_of("door") - cpu);
        let gigabytes = LENGTH as f64 / 1e9;
        println!("{what}: {:.2} GB/s, {:.2} GB per CPU second of the door", gigabytes / wall, gigabytes / cpu);
    };
    let swallow = |method: &str, tail: &str, body: &str| {
        let mut client = door.client();
        client.send(method, &format!("/v1/sandboxes/{SANDBOX}/{tail}"), &format!("Content-Length: {}\r\n", body.len()));
        client.raw(body);
        let mut buffer = vec![0; 1 << 20];
        let mut left = LENGTH;
        while left > 0 {
            let count = client.reader.get_mut().read(&mut buffer).unwrap() as u64;
            assert!(count > 0);
            left = left.saturating_sub(count);
        }
    };
    measure("stdout", &|| swallow("POST", "execs", r#"{"argv":["x"]}"#));
    measure("download", &|| swallow("GET", "files/content?path=/a", ""));
    measure("upload", &|| {
        let mut client = door.client();
        client.send(
            "PUT",
            &format!("/v1/sandboxes/{SANDBOX}/files/content?path=/a"),
            &format!("Content-Length: {LENGTH}\r\n"),
        );
        let block = vec![7; 1 << 20];
        for _ in 0..LENGTH >> 20 {
            client.reader.get_mut().write_all(&block).unwrap();
        }
        assert_eq!(client.answer().status, 200);
    });
}
