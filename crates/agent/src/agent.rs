//! The poll loop: connections in, commands and files behind them.
//!
//! One thread waits in one place. Whatever takes long (a stream, a listing, a removal, an archive) goes forward a
//! bounded step a turn; a connection's channels take turns, and so do the connections.

use std::os::fd::OwnedFd;

use shoal_wire::{HEADER_LEN, Header, Kind, Ready};

use crate::changes::Notice;
use crate::conn::{self, Channel, Conn, Step, Target, Work};
use crate::exec::Exec;
use crate::files;
use crate::ports::Port;
use crate::requests::push_archive_error;
use crate::slab::{Key, Slab};
use crate::spawn::Context;
use crate::streams::Leftover;
use crate::sys::{self, Epoll, Error};
use crate::tree::Processes;
use crate::user::Users;

/// What an event is about; for all but the first two the rest of the token is a [`Key`].
const LISTENER: u8 = 0;
const SIGNALS: u8 = 1;
const CONNECTION: u8 = 2;
const REPORT: u8 = 3;
/// An event on the pipe of stdout.
pub const STDOUT: u8 = 4;
/// An event on the pipe of stderr.
pub const STDERR_PIPE: u8 = 5;
/// Room in the pipe of stdin.
pub const STDIN: u8 = 6;
/// An event on a [`Leftover`].
pub const LEFTOVER: u8 = 7;
/// An event on the socket of a [`Port`].
pub const PORT: u8 = 9;

/// Changes below a path that a channel watches.
pub const CHANGES: u8 = 10;

/// Connections served at a time.
const MAX_CONNECTIONS: usize = 64;
/// Bytes a connection may queue to be sent before it sends.
const FILL: usize = 256 << 10;
/// Steps of a connection's channels before other connections get their turn.
const STEPS_A_TURN: usize = 8;

/// Nanoseconds of a millisecond.
pub const MS: u64 = 1_000_000;
/// Quiet time after which memory is given back.
const TRIM_AFTER_NS: u64 = 200 * MS;
/// Time between two looks at what is left of a killed tree.
pub const KILL_AGAIN_NS: u64 = 20 * MS;
/// How often it is looked at.
pub const KILL_TRIES: u32 = 250;
/// Time without accepting when descriptors have run out.
const ACCEPT_PAUSE_NS: u64 = 100 * MS;

/// What the command line gave.
#[derive(Debug)]
pub struct Options {
    /// A listening unix socket.
    pub listener: OwnedFd,
    /// Counter of OOM kills.
    pub oom: Option<OwnedFd>,
    /// Told in READY.
    pub generation: u64,
    /// What commands are started with.
    pub context: Context,
    /// The agent may become other users.
    pub privileged: bool,
}

/// Everything the agent knows.
pub struct Agent {
    /// Where the loop waits.
    pub epoll: Epoll,
    /// What the command line gave.
    pub options: Options,
    signals: OwnedFd,
    ready: Vec<u8>,
    /// The image's users.
    pub users: Users,
    /// Connections.
    pub conns: Slab<Conn>,
    /// Commands that run, and some that ran.
    pub execs: Slab<Exec>,
    /// See [`Leftover`].
    pub leftovers: Slab<Leftover>,
    /// Connections to ports of the sandbox.
    pub ports: Slab<Port>,
    /// Channels that tell of changes.
    pub notices: Slab<Notice>,
    /// Connections that have something to do.
    queue: Vec<Key>,
    /// Serial of the last command.
    pub next_serial: u64,
    /// Children may be waiting to be reaped.
    pub more_to_reap: bool,
    /// The image still lacks its /etc/hosts; written after the first READY, which should not wait for it.
    hosts_due: bool,
    trim_at: Option<u64>,
    accept_again_at: Option<u64>,
    /// Descriptors that this process may have.
    pub most_fds: u64,
    /// When the events at hand were taken.
    pub now: u64,
}

impl Agent {
    /// Begins to listen.
    pub fn new(options: Options) -> Result<Self, Error> {
        let epoll = Epoll::new()?;
        let signals = sys::take_signals()?;
        sys::set_nonblocking(&options.listener)?;
        epoll.add(&signals, libc::EPOLLIN, u64::from(SIGNALS) << 60)?;
        epoll.add(&options.listener, libc::EPOLLIN, u64::from(LISTENER) << 60)?;
        let now = sys::now_ns();
        let ready = Ready { version: shoal_wire::VERSION, generation: options.generation, ready_at_ns: now };
        let users = Users::new(options.context.own.0, options.privileged);
        Ok(Self {
            epoll,
            signals,
            ready: shoal_wire::frame(Kind::Ready, 0, 0, &ready.encode()),
            users,
            conns: Slab::default(),
            execs: Slab::default(),
            leftovers: Slab::default(),
            ports: Slab::default(),
            notices: Slab::default(),
            queue: Vec::new(),
            next_serial: 0,
            more_to_reap: true,
            hosts_due: options.privileged && std::process::id() == 1,
            trim_at: None,
            accept_again_at: None,
            most_fds: open_file_limit(),
            now,
            options,
        })
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// When waiting for events fails, which leaves nothing to do.
    pub fn run(mut self) -> Error {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        loop {
            let timeout = self.timeout();
            let happened = match self.epoll.wait(&mut events, timeout) {
                Ok(happened) => happened,
                Err(Error { errno: libc::EINTR, .. }) => continue,
                Err(error) => return error,
            };
            self.now = sys::now_ns();
            if !happened.is_empty() {
                self.trim_at = Some(self.now + TRIM_AFTER_NS);
            }
            for event in happened {
                self.event(event.u64, event.events as libc::c_int);
            }
            if self.more_to_reap {
                self.reap();
            }
            self.timers();
            for key in std::mem::take(&mut self.queue) {
                self.serve(key);
            }
        }
    }

    fn event(&mut self, token: u64, events: libc::c_int) {
        let (tag, key) = Key::from_token(token);
        match tag {
            LISTENER => self.accept(),
            SIGNALS => {
                // One or many children: the queue of a signal holds one of its kind.
                let mut info = [0; size_of::<libc::signalfd_siginfo>()];
                let _ = sys::read(&self.signals, &mut info);
                self.more_to_reap = true;
            }
            CONNECTION => self.connection_event(key, events),
            REPORT => self.read_report(key),
            STDOUT => self.pump(key, 0),
            STDERR_PIPE => self.pump(key, 1),
            STDIN => self.feed(key),
            LEFTOVER => self.discard(key),
            PORT => self.port_event(key, events),
            CHANGES => self.changed(key),
            _ => {}
        }
    }

    /// Milliseconds until something is due, rounded up.
    fn timeout(&self) -> libc::c_int {
        if self.more_to_reap || !self.queue.is_empty() {
            return 0;
        }
        let of_exec = |exec: &Exec| [exec.announce_at, exec.deadline_ns, exec.kill_again.map(|(at, _)| at)];
        let due = self
            .execs
            .iter()
            .flat_map(|(_, exec)| of_exec(exec))
            .chain(self.leftovers.iter().map(|(_, leftover)| leftover.pause_until))
            .chain(self.notices.iter().map(|(_, notice)| notice.due))
            .chain([self.trim_at, self.accept_again_at])
            .flatten()
            .min();
        let Some(due) = due else { return -1 };
        let ms = due.saturating_sub(sys::now_ns()).div_ceil(MS);
        ms.min(1_000_000) as libc::c_int
    }

    fn timers(&mut self) {
        let now = self.now;
        let mut started = Vec::new();
        let mut processes = None;
        for (key, exec) in self.execs.iter_mut() {
            if exec.announce_at.is_some_and(|at| at <= now) {
                exec.announce_at = None;
                started.push(key);
            }
            if exec.deadline_ns.is_some_and(|at| at <= now) {
                exec.time_out(processes.get_or_insert_with(Processes::now));
                exec.kill_again = Some((now + KILL_AGAIN_NS, KILL_TRIES));
            }
            if let Some((at, tries)) = exec.kill_again
                && at <= now
            {
                let left = processes.get_or_insert_with(Processes::now).signal(exec.root(), libc::SIGKILL);
                // From the end of a look that may have taken longer than the pause: there is other work.
                exec.kill_again = (left > 0 && tries > 0).then(|| (sys::now_ns() + KILL_AGAIN_NS, tries - 1));
            }
        }
        for key in started {
            self.read_report(key);
            if let Some(report) = self.execs.get(key).and_then(|exec| exec.report.as_ref()) {
                // Still on its way, so somebody holds it up. Without an event, reaping it tells how it went.
                let _ = self.epoll.add(report, libc::EPOLLIN, key.token(REPORT));
            }
        }
        let epoll = &self.epoll;
        for (key, leftover) in self.leftovers.iter_mut() {
            if leftover.pause_until.is_some_and(|at| at <= now) {
                leftover.pause_until = None;
                let _ = epoll.add(&leftover.fd, libc::EPOLLIN, key.token(LEFTOVER));
            }
        }
        let due: Vec<Key> = self
            .notices
            .iter()
            .filter(|(_, notice)| notice.due.is_some_and(|at| at <= now))
            .map(|(key, _)| key)
            .collect();
        for key in due {
            self.changed(key);
        }
        if self.accept_again_at.is_some_and(|at| at <= now) {
            self.accept_again_at = None;
            let _ = self.epoll.add(&self.options.listener, libc::EPOLLIN, u64::from(LISTENER) << 60);
        }
        if self.trim_at.is_some_and(|at| at <= now) {
            self.trim_at = None;
            self.trim();
        }
    }

    /// Gives memory back after a while without work.
    fn trim(&mut self) {
        for (_, conn) in self.conns.iter_mut() {
            conn.shrink();
        }
        for (_, exec) in self.execs.iter_mut() {
            for output in &mut exec.outputs {
                output.ring.shrink();
            }
        }
        self.queue.shrink_to_fit();
        sys::trim_memory();
    }

    fn accept(&mut self) {
        match sys::accept(&self.options.listener) {
            Ok(fd) if self.conns.len() < MAX_CONNECTIONS => {
                let mut conn = Conn::new(fd);
                conn.out.extend_from_slice(&self.ready);
                conn.interest = libc::EPOLLIN;
                let key = self.conns.insert(conn);
                let Some(conn) = self.conns.get(key) else { return };
                if self.epoll.add(&conn.fd, conn.interest, key.token(CONNECTION)).is_err() {
                    self.conns.remove(key);
                    return;
                }
                self.serve(key);
                if self.hosts_due {
                    self.hosts_due = false;
                    files::make_hosts(Some((0, 0)));
                }
            }
            Ok(_) | Err(Error { errno: libc::EAGAIN | libc::ECONNABORTED, .. }) => {}
            Err(_) => {
                self.epoll.remove(&self.options.listener);
                self.accept_again_at = Some(self.now + ACCEPT_PAUSE_NS);
            }
        }
    }

    fn connection_event(&mut self, key: Key, events: libc::c_int) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if conn.stalled() && events & (libc::EPOLLHUP | libc::EPOLLERR) != 0 {
            self.close(key);
            return;
        }
        if events & (libc::EPOLLIN | libc::EPOLLHUP | libc::EPOLLERR) != 0 && !conn.stalled() {
            match conn.receive() {
                Ok(0) => return self.close(key),
                Ok(_) => return self.read_frames(key),
                Err(Error { errno: libc::EAGAIN, .. }) => {}
                Err(_) => return self.close(key),
            }
        }
        self.enqueue(key);
    }

    /// Acts on every whole frame that has come.
    fn read_frames(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let mut input = std::mem::take(&mut conn.input);
        let mut taken = 0;
        loop {
            let Some(conn) = self.conns.get_mut(key) else { return };
            let rest = input.get(taken..).unwrap_or(&[]);
            let Some((header, body)) = rest.split_first_chunk::<HEADER_LEN>() else { break };
            let Ok(header) = Header::decode(*header) else { return self.close(key) };
            let Some(payload) = body.get(..header.len as usize) else { break };
            if conn.stalled() {
                break;
            }
            taken += HEADER_LEN + payload.len();
            if self.frame(key, header, payload).is_err() {
                return self.close(key);
            }
        }
        input.drain(..taken);
        if let Some(conn) = self.conns.get_mut(key) {
            conn.input = input;
        }
        self.enqueue(key);
    }

    /// Has a connection served in this turn of the loop.
    pub fn enqueue(&mut self, key: Key) {
        if let Some(conn) = self.conns.get_mut(key)
            && !conn.queued
        {
            conn.queued = true;
            self.queue.push(key);
        }
    }

    /// Lets a connection's channels fill its outgoing bytes, and sends them.
    fn serve(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.queued = false;
        let was_stalled = conn.stalled();
        let mut steps = STEPS_A_TURN;
        let mut sent_all = true;
        loop {
            while steps > 0
                && conn.pending() < FILL
                && let Some(channel) = conn.ready.pop_front()
            {
                steps -= 1;
                Self::step(conn, channel, &self.execs, &mut self.ports, &mut self.notices, &self.epoll);
            }
            if conn.pending() == 0 {
                break;
            }
            match conn.send() {
                Ok(true) => {}
                Ok(false) => {
                    sent_all = false;
                    break;
                }
                Err(_) => return self.close(key),
            }
            if steps == 0 {
                break;
            }
        }
        let again = sent_all && !conn.ready.is_empty();
        let stalled = conn.stalled();
        let interest = if stalled { 0 } else { libc::EPOLLIN } | if sent_all { 0 } else { libc::EPOLLOUT };
        if interest != conn.interest {
            conn.interest = interest;
            if self.epoll.modify(&conn.fd, interest, key.token(CONNECTION)).is_err() {
                return self.close(key);
            }
        }
        if again {
            self.enqueue(key);
        }
        if was_stalled && !stalled {
            self.read_frames(key);
        }
    }

    /// Takes one channel a bounded step further.
    fn step(
        conn: &mut Conn,
        id: u32,
        execs: &Slab<Exec>,
        ports: &mut Slab<Port>,
        notices: &mut Slab<Notice>,
        epoll: &Epoll,
    ) {
        let Conn { channels, out, .. } = conn;
        let Some(channel) = channels.get_mut(&id) else { return };
        channel.queued = false;
        let step = match &mut channel.work {
            Work::Watch(exec, watcher) => match execs.get(*exec) {
                Some(exec) => watcher.step(exec, id, out),
                None => Step::Done,
            },
            Work::Read(reading) => reading.step(id, out).unwrap_or_else(|error| {
                conn::push_error(out, id, error, b"");
                Step::Done
            }),
            Work::List(listing) => match listing.step() {
                Ok(None) => Step::More,
                Ok(Some(payload)) => {
                    conn::push(out, Kind::Ok, 0, id, &payload);
                    Step::Done
                }
                Err(error) => {
                    conn::push_error(out, id, error, b"");
                    Step::Done
                }
            },
            Work::Remove(removal) => match removal.step() {
                Ok(false) => Step::More,
                Ok(true) => {
                    conn::push(out, Kind::Ok, 0, id, &[]);
                    Step::Done
                }
                Err(error) => {
                    conn::push_error(out, id, error, b"");
                    Step::Done
                }
            },
            Work::Pack(packing) => packing.step(id, out).unwrap_or_else(|error| {
                push_archive_error(out, id, &error);
                Step::Done
            }),
            Work::Port(key) => {
                let key = *key;
                let step = ports.get_mut(key).map_or(Step::Done, |port| port.step(id, out));
                if matches!(step, Step::Done) {
                    ports.remove(key);
                }
                step
            }
            Work::Changes(changes) => {
                let key = changes.key;
                changes.step(id, out, epoll, notices).unwrap_or_else(|error| {
                    notices.remove(key);
                    conn::push_error(out, id, error, b"");
                    Step::Done
                })
            }
            Work::Wait(_) | Work::Feed(..) | Work::Write(..) | Work::Unpack(..) => Step::Wait,
        };
        match step {
            Step::More => conn.wake(id),
            Step::Wait => {}
            Step::Done => {
                conn.channels.remove(&id);
            }
        }
    }

    /// Ends a connection and what was only for it.
    fn close(&mut self, key: Key) {
        let Some(conn) = self.conns.remove(key) else { return };
        for (id, channel) in conn.channels {
            self.abandon((key, id), &channel.work);
        }
    }

    /// Nobody listens to a channel any more: its exec goes on; a file operation ends as its state is dropped.
    pub fn abandon(&mut self, target: Target, work: &Work) {
        match work {
            Work::Watch(key, _) => {
                if let Some(exec) = self.execs.get_mut(*key)
                    && exec.attached == Some(target)
                {
                    exec.attached = None;
                    if exec.detached && exec.report.is_none() {
                        // It may be waiting for this reader.
                        self.pump(*key, 0);
                        self.pump(*key, 1);
                    }
                }
            }
            Work::Wait(key) => {
                if let Some(exec) = self.execs.get_mut(*key) {
                    exec.waiting.retain(|waiting| *waiting != target);
                }
            }
            Work::Feed(key, _) => {
                if let Some(exec) = self.execs.get_mut(*key) {
                    exec.inputs.retain(|input| *input != target);
                }
                self.feed(*key);
            }
            Work::Port(key) => {
                if let Some(port) = self.ports.remove(*key) {
                    port.hang_up();
                }
            }
            Work::Changes(changes) => {
                self.notices.remove(changes.key);
            }
            _ => {}
        }
    }

    /// A watched directory has changed, or it was time to look.
    fn changed(&mut self, key: Key) {
        let Some(notice) = self.notices.get_mut(key) else { return };
        notice.due = None;
        let (conn_key, id) = notice.target;
        if let Some(conn) = self.conns.get_mut(conn_key) {
            conn.wake(id);
        }
        self.enqueue(conn_key);
    }

    /// Answers a request with Ok.
    pub fn reply(&mut self, (key, id): Target, payload: &[u8]) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn::push(&mut conn.out, Kind::Ok, 0, id, payload);
        }
        self.enqueue(key);
    }

    /// Answers a request with Error; `object` is what the call was about.
    pub fn fail(&mut self, (key, id): Target, error: Error, object: &[u8]) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn::push_error(&mut conn.out, id, error, object);
        }
        self.enqueue(key);
    }

    /// Answers with Ok and nothing else, or with Error.
    pub fn answer(&mut self, target: Target, result: Result<(), Error>, object: &[u8]) {
        match result {
            Ok(()) => self.reply(target, &[]),
            Err(error) => self.fail(target, error, object),
        }
    }

    /// Begins what takes more than one step.
    pub fn open(&mut self, (key, id): Target, work: Work) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn.channels.insert(id, Channel { work, queued: false });
            conn.wake(id);
        }
        self.enqueue(key);
    }
}

/// How many descriptors this process may have.
fn open_file_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 1024, rlim_max: 1024 };
    // SAFETY: the pointer outlives the call; on failure the value stays.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}
