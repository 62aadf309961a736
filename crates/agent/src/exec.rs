//! One command: its streams, what is kept of them, and how it ended.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use shoal_wire::{DATA_CHUNK, EOF, ExecStatus, Exited, Kind, Outcome, STDERR, Stage, Started};

use crate::conn::{self, Step, Target};
use crate::ring::Ring;
use crate::sys::{self, Error, Reaped};
use crate::tree;

/// Bytes read from one pipe before others get their turn.
const READ_A_TURN: usize = 256 << 10;
/// A read this long means that the command writes faster than the pipe holds.
const BUSY_READ: usize = 64 << 10;
/// Pipe size asked for then.
const BUSY_PIPE: libc::c_int = 256 << 10;
/// Bytes of terminal output read at the most after the command is gone.
const TERMINAL_TAIL: u64 = 1 << 20;
/// Bytes of arguments remembered for a listing.
const KEPT_ARGV: usize = 1024;
/// Exit code of a shell whose child died of SIGKILL.
const SHELL_KILLED: i32 = 128 + libc::SIGKILL;

/// stdout or stderr on its way from the command to the client.
#[derive(Debug, Default)]
pub struct Output {
    /// What was read and is not consumed.
    pub ring: Ring,
    /// Our end; `None` when nothing more will be read.
    pub fd: Option<OwnedFd>,
    /// The poll loop looks at it.
    pub watched: bool,
    /// No byte will follow those in the ring.
    pub eof: bool,
    /// The command is gone: bytes of what it left in the pipe that are still to be read.
    left: Option<u64>,
    busy: bool,
}

impl Output {
    /// A stream that is read from `fd`; `None` is one that has ended already.
    pub fn new(fd: Option<OwnedFd>) -> Self {
        Self { eof: fd.is_none(), fd, ..Self::default() }
    }

    /// Moves what is there into the ring, without waiting; returns an end that others still hold open.
    ///
    /// `dropping`: a full ring loses its oldest bytes, so that the command never waits.
    pub fn pump(&mut self, dropping: bool) -> Option<OwnedFd> {
        let mut turn = READ_A_TURN;
        while turn > 0 {
            if self.left == Some(0) {
                return self.end();
            }
            let Some(fd) = &self.fd else { return None };
            if !self.ring.make_room() && (!dropping || self.ring.drop_oldest() == 0) {
                return None;
            }
            let most = self.left.unwrap_or(u64::MAX).min(turn as u64) as usize;
            let (first, second) = self.ring.free();
            let in_first = most.min(first.len());
            let in_second = (most - in_first).min(second.len());
            let (first, _) = first.split_at_mut(in_first);
            let (second, _) = second.split_at_mut(in_second);
            match sys::read_pair(fd, first, second) {
                Ok(count) if count > 0 => {
                    if count >= BUSY_READ && !self.busy {
                        self.busy = true;
                        sys::grow_pipe(fd, BUSY_PIPE);
                    }
                    self.ring.filled(count);
                    self.left = self.left.map(|left| left - count as u64);
                    turn -= count;
                    if count < in_first + in_second && self.left.is_none() {
                        return None;
                    }
                }
                Err(Error { errno: libc::EAGAIN, .. }) if self.left.is_none() => return None,
                Err(Error { errno: libc::EAGAIN, .. }) => return self.end(),
                // 0 is a pipe without writers, EIO a terminal that nobody has open.
                _ => {
                    self.end();
                    return None;
                }
            }
        }
        None
    }

    /// The command is gone: only what it has written by now belongs to the stream.
    fn leader_gone(&mut self, terminal: bool) {
        if let Some(fd) = &self.fd {
            self.left = Some(if terminal { TERMINAL_TAIL } else { sys::readable_bytes(fd) });
        }
    }

    /// No byte will follow; returns the pipe if others still hold it.
    fn end(&mut self) -> Option<OwnedFd> {
        self.eof = true;
        self.ring.compact();
        self.fd.take().filter(|fd| !sys::hung_up(fd))
    }
}

/// A command that runs or ran.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, no state machine")]
pub struct Exec {
    /// Chosen by the client.
    pub id: Vec<u8>,
    /// Counts up; tells older from newer.
    pub serial: u64,
    /// Pid of the leader.
    pub pid: i32,
    /// The leader has a terminal.
    pub terminal: bool,
    /// It never waits for a reader: see [`Exec::drops`].
    pub detached: bool,
    argv: Vec<Vec<u8>>,
    mark: Option<u64>,
    started_ns: u64,
    /// When to look whether it has started.
    pub announce_at: Option<u64>,
    /// When it is to be killed.
    pub deadline_ns: Option<u64>,
    /// When to look again for what a kill of the tree missed, and how often still.
    pub kill_again: Option<(u64, u32)>,
    timed_out: bool,
    /// Bit n: a client sent signal n.
    client_signals: u64,
    oom_kills_before: u64,
    /// Tells why it did not start; closed once it has.
    pub report: Option<OwnedFd>,
    /// stdout, stderr.
    pub outputs: [Output; 2],
    /// stdin, or the terminal.
    pub stdin: Option<OwnedFd>,
    /// The poll loop waits for room in stdin.
    pub stdin_watched: bool,
    /// Bytes of stdin that are in the pipe or gone through it.
    pub stdin_offset: u64,
    stdin_ended: bool,
    /// Channels that feed stdin, one after the other.
    pub inputs: VecDeque<Target>,
    /// The channel that its output goes to.
    pub attached: Option<Target>,
    /// Channels that are told of its end.
    pub waiting: Vec<Target>,
    /// How it ended.
    pub exited: Option<Exited>,
}

/// What a new command starts with.
#[derive(Debug)]
pub struct Birth {
    /// As in [`Exec`].
    pub id: Vec<u8>,
    /// As in [`Exec`].
    pub serial: u64,
    /// As in [`Exec`].
    pub pid: i32,
    /// As in [`Exec`].
    pub terminal: bool,
    /// As in [`Exec`].
    pub detached: bool,
    /// Program and arguments.
    pub argv: Vec<Vec<u8>>,
    /// See [`tree`].
    pub mark: Option<u64>,
    /// Now.
    pub started_ns: u64,
    /// As in [`Exec`].
    pub deadline_ns: Option<u64>,
    /// OOM kills in the sandbox so far.
    pub oom_kills: u64,
}

impl Exec {
    /// A command that was just forked, or that ended before it was.
    pub fn new(birth: Birth, outputs: [Output; 2], stdin: Option<OwnedFd>, report: Option<OwnedFd>) -> Self {
        let mut room = KEPT_ARGV;
        let mut argv = birth.argv;
        argv.retain_mut(|argument| {
            let fits = room > 0;
            argument.truncate(room);
            argument.shrink_to_fit();
            room -= argument.len().min(room);
            fits
        });
        argv.shrink_to_fit();
        Self {
            id: birth.id,
            serial: birth.serial,
            pid: birth.pid,
            terminal: birth.terminal,
            detached: birth.detached,
            argv,
            mark: birth.mark,
            started_ns: birth.started_ns,
            announce_at: None,
            deadline_ns: birth.deadline_ns,
            kill_again: None,
            timed_out: false,
            client_signals: 0,
            oom_kills_before: birth.oom_kills,
            report,
            outputs,
            stdin,
            stdin_watched: false,
            stdin_offset: 0,
            stdin_ended: false,
            inputs: VecDeque::new(),
            attached: None,
            waiting: Vec::new(),
            exited: None,
        }
    }

    /// How it ended, when it never ran.
    pub fn not_started(stage: Stage, errno: i32) -> Exited {
        Exited { outcome: Outcome::NotStarted, code: -1, errno, stage, ..Exited::default() }
    }

    /// A line for a listing.
    pub fn status(&self) -> ExecStatus {
        ExecStatus {
            exec_id: self.id.clone(),
            pid: self.pid as u32,
            argv: self.argv.clone(),
            outcome: self.exited.as_ref().map_or(Outcome::Running, |exited| exited.outcome),
            code: self.exited.as_ref().map_or(-1, |exited| exited.code),
            pty: self.terminal,
        }
    }

    /// What one is told who attaches now.
    pub fn started(&self) -> Started {
        let [stdout_offset, stderr_offset] = self.outputs.each_ref().map(|output| output.ring.start());
        let detached = self.detached;
        Started { pid: self.pid as u32, existing: true, stdout_offset, stderr_offset, detached }
    }

    /// Bytes of output that nobody consumed.
    pub fn unconsumed(&self) -> usize {
        self.outputs.iter().map(|output| output.ring.len()).sum()
    }

    /// Output that finds no room takes the place of the oldest: nobody reads, and it was said that this may last.
    pub fn drops(&self) -> bool {
        self.detached && self.attached.is_none()
    }

    /// What its process tree is known by.
    pub fn root(&self) -> tree::Root {
        let leader = (self.exited.is_none() && self.pid > 0).then_some(self.pid);
        tree::Root { leader, mark: self.mark }
    }

    /// Sends a client's signal: to the command's own process, or to its whole tree.
    ///
    /// # Errors
    /// `ESRCH` when nobody is left to get it, `EINVAL` for a number that is no signal.
    pub fn signal(&mut self, signal: u8, whole_tree: bool) -> Result<(), Error> {
        let number = i32::from(signal);
        if !(1..=64).contains(&number) {
            return Err(Error::new("signal", libc::EINVAL));
        }
        let nobody = Error::new("kill", libc::ESRCH);
        if whole_tree {
            if tree::Processes::now().signal(self.root(), number) == 0 {
                return Err(nobody);
            }
        } else {
            sys::kill(self.root().leader.ok_or(nobody)?, number)?;
        }
        if self.exited.is_none() {
            self.client_signals |= 1 << (number - 1);
        }
        Ok(())
    }

    /// Kills it because its time is up.
    pub fn time_out(&mut self, processes: &tree::Processes) {
        self.deadline_ns = None;
        self.timed_out = true;
        processes.signal(self.root(), libc::SIGKILL);
    }

    /// Takes note of the leader's end; `oom_kills` is the sandbox's count by now.
    pub fn ended(&mut self, reaped: &Reaped, now_ns: u64, oom_kills: u64) {
        let signal = if libc::WIFSIGNALED(reaped.status) { libc::WTERMSIG(reaped.status) } else { 0 };
        let code = if libc::WIFEXITED(reaped.status) { libc::WEXITSTATUS(reaped.status) } else { -1 };
        let oom_kills = oom_kills.saturating_sub(self.oom_kills_before);
        let by_client = |number: i32| number > 0 && self.client_signals & 1 << (number - 1) != 0;
        let outcome = if self.timed_out && (signal == libc::SIGKILL || code == SHELL_KILLED) {
            Outcome::TimedOut
        } else if by_client(signal) {
            Outcome::Killed
        } else if oom_kills > 0 && (signal == libc::SIGKILL || (code == SHELL_KILLED && !by_client(libc::SIGKILL))) {
            Outcome::OomKilled
        } else if signal != 0 {
            Outcome::Signaled
        } else {
            Outcome::Exited
        };
        let micros = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
        let usage = &reaped.usage;
        self.exited = Some(Exited {
            outcome,
            code,
            signal,
            errno: 0,
            stage: Stage::None,
            wall_ns: now_ns.saturating_sub(self.started_ns),
            user_us: micros(usage.ru_utime),
            system_us: micros(usage.ru_stime),
            max_rss_kib: usage.ru_maxrss as u64,
            // getrusage(2) counts blocks of 512 bytes, whatever the device.
            read_bytes: usage.ru_inblock as u64 * 512,
            written_bytes: usage.ru_oublock as u64 * 512,
            oom_kills,
            pid: self.pid as u32,
        });
        self.deadline_ns = None;
        for output in &mut self.outputs {
            output.leader_gone(self.terminal);
        }
    }

    /// Takes the reader's progress in one stream.
    pub fn consume(&mut self, stream: usize, offset: u64) {
        if let Some(output) = self.outputs.get_mut(stream) {
            output.ring.consume(offset);
            if output.eof {
                output.ring.shrink();
            }
        }
    }

    /// No byte will follow on stdin.
    pub fn end_stdin(&mut self) {
        self.stdin_ended = true;
        if !self.terminal {
            self.stdin = None;
            return;
        }
        // A terminal stays open; its end of file is a character.
        if let Some(fd) = &self.stdin {
            // SAFETY: a zeroed termios is a valid value of this plain struct.
            let mut settings: libc::termios = unsafe { std::mem::zeroed() };
            // SAFETY: the pointer outlives the call.
            let known = unsafe { libc::tcgetattr(fd.as_raw_fd(), &raw mut settings) } == 0;
            let character = settings.c_cc.get(libc::VEOF).copied().filter(|_| known).unwrap_or(4);
            let _ = sys::write(fd, &[character]);
        }
    }
}

/// Sends output to the channel that is attached to it.
#[derive(Debug)]
pub struct Watcher {
    /// The exec was known before.
    pub existing: bool,
    /// [`Kind::Started`] is sent.
    pub announced: bool,
    /// Next byte to send of each stream.
    pub sent: [u64; 2],
    ended: [bool; 2],
    /// [`Kind::Exited`] is sent; the channel only waits for late windows.
    pub done: bool,
}

impl Watcher {
    /// A channel that has seen nothing.
    pub fn new(existing: bool) -> Self {
        Self { existing, announced: false, sent: [0; 2], ended: [false; 2], done: false }
    }

    /// Sends a share of what is there.
    pub fn step(&mut self, exec: &Exec, channel: u32, out: &mut Vec<u8>) -> Step {
        if !self.announced || self.done {
            return Step::Wait;
        }
        let mut more = false;
        let streams = exec.outputs.iter().zip([0, STDERR]).zip(self.sent.iter_mut().zip(self.ended.iter_mut()));
        for ((output, flag), (sent, ended)) in streams {
            if *ended {
                continue;
            }
            let there = output.ring.end().saturating_sub(*sent);
            let count = there.min(DATA_CHUNK as u64);
            let last = output.eof && count == there;
            more |= count < there;
            if count > 0 || last {
                conn::push_header(out, Kind::Data, if last { flag | EOF } else { flag }, channel, count as usize);
                output.ring.copy_out(*sent, count as usize, out);
                *sent += count;
                *ended = last;
            }
        }
        match &exec.exited {
            Some(exited) if self.ended == [true; 2] => {
                conn::push(out, Kind::Exited, 0, channel, &exited.encode());
                self.done = true;
                Step::Wait
            }
            _ if more => Step::More,
            _ => Step::Wait,
        }
    }
}

/// Feeds stdin from a channel.
#[derive(Debug)]
pub struct Feeder {
    wanted_offset: u64,
    begun: bool,
    /// Bytes that a former channel has written already.
    repeated: u64,
    pending: Vec<u8>,
    taken: usize,
    received: u64,
    /// Bytes of this channel that are in the pipe, or were there before.
    pub consumed: u64,
    /// The last window told.
    pub told: u64,
    last: bool,
    ends_stdin: bool,
}

/// What a feeder came to.
#[derive(Debug)]
pub enum Fed {
    /// Everything that came is in; more will come.
    All,
    /// The pipe is full.
    Full,
    /// The request is done.
    Done,
}

impl Feeder {
    /// A channel whose first byte is stdin's byte `offset`, or the next one (`u64::MAX`).
    pub fn new(offset: u64) -> Self {
        Self {
            wanted_offset: offset,
            begun: false,
            repeated: 0,
            pending: Vec::new(),
            taken: 0,
            received: 0,
            consumed: 0,
            told: 0,
            last: false,
            ends_stdin: false,
        }
    }

    /// Takes bytes that came; false when the sender broke the rules.
    pub fn take(&mut self, bytes: &[u8], ends_stdin: bool, last: bool) -> bool {
        if self.last {
            return false;
        }
        self.received += bytes.len() as u64;
        self.pending.extend_from_slice(bytes);
        self.last = last;
        self.ends_stdin = ends_stdin;
        self.received - self.consumed <= shoal_wire::WINDOW
    }

    /// Writes what the pipe takes.
    ///
    /// # Errors
    /// `EPIPE` when nobody reads stdin, `EINVAL` when bytes before the offset are missing.
    pub fn step(&mut self, exec: &mut Exec) -> Result<Fed, Error> {
        if !self.begun {
            self.begun = true;
            if self.wanted_offset != u64::MAX {
                let missing = Error::new("bytes before the offset are missing", libc::EINVAL);
                self.repeated = exec.stdin_offset.checked_sub(self.wanted_offset).ok_or(missing)?;
            }
        }
        loop {
            let rest = self.pending.get(self.taken..).unwrap_or(&[]);
            if rest.is_empty() {
                self.pending = Vec::new();
                self.taken = 0;
                break;
            }
            let count = if self.repeated > 0 {
                let count = self.repeated.min(rest.len() as u64) as usize;
                self.repeated -= count as u64;
                count
            } else {
                let closed = Error::new("stdin is closed", libc::EPIPE);
                let fd = exec.stdin.as_ref().filter(|_| !exec.stdin_ended).ok_or(closed)?;
                match sys::write(fd, rest) {
                    Ok(count) => {
                        exec.stdin_offset += count as u64;
                        count
                    }
                    Err(Error { errno: libc::EAGAIN, .. }) => return Ok(Fed::Full),
                    Err(error) => {
                        exec.stdin = None;
                        return Err(Error {
                            errno: if error.errno == libc::EIO { libc::EPIPE } else { error.errno },
                            ..error
                        });
                    }
                }
            };
            self.taken += count;
            self.consumed += count as u64;
        }
        if !self.last {
            return Ok(Fed::All);
        }
        if self.ends_stdin && exec.stdin.is_some() {
            exec.end_stdin();
        }
        Ok(Fed::Done)
    }
}
