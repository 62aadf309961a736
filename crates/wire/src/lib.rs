//! Frames between the front door and the guest agent; no I/O.
//!
//! One connection carries many *channels*. The front door opens a channel with a request frame
//! and a number that is not in use on that connection; the agent ends it with [`Kind::Ok`],
//! [`Kind::Error`] or [`Kind::Exited`]. Bulk bytes travel as [`Kind::Data`] behind the same fixed
//! header.
//!
//! **Flow control is by offset.** For every byte stream the receiver sends [`Kind::Window`] with
//! the offset up to which it has *consumed* the stream. The sender may send up to
//! `consumed + WINDOW` and must keep what lies between `consumed` and what it has sent, until it
//! is consumed or the stream is given up. One number is both the credit and the acknowledgement,
//! so a slow reader stalls only itself and a broken connection resumes without loss.
//!
//! All integers are little endian; a string is a `u32` length and that many bytes, not
//! necessarily UTF-8; a list is a `u32` count and its items.

mod codec;
mod message;

pub use codec::{DecodeError, Reader, Writer};
pub use message::*;

/// Version of this protocol, told in [`Ready`].
pub const VERSION: u16 = 1;

/// Bytes of the fixed frame header.
pub const HEADER_LEN: usize = 12;

/// Largest payload of one frame; a longer one ends the connection.
///
/// Room for an argument list as long as the kernel takes (2 MiB), and for a directory listing.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// Largest payload of a [`Kind::Data`] frame that we send.
pub const DATA_CHUNK: usize = 128 << 10;

/// Bytes a sender may be ahead of what its receiver has consumed, per stream.
pub const WINDOW: u64 = 1 << 20;

/// As [`WINDOW`], for the agent on a connection to a port: strangers may open many of them, and read none.
pub const PORT_WINDOW: u64 = WINDOW / 4;

/// What a frame means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Agent, channel 0, first frame of a connection: [`Ready`].
    Ready = 0x01,
    /// Starts a command: [`ExecStart`]. Answered by [`Kind::Started`] or [`Kind::Exited`] with
    /// outcome `not_started`. A known exec id is attached to, never run again.
    ///
    /// One channel at a time has an exec's output: the newest. The one before ends with `ESTALE`.
    ExecStart = 0x10,
    /// Reads on in the output of a known exec: [`ExecAttach`]. Answered as [`Kind::ExecStart`].
    ExecAttach = 0x11,
    /// Agent: [`Started`].
    Started = 0x12,
    /// Agent: [`Exited`]; the last frame of an exec channel, after all output.
    Exited = 0x13,
    /// Opens a channel that carries stdin: [`ExecInput`]; then [`Kind::Data`] frames. The last one
    /// has [`EOF`] (close stdin) or [`DETACH`] (leave it open); answered by [`Kind::Ok`] when all
    /// bytes are in the pipe, or [`Kind::Error`] (`EPIPE` when the process closed it, `EINVAL` when bytes before
    /// the offset are missing). Windows count this channel's own bytes from 0. Channels of one exec take turns.
    ExecInput = 0x14,
    /// Sends a signal: [`ExecSignal`]. Answered by Ok or Error (`ENOENT`: unknown exec; `ESRCH`: nobody is left
    /// to get it). With `tree` it also reaches what a finished exec left behind.
    ExecSignal = 0x15,
    /// Sets the terminal's size: [`ExecResize`]. Answered by Ok or Error.
    ExecResize = 0x16,
    /// Asks for the execs the agent knows. Answered by Ok with [`ExecList`].
    ExecList = 0x17,
    /// Forgets a finished exec: a string, the exec id. Answered by Ok or Error (`EBUSY` while it runs).
    ExecForget = 0x18,
    /// Waits for an exec's end and leaves its output to who reads it: a string, the exec id. Answered by
    /// [`Kind::Started`] if it runs, and by [`Kind::Exited`] as soon as it has ended, or Error.
    ExecWait = 0x19,
    /// Reads a file: [`FileRead`]. Answered by Ok with [`FileInfo`], then Data up to [`EOF`], or Error.
    FileRead = 0x20,
    /// Writes a file: [`FileWrite`], then Data up to [`EOF`]. Answered by Ok with [`FileInfo`] once it
    /// is in place, or Error. The file appears whole or not at all.
    FileWrite = 0x21,
    /// Asks for one path: [`PathRequest`]. Answered by Ok with [`FileInfo`], or Error.
    FileStat = 0x22,
    /// Lists a directory: [`FileList`]. Answered by Ok with a list of [`FileInfo`], or Error.
    FileList = 0x23,
    /// Makes a directory: [`PathRequest`]; flag bit 0 makes parents and accepts an existing one. Answered by Ok
    /// with [`FileInfo`], or Error.
    FileMakeDir = 0x24,
    /// Removes a path: [`PathRequest`]; flag bit 0 removes a directory with all in it.
    FileRemove = 0x25,
    /// Renames within the sandbox: [`FileRename`].
    FileRename = 0x26,
    /// Packs a file or tree as tar: [`PathRequest`]. A directory's entries come without its own name, a file under its
    /// name. Answered by Ok (empty), then Data up to [`EOF`]; a fault on
    /// the way ends it with Error.
    FilePack = 0x27,
    /// Unpacks a tar stream under a directory: [`FileUnpack`], then Data up to [`EOF`]. Answered by Ok or Error;
    /// what was unpacked before a fault stays.
    FileUnpack = 0x28,
    /// Tells of changes: [`FileWatch`]. Answered by Ok (empty) once every change from then on will be seen, then Data
    /// without end, one JSON document a line; or Error (`ENOSPC`: the kernel's or our limit on watched directories,
    /// `EMFILE`: on watchers), at the start or on the way.
    ///
    /// The first line is `{"type":"ready"}`. A directory that appears below a recursive watch is watched, and what is
    /// in it already is told as created. `overflow`: changes were lost, and from here on none is.
    FileWatch = 0x29,
    /// Changes permission bits and owner, links followed: [`FileChange`]. Answered by Ok with [`FileInfo`], or Error.
    FileChange = 0x2a,
    /// Bytes of a stream; see [`EOF`], [`STDERR`], [`DETACH`].
    Data = 0x30,
    /// Offset consumed so far: [`Window`].
    Window = 0x31,
    /// Front door: nobody listens to this channel any more. A file operation is undone; an exec goes on,
    /// its output kept for who attaches next.
    Cancel = 0x32,
    /// Agent: the request succeeded; the payload depends on the request.
    Ok = 0x40,
    /// Agent: the request failed: [`Failure`].
    Error = 0x41,
    /// Connects to a TCP port of the sandbox: [`PortConnect`]. Answered by Ok (empty), or Error (`ECONNREFUSED`: nobody
    /// listens).
    ///
    /// After Ok, Data goes both ways, each way with its own windows and its own [`EOF`], which closes that half. The
    /// channel ends when both halves are closed, or by Error (`ECONNRESET`) or Cancel; Cancel resets the connection
    /// unless everything up to the front door's [`EOF`] was consumed before.
    PortConnect = 0x50,
}

impl Kind {
    /// The kind behind a byte, or `None` for one that this version does not know.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{
            Cancel, Data, Error, ExecAttach, ExecForget, ExecInput, ExecList, ExecResize, ExecSignal, ExecStart,
            ExecWait, Exited, FileChange, FileList, FileMakeDir, FilePack, FileRead, FileRemove, FileRename, FileStat,
            FileUnpack, FileWatch, FileWrite, Ok, PortConnect, Ready, Started, Window,
        };
        const ALL: [Kind; 28] = [
            Ready,
            ExecStart,
            ExecAttach,
            Started,
            Exited,
            ExecInput,
            ExecSignal,
            ExecResize,
            ExecList,
            ExecForget,
            ExecWait,
            FileRead,
            FileWrite,
            FileStat,
            FileList,
            FileMakeDir,
            FileRemove,
            FileRename,
            FilePack,
            FileUnpack,
            FileWatch,
            FileChange,
            Data,
            Window,
            Cancel,
            Ok,
            Error,
            PortConnect,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// [`Kind::Data`] flag: the stream ends with this frame.
pub const EOF: u8 = 0x01;
/// [`Kind::Data`] and [`Kind::Window`] flag: the stream is stderr (unset: stdout, stdin or a file).
pub const STDERR: u8 = 0x02;
/// [`Kind::Data`] flag on an input channel: the request ends, stdin stays open.
pub const DETACH: u8 = 0x04;

/// The fixed start of every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload that follow.
    pub len: u32,
    /// Channel; 0 is the connection itself.
    pub channel: u32,
    /// Meaning of the payload.
    pub kind: Kind,
    /// Bits that depend on `kind`.
    pub flags: u8,
}

impl Header {
    /// The twelve bytes that go out.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let l = self.len.to_le_bytes();
        let c = self.channel.to_le_bytes();
        [l[0], l[1], l[2], l[3], c[0], c[1], c[2], c[3], self.kind as u8, self.flags, 0, 0]
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`DecodeError`] for an unknown kind, a payload over [`MAX_PAYLOAD`] or reserved bytes that are not zero; the
    /// stream cannot be read on after that.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, DecodeError> {
        let [l0, l1, l2, l3, c0, c1, c2, c3, kind, flags, z0, z1] = bytes;
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        if len as usize > MAX_PAYLOAD {
            return Err(DecodeError("frame too long"));
        }
        if z0 != 0 || z1 != 0 {
            return Err(DecodeError("reserved bytes set"));
        }
        let kind = Kind::from_byte(kind).ok_or(DecodeError("unknown frame kind"))?;
        Ok(Self { len, channel: u32::from_le_bytes([c0, c1, c2, c3]), kind, flags })
    }
}

/// A whole frame, ready to be written.
pub fn frame(kind: Kind, flags: u8, channel: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { len: payload.len() as u32, channel, kind, flags };
    let mut out = Vec::with_capacity(HEADER_LEN + payload.len());
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(payload);
    out
}
