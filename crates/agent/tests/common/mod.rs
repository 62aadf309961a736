//! A client that speaks the agent's protocol, and a running agent to speak to.

#![allow(dead_code, missing_docs, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use shoal_wire::{
    EOF, ExecAttach, ExecInput, ExecSignal, ExecStart, Exited, Failure, HEADER_LEN, Header, Kind, Ready, STDERR,
    Started, Window, frame,
};

/// Longest time any single answer may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A directory that goes with its test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("shoal-agent-it-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
    pub fn path(&self, name: &str) -> Vec<u8> {
        self.0.join(name).into_os_string().into_encoded_bytes()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// How the agent is started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As whoever runs the tests.
    Plain,
    /// As PID 1 of a pid namespace; needs root.
    Init,
    /// As in a sandbox: PID 1, an id and capabilities of its own; needs root.
    Guest,
}

/// Whether the tests may make namespaces and change ids.
pub fn is_root() -> bool {
    // SAFETY: no pointer.
    unsafe { libc::geteuid() == 0 }
}

/// A running agent; killed when dropped.
pub struct Agent {
    child: Child,
    socket: PathBuf,
    pub scratch: Scratch,
}

const GUEST_CAPS: &str = "+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+setfcap,\
    +net_bind_service,+sys_chroot";

impl Agent {
    pub fn start() -> Self {
        Self::start_as(Mode::Plain, &[])
    }

    pub fn start_as(mode: Mode, files: &[(&str, &Path)]) -> Self {
        let scratch = Scratch::new();
        let socket = scratch.0.join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = env!("CARGO_BIN_EXE_shoal-agent");
        let mut argv: Vec<String> = Vec::new();
        if mode != Mode::Plain {
            argv.extend(["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"].map(String::from));
        }
        if mode == Mode::Guest {
            let only = format!("-all,{GUEST_CAPS}");
            argv.extend(
                ["setpriv", "--reuid=65536", "--regid=65536", "--clear-groups", "--no-new-privs"].map(String::from),
            );
            argv.extend([
                format!("--inh-caps={only}"),
                format!("--ambient-caps={only}"),
                format!("--bounding-set={only}"),
            ]);
        }
        argv.extend([agent, "--generation", "7", "--listen"].map(String::from));
        argv.push(listener.as_raw_fd().to_string());
        let mut keep = vec![listener.as_raw_fd()];
        let mut opened = Vec::new();
        for (option, path) in files {
            let file = std::fs::OpenOptions::new().read(true).write(*option == "--cgroup").open(path).unwrap();
            argv.extend([(*option).to_string(), file.as_raw_fd().to_string()]);
            keep.push(file.as_raw_fd());
            opened.push(file);
        }
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        // SAFETY: only fcntl runs between fork and exec.
        unsafe {
            command.pre_exec(move || {
                for fd in &keep {
                    libc::fcntl(*fd, libc::F_SETFD, 0);
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        Self { child, socket, scratch }
    }

    pub fn connect(&self) -> Client {
        Client::new(UnixStream::connect(&self.socket).unwrap())
    }

    /// Pid of the agent itself, as the test sees it.
    pub fn pid(&self) -> u32 {
        self.find_pid(PATIENCE).expect("the agent runs")
    }

    /// As [`Agent::pid`]; the agent is a descendant of what was started, when it has namespaces of its own.
    fn find_pid(&self, patience: Duration) -> Option<u32> {
        let deadline = Instant::now() + patience;
        let mut pid = self.child.id();
        loop {
            if std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim() == "shoal-agent" {
                return Some(pid);
            }
            if Instant::now() > deadline {
                return None;
            }
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            match children.split_whitespace().next() {
                Some(child) => pid = child.parse().unwrap(),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Private memory in KiB: what another agent would take once more. (The program's own pages are shared by all.)
    ///
    /// 0 for anybody but root, to whom the agent shows nothing of itself.
    pub fn private_kib(&self) -> u64 {
        let Ok(rollup) = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid())) else {
            assert!(!is_root());
            return 0;
        };
        let line = rollup.lines().find(|line| line.starts_with("Anonymous:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Open descriptors; 0 for anybody but root.
    pub fn open_fds(&self) -> usize {
        let Ok(fds) = std::fs::read_dir(format!("/proc/{}/fd", self.pid())) else {
            assert!(!is_root());
            return 0;
        };
        fds.count()
    }

    /// Waits until the agent has slept through a stretch of time: one that has something to do never does.
    pub fn rests(&self, stretch: Duration) {
        eventually("the agent sleeps", || {
            let before = self.sleeps();
            std::thread::sleep(stretch);
            before.is_some() && before == self.sleeps()
        });
    }

    /// How often the agent has gone to sleep so far; `None` when it is awake.
    fn sleeps(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        (field("State:") == "S").then(|| field("voluntary_ctxt_switches:").parse().unwrap())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // First the agent: a change of ids has made it forget that it should die with its parent.
        if let Some(pid) = self.find_pid(Duration::from_secs(1)) {
            // SAFETY: no pointer; nobody has waited for this process, so the number is still its own.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What has come on one channel.
#[derive(Debug, Default)]
pub struct Channel {
    pub started: Option<Started>,
    /// It is told an end and no output.
    pub waits: bool,
    pub data: [Vec<u8>; 2],
    pub eof: [bool; 2],
    pub window: u64,
    /// Offset of the first byte of each stream.
    pub base: [u64; 2],
    pub end: Option<End>,
    /// Ok came, with this payload; the end of requests that send no data.
    pub ok: Option<Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum End {
    Exited(Exited),
    Error(Failure),
}

impl Channel {
    pub fn exited(&self) -> &Exited {
        match &self.end {
            Some(End::Exited(exited)) => exited,
            other => panic!("not exited: {other:?}, stderr {:?}", String::from_utf8_lossy(&self.data[1])),
        }
    }
    pub fn errno(&self) -> i32 {
        match &self.end {
            Some(End::Error(failure)) => failure.errno,
            other => panic!("no error: {other:?}"),
        }
    }
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.data[0]).into_owned()
    }
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.data[1]).into_owned()
    }
    pub fn ended(&self) -> bool {
        self.end.is_some()
    }
}

/// A connection.
pub struct Client {
    pub stream: UnixStream,
    pub ready: Ready,
    pub channels: BTreeMap<u32, Channel>,
    /// Tell the agent of every byte that came.
    pub acknowledge: bool,
    next: u32,
    input: Vec<u8>,
    taken: usize,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self {
            stream,
            ready: Ready::default(),
            channels: BTreeMap::new(),
            acknowledge: true,
            next: 0,
            input: Vec::new(),
            taken: 0,
        };
        let (header, payload) = client.frame().expect("READY");
        assert_eq!((header.kind, header.channel), (Kind::Ready, 0));
        client.ready = Ready::decode(&payload).unwrap();
        client
    }

    /// The next frame; `None` when the agent closed the connection.
    pub fn frame(&mut self) -> Option<(Header, Vec<u8>)> {
        loop {
            let rest = &self.input[self.taken..];
            if let Some((header, body)) = rest.split_first_chunk::<HEADER_LEN>() {
                let header = Header::decode(*header).unwrap();
                if let Some(payload) = body.get(..header.len as usize) {
                    let payload = payload.to_vec();
                    self.taken += HEADER_LEN + payload.len();
                    return Some((header, payload));
                }
            }
            self.input.drain(..self.taken);
            self.taken = 0;
            let mut buffer = vec![0; 256 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no frame: {error}"),
            }
        }
    }

    /// Takes one frame into its channel; false when the connection is closed.
    pub fn take(&mut self) -> bool {
        let Some((header, payload)) = self.frame() else { return false };
        let channel = self.channels.entry(header.channel).or_default();
        let mut window = None;
        match header.kind {
            Kind::Started => {
                let started = Started::decode(&payload).unwrap();
                channel.base = [started.stdout_offset, started.stderr_offset];
                channel.started = Some(started);
            }
            Kind::Data => {
                let stream = usize::from(header.flags & STDERR != 0);
                assert!(!channel.eof[stream], "data after the end");
                channel.data[stream].extend_from_slice(&payload);
                channel.eof[stream] = header.flags & EOF != 0;
                let consumed = channel.base[stream] + channel.data[stream].len() as u64;
                window = (self.acknowledge && !payload.is_empty()).then_some((header.flags & STDERR, consumed));
            }
            Kind::Exited => {
                let exited = Exited::decode(&payload).unwrap();
                if exited.outcome != shoal_wire::Outcome::NotStarted && !channel.waits {
                    assert_eq!(channel.eof, [true; 2], "Exited before the ends of both streams");
                }
                channel.end = Some(End::Exited(exited));
            }
            Kind::Ok => channel.ok = Some(payload),
            Kind::Error => channel.end = Some(End::Error(Failure::decode(&payload).unwrap())),
            Kind::Window => channel.window = Window::decode(&payload).unwrap().consumed,
            other => panic!("the agent sent {other:?}"),
        }
        if let Some((flags, consumed)) = window {
            // The agent may be gone or have closed; the next read tells.
            let _ = self.stream.write_all(&frame(Kind::Window, flags, header.channel, &Window { consumed }.encode()));
        }
        true
    }

    pub fn send(&mut self, kind: Kind, flags: u8, channel: u32, payload: &[u8]) {
        self.stream.write_all(&frame(kind, flags, channel, payload)).unwrap();
    }

    /// Opens a channel.
    pub fn request(&mut self, kind: Kind, payload: &[u8]) -> u32 {
        self.next += 1;
        self.channels.insert(self.next, Channel { waits: kind == Kind::ExecWait, ..Channel::default() });
        self.send(kind, 0, self.next, payload);
        self.next
    }

    /// Waits until a channel is as wanted.
    pub fn until(&mut self, id: u32, wanted: impl Fn(&Channel) -> bool) -> &Channel {
        let deadline = Instant::now() + PATIENCE;
        while !wanted(&self.channels[&id]) {
            assert!(Instant::now() < deadline, "channel {id} never got there");
            assert!(self.take(), "connection closed, channel {id}: {:?}", self.channels[&id]);
        }
        &self.channels[&id]
    }

    /// Sends a request and waits for Ok or Error.
    pub fn call(&mut self, kind: Kind, payload: &[u8]) -> &Channel {
        let id = self.request(kind, payload);
        self.until(id, |channel| channel.ok.is_some() || channel.ended())
    }

    pub fn start(&mut self, start: &ExecStart) -> u32 {
        self.request(Kind::ExecStart, &start.encode())
    }

    /// Runs a command to its end.
    pub fn run(&mut self, start: &ExecStart) -> &Channel {
        let id = self.start(start);
        self.until(id, Channel::ended)
    }

    pub fn attach(&mut self, exec_id: &str, stdout_offset: u64, stderr_offset: u64) -> u32 {
        let request = ExecAttach { exec_id: exec_id.into(), stdout_offset, stderr_offset };
        self.request(Kind::ExecAttach, &request.encode())
    }

    pub fn signal(&mut self, exec_id: &[u8], signal: i32, tree: bool) -> &Channel {
        let request = ExecSignal { exec_id: exec_id.to_vec(), signal: signal as u8, tree };
        self.call(Kind::ExecSignal, &request.encode())
    }

    /// Sends bytes as stdin (in one frame) and waits for the answer.
    pub fn input(&mut self, exec_id: &[u8], offset: u64, bytes: &[u8], flags: u8) -> &Channel {
        let id = self.request(Kind::ExecInput, &ExecInput { exec_id: exec_id.to_vec(), offset }.encode());
        self.send(Kind::Data, flags, id, bytes);
        self.until(id, |channel| channel.ok.is_some() || channel.ended())
    }

    /// Uploads bytes on an open channel, no faster than its window allows.
    pub fn upload(&mut self, id: u32, bytes: &[u8], chunk: usize) -> &Channel {
        let mut sent = 0;
        for piece in bytes.chunks(chunk) {
            self.until(id, |channel| {
                channel.ended() || sent + piece.len() as u64 <= channel.window + shoal_wire::WINDOW
            });
            if self.channels[&id].ended() {
                break;
            }
            self.send(Kind::Data, 0, id, piece);
            sent += piece.len() as u64;
        }
        self.send(Kind::Data, EOF, id, &[]);
        self.until(id, |channel| channel.ok.is_some() || channel.ended())
    }
}

/// A request for `sh -c script`.
pub fn sh(exec_id: &str, script: &str) -> ExecStart {
    exec(exec_id, &["/bin/sh", "-c", script])
}

/// A request for a command.
pub fn exec(exec_id: &str, argv: &[&str]) -> ExecStart {
    ExecStart {
        exec_id: exec_id.into(),
        argv: argv.iter().map(|argument| argument.as_bytes().to_vec()).collect(),
        env: vec![b"PATH=/usr/local/bin:/usr/bin:/bin".to_vec()],
        cwd: b"/".to_vec(),
        ..ExecStart::default()
    }
}

/// Bytes that no compression or repetition hides faults in.
pub fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend_from_slice(&seed.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// What holds a script up until the test opens it.
pub struct Gate(PathBuf);

impl Gate {
    pub fn new(agent: &Agent) -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        Self(agent.scratch.0.join(format!("gate-{number}")))
    }
    /// A shell command that waits here.
    pub fn wait(&self) -> String {
        format!("until [ -e {} ]; do sleep 0.02; done", self.0.display())
    }
    pub fn open(&self) {
        std::fs::write(&self.0, "").unwrap();
    }
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
