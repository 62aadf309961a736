//! Requests as they come, and those about files.

use shoal_archive::{Limits, Policy, Unpack};
use shoal_wire::{
    DecodeError, ExecAttach, ExecInput, ExecResize, ExecSignal, ExecStart, FileList, FileRead, FileRename, FileUnpack,
    FileWrite, Header, Kind, PathRequest, Reader, Window,
};

use crate::agent::Agent;
use crate::conn::{self, Channel, Taken, Target, Work};
use crate::files::{self, Draft, Owner};
use crate::jobs::{Listing, Packing, Reading, Removal};
use crate::slab::Key;
use crate::sys::Error;
use crate::user::Identity;

/// Channels open on one connection.
const MAX_CHANNELS: usize = 4096;

/// The other side broke the protocol; its connection ends.
pub struct Violation;

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
                match self.begin_write(&request) {
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
                let made = self
                    .owner(&request.user)
                    .and_then(|owner| files::make_dir(&request.path, request.bits & 1 != 0, owner));
                match made {
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
                match self.begin_unpack(&request) {
                    Ok(unpack) => self.open(target, Work::Unpack(Box::new(unpack), Taken::default())),
                    Err(error) => self.fail(target, error, &request.path),
                }
            }
            _ => return Err(Violation),
        }
        Ok(())
    }

    /// Answers a request with what was wrong with an archive.
    pub fn fail_archive(&mut self, (key, id): Target, error: &shoal_archive::Error) {
        if let Some(conn) = self.conns.get_mut(key) {
            push_archive_error(&mut conn.out, id, error);
        }
        self.enqueue(key);
    }

    /// The owner that a request names; `None`: nothing was named and nothing has to change.
    ///
    /// Nobody named is root, or whoever runs the agent when it may become nobody else.
    fn owner(&mut self, user: &[u8]) -> Result<Option<Owner>, Error> {
        if user.is_empty() {
            return Ok(self.options.privileged.then_some((0, 0)));
        }
        let Identity { uid, gid, .. } = self.users.find(user)?;
        Ok(Some((uid, gid)))
    }

    /// Begins a file, its parents first if they are asked for.
    fn begin_write(&mut self, request: &FileWrite) -> Result<Draft, Error> {
        let owner = if request.user.is_empty() { None } else { self.owner(&request.user)? };
        let default_owner = self.owner(b"")?;
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
    fn begin_unpack(&mut self, request: &FileUnpack) -> Result<Unpack, Error> {
        let owner = self.owner(&request.user)?;
        files::make_dirs(&request.path, owner)?;
        let root = files::open_to_list(&request.path)?;
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
