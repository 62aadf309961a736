//! The payloads of the frames.

use crate::{DecodeError, Reader, Writer};

/// Declares a payload: its fields in the order in which they are written.
macro_rules! payload {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:tt,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: payload!(@type $type),)*
        }
        impl $name {
            /// The payload's bytes.
            pub fn encode(&self) -> Vec<u8> {
                let mut out = Writer::default();
                self.write(&mut out);
                out.into_bytes()
            }
            /// Reads a payload that holds this and nothing else.
            ///
            /// # Errors
            /// [`DecodeError`] when fields are missing, malformed or followed by more.
            pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
                let mut input = Reader::new(payload);
                let value = Self::read(&mut input)?;
                input.finish()?;
                Ok(value)
            }
            fn write(&self, out: &mut Writer) {
                $(payload!(@write $type out, &self.$field);)*
            }
            fn read(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok(Self { $($field: payload!(@read $type input),)* })
            }
        }
    };
    (@type bytes) => { Vec<u8> };
    (@type list) => { Vec<Vec<u8>> };
    (@type [$item:ident]) => { Vec<$item> };
    (@type $scalar:ident) => { $scalar };
    (@write bytes $out:ident, $value:expr) => { $out.bytes($value) };
    (@write list $out:ident, $value:expr) => { $out.list($value) };
    (@write [$item:ident] $out:ident, $value:expr) => {{
        $out.u32($value.len() as u32);
        for item in $value { item.write($out); }
    }};
    (@write bool $out:ident, $value:expr) => { $out.u8(u8::from(*$value)) };
    (@write Outcome $out:ident, $value:expr) => { $out.u8(*$value as u8) };
    (@write Stage $out:ident, $value:expr) => { $out.u8(*$value as u8) };
    (@write FileKind $out:ident, $value:expr) => { $out.u8(*$value as u8) };
    (@write $scalar:ident $out:ident, $value:expr) => { $out.$scalar(*$value) };
    (@read bytes $in:ident) => { $in.bytes()? };
    (@read list $in:ident) => { $in.list()? };
    (@read [$item:ident] $in:ident) => {{
        let count = $in.count(1)?;
        (0..count).map(|_| $item::read($in)).collect::<Result<Vec<_>, _>>()?
    }};
    (@read bool $in:ident) => { match $in.u8()? { 0 => false, 1 => true, _ => return Err(DecodeError("not a bool")) } };
    (@read Outcome $in:ident) => { Outcome::from_byte($in.u8()?).ok_or(DecodeError("unknown outcome"))? };
    (@read Stage $in:ident) => { Stage::from_byte($in.u8()?).ok_or(DecodeError("unknown stage"))? };
    (@read FileKind $in:ident) => { FileKind::from_byte($in.u8()?).ok_or(DecodeError("unknown file kind"))? };
    (@read $scalar:ident $in:ident) => { $in.$scalar()? };
}

/// Declares a closed list that travels as one byte; the first member is the default.
macro_rules! closed_list {
    ($(#[$meta:meta])* $name:ident { $(#[$first_meta:meta])* $first:ident = $first_word:literal, $($(#[$member_meta:meta])* $member:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[repr(u8)]
        pub enum $name {
            #[default] $(#[$first_meta])* $first,
            $($(#[$member_meta])* $member,)*
        }
        impl $name {
            /// All members, in the order of their bytes.
            pub const ALL: &[Self] = &[Self::$first, $(Self::$member,)*];
            /// The member behind a byte.
            pub fn from_byte(byte: u8) -> Option<Self> {
                Self::ALL.get(byte as usize).copied()
            }
            /// The word that clients see.
            pub fn word(self) -> &'static str {
                match self { Self::$first => $first_word, $(Self::$member => $word,)* }
            }
        }
    };
}

closed_list! {
    /// How an exec ended.
    Outcome {
        /// Still running; only in [`ExecStatus`].
        Running = "running",
        /// It called exit; the code is its own.
        Exited = "exited",
        /// A signal ended it, sent by itself or its siblings.
        Signaled = "signaled",
        /// Its deadline passed and it was killed.
        TimedOut = "timed_out",
        /// The sandbox's memory limit was hit and the kernel killed it.
        OomKilled = "oom_killed",
        /// The client sent the signal that ended it.
        Killed = "killed",
        /// It never ran; see errno and stage.
        NotStarted = "not_started",
    }
}

closed_list! {
    /// Where starting a command failed.
    Stage {
        /// It did not fail.
        None = "none",
        /// The request itself makes no sense.
        Request = "request",
        /// Name or id of the user.
        User = "user",
        /// Change of working directory.
        Cwd = "cwd",
        /// Pipes or terminal.
        Stdio = "stdio",
        /// fork(2).
        Fork = "fork",
        /// Move into the workload's cgroup.
        Cgroup = "cgroup",
        /// Change of user, groups and capabilities.
        Privileges = "privileges",
        /// execve(2), the search in PATH included.
        Exec = "exec",
    }
}

closed_list! {
    /// What a path is.
    FileKind {
        /// A regular file.
        File = "file",
        /// A directory.
        Directory = "directory",
        /// A symbolic link.
        Symlink = "symlink",
        /// A device, FIFO or socket.
        Other = "other",
    }
}

payload! {
    /// The agent serves this connection.
    Ready {
        /// [`crate::VERSION`] of the agent.
        version: u16,
        /// Number given at start; another one means that a snapshot brought an old agent back.
        generation: u64,
        /// `CLOCK_MONOTONIC`, in nanoseconds, when the agent began to listen.
        ready_at_ns: u64,
    }
}

payload! {
    /// A command to start.
    ExecStart {
        /// Chosen by the client, unique in the sandbox; at most 128 bytes.
        exec_id: bytes,
        /// Program and arguments; the program is searched in the PATH of `env`.
        argv: list,
        /// The environment, `NAME=value` each. PATH, HOME, USER, LOGNAME and SHELL, and TERM with a terminal, are added
        /// where they are missing.
        env: list,
        /// Absolute working directory; empty: the user's home.
        cwd: bytes,
        /// Make `cwd` when it does not exist (an image's working directory).
        make_cwd: bool,
        /// `name`, `uid`, `name:group` or `uid:gid`, looked up in the image's own passwd; empty: root.
        user: bytes,
        /// Give it a pipe as stdin (or the terminal's input); otherwise /dev/null.
        stdin: bool,
        /// Give it a terminal; stderr then comes as stdout.
        pty: bool,
        /// Terminal rows.
        rows: u16,
        /// Terminal columns.
        cols: u16,
        /// Milliseconds until it is killed; 0: never.
        timeout_ms: u64,
        /// While nobody reads its output the oldest of it is dropped, and it never waits.
        detached: bool,
    }
}

payload! {
    /// A known exec to read on from.
    ExecAttach {
        /// Its id.
        exec_id: bytes,
        /// First byte of stdout wanted; everything before counts as consumed.
        stdout_offset: u64,
        /// First byte of stderr wanted.
        stderr_offset: u64,
    }
}

payload! {
    /// A command runs, or ran already.
    Started {
        /// Its pid as the sandbox sees it.
        pid: u32,
        /// The exec id was known: this is the same exec, not a second run.
        existing: bool,
        /// Offset of the first byte of stdout that will come.
        stdout_offset: u64,
        /// Offset of the first byte of stderr that will come.
        stderr_offset: u64,
        /// As in [`ExecStart`].
        detached: bool,
    }
}

payload! {
    /// A command ended.
    Exited {
        /// How.
        outcome: Outcome,
        /// Exit code when it exited, else -1.
        code: i32,
        /// Signal that ended it, else 0.
        signal: i32,
        /// Errno when it did not start, else 0.
        errno: i32,
        /// Where starting failed.
        stage: Stage,
        /// Nanoseconds from start to end.
        wall_ns: u64,
        /// User CPU time in microseconds, waited-for children included.
        user_us: u64,
        /// System CPU time in microseconds.
        system_us: u64,
        /// Largest resident set of any one process, in KiB.
        max_rss_kib: u64,
        /// Bytes read from storage.
        read_bytes: u64,
        /// Bytes written to storage.
        written_bytes: u64,
        /// OOM kills in the sandbox while it ran.
        oom_kills: u64,
        /// Its pid as the sandbox saw it; 0 if it never ran.
        pid: u32,
    }
}

payload! {
    /// Stdin of a running exec.
    ExecInput {
        /// Its id.
        exec_id: bytes,
        /// Offset of the first byte in the exec's stdin; bytes that are there already are dropped, so that a
        /// retry repeats nothing. `u64::MAX`: append.
        offset: u64,
    }
}

payload! {
    /// A signal for a running exec.
    ExecSignal {
        /// Its id.
        exec_id: bytes,
        /// Number of the signal.
        signal: u8,
        /// Also to every process that descends from it; else to its own process alone, whatever its group. (^C is no
        /// such signal but a byte of stdin, of which the terminal makes one to its foreground group.)
        tree: bool,
    }
}

payload! {
    /// A terminal's new size.
    ExecResize {
        /// The exec's id.
        exec_id: bytes,
        /// Rows.
        rows: u16,
        /// Columns.
        cols: u16,
    }
}

payload! {
    /// One exec that the agent knows.
    ExecStatus {
        /// Its id.
        exec_id: bytes,
        /// Its pid as the sandbox sees it.
        pid: u32,
        /// Program and arguments.
        argv: list,
        /// Running, or how it ended.
        outcome: Outcome,
        /// Exit code when it exited, else -1.
        code: i32,
        /// It has a terminal.
        pty: bool,
    }
}

payload! {
    /// The execs that the agent knows.
    ExecList {
        /// Oldest first.
        execs: [ExecStatus],
    }
}

payload! {
    /// A stretch of a file.
    FileRead {
        /// Absolute path.
        path: bytes,
        /// First byte.
        offset: u64,
        /// Bytes at the most; `u64::MAX`: to the end.
        length: u64,
    }
}

payload! {
    /// A file to write.
    FileWrite {
        /// Absolute path.
        path: bytes,
        /// Permission bits; `u32::MAX`: those of the file it replaces, else 0644.
        mode: u32,
        /// Owner as in [`ExecStart::user`]; empty: owner of the file it replaces, else root.
        user: bytes,
        /// Make missing parent directories.
        parents: bool,
    }
}

payload! {
    /// A directory to list.
    FileList {
        /// Absolute path.
        path: bytes,
        /// Levels to go down; 1 is the directory itself.
        depth: u32,
    }
}

payload! {
    /// Any request about one path.
    PathRequest {
        /// Absolute path.
        path: bytes,
        /// Owner for what is made, as in [`ExecStart::user`].
        user: bytes,
        /// Bits that depend on the request.
        bits: u32,
    }
}

payload! {
    /// A rename.
    FileRename {
        /// Absolute path that exists.
        from: bytes,
        /// Absolute path it gets; a file there is replaced.
        to: bytes,
    }
}

payload! {
    /// A tar stream to unpack.
    FileUnpack {
        /// Absolute path of the directory; made when missing.
        path: bytes,
        /// Owner of everything unpacked, as in [`ExecStart::user`]; empty: root.
        user: bytes,
    }
}

payload! {
    /// A path to watch.
    FileWatch {
        /// Absolute path of a directory, or of a file, which may be replaced meanwhile.
        path: bytes,
        /// Also all that lies below.
        recursive: bool,
    }
}

payload! {
    /// New attributes of a path.
    FileChange {
        /// Absolute path.
        path: bytes,
        /// Permission bits; `u32::MAX`: as they are.
        mode: u32,
        /// Owner as in [`ExecStart::user`]; empty: as it is.
        user: bytes,
    }
}

payload! {
    /// What a path is.
    FileInfo {
        /// The path as asked for; in a listing absolute, below the directory asked for.
        path: bytes,
        /// Kind, links not followed.
        kind: FileKind,
        /// Size in bytes.
        size: u64,
        /// Permission bits, set-id and sticky included.
        mode: u32,
        /// Owner as the sandbox sees it.
        uid: u32,
        /// Group as the sandbox sees it.
        gid: u32,
        /// Modification time, nanoseconds since 1970.
        mtime_ns: i64,
        /// Where a symbolic link points.
        target: bytes,
    }
}

payload! {
    /// A directory's entries.
    FileListing {
        /// In no order.
        entries: [FileInfo],
    }
}

payload! {
    /// A TCP port of the sandbox.
    PortConnect {
        /// Its number; 127.0.0.1 is tried first, then `::1`.
        port: u16,
    }
}

payload! {
    /// A stream's progress; [`crate::STDERR`] in the frame's flags tells which.
    Window {
        /// Bytes of the stream consumed since its start.
        consumed: u64,
    }
}

payload! {
    /// Why a request failed.
    Failure {
        /// Errno, or 0 when no system call failed, as for an owner that the image does not know.
        errno: i32,
        /// The call or check that failed, for a person.
        what: bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_decodes_to_what_was_encoded() {
        let start = ExecStart {
            exec_id: b"e1".to_vec(),
            argv: vec![b"sh".to_vec(), b"\xff".to_vec()],
            env: vec![b"A=b".to_vec()],
            stdin: true,
            timeout_ms: 5,
            ..ExecStart::default()
        };
        assert_eq!(ExecStart::decode(&start.encode()), Ok(start));
        let exited = Exited { outcome: Outcome::OomKilled, stage: Stage::Exec, code: -1, ..Exited::default() };
        assert_eq!(Exited::decode(&exited.encode()), Ok(exited));
        let listing = FileListing { entries: vec![FileInfo { kind: FileKind::Symlink, ..FileInfo::default() }; 3] };
        assert_eq!(FileListing::decode(&listing.encode()), Ok(listing));
    }

    #[test]
    fn every_truncation_of_a_payload_is_refused() {
        let whole = ExecStart { argv: vec![b"true".to_vec()], ..ExecStart::default() }.encode();
        for length in 0..whole.len() {
            assert!(ExecStart::decode(&whole[..length]).is_err(), "{length} bytes decoded");
        }
        let mut longer = whole;
        longer.push(0);
        assert!(ExecStart::decode(&longer).is_err());
    }

    #[test]
    fn a_list_that_claims_more_items_than_bytes_allocates_nothing() {
        assert_eq!(ExecList::decode(&u32::MAX.to_le_bytes()), Err(DecodeError("list longer than its payload")));
    }
}
