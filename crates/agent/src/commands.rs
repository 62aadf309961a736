//! Requests about commands, and their ends.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use shoal_wire::{
    ExecAttach, ExecInput, ExecList, ExecResize, ExecSignal, ExecStart, Kind, MAX_PAYLOAD, Outcome, Stage, Started,
};

use crate::agent::{self, Agent, KILL_AGAIN_NS, KILL_TRIES};
use crate::conn::{self, Channel, Target, Work};
use crate::exec::{Birth, Exec, Feeder, Output, Watcher};
use crate::files::{self, Owner};
use crate::slab::Key;
use crate::spawn::{self, Command, NotStarted, Stdio};
use crate::sys::{self, Error};
use crate::terminal;

/// Commands running at a time.
const MAX_RUNNING: usize = 4096;
/// Finished commands remembered.
const MAX_FINISHED: usize = 128;
/// Bytes of unread output kept for finished commands, all together.
const MAX_FINISHED_BYTES: usize = 32 << 20;
/// Longest exec id.
const MAX_EXEC_ID: usize = 128;
/// Children reaped before others get their turn.
const REAPS_A_TURN: usize = 256;
/// Descriptors kept free for connections and files, so that neither commands nor ports use up the last one.
pub const SPARE_FDS: u64 = 64;
/// Time after a fork before anything is told of a command that does not end: one that is over by then is told of in
/// one go, with one wake of everybody instead of three.
const START_WINDOW_NS: u64 = agent::MS;

impl Agent {
    fn find(&self, id: &[u8]) -> Option<Key> {
        self.execs.iter().find(|(_, exec)| exec.id == id).map(|(key, _)| key)
    }

    fn oom_kills(&self) -> u64 {
        let Some(fd) = &self.options.oom else { return 0 };
        let mut buffer = [0; 1024];
        let count = sys::pread(fd, &mut buffer, 0).unwrap_or(0);
        parse_oom_kills(buffer.get(..count).unwrap_or(&[]))
    }

    /// Starts a command, or attaches to the one that has this id.
    pub fn exec_start(&mut self, target: Target, request: ExecStart) {
        if let Some(key) = self.find(&request.exec_id) {
            if request.detached && self.tell_started(target, key) {
                return;
            }
            return self.attach(target, key, true, None);
        }
        if !(1..=MAX_EXEC_ID).contains(&request.exec_id.len()) {
            // What cannot be an id is not remembered.
            let (conn_key, id) = target;
            if let Some(conn) = self.conns.get_mut(conn_key) {
                let exited = Exec::not_started(Stage::Request, libc::EINVAL);
                conn::push(&mut conn.out, Kind::Exited, 0, id, &exited.encode());
            }
            return self.enqueue(conn_key);
        }
        let key = match self.fork_command(&request) {
            Ok(Born { pid, outputs, stdin, report, mark, oom_kills }) => {
                let mut birth = self.birth(request, pid, mark);
                birth.oom_kills = oom_kills;
                let mut exec = Exec::new(birth, outputs, stdin, Some(report));
                exec.announce_at = Some(self.now + START_WINDOW_NS);
                self.execs.insert(exec)
            }
            Err(failed) => {
                let birth = self.birth(request, 0, None);
                let mut exec = Exec::new(birth, [Output::new(None), Output::new(None)], None, None);
                exec.exited = Some(Exec::not_started(failed.stage, failed.errno));
                self.execs.insert(exec)
            }
        };
        self.attach(target, key, false, None);
        self.forget_oldest();
    }

    fn birth(&mut self, request: ExecStart, pid: i32, mark: Option<u64>) -> Birth {
        self.next_serial += 1;
        let timeout = request.timeout_ms.saturating_mul(agent::MS);
        Birth {
            id: request.exec_id,
            serial: self.next_serial,
            pid,
            terminal: request.pty,
            detached: request.detached,
            argv: request.argv,
            mark,
            started_ns: self.now,
            deadline_ns: (timeout > 0 && pid > 0).then(|| self.now.saturating_add(timeout)),
            oom_kills: 0,
        }
    }

    /// Forks a command.
    fn fork_command(&mut self, request: &ExecStart) -> Result<Born, NotStarted> {
        let running = self.execs.iter().filter(|(_, exec)| exec.exited.is_none()).count();
        if running >= MAX_RUNNING {
            return Err(NotStarted { stage: Stage::Fork, errno: libc::EAGAIN });
        }
        let identity = self.users.find(&request.user).map_err(NotStarted::at(Stage::User))?;
        let owner = (identity.uid, identity.gid);
        // Serials count from 1, so the first command's mark is one below the base.
        let mark = self.options.context.first_mark.map(|base| base - (self.next_serial + 1));
        let command = Command::new(&request.argv, &request.env, &request.cwd, identity, request.pty, mark)?;
        if request.make_cwd && !request.cwd.is_empty() {
            let owner = (owner != self.options.context.own).then_some(owner);
            files::make_dirs(&request.cwd, owner).map_err(NotStarted::at(Stage::Cwd))?;
        }
        let stdio = |error: Error| NotStarted { stage: Stage::Stdio, errno: error.errno };
        let (report, child_report) = sys::pipe().map_err(stdio)?;
        sys::set_nonblocking(&report).map_err(stdio)?;
        let streams = if request.pty {
            let size = terminal::Size { rows: request.rows, cols: request.cols };
            Streams::terminal(size, owner).map_err(stdio)?
        } else {
            Streams::pipes(request.stdin).map_err(stdio)?
        };
        if streams.highest() + SPARE_FDS > self.most_fds {
            return Err(NotStarted { stage: Stage::Stdio, errno: libc::EMFILE });
        }
        let null = self.options.context.null.as_raw_fd();
        let child = Stdio {
            fds: streams.child.each_ref().map(|fd| fd.as_ref().map_or(null, AsRawFd::as_raw_fd)),
            terminal: request.pty,
            report: child_report.as_raw_fd(),
        };
        let oom_kills = self.oom_kills();
        let pid = spawn::spawn(&command, child, &self.options.context).map_err(NotStarted::at(Stage::Fork))?;
        let Streams { stdin, outputs, .. } = streams;
        Ok(Born { pid, outputs: outputs.map(Output::new), stdin, report, mark, oom_kills })
    }

    /// Learns whether a command has started.
    pub fn read_report(&mut self, key: Key) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        let Some(report) = &exec.report else { return };
        let mut record = [0_u8; 8];
        let count = match sys::read(report, &mut record) {
            Err(Error { errno: libc::EAGAIN, .. }) => return,
            Ok(count) => count,
            Err(_) => 0,
        };
        exec.report = None;
        exec.announce_at = None;
        if count == record.len() {
            let [stage, _, _, _, errno @ ..] = record;
            let stage = Stage::from_byte(stage).unwrap_or(Stage::Exec);
            exec.exited = Some(Exec::not_started(stage, i32::from_le_bytes(errno)));
            exec.deadline_ns = None;
            exec.outputs = [Output::new(None), Output::new(None)];
            exec.stdin = None;
            exec.stdin_watched = false;
            // Its number is free for others as soon as it is reaped.
            exec.pid = 0;
            self.announce(key);
            self.tell_end(key);
            self.feed(key);
            self.forget_oldest();
            return;
        }
        self.announce(key);
        self.watch(key, 0);
        self.watch(key, 1);
    }

    /// Tells the attached channel that the command has started, or that it never will.
    fn announce(&mut self, key: Key) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        let Some((conn_key, id)) = exec.attached else { return };
        let Some(conn) = self.conns.get_mut(conn_key) else { return };
        let Some(Channel { work: Work::Watch(_, watcher), .. }) = conn.channels.get_mut(&id) else { return };
        if watcher.announced {
            return;
        }
        watcher.announced = true;
        if let Some(exited) = exec.exited.as_ref().filter(|exited| exited.outcome == Outcome::NotStarted) {
            watcher.done = true;
            conn::push(&mut conn.out, Kind::Exited, 0, id, &exited.encode());
        } else {
            let offsets = exec.outputs.each_ref().map(|output| output.ring.start());
            watcher.sent = offsets;
            let started = Started { existing: watcher.existing, ..exec.started() };
            conn::push(&mut conn.out, Kind::Started, 0, id, &started.encode());
            conn.wake(id);
        }
        self.enqueue(conn_key);
    }

    /// Makes a channel the one that an exec's output goes to. One that was attached before ends with `ESTALE`.
    fn attach(&mut self, target: Target, key: Key, existing: bool, offsets: Option<[u64; 2]>) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        if let Some(offsets) = offsets {
            let beyond = exec.outputs.iter().zip(offsets).any(|(output, offset)| offset > output.ring.end());
            if beyond {
                return self.fail(target, Error::new("offset beyond the output's end", libc::EINVAL), b"");
            }
            for (stream, offset) in offsets.into_iter().enumerate() {
                exec.consume(stream, offset);
            }
        }
        let former = exec.attached.replace(target);
        let starting = exec.report.is_some();
        if let Some((conn_key, id)) = former {
            let open = self.conns.get_mut(conn_key).and_then(|conn| conn.channels.remove(&id));
            if let Some(Channel { work: Work::Watch(_, watcher), .. }) = open
                && !watcher.done
            {
                self.fail((conn_key, id), Error::new("another reader has taken over", libc::ESTALE), b"");
            }
        }
        self.open(target, Work::Watch(key, Watcher::new(existing)));
        if !starting {
            self.announce(key);
            self.pump(key, 0);
            self.pump(key, 1);
        }
    }

    /// Tells one who will not read that a command runs, without taking the output away from who does; false when
    /// nobody does.
    fn tell_started(&mut self, (conn_key, id): Target, key: Key) -> bool {
        let read = |exec: &&Exec| exec.attached.is_some() && exec.report.is_none() && exec.exited.is_none();
        let Some(exec) = self.execs.get(key).filter(read) else { return false };
        let started = exec.started();
        if let Some(conn) = self.conns.get_mut(conn_key) {
            conn::push(&mut conn.out, Kind::Started, 0, id, &started.encode());
        }
        self.enqueue(conn_key);
        true
    }

    fn unknown_exec() -> Error {
        Error::new("no such exec", libc::ENOENT)
    }

    /// Goes on with the output of a known command.
    pub fn exec_attach(&mut self, target: Target, request: &ExecAttach) {
        match self.find(&request.exec_id) {
            Some(key) => self.attach(target, key, true, Some([request.stdout_offset, request.stderr_offset])),
            None => self.fail(target, Self::unknown_exec(), &request.exec_id),
        }
    }

    /// Tells of a command's end, now or later, and takes its output from nobody.
    pub fn exec_wait(&mut self, target: Target, id: &[u8]) {
        let Some(key) = self.find(id) else { return self.fail(target, Self::unknown_exec(), id) };
        let (Some(exec), Some(conn)) = (self.execs.get_mut(key), self.conns.get_mut(target.0)) else { return };
        if let Some(exited) = &exec.exited {
            conn::push(&mut conn.out, Kind::Exited, 0, target.1, &exited.encode());
            return self.enqueue(target.0);
        }
        conn::push(&mut conn.out, Kind::Started, 0, target.1, &exec.started().encode());
        exec.waiting.push(target);
        self.open(target, Work::Wait(key));
        self.enqueue(target.0);
    }

    /// Tells those who wait for a command's end.
    fn tell_end(&mut self, key: Key) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        let Some(exited) = &exec.exited else { return };
        let payload = exited.encode();
        for (conn_key, id) in std::mem::take(&mut exec.waiting) {
            if let Some(conn) = self.conns.get_mut(conn_key) {
                conn.channels.remove(&id);
                conn::push(&mut conn.out, Kind::Exited, 0, id, &payload);
            }
            self.enqueue(conn_key);
        }
    }

    /// Opens a channel to a command's stdin.
    pub fn exec_input(&mut self, target: Target, request: &ExecInput) {
        let Some(key) = self.find(&request.exec_id) else {
            return self.fail(target, Self::unknown_exec(), &request.exec_id);
        };
        self.open(target, Work::Feed(key, Feeder::new(request.offset)));
        if let Some(exec) = self.execs.get_mut(key) {
            exec.inputs.push_back(target);
        }
        self.feed(key);
    }

    /// Sends a signal.
    pub fn exec_signal(&mut self, target: Target, request: &ExecSignal) {
        let Some(key) = self.find(&request.exec_id) else {
            return self.fail(target, Self::unknown_exec(), &request.exec_id);
        };
        let now = self.now;
        let Some(exec) = self.execs.get_mut(key) else { return };
        let sent = exec.signal(request.signal, request.tree);
        if sent.is_ok() && request.tree && i32::from(request.signal) == libc::SIGKILL {
            exec.kill_again = Some((now + KILL_AGAIN_NS, KILL_TRIES));
        }
        self.answer(target, sent, &request.exec_id);
    }

    /// Sets a terminal's size.
    pub fn exec_resize(&mut self, target: Target, request: &ExecResize) {
        let size = terminal::Size { rows: request.rows, cols: request.cols };
        let result = match self.find(&request.exec_id).and_then(|key| self.execs.get(key)) {
            None => Err(Self::unknown_exec()),
            Some(exec) => match &exec.stdin {
                Some(fd) if exec.terminal => terminal::resize(fd, size),
                _ if exec.terminal => Err(Error::new("the terminal is gone", libc::ESRCH)),
                _ => Err(Error::new("no terminal", libc::ENOTTY)),
            },
        };
        self.answer(target, result, &request.exec_id);
    }

    /// Tells which commands are known.
    pub fn exec_list(&mut self, target: Target) {
        let mut known: Vec<&Exec> = self.execs.iter().map(|(_, exec)| exec).collect();
        known.sort_unstable_by_key(|exec| exec.serial);
        let mut list = ExecList { execs: known.into_iter().map(Exec::status).collect() };
        // Arguments are cut where they would not fit one frame; ids and outcomes always do.
        let mut room = MAX_PAYLOAD / 2;
        for status in &mut list.execs {
            let size = status.argv.iter().map(|argument| argument.len() + 4).sum();
            room = room.saturating_sub(size);
            if room == 0 {
                status.argv.truncate(0);
            }
        }
        self.reply(target, &list.encode());
    }

    /// Forgets a finished command.
    pub fn exec_forget(&mut self, target: Target, id: &[u8]) {
        let result = match self.find(id) {
            None => Err(Self::unknown_exec()),
            Some(key) if self.execs.get(key).is_some_and(|exec| exec.exited.is_none()) => {
                Err(Error::new("the exec is running", libc::EBUSY))
            }
            Some(key) => {
                self.forget(key);
                Ok(())
            }
        };
        self.answer(target, result, id);
    }

    /// Lets go of a finished exec and ends the channels on it.
    fn forget(&mut self, key: Key) {
        let Some(exec) = self.execs.remove(key) else { return };
        for target in exec.attached.into_iter().chain(exec.inputs) {
            let open = self.conns.get_mut(target.0).and_then(|conn| conn.channels.remove(&target.1));
            match open.map(|channel| channel.work) {
                None => {}
                Some(Work::Watch(_, watcher)) if watcher.done => {}
                Some(_) => self.fail(target, Error::new("the exec was forgotten", libc::ENOENT), b""),
            }
        }
    }

    /// Keeps the number of finished execs, and the output kept for them, within bounds.
    ///
    /// Those whose output is consumed go first, then the oldest.
    fn forget_oldest(&mut self) {
        loop {
            let mut count = 0;
            let mut bytes = 0;
            let mut first: Option<(bool, u64, Key)> = None;
            for (key, exec) in self.execs.iter().filter(|(_, exec)| exec.exited.is_some()) {
                let unconsumed = exec.unconsumed();
                count += 1;
                bytes += unconsumed;
                // An exec that somebody is reading is not let go of.
                let idle = exec.attached.is_none_or(|(conn, id)| self.is_done(conn, id));
                let candidate = (unconsumed > 0, exec.serial, key);
                if idle && first.is_none_or(|first| candidate < first) {
                    first = Some(candidate);
                }
            }
            let over = count > MAX_FINISHED || bytes > MAX_FINISHED_BYTES;
            match first {
                Some((_, _, key)) if over => self.forget(key),
                _ => return,
            }
        }
    }

    fn is_done(&self, conn: Key, id: u32) -> bool {
        let channel = self.conns.get(conn).and_then(|conn| conn.channels.get(&id));
        !matches!(channel, Some(Channel { work: Work::Watch(_, watcher), .. }) if !watcher.done)
    }

    /// Takes the status of children that ended: commands, and orphans that nobody else waits for.
    pub fn reap(&mut self) {
        self.more_to_reap = false;
        for turn in 0.. {
            if turn == REAPS_A_TURN {
                self.more_to_reap = true;
                break;
            }
            let Some(reaped) = sys::reap() else { break };
            let found = self.execs.iter().find(|(_, exec)| exec.pid == reaped.pid && exec.exited.is_none());
            let Some((key, _)) = found else { continue };
            // What it had to say about its start comes before its end.
            self.read_report(key);
            let oom_kills = self.oom_kills();
            let now = sys::now_ns();
            let Some(exec) = self.execs.get_mut(key) else { continue };
            if exec.exited.is_some() {
                continue;
            }
            exec.report = None;
            exec.announce_at = None;
            exec.ended(&reaped, now, oom_kills);
            exec.stdin = None;
            exec.stdin_watched = false;
            self.announce(key);
            self.tell_end(key);
            self.feed(key);
            self.pump(key, 0);
            self.pump(key, 1);
            self.forget_oldest();
        }
    }
}

/// A command that was forked.
struct Born {
    pid: i32,
    outputs: [Output; 2],
    stdin: Option<OwnedFd>,
    report: OwnedFd,
    mark: Option<u64>,
    oom_kills: u64,
}

/// Both ends of a command's streams.
struct Streams {
    stdin: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
    /// The child's ends; `None` is /dev/null, and of a terminal all three are the first.
    child: [Option<Rc<OwnedFd>>; 3],
}

impl Streams {
    fn pipes(with_stdin: bool) -> Result<Self, Error> {
        let (out, child_out) = sys::pipe()?;
        let (err, child_err) = sys::pipe()?;
        sys::set_nonblocking(&out)?;
        sys::set_nonblocking(&err)?;
        let (child_in, stdin) = if with_stdin {
            let (child_in, stdin) = sys::pipe()?;
            sys::set_nonblocking(&stdin)?;
            (Some(child_in.into()), Some(stdin))
        } else {
            (None, None)
        };
        let child = [child_in, Some(child_out.into()), Some(child_err.into())];
        Ok(Self { stdin, outputs: [Some(out), Some(err)], child })
    }

    fn terminal(size: terminal::Size, owner: Owner) -> Result<Self, Error> {
        let (master, slave) = terminal::open(size, owner)?;
        let stdin = sys::dup_from(&master, 3)?;
        let slave = Rc::new(slave);
        let child = [Some(slave.clone()), Some(slave.clone()), Some(slave)];
        Ok(Self { stdin: Some(stdin), outputs: [Some(master), None], child })
    }

    /// The largest descriptor number among them.
    fn highest(&self) -> u64 {
        let ours = self.outputs.iter().flatten().chain(&self.stdin).map(AsRawFd::as_raw_fd);
        let theirs = self.child.iter().flatten().map(AsRawFd::as_raw_fd);
        ours.chain(theirs).max().unwrap_or(0) as u64
    }
}

/// The count in a line `oom_kill N`.
///
/// Source: cgroup-v2, `memory.events`; cgroup-v1, `memory.oom_control`.
fn parse_oom_kills(text: &[u8]) -> u64 {
    text.split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"oom_kill "))
        .and_then(|count| std::str::from_utf8(count).ok()?.trim_end().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_cgroup_versions_tell_the_oom_kills() {
        assert_eq!(parse_oom_kills(b"low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n"), 4);
        assert_eq!(parse_oom_kills(b"oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"), 7);
        assert_eq!(parse_oom_kills(b"oom_kill x\n"), 0);
        assert_eq!(parse_oom_kills(b""), 0);
    }
}
