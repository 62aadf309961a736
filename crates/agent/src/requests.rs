//! Requests as they come, and those about files.

use shoal_archive::{Limits, Policy, Unpack};
use shoal_wire::{
    DecodeError, ExecAttach, ExecInput, ExecResize, ExecSignal, ExecStart, FileChange, FileList, FileRead, FileRename,
    FileUnpack, FileWatch, FileWrite, Header, Kind, PathRequest, PortConnect, Reader, Window,
};

use crate::agent::Agent;
use crate::changes::{Changes, Notice};
use crate::conn::{self, Channel, Taken, Target, Work};
use crate::files::{self, Draft, Owner};
use crate::jobs::{Listing, Packing, Reading, Removal};
use crate::slab::Key;
use crate::sys::Error;
use crate::user::Identity;

/// Channels open on one connection.
const MAX_CHANNELS: usize = 4096;

/// Channels that may tell of changes; all sandboxes' count against one limit of the kernel's (128 as a rule).
const MAX_WATCHERS: usize = 16;

/// The other side broke the protocol; its connection ends.
pub struct Violation;

/// A request is over: it was answered with what is wrong with it.
struct Answered;

impl From<DecodeError> for Violation {
    fn from(_: DecodeError) -> Self {
        Self
    }
}

impl Agent {
    /// Acts on one frame.
    pub fn frame(&mut self, key: Key, header: Header, payload: &[u8]) -> Result<(), Violation> {
        let target = (key, header.channel);
        match header.kind {
            Kind::Data => return self.data(target, header.flags, payload),
            Kind::Window => return self.window(target, header.flags, Window::decode(payload)?.consumed),
            Kind::Cancel => {
                let channel = self.conns.get_mut(key).and_then(|conn| conn.channels.remove(&header.channel));
                if let Some(channel) = channel {
                    self.abandon(target, &channel.work);
                }
                return Ok(());
            }
            Kind::Ready | Kind::Started | Kind::Exited | Kind::Ok | Kind::Error => return Err(Violation),
            _ => {}
        }
        let Some(conn) = self.conns.get_mut(key) else { return Ok(()) };
        let busy = |channel: &Channel| !matches!(&channel.work, Work::Watch(_, watcher) if watcher.done);
        if header.channel == 0 || conn.channels.get(&header.channel).is_some_and(busy) {
            return Err(Violation);
        }
        if let Some(done) = conn.channels.remove(&header.channel) {
            self.abandon(target, &done.work);
        } else if conn.channels.len() >= MAX_CHANNELS {
            self.fail(target, Error::new("too many channels", libc::EAGAIN), b"");
            return Ok(());
        }
        match header.kind {
            Kind::ExecStart => self.exec_start(target, ExecStart::decode(payload)?),
            Kind::ExecAttach => self.exec_attach(target, &ExecAttach::decode(payload)?),
            Kind::ExecInput => self.exec_input(target, &ExecInput::decode(payload)?),
            Kind::ExecSignal => self.exec_signal(target, &ExecSignal::decode(payload)?),
            Kind::ExecResize => self.exec_resize(target, &ExecResize::decode(payload)?),
            Kind::ExecList => {
                Reader::new(payload).finish()?;
                self.exec_list(target);
            }
            Kind::ExecForget => {
                let mut reader = Reader::new(payload);
                let id = reader.bytes()?;
                reader.finish()?;
                self.exec_forget(target, &id);
            }
            Kind::ExecWait => {
                let mut reader = Reader::new(payload);
                let id = reader.bytes()?;
                reader.finish()?;
                self.exec_wait(target, &id);
            }
            Kind::PortConnect => self.port_connect(target, &PortConnect::decode(payload)?),
            _ => self.file_request(target, header.kind, payload)?,
        }
        Ok(())
    }

    /// Acts on a request about a path.
    fn file_request(&mut self, target: Target, kind: Kind, payload: &[u8]) -> Result<(), Violation> {
        match kind {
            Kind::FileRead => {
                let request = FileRead::decode(payload)?;
                match Reading::new(&request.path, request.offset, request.length) {
                    Ok((reading, info)) => {
                        self.reply(target, &info.encode());
                        self.open(target, Work::Read(reading));
                    }
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileWrite => {
                let request = FileWrite::decode(payload)?;
                let Ok(owner) = self.named(target, &request.user) else { return Ok(()) };
                match self.begin_write(&request, owner) {
                    Ok(draft) => self.open(target, Work::Write(Box::new(draft), Taken::default())),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileStat => {
                let request = PathRequest::decode(payload)?;
                match files::stat(&request.path) {
                    Ok(info) => self.reply(target, &info.encode()),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileList => {
                let request = FileList::decode(payload)?;
                match Listing::new(&request.path, request.depth) {
                    Ok(listing) => self.open(target, Work::List(Box::new(listing))),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileMakeDir => {
                let request = PathRequest::decode(payload)?;
                let Ok(owner) = self.named(target, &request.user) else { return Ok(()) };
                match files::make_dir(&request.path, request.bits & 1 != 0, owner.or(self.default_owner())) {
                    Ok(info) => self.reply(target, &info.encode()),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileRemove => {
                let request = PathRequest::decode(payload)?;
                match Removal::new(&request.path, request.bits & 1 != 0) {
                    Ok(Some(removal)) => self.open(target, Work::Remove(Box::new(removal))),
                    Ok(None) => self.reply(target, &[]),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileRename => {
                let request = FileRename::decode(payload)?;
                self.answer(target, files::rename(&request.from, &request.to), &request.from);
            }
            Kind::FilePack => {
                let request = PathRequest::decode(payload)?;
                match Packing::new(&request.path) {
                    Ok(packing) => {
                        self.reply(target, &[]);
                        self.open(target, Work::Pack(Box::new(packing)));
                    }
                    Err(error) => self.fail_archive(target, &error),
                }
            }
            Kind::FileUnpack => {
                let request = FileUnpack::decode(payload)?;
                let Ok(owner) = self.named(target, &request.user) else { return Ok(()) };
                match self.begin_unpack(&request.path, owner.or(self.default_owner())) {
                    Ok(unpack) => self.open(target, Work::Unpack(Box::new(unpack), Taken::default())),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            Kind::FileWatch => {
                let request = FileWatch::decode(payload)?;
                if let Err(error) = self.begin_watch(target, &request) {
                    self.fail(target, error, &request.path);
                }
            }
            Kind::FileChange => {
                let request = FileChange::decode(payload)?;
                let Ok(owner) = self.named(target, &request.user) else { return Ok(()) };
                match files::change(&request.path, request.mode, owner) {
                    Ok(info) => self.reply(target, &info.encode()),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            _ => return Err(Violation),
        }
        Ok(())
    }

    /// Begins to tell of changes.
    fn begin_watch(&mut self, target: Target, request: &FileWatch) -> Result<(), Error> {
        if self.notices.len() >= MAX_WATCHERS {
            return Err(Error::new("watchers", libc::EMFILE));
        }
        let key = self.notices.insert(Notice { target, due: None });
        match Changes::new(key, &request.path, request.recursive, &self.epoll) {
            Ok(changes) => {
                self.open(target, Work::Changes(Box::new(changes)));
                Ok(())
            }
            Err(error) => {
                self.notices.remove(key);
                Err(error)
            }
        }
    }

    /// Answers a request with what was wrong with an archive.
    pub fn fail_archive(&mut self, (key, id): Target, error: &shoal_archive::Error) {
        if let Some(conn) = self.conns.get_mut(key) {
            push_archive_error(&mut conn.out, id, error);
        }
        self.enqueue(key);
    }

    /// The owner that a request names, if it names one.
    fn named(&mut self, target: Target, user: &[u8]) -> Result<Option<Owner>, Answered> {
        if user.is_empty() {
            return Ok(None);
        }
        match self.users.find(user) {
            Ok(Identity { uid, gid, .. }) => Ok(Some((uid, gid))),
            Err(error) => {
                let why = if error.errno == libc::ENOENT { "no such" } else { "not a" };
                let what = [b"user \"", user, b"\": ", why.as_bytes(), b" ", error.call.as_bytes()].concat();
                // Without errno: the call was about a path, and nothing is wrong with that.
                self.fail(target, Error::new(error.call, 0), &what);
                Err(Answered)
            }
        }
    }

    /// Who owns what is made and nobody is named for: root, or whoever runs the agent when it may become nobody else.
    fn default_owner(&self) -> Option<Owner> {
        self.options.privileged.then_some((0, 0))
    }

    /// Begins a file, its parents first if they are asked for.
    fn begin_write(&self, request: &FileWrite, owner: Option<Owner>) -> Result<Draft, Error> {
        let default_owner = self.default_owner();
        if request.parents {
            let end = request.path.iter().rposition(|byte| *byte != b'/').map_or(0, |at| at + 1);
            let name_at = request.path.get(..end).and_then(|path| path.iter().rposition(|byte| *byte == b'/'));
            if let Some(parent) = name_at.and_then(|at| request.path.get(..=at)) {
                files::make_dirs(parent, owner.or(default_owner))?;
            }
        }
        Draft::new(&request.path, request.mode, owner, default_owner)
    }

    /// Begins to unpack into a directory, which is made when missing.
    fn begin_unpack(&self, path: &[u8], owner: Option<Owner>) -> Result<Unpack, Error> {
        files::make_dirs(path, owner)?;
        let root = files::open_to_list(path)?;
        let (uid, gid) = owner.unwrap_or(self.options.context.own);
        Ok(Unpack::new(root, Policy::Upload { uid, gid }, Limits::default()))
    }
}

/// Appends an error frame for what went wrong with an archive: the kernel's errno, or `EINVAL` for a bad archive.
pub fn push_archive_error(out: &mut Vec<u8>, channel: u32, error: &shoal_archive::Error) {
    let errno = error.errno().unwrap_or(match error {
        shoal_archive::Error::Limit { .. } => libc::E2BIG,
        _ => libc::EINVAL,
    });
    // The errno travels apart, so a person is told what it was about.
    let what = match error {
        shoal_archive::Error::Os { path, .. } => path.clone(),
        _ => error.to_string().into_bytes(),
    };
    let failure = shoal_wire::Failure { errno, what };
    conn::push(out, Kind::Error, 0, channel, &failure.encode());
}
