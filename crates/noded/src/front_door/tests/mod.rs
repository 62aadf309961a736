//! The front door as its clients, its server and the agents see it: over real sockets.

#![allow(
    clippy::cast_precision_loss,
    clippy::items_after_statements,
    clippy::large_stack_arrays,
    clippy::needless_pass_by_value,
    clippy::large_stack_frames,
    reason = "a test says what it does in the plainest way"
)]

mod bench;
mod control;
mod exec;
mod files;
mod hostile;
mod http;
mod ports;
mod proxy;
mod real;
mod real_ports;

use super::{Config, run};
use serde_json::{Value, json};
use shoal_wire::{ExecStart, HEADER_LEN, Header, Kind, Ready, Started, VERSION, Window};
use std::collections::{HashMap, HashSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// No wait in a test is longer.
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const TOKEN: &str = "f00d";
pub const SANDBOX: &str = "sb-abc";

/// A front door on sockets in a directory of its own. Its thread ends with the test process.
pub struct TestDoor {
    pub dir: PathBuf,
}

impl TestDoor {
    pub fn start() -> Self {
        Self::with(|_| {})
    }

    /// One that gives agents all the time they want to connect again.
    pub fn patient() -> Self {
        Self::with(|config| config.grace = PATIENCE)
    }

    pub fn with(change: impl FnOnce(&mut Config)) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("shoal-door-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let bind = |name: &str| UnixListener::bind(dir.join(name)).unwrap().into();
        let mut config = Config::new(vec![bind("shoal.sock")], bind("door.sock"), dir.join("server.sock"));
        change(&mut config);
        std::thread::Builder::new().name("door".to_owned()).spawn(move || run(config)).unwrap();
        Self { dir }
    }

    /// Starts an agent that serves each connection with `script`, and attaches it.
    pub fn agent(&self, script: impl FnMut(AgentConn) + Send + 'static) -> JoinHandle<()> {
        self.agent_as(SANDBOX, script)
    }

    pub fn agent_as(&self, sandbox: &str, script: impl FnMut(AgentConn) + Send + 'static) -> JoinHandle<()> {
        let socket = self.dir.join(format!("{sandbox}.agent"));
        let handle = listen(&socket, script);
        let answer = self.control().call(&attach_request(sandbox, &socket));
        assert!(answer.get("ok").is_some(), "attach: {answer}");
        handle
    }

    pub fn control(&self) -> Control {
        let stream = UnixStream::connect(self.dir.join("door.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Control { reader: BufReader::new(stream) }
    }

    pub fn client(&self) -> Client {
        let stream = UnixStream::connect(self.dir.join("shoal.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Client { reader: BufReader::with_capacity(256 << 10, stream) }
    }

    pub fn request(&self, method: &str, tail: &str, body: &[u8]) -> Answer {
        self.client().request(method, &format!("/v1/sandboxes/{SANDBOX}/{tail}"), body)
    }
}

impl Drop for TestDoor {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

pub fn attach_request(sandbox: &str, socket: &Path) -> Value {
    json!({"op": "attach", "sandbox": sandbox, "socket": socket, "token": TOKEN, "deadline_ms": 5000,
           "process": {"env": ["PATH=/bin", "A=1"], "cwd": "/app", "user": "dev"}})
}

/// An agent's listener; each connection gets its READY and then `script`, one after the other.
pub fn listen(socket: &Path, mut script: impl FnMut(AgentConn) + Send + 'static) -> JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let mut conn = AgentConn::new(stream);
            conn.ready(1);
            script(conn);
        }
    })
}

/// Tries something until it holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
    }
}

/// The agent's end of a connection.
pub struct AgentConn {
    pub stream: UnixStream,
    /// Channels of commands that have ended: what the door still says on them is passed over.
    ended: HashSet<u32>,
}

impl AgentConn {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, ended: HashSet::new() }
    }

    pub fn ready(&mut self, generation: u64) {
        self.send(Kind::Ready, 0, 0, &Ready { version: VERSION, generation, ready_at_ns: 5 }.encode());
    }

    pub fn send(&mut self, kind: Kind, flags: u8, channel: u32, payload: &[u8]) {
        if kind == Kind::Exited {
            self.ended.insert(channel);
        }
        let _ = self.stream.write_all(&shoal_wire::frame(kind, flags, channel, payload));
    }

    /// The next frame that counts; `None` at the end.
    pub fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        loop {
            let (header, payload) = self.receive_any()?;
            if !matches!(header.kind, Kind::Cancel | Kind::Window) || !self.ended.contains(&header.channel) {
                return Some((header, payload));
            }
        }
    }

    /// The next frame; `None` at the end.
    pub fn receive_any(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).ok()?;
        let header = Header::decode(header).unwrap();
        let mut payload = vec![0; header.len as usize];
        self.stream.read_exact(&mut payload).ok()?;
        Some((header, payload))
    }

    /// The next frame, which is of this kind.
    pub fn expect(&mut self, kind: Kind) -> (u32, u8, Vec<u8>) {
        let (header, payload) = self.receive().expect("a frame");
        assert_eq!(header.kind, kind);
        (header.channel, header.flags, payload)
    }

    /// Takes an exec's start and says that it runs.
    pub fn start(&mut self) -> (u32, ExecStart) {
        let (channel, _, payload) = self.expect(Kind::ExecStart);
        let start = ExecStart::decode(&payload).unwrap();
        self.started(channel, Started { pid: 7, detached: start.detached, ..Started::default() });
        (channel, start)
    }

    pub fn started(&mut self, channel: u32, started: Started) {
        self.send(Kind::Started, 0, channel, &started.encode());
    }

    pub fn exited(&mut self, channel: u32, code: i32) {
        let exited = shoal_wire::Exited { outcome: shoal_wire::Outcome::Exited, code, ..Default::default() };
        self.send(Kind::Exited, 0, channel, &exited.encode());
    }

    /// Sends `count` bytes of one stream, as fast as the window allows; returns the last offset.
    pub fn pump(&mut self, channel: u32, flags: u8, count: u64) -> u64 {
        self.pump_within(shoal_wire::WINDOW, channel, flags, count)
    }

    /// As [`Self::pump`], with another window.
    pub fn pump_within(&mut self, window: u64, channel: u32, flags: u8, count: u64) -> u64 {
        let chunk = vec![b'x'; shoal_wire::DATA_CHUNK];
        let (mut sent, mut consumed) = (0, 0);
        while sent < count {
            let room = consumed + window - sent;
            let size = (chunk.len() as u64).min(count - sent).min(room);
            if size == 0 {
                let (header, payload) = self.receive().expect("a window");
                assert_eq!((header.kind, header.channel, header.flags), (Kind::Window, channel, flags));
                let window = Window::decode(&payload).unwrap();
                assert!(window.consumed > consumed && window.consumed <= sent);
                consumed = window.consumed;
                continue;
            }
            self.send(Kind::Data, flags, channel, &chunk[..size as usize]);
            sent += size;
        }
        sent
    }

    /// Reads until the other end closes.
    pub fn idle(&mut self) {
        while self.receive().is_some() {}
    }
}

/// A connection to the control socket.
pub struct Control {
    pub reader: BufReader<UnixStream>,
}

impl Control {
    pub fn call(&mut self, request: &Value) -> Value {
        let mut request = request.clone();
        request["id"] = json!(1);
        self.send(&request.to_string());
        self.line()
    }

    pub fn send(&mut self, line: &str) {
        self.reader.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

/// A client's connection.
pub struct Client {
    pub reader: BufReader<UnixStream>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
    /// The body ended as it should.
    pub whole: bool,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }
    /// Status and code of a problem.
    pub fn problem(&self) -> (u16, String) {
        assert_eq!(self.headers["content-type"], "application/problem+json");
        (self.status, self.json()["code"].as_str().unwrap().to_owned())
    }
    pub fn frames(&self) -> Vec<(u8, Vec<u8>)> {
        frames(&self.body)
    }
}

/// Frames of a stream, neighbours of one kind joined.
pub fn frames(mut body: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames: Vec<(u8, Vec<u8>)> = Vec::new();
    while !body.is_empty() {
        let length = u32::from_be_bytes(body[4..8].try_into().unwrap()) as usize;
        assert_eq!(&body[1..4], [0, 0, 0]);
        let payload = &body[8..8 + length];
        match frames.last_mut() {
            Some((kind, joined)) if *kind == body[0] && (2..=3).contains(kind) => joined.extend_from_slice(payload),
            _ => frames.push((body[0], payload.to_vec())),
        }
        body = &body[8 + length..];
    }
    frames
}

impl Client {
    pub fn request(&mut self, method: &str, path: &str, body: &[u8]) -> Answer {
        self.send(method, path, &format!("Content-Length: {}\r\n", body.len()));
        // The other end may have answered already and closed.
        let _ = self.reader.get_mut().write_all(body);
        self.answer()
    }

    /// Sends a head with the token.
    pub fn send(&mut self, method: &str, path: &str, headers: &str) {
        self.raw(&format!("{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{headers}\r\n"));
    }

    pub fn raw(&mut self, text: &str) {
        let _ = self.reader.get_mut().write_all(text.as_bytes());
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn head(&mut self) -> (u16, HashMap<String, String>) {
        let status = self.line();
        let status = status.split(' ').nth(1).unwrap_or_else(|| panic!("no status line: {status:?}")).parse().unwrap();
        let mut headers = HashMap::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(':') else { break };
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        (status, headers)
    }

    /// The next chunk of a chunked body; empty: the end, `None`: it broke off.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let mut line = String::new();
        self.reader.read_line(&mut line).ok()?;
        let length = usize::from_str_radix(line.trim_end(), 16).ok()?;
        let mut chunk = vec![0; length + 2];
        self.reader.read_exact(&mut chunk).ok()?;
        chunk.truncate(length);
        Some(chunk)
    }

    /// Chunks of a body, up to the one in which `last` is.
    pub fn chunks_until(&mut self, last: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !bytes.windows(last.len()).any(|window| window == last) {
            let chunk = self.chunk().expect("a chunk");
            assert!(!chunk.is_empty(), "the body ended without {last:?}");
            bytes.extend(chunk);
        }
        bytes
    }

    /// The chunks that follow, to the end of the body.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let chunk = self.chunk().expect("a chunk");
            if chunk.is_empty() {
                return bytes;
            }
            bytes.extend(chunk);
        }
    }

    pub fn answer(&mut self) -> Answer {
        let (status, headers) = self.head();
        let mut body = Vec::new();
        let mut whole = true;
        if let Some(length) = headers.get("content-length") {
            let length: u64 = length.parse().unwrap();
            (&mut self.reader).take(length).read_to_end(&mut body).unwrap();
            whole = body.len() as u64 == length;
        } else if headers.contains_key("transfer-encoding") {
            loop {
                match self.chunk() {
                    Some(chunk) if chunk.is_empty() => break,
                    Some(chunk) => body.extend_from_slice(&chunk),
                    None => {
                        whole = false;
                        break;
                    }
                }
            }
        }
        Answer { status, headers, body, whole }
    }
}
