//! Bytes on their way between clients, files and commands.

use std::os::fd::OwnedFd;

use shoal_wire::{DETACH, EOF, Kind, STDERR, Window};

use crate::agent::{self, Agent, LEFTOVER, STDERR_PIPE, STDIN, STDOUT};
use crate::conn::{self, Channel, Target, WINDOW_STEP, Work};
use crate::exec::Fed;
use crate::requests::Violation;
use crate::slab::Key;
use crate::sys::{self, Error};

/// Pipes kept open for background processes whose command has ended.
const MAX_LEFTOVERS: usize = 64;
/// Time a background process waits after filling its pipe, which nobody reads, before it is emptied again.
const LEFTOVER_PAUSE_NS: u64 = 50 * agent::MS;

/// A pipe of a command that has ended, held open by processes that it left behind.
///
/// They keep running without SIGPIPE; what they write is thrown away, at a pace that costs nothing.
pub struct Leftover {
    /// Our end.
    pub fd: OwnedFd,
    /// When it is looked at again; `None` while the poll loop watches it.
    pub pause_until: Option<u64>,
}

impl Agent {
    /// Bytes from the client: stdin, a file or an archive.
    pub fn data(&mut self, target: Target, flags: u8, payload: &[u8]) -> Result<(), Violation> {
        let (key, id) = target;
        let Some(conn) = self.conns.get_mut(key) else { return Ok(()) };
        // An unknown channel is one that was answered while this was on its way.
        let Some(channel) = conn.channels.get_mut(&id) else { return Ok(()) };
        let eof = flags & EOF != 0;
        match &mut channel.work {
            Work::Feed(exec, feeder) => {
                let exec = *exec;
                if !feeder.take(payload, eof, eof || flags & DETACH != 0) {
                    return Err(Violation);
                }
                self.feed(exec);
            }
            Work::Write(draft, taken) => {
                let written = draft.write(payload);
                let told = taken.add(payload.len());
                if let Err(error) = written {
                    conn.channels.remove(&id);
                    self.fail(target, error, b"");
                } else if eof {
                    self.publish(target);
                } else {
                    self.tell_window(target, told);
                }
            }
            Work::Unpack(unpack, taken) => {
                let pushed = unpack.push(payload);
                let told = taken.add(payload.len());
                if let Err(error) = pushed {
                    conn.channels.remove(&id);
                    self.fail_archive(target, &error);
                } else if eof {
                    self.finish_unpack(target);
                } else {
                    self.tell_window(target, told);
                }
            }
            Work::Port(port) => {
                let port = *port;
                return self.port_data(port, payload, eof);
            }
            // A channel that is done may have been given another meaning; all others send and do not take.
            Work::Watch(_, watcher) if watcher.done => {}
            _ => return Err(Violation),
        }
        Ok(())
    }

    /// Tells the client how much of its stream is consumed, if that is due.
    pub fn tell_window(&mut self, (key, id): Target, consumed: Option<u64>) {
        let Some(consumed) = consumed else { return };
        if let Some(conn) = self.conns.get_mut(key) {
            conn::push(&mut conn.out, Kind::Window, 0, id, &Window { consumed }.encode());
        }
        self.enqueue(key);
    }

    fn publish(&mut self, (key, id): Target) {
        let channel = self.conns.get_mut(key).and_then(|conn| conn.channels.remove(&id));
        let Some(Channel { work: Work::Write(draft, _), .. }) = channel else { return };
        match draft.publish() {
            Ok(info) => self.reply((key, id), &info.encode()),
            Err(error) => self.fail((key, id), error, b""),
        }
    }

    fn finish_unpack(&mut self, (key, id): Target) {
        let channel = self.conns.get_mut(key).and_then(|conn| conn.channels.remove(&id));
        let Some(Channel { work: Work::Unpack(unpack, _), .. }) = channel else { return };
        match unpack.finish() {
            Ok(_) => self.reply((key, id), &[]),
            Err(error) => self.fail_archive((key, id), &error),
        }
    }

    /// The client's progress in a stream that we send.
    pub fn window(&mut self, (key, id): Target, flags: u8, consumed: u64) -> Result<(), Violation> {
        let Some(conn) = self.conns.get_mut(key) else { return Ok(()) };
        let Some(channel) = conn.channels.get_mut(&id) else { return Ok(()) };
        let keeps_rules = match &mut channel.work {
            Work::Read(reading) => reading.consumed(consumed),
            Work::Pack(packing) => packing.consumed(consumed),
            Work::Port(port) => self.ports.get_mut(*port).is_none_or(|port| port.consumed(consumed)),
            Work::Changes(changes) => changes.consumed(consumed),
            Work::Watch(exec_key, watcher) => {
                let stream = usize::from(flags & STDERR != 0);
                let sent = watcher.sent.get(stream).copied().unwrap_or(0);
                let exec_key = *exec_key;
                if consumed > sent {
                    return Err(Violation);
                }
                if let Some(exec) = self.execs.get_mut(exec_key) {
                    exec.consume(stream, consumed);
                }
                self.pump(exec_key, stream);
                return Ok(());
            }
            _ => return Err(Violation),
        };
        if !keeps_rules {
            return Err(Violation);
        }
        conn.wake(id);
        self.enqueue(key);
        Ok(())
    }

    /// Reads what a command has written, as far as there is room, and passes it on.
    pub fn pump(&mut self, key: Key, stream: usize) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        let (terminal, dropping) = (exec.terminal, exec.drops());
        let Some(output) = exec.outputs.get_mut(stream) else { return };
        let leftover = output.pump(dropping);
        if let Some(fd) = leftover {
            if output.watched {
                self.epoll.remove(&fd);
            }
            if !terminal {
                self.keep_open(fd);
            }
        }
        self.watch(key, stream);
        self.wake_watcher(key);
    }

    /// Has the poll loop look at a stream, or not: with no room left, a pipe that hung up would wake it for ever.
    pub fn watch(&mut self, key: Key, stream: usize) {
        let Some(exec) = self.execs.get_mut(key) else { return };
        let dropping = exec.drops();
        let Some(output) = exec.outputs.get_mut(stream) else { return };
        let tag = if stream == 0 { STDOUT } else { STDERR_PIPE };
        let Some(fd) = &output.fd else {
            output.watched = false;
            return;
        };
        let wanted = dropping || output.ring.has_room();
        if wanted && !output.watched {
            output.watched = self.epoll.add(fd, libc::EPOLLIN, key.token(tag)).is_ok();
        } else if !wanted && output.watched {
            self.epoll.remove(fd);
            output.watched = false;
        }
    }

    fn wake_watcher(&mut self, key: Key) {
        let attached = self.execs.get(key).and_then(|exec| exec.attached);
        if let Some((conn_key, id)) = attached {
            if let Some(conn) = self.conns.get_mut(conn_key) {
                conn.wake(id);
            }
            self.enqueue(conn_key);
        }
    }

    /// Writes to a command's stdin what its channels have, the oldest channel first.
    pub fn feed(&mut self, key: Key) {
        loop {
            let Some(exec) = self.execs.get_mut(key) else { return };
            let Some(target) = exec.inputs.front().copied() else { break };
            let channel = self.conns.get_mut(target.0).and_then(|conn| conn.channels.get_mut(&target.1));
            let Some(Channel { work: Work::Feed(_, feeder), .. }) = channel else {
                exec.inputs.pop_front();
                continue;
            };
            let fed = feeder.step(exec);
            let told = (feeder.consumed - feeder.told >= WINDOW_STEP).then_some(feeder.consumed);
            if let Some(consumed) = told {
                feeder.told = consumed;
            }
            let full = matches!(fed, Ok(Fed::Full));
            if let (Some(fd), true) = (&exec.stdin, full != exec.stdin_watched) {
                if full {
                    exec.stdin_watched = self.epoll.add(fd, libc::EPOLLOUT, key.token(STDIN)).is_ok();
                } else {
                    self.epoll.remove(fd);
                    exec.stdin_watched = false;
                }
            }
            let result = match fed {
                Ok(Fed::All | Fed::Full) => {
                    self.tell_window(target, told);
                    return;
                }
                Ok(Fed::Done) => Ok(()),
                Err(error) => Err(error),
            };
            exec.inputs.pop_front();
            if let Some(conn) = self.conns.get_mut(target.0) {
                conn.channels.remove(&target.1);
            }
            self.answer(target, result, b"");
        }
        // Nothing is waiting to be written.
        if let Some(exec) = self.execs.get_mut(key)
            && exec.stdin_watched
        {
            if let Some(fd) = &exec.stdin {
                self.epoll.remove(fd);
            }
            exec.stdin_watched = false;
        }
    }

    /// Keeps a pipe of a command that has ended open for those it left behind.
    fn keep_open(&mut self, fd: OwnedFd) {
        if self.leftovers.len() >= MAX_LEFTOVERS {
            return;
        }
        let key = self.leftovers.insert(Leftover { fd, pause_until: None });
        if let Some(leftover) = self.leftovers.get(key)
            && self.epoll.add(&leftover.fd, libc::EPOLLIN, key.token(LEFTOVER)).is_err()
        {
            self.leftovers.remove(key);
        }
    }

    /// Throws away one pipe full, then looks elsewhere for a while.
    pub fn discard(&mut self, key: Key) {
        let Some(leftover) = self.leftovers.get_mut(key) else { return };
        let mut sink = vec![0; 64 << 10];
        match sys::read(&leftover.fd, &mut sink) {
            Ok(count) if count > 0 => {
                self.epoll.remove(&leftover.fd);
                leftover.pause_until = Some(self.now + LEFTOVER_PAUSE_NS);
            }
            Err(Error { errno: libc::EAGAIN, .. }) => {}
            _ => {
                self.leftovers.remove(key);
            }
        }
    }
}
