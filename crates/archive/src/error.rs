//! Why an archive was refused, or what the kernel refused.

use std::fmt;

/// Why reading, unpacking or packing ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The bytes are no tar, or a tar that two parsers could read differently.
    Malformed {
        /// What is wrong, in a few words.
        what: &'static str,
        /// The member it is about, as far as its name was known.
        member: Vec<u8>,
    },
    /// The input ended before the archive did.
    Truncated,
    /// The archive is larger than the caller allows.
    Limit {
        /// Of what there is too much.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// A well-formed member that must not be unpacked, or cannot be packed.
    Refused {
        /// Why.
        what: &'static str,
        /// The member.
        member: Vec<u8>,
    },
    /// A system call failed.
    Os {
        /// The call.
        call: &'static str,
        /// Its object, below the directory that was given.
        path: Vec<u8>,
        /// The kernel's word.
        errno: i32,
    },
}

impl Error {
    /// The kernel's word, where it was the kernel that refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Os { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Stable word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed { .. } => "malformed",
            Self::Truncated => "truncated",
            Self::Limit { .. } => "limit",
            Self::Refused { .. } => "refused",
            Self::Os { .. } => "os",
        }
    }

    pub(crate) fn malformed(what: &'static str, member: &[u8]) -> Self {
        Self::Malformed { what, member: member.to_vec() }
    }

    pub(crate) fn refused(what: &'static str, member: &[u8]) -> Self {
        Self::Refused { what, member: member.to_vec() }
    }

    /// The error that the last system call of this thread left.
    pub(crate) fn last(call: &'static str, path: &[u8]) -> Self {
        Self::Os { call, path: path.to_vec(), errno: last_errno() }
    }
}

pub(crate) fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A name as one short printable line, whatever its bytes are.
struct Printable<'a>(&'a [u8]);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 200;
        let (shown, rest) = self.0.split_at(self.0.len().min(SHOWN));
        write!(out, "\"{}\"", shown.escape_ascii())?;
        if rest.is_empty() { Ok(()) } else { write!(out, "… ({} bytes)", self.0.len()) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed { what, member } if member.is_empty() => write!(out, "malformed archive: {what}"),
            Self::Malformed { what, member } => {
                write!(out, "malformed archive: {what}, at {}", Printable(member))
            }
            Self::Truncated => write!(out, "archive ends early"),
            Self::Limit { what, limit } => write!(out, "archive has more than {limit} {what}"),
            Self::Refused { what, member } => write!(out, "member {} refused: {what}", Printable(member)),
            Self::Os { call, path, errno } => {
                let reason = std::io::Error::from_raw_os_error(*errno);
                write!(out, "{call} of {}: {reason}", Printable(path))
            }
        }
    }
}

impl std::error::Error for Error {}
