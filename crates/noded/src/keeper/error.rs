//! What the keeper says when a step fails.

use serde::Serialize;

/// A step that failed: which call on what, and the kernel's word.
#[derive(Debug, Clone, Serialize)]
pub struct Error {
    /// Stable word for programs.
    pub code: &'static str,
    /// The step of a longer operation, e.g. `overlay`.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub stage: &'static str,
    /// The system call or check.
    pub call: &'static str,
    /// What it was about.
    pub object: String,
    /// Errno, or 0 when no system call failed.
    pub errno: i32,
    /// All of it, for a person.
    pub message: String,
}

/// Result of a keeper step.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The failure that `errno` tells of, right after `call`.
    pub fn last(call: &'static str, object: impl Into<String>) -> Self {
        Self::os(call, object, std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }

    /// A system call that failed with `errno`.
    pub fn os(call: &'static str, object: impl Into<String>, errno: i32) -> Self {
        let object = object.into();
        let message = format!("{call} {object}: {}", std::io::Error::from_raw_os_error(errno));
        Self { code: "syscall_failed", stage: "", call, object, errno, message }
    }

    /// The failure behind an `io::Error` of std.
    pub fn io(call: &'static str, object: impl Into<String>, error: &std::io::Error) -> Self {
        Self::os(call, object, error.raw_os_error().unwrap_or(libc::EIO))
    }

    /// A request that the keeper does not carry out.
    pub fn invalid(message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code: "invalid_request", stage: "", call: "check", object: String::new(), errno: 0, message }
    }

    /// A failure that is none of a system call.
    pub fn other(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, ..Self::invalid(message) }
    }

    /// The same failure, placed in a longer operation.
    #[must_use]
    pub fn at(mut self, stage: &'static str) -> Self {
        if self.stage.is_empty() {
            self.stage = stage;
        }
        self
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
