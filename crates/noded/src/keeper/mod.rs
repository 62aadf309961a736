//! The privileged process: a closed list of operations, one thread, no byte of a client's.
//!
//! It owns every host resource of every sandbox: process, control groups, directories, socket, ids.
//! One table says what there is; one function removes it, after an error as after a life. The front
//! door and the server may die: it starts them again, and the sandboxes do not notice.

mod cgroup;
mod error;
mod ids;
mod landlock;
mod pool;
mod processes;
mod rpc;
mod runtimes;
mod seccomp;
mod setup;
mod spec;
mod sys;
mod unpack;
mod userns;

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use error::{Error, Result};
use processes::Child;
use rpc::Channel;
use spec::{Operation, Request, Spec};

/// What `shoal-noded serve` is told on its command line.
pub struct Options {
    /// Directory of what must survive; made by the caller.
    pub data_dir: String,
    /// Directory of the sockets; made by the caller.
    pub run_dir: String,
    /// The guest agent's binary.
    pub agent: String,
    /// The Python that runs the server.
    pub python: String,
    /// The pool file, formatted by the caller.
    pub pool: String,
    /// Where one line says whether the node came up.
    pub ready: Option<RawFd>,
    /// Seconds of idleness after which the server leaves; passed on.
    pub idle_exit: Option<String>,
    /// Loopback address and port on which clients are served besides the socket in `run_dir`.
    pub listen: Option<String>,
}

/// Writes one structured line to stderr.
fn log(event: &str, facts: &Value) {
    let at = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let mut line = json!({ "event": event, "process": "keeper", "at": at });
    if let (Some(line), Some(facts)) = (line.as_object_mut(), facts.as_object()) {
        line.extend(facts.clone());
    }
    eprintln!("{line}");
}

/// Runs the node until its server leaves or a signal ends it.
pub fn serve(options: &Options) -> ExitCode {
    let mut ready = options.ready.map(rpc::Ready::new);
    match setup::node(options) {
        Ok(node) => {
            let mut keeper = Keeper::new(node, ready.take());
            let clean = keeper.run();
            keeper.close();
            if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            log("start_failed", &json!({ "error": error }));
            if let Some(ready) = ready {
                ready.failed(&error);
            }
            ExitCode::FAILURE
        }
    }
}

/// A sandbox whose PID 1 was started and has not been reaped.
struct Sandbox {
    pid: i32,
    pidfd: OwnedFd,
    generation: u64,
    host_id: u32,
    /// It was asked to end, maybe by a server that is gone.
    doomed: bool,
    /// Requests that wait for its end.
    ending: Vec<u64>,
}

/// What remains of a sandbox whose processes are gone, until it is removed.
struct Remains {
    id: String,
    host_id: u32,
    /// What to say, to whom, once it is.
    answers: Vec<u64>,
    event: Option<Value>,
    next_try: Instant,
    give_up: Instant,
}

/// A layer being unpacked.
struct Unpacking {
    layer: String,
    worker: unpack::Worker,
    report: Vec<u8>,
    deadline: Instant,
}

/// Who an epoll event is from.
#[derive(Clone, PartialEq, Eq)]
enum Source {
    Server,
    Signals,
    DoorProcess,
    ServerProcess,
    Sandbox(String),
    Unpacking(u64),
}

/// Recent deaths of one part of the node.
#[derive(Default)]
struct Deaths(VecDeque<Instant>);

impl Deaths {
    /// Counts one; true when starting that part once more would not help.
    fn too_many(&mut self, now: Instant) -> bool {
        self.0.retain(|then| now.duration_since(*then) < DEATHS_WINDOW);
        self.0.push_back(now);
        self.0.len() > MAX_DEATHS
    }
}

/// How the node is ending.
struct Stop {
    clean: bool,
    deadline: Instant,
}

struct Keeper {
    node: setup::Node,
    channel: Channel,
    ready: Option<rpc::Ready>,
    sandboxes: HashMap<String, Sandbox>,
    remains: Vec<Remains>,
    unpacking: HashMap<u64, Unpacking>,
    host_ids: HashSet<u32>,
    sources: HashMap<u64, Source>,
    next_token: u64,
    /// The last sandboxes that ended by themselves, for a server that did not hear of it.
    exited: VecDeque<Value>,
    door_deaths: Deaths,
    server_deaths: Deaths,
    /// A server has come up in this node's life.
    greeted: bool,
    /// The server was told to leave, and the node ends with it.
    leaving: bool,
    stop: Option<Stop>,
}

/// Deaths of one part within [`DEATHS_WINDOW`] that the node lives through.
const MAX_DEATHS: usize = 5;
const DEATHS_WINDOW: Duration = Duration::from_mins(1);
/// Ends that are remembered.
const MAX_EXITED: usize = 1024;
/// Sandboxes on a page of the list: with all ends that are remembered it fits into a packet.
const LIST_PAGE: usize = 256;
/// Longest that ending everything may take.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// Longest that removing what a sandbox left may take before its owner is told of the failure.
const REMOVE_PATIENCE: Duration = Duration::from_secs(10);

impl Keeper {
    fn new(node: setup::Node, ready: Option<rpc::Ready>) -> Self {
        let channel = Channel::new(node.server_end.try_clone());
        Self {
            node,
            channel,
            ready,
            sandboxes: HashMap::new(),
            remains: Vec::new(),
            unpacking: HashMap::new(),
            host_ids: HashSet::new(),
            sources: HashMap::new(),
            next_token: 0,
            exited: VecDeque::new(),
            door_deaths: Deaths::default(),
            server_deaths: Deaths::default(),
            greeted: false,
            leaving: false,
            stop: None,
        }
    }

    /// Serves until there is nothing left to serve; true when that was wanted.
    fn run(&mut self) -> bool {
        let fixed = [
            (self.node.server_end.as_raw_fd(), Source::Server),
            (self.node.signals.as_raw_fd(), Source::Signals),
            (self.node.door.pidfd.as_raw_fd(), Source::DoorProcess),
            (self.node.server.pidfd.as_raw_fd(), Source::ServerProcess),
        ];
        for (fd, source) in fixed {
            if let Err(error) = self.watch(fd, source) {
                log("watch_failed", &json!({ "error": error }));
                return false;
            }
        }
        loop {
            if let Some(stop) = &self.stop {
                let over = self.sandboxes.is_empty() && self.remains.is_empty() && self.unpacking.is_empty();
                if over || Instant::now() > stop.deadline {
                    if !over {
                        log(
                            "stop_incomplete",
                            &json!({ "sandboxes": self.sandboxes.len(), "remains": self.remains.len() }),
                        );
                    }
                    return stop.clean && over;
                }
            }
            let tokens = match self.node.epoll.wait(self.patience()) {
                Ok(tokens) => tokens,
                Err(error) => {
                    log("epoll_failed", &json!({ "error": error }));
                    return false;
                }
            };
            for token in tokens {
                if let Some(source) = self.sources.get(&token).cloned() {
                    self.happened(token, &source);
                }
            }
            self.expire();
            self.remove_remains();
            self.channel.flush();
        }
    }

    fn watch(&mut self, fd: RawFd, source: Source) -> Result<()> {
        self.next_token += 1;
        self.node.epoll.add(fd, self.next_token)?;
        self.sources.insert(self.next_token, source);
        Ok(())
    }

    /// How long nothing needs to be looked at.
    fn patience(&self) -> Option<Duration> {
        let mut times: Vec<Instant> = self.remains.iter().map(|one| one.next_try).collect();
        times.extend(self.unpacking.values().map(|one| one.deadline));
        times.extend(self.stop.as_ref().map(|stop| stop.deadline));
        if self.channel.is_blocked() {
            times.push(Instant::now() + Duration::from_millis(5));
        }
        times.into_iter().min().map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn happened(&mut self, token: u64, source: &Source) {
        match source {
            Source::Server => self.requests(token),
            Source::Signals => self.signalled(),
            Source::DoorProcess => {
                self.node.epoll.remove(self.node.door.pidfd.as_raw_fd());
                self.sources.remove(&token);
                self.door_ended();
            }
            Source::ServerProcess => {
                self.node.epoll.remove(self.node.server.pidfd.as_raw_fd());
                self.sources.remove(&token);
                self.server_ended();
            }
            Source::Sandbox(id) => {
                self.sources.remove(&token);
                self.sandbox_ended(id);
            }
            Source::Unpacking(request) => self.unpack_progress(token, *request),
        }
    }

    /// Puts a new front door in the place of one that died; the server tells it which sandboxes there are.
    fn door_ended(&mut self) {
        log("door_died", &json!({ "status": sys::reap(self.node.door.pid) }));
        if self.stop.is_some() {
            return;
        }
        if !self.greeted || self.door_deaths.too_many(Instant::now()) {
            self.begin_stop(false);
            return;
        }
        let started = self.node.starter.door().and_then(|door| {
            self.node.door = door;
            self.watch(self.node.door.pidfd.as_raw_fd(), Source::DoorProcess)
        });
        if let Err(error) = started {
            log("door_not_started", &json!({ "error": error }));
            self.begin_stop(false);
        }
    }

    /// Puts a new server in the place of one that died; one that left takes the node along.
    fn server_ended(&mut self) {
        let status = sys::reap(self.node.server.pid).unwrap_or(-1);
        log("server_exited", &json!({ "status": status }));
        if let Some(ready) = self.ready.take() {
            ready.failed(&Error::other("internal", "the server ended before it was ready; see its log"));
        }
        let ends = status == 0 || self.leaving || !self.greeted;
        if ends || self.stop.is_some() || self.server_deaths.too_many(Instant::now()) {
            self.begin_stop(status == 0);
            return;
        }
        if let Err(error) = self.replace_server() {
            log("server_not_started", &json!({ "error": error }));
            self.begin_stop(false);
        }
    }

    /// Starts a server that owes nothing to the one before: nothing that it asked for is answered to this one.
    fn replace_server(&mut self) -> Result<()> {
        for request in self.unpacking.keys().copied().collect::<Vec<u64>>() {
            self.finish_unpacking(request, Some(Error::other("stopping", "its server is gone")));
        }
        self.node.pool.discard_uncommitted()?;
        for sandbox in self.sandboxes.values_mut() {
            sandbox.ending.clear();
        }
        for one in &mut self.remains {
            one.answers.clear();
        }
        self.node.epoll.remove(self.node.server_end.as_raw_fd());
        self.sources.retain(|_, source| *source != Source::Server);
        (self.node.server, self.node.server_end) = setup::start_server(&self.node.starter)?;
        self.channel = Channel::new(self.node.server_end.try_clone());
        self.watch(self.node.server_end.as_raw_fd(), Source::Server)?;
        self.watch(self.node.server.pidfd.as_raw_fd(), Source::ServerProcess)
    }

    fn signalled(&mut self) {
        for signal in self.node.take_signals() {
            if signal == libc::SIGTERM || signal == libc::SIGINT {
                // The server records why its sandboxes ended, then leaves, and that ends the node.
                log("stopping", &json!({ "signal": signal }));
                self.leaving = true;
                let _ = sys::pidfd_kill(self.node.server.pidfd.as_fd(), libc::SIGTERM);
            }
        }
    }

    fn requests(&mut self, token: u64) {
        loop {
            match self.channel.receive() {
                rpc::Received::Nothing => return,
                rpc::Received::Closed => {
                    self.node.epoll.remove(self.node.server_end.as_raw_fd());
                    self.sources.remove(&token);
                    return;
                }
                rpc::Received::Packet(bytes, fd) => {
                    match serde_json::from_slice::<Request>(&bytes) {
                        Ok(request) => self.serve_request(request, fd),
                        Err(error) => {
                            // Whoever asked is told, where the packet says who that was.
                            let packet = serde_json::from_slice::<Value>(&bytes).unwrap_or_default();
                            let id = packet.get("id").and_then(Value::as_u64).unwrap_or(0);
                            self.channel.answer(id, Err(Error::invalid(error.to_string())));
                        }
                    }
                }
            }
        }
    }

    /// Carries out one request; those that take time answer later.
    fn serve_request(&mut self, request: Request, fd: Option<OwnedFd>) {
        let id = request.id;
        let answer = match request.operation {
            Operation::Create { sandbox, generation, spec } => self.create(&sandbox, generation, &spec),
            Operation::Destroy { sandbox } => match self.destroy(&sandbox, id) {
                Ok(true) => Ok(json!({})),
                Ok(false) => return,
                Err(error) => Err(error),
            },
            Operation::LayerUnpack(what) => match self.unpack(id, &what, fd) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Operation::Hello => self.hello(),
            Operation::ClaimIds => self.node.ids.claim().map(|first| json!({ "first": first, "count": ids::BLOCK })),
            Operation::List { after } => Ok(self.list(&after)),
            Operation::LayerCommit { layer, diff_id } => spec::check_layer_name(&layer)
                .and_then(|()| spec::check_diff_id(&diff_id))
                .and_then(|()| self.node.pool.commit_layer(&layer, &diff_id))
                .map(|existing| json!({ "existing": existing })),
            Operation::LayerDiscard { layer } => {
                spec::check_layer_name(&layer).and_then(|()| self.node.pool.discard_layer(&layer)).map(|()| json!({}))
            }
            Operation::LayerRemove { diff_id } => {
                spec::check_diff_id(&diff_id).and_then(|()| self.node.pool.remove_layer(&diff_id)).map(|()| json!({}))
            }
            Operation::LayerList => self.node.pool.layers().map(|layers| json!({ "layers": layers })),
        };
        self.channel.answer(id, answer);
    }

    fn list(&self, after: &str) -> Value {
        let mut ids: Vec<&String> = self.sandboxes.keys().filter(|id| id.as_str() > after).collect();
        ids.sort_unstable();
        let page = ids.iter().take(LIST_PAGE).filter_map(|id| self.sandboxes.get_key_value(*id));
        let page = page.map(
            |(id, one)| json!({ "sandbox": id, "pid": one.pid, "generation": one.generation, "socket": socket_of(id) }),
        );
        // With the last page, so that what ended between two pages is missing from neither list.
        let more = ids.len() > LIST_PAGE;
        let exited = if more { json!([]) } else { json!(self.exited) };
        json!({ "sandboxes": page.collect::<Vec<_>>(), "more": more, "exited": exited })
    }

    fn hello(&mut self) -> Result<Value> {
        self.greeted = true;
        if let Some(ready) = self.ready.take() {
            ready.ok(&self.node.run_dir);
        }
        let (total, free) = self.node.pool.space()?;
        let filter = self.node.native.filter_facts();
        Ok(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": setup::kernel_release(),
            "cgroup": if self.node.cgroups.version == cgroup::Version::V1 { "v1" } else { "v2" },
            "pool": { "total_bytes": total, "free_bytes": free },
            "listen": self.node.listen,
            "id_blocks": self.node.ids.blocks(),
            "ids_per_block": ids::BLOCK,
            "walls": {
                "runtime": "native",
                "seccomp": "standard",
                "seccomp_allowed": filter.allowed,
                "seccomp_conditional": filter.conditional,
                "seccomp_denied": filter.denied,
                "capabilities": 11,
                "server_landlock": self.node.starter.has_landlock(),
            },
        }))
    }

    fn create(&mut self, id: &str, generation: u64, spec: &Spec) -> Result<Value> {
        spec::check_sandbox_id(id)?;
        spec.check()?;
        let host_id = spec.host_id();
        if self.stop.is_some() {
            return Err(Error::other("stopping", "the node is stopping"));
        }
        if !self.node.ids.has(host_id) {
            return Err(Error::invalid(format!("host ids from {host_id} are not this node's")));
        }
        if self.sandboxes.contains_key(id) || self.remains.iter().any(|one| one.id == id) {
            return Err(Error::invalid(format!("sandbox {id} exists")));
        }
        if !self.host_ids.insert(host_id) {
            return Err(Error::invalid(format!("host ids from {host_id} are in use")));
        }
        let spawned = self.node.native.spawn(id, generation, spec, &self.node.pool, &self.node.cgroups);
        let watched = spawned.and_then(|spawned| {
            let watched = self.watch(spawned.pidfd.as_raw_fd(), Source::Sandbox(id.to_owned()));
            if watched.is_err() {
                sys::pidfd_kill(spawned.pidfd.as_fd(), libc::SIGKILL)?;
                sys::wait(spawned.pid);
            }
            watched.map(|()| spawned)
        });
        match watched {
            Ok(spawned) => {
                let pid = spawned.pid;
                let pidfd = spawned.pidfd;
                let sandbox = Sandbox { pid, pidfd, generation, host_id, doomed: false, ending: Vec::new() };
                self.sandboxes.insert(id.to_owned(), sandbox);
                Ok(json!({ "pid": pid, "socket": socket_of(id) }))
            }
            Err(error) => {
                self.leave_remains(id.to_owned(), host_id, Vec::new(), None);
                Err(error)
            }
        }
    }

    /// Begins to end a sandbox; true when there is nothing to end.
    fn destroy(&mut self, id: &str, request: u64) -> Result<bool> {
        spec::check_sandbox_id(id)?;
        if let Some(one) = self.remains.iter_mut().find(|one| one.id == id) {
            one.answers.push(request);
            return Ok(false);
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(true) };
        // The kernel ends every process of the pid namespace with its first one.
        sys::pidfd_kill(sandbox.pidfd.as_fd(), libc::SIGKILL)?;
        sandbox.doomed = true;
        sandbox.ending.push(request);
        Ok(false)
    }

    fn sandbox_ended(&mut self, id: &str) {
        let Some(sandbox) = self.sandboxes.remove(id) else { return };
        self.node.epoll.remove(sandbox.pidfd.as_raw_fd());
        let status = sys::reap(sandbox.pid).unwrap_or(-1);
        let event = (!sandbox.doomed).then(|| {
            let oom_kills = self.node.cgroups.oom_kills(id);
            if self.exited.len() == MAX_EXITED {
                self.exited.pop_front();
            }
            self.exited.push_back(json!({ "sandbox": id, "oom_kills": oom_kills, "status": status }));
            json!({ "event": "sandbox_exited", "sandbox": id, "oom_kills": oom_kills, "status": status })
        });
        self.leave_remains(id.to_owned(), sandbox.host_id, sandbox.ending, event);
    }

    fn leave_remains(&mut self, id: String, host_id: u32, answers: Vec<u64>, event: Option<Value>) {
        let now = Instant::now();
        let one = Remains { id, host_id, answers, event, next_try: now, give_up: now + REMOVE_PATIENCE };
        self.remains.push(one);
        self.remove_remains();
    }

    /// Removes what dead sandboxes left, again where the kernel was not done with them yet.
    fn remove_remains(&mut self) {
        let now = Instant::now();
        for mut one in std::mem::take(&mut self.remains) {
            if one.next_try > now {
                self.remains.push(one);
                continue;
            }
            match self.node.native.remove(&one.id, &self.node.pool, &self.node.cgroups) {
                Ok(()) => {
                    self.host_ids.remove(&one.host_id);
                    for request in one.answers {
                        self.channel.answer(request, Ok(json!({})));
                    }
                    if let Some(event) = one.event {
                        self.channel.tell(&event);
                    }
                }
                Err(error) => {
                    let late = now > one.give_up;
                    if late {
                        log("remove_failed", &json!({ "sandbox": one.id, "error": error }));
                        for request in one.answers.drain(..) {
                            self.channel.answer(request, Err(error.clone()));
                        }
                    }
                    one.next_try = now + if late { Duration::from_secs(1) } else { Duration::from_millis(2) };
                    self.remains.push(one);
                }
            }
        }
    }

    fn unpack(&mut self, request: u64, what: &spec::LayerUnpack, blob: Option<OwnedFd>) -> Result<()> {
        spec::check_layer_name(&what.layer)?;
        let blob = blob.ok_or_else(|| Error::invalid("no descriptor came along"))?;
        let worker = self.node.unpack(what, &blob).inspect_err(|_| self.discard(&what.layer))?;
        let fd = worker.report.as_raw_fd();
        let deadline = Instant::now() + Duration::from_millis(what.deadline_ms);
        self.unpacking.insert(request, Unpacking { layer: what.layer.clone(), worker, report: Vec::new(), deadline });
        self.watch(fd, Source::Unpacking(request))
    }

    fn discard(&self, layer: &str) {
        if let Err(error) = self.node.pool.discard_layer(layer) {
            log("discard_failed", &json!({ "layer": layer, "error": error }));
        }
    }

    fn unpack_progress(&mut self, token: u64, request: u64) {
        let Some(one) = self.unpacking.get_mut(&request) else { return };
        let failure = match one.worker.read(&mut one.report) {
            Ok(false) => return,
            Ok(true) => None,
            Err(error) => Some(error),
        };
        self.sources.remove(&token);
        self.finish_unpacking(request, failure);
    }

    /// Ends a worker, which on its own is at its end already, and answers for it.
    fn finish_unpacking(&mut self, request: u64, failure: Option<Error>) {
        let Some(one) = self.unpacking.remove(&request) else { return };
        self.node.epoll.remove(one.worker.report.as_raw_fd());
        if failure.is_some() {
            let _ = sys::pidfd_kill(one.worker.pidfd.as_fd(), libc::SIGKILL);
        }
        // A worker that has said all it has to say ends at once, or is not what we started.
        if failure.is_none() && !sys::ends_within(one.worker.pidfd.as_fd(), Duration::from_millis(500)) {
            let _ = sys::pidfd_kill(one.worker.pidfd.as_fd(), libc::SIGKILL);
        }
        let status = sys::wait(one.worker.pid);
        let result = match failure {
            Some(error) => Err(error),
            None => unpack::outcome(&one.report, status).map(|unpacked| json!(unpacked)),
        };
        if result.is_err() {
            self.discard(&one.layer);
        }
        self.channel.answer(request, result);
    }

    /// Ends unpackings that took too long.
    fn expire(&mut self) {
        let now = Instant::now();
        let late: Vec<u64> =
            self.unpacking.iter().filter(|(_, one)| now >= one.deadline).map(|(request, _)| *request).collect();
        for request in late {
            let error = Error::other("deadline_exceeded", "unpacking the layer took too long");
            self.finish_unpacking(request, Some(error));
        }
    }

    /// Ends every sandbox; the loop ends when they are gone.
    fn begin_stop(&mut self, clean: bool) {
        if self.stop.is_some() {
            return;
        }
        self.stop = Some(Stop { clean, deadline: Instant::now() + STOP_PATIENCE });
        for sandbox in self.sandboxes.values() {
            let _ = sys::pidfd_kill(sandbox.pidfd.as_fd(), libc::SIGKILL);
        }
        for one in self.unpacking.values_mut() {
            one.deadline = Instant::now();
        }
    }

    /// Ends the other two processes and takes away what belongs to the node itself.
    fn close(self) {
        // The server may be waiting for an answer that will not come: let it see that nobody is here.
        // SAFETY: an open socket.
        unsafe { libc::shutdown(self.node.server_end.as_raw_fd(), libc::SHUT_RDWR) };
        for child in [&self.node.server, &self.node.door] {
            end(child);
        }
        self.node.cgroups.close();
        self.node.remove_sockets();
        log("stopped", &json!({}));
    }
}

/// Where a sandbox's guest agent listens, as the front door sees it.
fn socket_of(id: &str) -> String {
    format!("/agents/{id}.sock")
}

/// Ends a child: politely, then surely.
fn end(child: &Child) {
    let _ = sys::pidfd_kill(child.pidfd.as_fd(), libc::SIGTERM);
    let deadline = Instant::now() + Duration::from_secs(5);
    while sys::reap(child.pid).is_none() {
        // SAFETY: plain numbers; asks whether the child is there to be waited for at all.
        if unsafe { libc::kill(child.pid, 0) } < 0 {
            return;
        }
        if Instant::now() > deadline {
            let _ = sys::pidfd_kill(child.pidfd.as_fd(), libc::SIGKILL);
            sys::wait(child.pid);
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_dies_again_and_again_is_given_up_and_one_that_dies_now_and_then_is_not() {
        let start = Instant::now();
        let mut deaths = Deaths::default();
        assert!((0..20).all(|number| !deaths.too_many(start + DEATHS_WINDOW * number / 5)));
        let mut deaths = Deaths::default();
        let quick: Vec<bool> = (0..6).map(|second| deaths.too_many(start + Duration::from_secs(second))).collect();
        assert_eq!(quick, [false, false, false, false, false, true]);
    }
}
