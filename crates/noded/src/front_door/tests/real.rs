//! The front door with the real guest agent, which runs as a plain process of this machine.

use super::{Config, SANDBOX, TestDoor, attach_request};
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Builds the agent of this workspace beside this test and returns its path.
fn agent_binary() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        // …/<target>/debug/deps/<test>
        let test = std::env::current_exe().unwrap();
        let profile = test.ancestors().nth(2).unwrap();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "shoal-agent"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        let mut target = profile.parent().unwrap();
        if let Some(triple) = target.file_name().filter(|name| name.to_string_lossy().matches('-').count() >= 2)
            && target.parent().unwrap().join("CACHEDIR.TAG").exists()
        {
            build.arg("--target").arg(triple);
            target = target.parent().unwrap();
        }
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.arg("--target-dir").arg(target).status().unwrap().success(), "the agent was not built");
        profile.join("shoal-agent")
    })
}

/// A front door and an agent.
pub struct Real {
    pub door: TestDoor,
    pub agent: Child,
}

impl Real {
    pub fn start() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Config)) -> Self {
        let door = TestDoor::with(change);
        let socket = door.dir.join("agent");
        let listener = UnixListener::bind(&socket).unwrap();
        let fd = listener.as_raw_fd();
        let mut command = Command::new(agent_binary());
        command.args(["--listen", &fd.to_string(), "--generation", "3"]).current_dir("/").env_clear();
        // SAFETY: fcntl is async-signal-safe, and the descriptor is open in the child.
        unsafe {
            command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let agent = command.spawn().unwrap();
        drop(listener);
        let mut request = attach_request(SANDBOX, &socket);
        request["process"] = json!({"env": ["PATH=/usr/bin:/bin"], "cwd": door.dir, "user": ""});
        let answer = door.control().call(&request);
        assert_eq!(answer["ok"]["generation"], 3, "{answer}");
        Self { door, agent }
    }

    fn run(&self, request: &Value) -> (Vec<u8>, Vec<u8>, Value) {
        let answer = self.door.request("POST", "execs", request.to_string().as_bytes());
        assert_eq!(answer.status, 200, "{answer:?}");
        let of =
            |kind: u8| answer.frames().iter().filter(|f| f.0 == kind).flat_map(|f| f.1.clone()).collect::<Vec<_>>();
        (of(2), of(3), serde_json::from_slice(&of(4)).unwrap_or_else(|_| panic!("no exit: {:?}", answer.frames())))
    }

    fn path(&self, name: &str) -> String {
        self.door.dir.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

#[test]
fn real_commands_run() {
    let real = Real::start();
    let (out, err, exit) =
        real.run(&json!({"argv": ["sh", "-c", "pwd; echo $A; echo err >&2; exit 7"], "env": {"A": "1 2"}}));
    assert_eq!(String::from_utf8(out).unwrap(), format!("{}\n1 2\n", real.door.dir.display()));
    assert_eq!(err, b"err\n");
    assert_eq!((&exit["outcome"], &exit["exit_code"]), (&json!("exited"), &json!(7)));
    let (_, _, exit) = real.run(&json!({"argv": ["no-such-program"]}));
    assert_eq!((&exit["outcome"], &exit["errno"], &exit["stage"]), (&json!("not_started"), &json!(2), &json!("exec")));
    let (_, _, exit) = real.run(&json!({"argv": ["sleep", "60"], "timeout": 0.2}));
    assert_eq!((&exit["outcome"], &exit["signal"]), (&json!("timed_out"), &json!(9)));
    let list = real.door.request("GET", "execs", b"").json();
    assert!(list["execs"].as_array().unwrap().len() >= 2, "{list}");
}

#[test]
fn real_output_is_bounded_by_its_reader_and_byte_exact() {
    let real = Real::start();
    let (out, _, exit) =
        real.run(&json!({"argv": ["sh", "-c", "head -c 50000000 /dev/zero | tr '\\0' x; printf end"]}));
    assert_eq!(exit["exit_code"], 0);
    assert_eq!(out.len(), 50_000_003);
    assert!(out.ends_with(b"xend") && out[..50_000_000].iter().all(|byte| *byte == b'x'));
}

#[test]
fn real_stdin_signals_and_attach_work() {
    let real = Real::start();
    let exec = real.path("");
    let mut client = real.door.client();
    let body = json!({"argv": ["cat"], "exec_id": "cat", "stdin": true, "cwd": exec}).to_string();
    client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), &format!("Content-Length: {}\r\n", body.len()));
    client.raw(&body);
    assert_eq!(client.head().0, 200);
    client.chunk().unwrap();
    assert_eq!(real.door.request("POST", "execs/cat/stdin?offset=0", b"one ").status, 204);
    let piece = client.chunk().unwrap();
    assert_eq!(&piece[8..], b"one ");
    // The reader goes away; another comes with the offset that it got to.
    drop(client);
    assert_eq!(real.door.request("POST", "execs/cat/stdin?offset=4", b"two ").status, 204);
    let mut client = real.door.client();
    client.send("GET", &format!("/v1/sandboxes/{SANDBOX}/execs/cat/stream?stdout_offset=4"), "");
    assert_eq!(client.head().0, 200);
    let started = client.chunk().unwrap();
    let started: Value = serde_json::from_slice(&started[8..]).unwrap();
    assert_eq!((&started["existing"], &started["stdout_offset"]), (&json!(true), &json!(4)));
    // Sent twice, arrives once: the offset tells.
    assert_eq!(real.door.request("POST", "execs/cat/stdin?offset=4", b"two ").status, 204);
    let big = vec![b'z'; 3 << 20];
    let feeding = std::thread::scope(|scope| {
        let feeding = scope.spawn(|| real.door.request("POST", "execs/cat/stdin?eof=true", &big).status);
        let answer = {
            let mut body = Vec::new();
            loop {
                let chunk = client.chunk().unwrap();
                if chunk.is_empty() {
                    break body;
                }
                body.extend(chunk);
            }
        };
        let frames = super::frames(&answer);
        assert_eq!(frames[0].1.len(), 4 + (3 << 20));
        assert!(frames[0].1.starts_with(b"two z"));
        assert_eq!(frames[1].0, 4);
        feeding.join().unwrap()
    });
    assert_eq!(feeding, 204);
    assert_eq!(real.door.request("POST", "execs/cat/stdin", b"late").problem(), (409, "conflict".to_owned()));
    assert_eq!(
        real.door.request("POST", "execs/cat/signal", br#"{"signal":9}"#).problem(),
        (409, "conflict".to_owned())
    );
    assert_eq!(real.door.request("POST", "execs/dog/signal", br#"{"signal":9}"#).problem().1, "exec_not_found");
    assert_eq!(real.door.request("DELETE", "execs/cat", b"").status, 204);
    assert_eq!(real.door.request("GET", "execs/cat/stream", b"").problem().1, "exec_not_found");
}

#[test]
fn real_files_go_in_and_out() {
    let real = Real::start();
    let content: Vec<u8> = (0..30_000_000_u32).map(|i| (i % 253) as u8).collect();
    let path = real.path("deep/er/file");
    let answer = real.door.request("PUT", &format!("files/content?path={path}&mode=0640&parents=true"), &content);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!((&answer.json()["size"], &answer.json()["mode"]), (&json!(30_000_000), &json!(0o640)));
    let answer = real.door.request("GET", &format!("files/content?path={path}"), b"");
    assert!(answer.whole && answer.body == content);
    assert_eq!(answer.headers["content-length"], "30000000");
    let answer = real.door.request("GET", &format!("files/content?path={path}&offset=29999990&length=5"), b"");
    assert_eq!(answer.body, content[29_999_990..29_999_995]);
    let empty = real.path("empty");
    assert_eq!(real.door.request("PUT", &format!("files/content?path={empty}"), b"").json()["size"], 0);
    assert_eq!(real.door.request("GET", &format!("files/content?path={empty}"), b"").body, b"");
    let root = real.path("deep");
    let tar = real.door.request("GET", &format!("files/archive?path={root}"), b"");
    assert!(tar.whole && tar.body.len() > 30_000_000);
    let copy = real.path("copy");
    let answer = real.door.request("PUT", &format!("files/archive?path={copy}"), &tar.body);
    assert_eq!(answer.status, 204, "{answer:?}");
    let list = real.door.request("GET", &format!("files/list?path={copy}&depth=9"), b"").json();
    let entries = list["entries"].as_array().unwrap();
    assert!(entries.iter().any(|entry| entry["size"] == 30_000_000 && entry["kind"] == "file"), "{list}");
    assert_ne!(real.door.request("PUT", &format!("files/archive?path={copy}"), &[7; 2048]).status, 204);
    let made = real.path("made/it");
    assert_eq!(
        real.door.request("POST", &format!("files/directory?path={made}&parents=true"), b"").json()["kind"],
        "directory"
    );
    let rename = json!({"from": made, "to": real.path("moved")}).to_string();
    assert_eq!(real.door.request("POST", "files/rename", rename.as_bytes()).status, 204);
    assert_eq!(real.door.request("GET", &format!("files/info?path={made}"), b"").problem().1, "path_not_found");
    assert_eq!(real.door.request("DELETE", &format!("files?path={copy}&recursive=true"), b"").status, 204);
    assert_eq!(real.door.request("GET", &format!("files/content?path={root}"), b"").problem().1, "path_error");
    assert!(real.door.request("GET", "files/content?path=/proc/self/status", b"").body.starts_with(b"Name:"));
}

#[test]
fn real_changes_are_told() {
    let real = Real::start();
    let root = real.path("tree");
    assert_eq!(real.door.request("POST", &format!("files/directory?path={root}"), b"").status, 200);
    let mut watcher = real.door.client();
    watcher.send("GET", &format!("/v1/sandboxes/{}/files/watch?path={root}", super::SANDBOX), "");
    assert_eq!(watcher.head().0, 200);
    watcher.chunks_until(b"{\"type\":\"ready\"}\n");
    assert_eq!(real.door.request("PUT", &format!("files/content?path={root}/a/f&parents=true"), b"x").status, 200);
    let line = format!("{{\"type\":\"create\",\"path\":\"{root}/a/f\",\"directory\":false}}\n");
    watcher.chunks_until(line.as_bytes());
    assert_eq!(
        real.door.request("POST", &format!("files/attributes?path={root}/a/f&mode=0711"), b"").json()["mode"],
        0o711
    );
    watcher.chunks_until(format!("{{\"type\":\"chmod\",\"path\":\"{root}/a/f\",\"directory\":false}}\n").as_bytes());
}

#[test]
fn real_execs_go_on_by_offset_when_the_agent_dies_they_are_lost() {
    let mut real = Real::start();
    let mut client = real.door.client();
    let body = json!({"argv": ["sh", "-c", "echo here; exec sleep 60"]}).to_string();
    client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), &format!("Content-Length: {}\r\n", body.len()));
    client.reader.get_mut().write_all(body.as_bytes()).unwrap();
    client.head();
    client.chunk().unwrap();
    client.chunk().unwrap();
    real.agent.kill().unwrap();
    real.agent.wait().unwrap();
    let last = client.chunk().unwrap();
    let problem: Value = serde_json::from_slice(&last[8..]).unwrap();
    assert_eq!((last[0], &problem["code"]), (0x7f, &json!("sandbox_lost")));
}

#[test]
#[ignore = "a measurement"]
fn bench_real() {
    let real = Real::start();
    let mut client = real.door.client();
    let mut times: Vec<Duration> = (0..2000)
        .map(|_| {
            let begin = Instant::now();
            let answer =
                client.request("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), br#"{"argv":["/bin/true"]}"#);
            assert_eq!(answer.frames().len(), 2);
            begin.elapsed()
        })
        .collect();
    times.sort_unstable();
    println!("true n=2000 p50={:?} p95={:?} p99={:?} max={:?}", times[1000], times[1900], times[1980], times[1999]);
    for (what, request) in [
        ("stdout", json!({"argv": ["head", "-c", "2000000000", "/dev/zero"]})),
        ("stderr", json!({"argv": ["sh", "-c", "head -c 2000000000 /dev/zero >&2"]})),
    ] {
        let mut client = real.door.client();
        let body = request.to_string();
        let headers = format!("Connection: close\r\nContent-Length: {}\r\n", body.len());
        client.send("POST", &format!("/v1/sandboxes/{SANDBOX}/execs"), &headers);
        client.raw(&body);
        let (begin, cpu) = (Instant::now(), super::bench::cpu_of("door"));
        let (mut buffer, mut total) = (vec![0; 1 << 20], 0);
        loop {
            match client.reader.get_mut().read(&mut buffer).unwrap() {
                0 => break,
                count => total += count,
            }
        }
        assert!(total > 2_000_000_000);
        let cpu = super::bench::cpu_of("door") - cpu;
        println!(
            "{what}: {:.2} GB/s, {:.2} GB per CPU second of the door",
            2.0 / begin.elapsed().as_secs_f64(),
            2.0 / cpu
        );
    }
}
