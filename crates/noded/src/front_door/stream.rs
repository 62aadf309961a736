//! The frames of `application/vnd.shoal.stream`: kind, three zero bytes, big-endian length, payload.

use super::link::{End, Ending};
use super::problem::Problem;
use bytes::Bytes;
use serde::Serialize;
use shoal_wire::{Exited, Outcome, Started};

/// Bytes before a frame's payload.
pub const HEADER_LEN: usize = 8;
/// JSON, `ExecStarted`.
const STARTED: u8 = 0x01;
/// Bytes of stdout.
pub const STDOUT: u8 = 0x02;
/// Bytes of stderr.
pub const STDERR: u8 = 0x03;
/// JSON, `ExecExit`; the last frame.
const EXIT: u8 = 0x04;
/// A problem document; the last frame.
const ERROR: u8 = 0x7f;

/// The eight bytes before a payload of this length.
pub fn header(kind: u8, length: usize) -> [u8; HEADER_LEN] {
    let [a, b, c, d] = (length as u32).to_be_bytes();
    [kind, 0, 0, 0, a, b, c, d]
}

fn frame(kind: u8, payload: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(HEADER_LEN + payload.len());
    out.extend_from_slice(&header(kind, payload.len()));
    out.extend_from_slice(payload);
    out.into()
}

/// `types.ExecStarted`.
#[derive(Serialize)]
pub struct ExecStarted<'a> {
    exec_id: &'a str,
    pid: u32,
    existing: bool,
    stdout_offset: u64,
    stderr_offset: u64,
    detached: bool,
}

/// `types.ExecExit`.
#[derive(Serialize)]
pub struct ExecExit {
    outcome: &'static str,
    exit_code: Option<i32>,
    signal: Option<i32>,
    errno: Option<i32>,
    stage: Option<&'static str>,
    usage: Usage,
}

#[derive(Serialize)]
struct Usage {
    wall_s: f64,
    user_s: f64,
    system_s: f64,
    max_rss_bytes: u64,
    read_bytes: u64,
    written_bytes: u64,
}

impl<'a> ExecStarted<'a> {
    /// What the agent says of an exec.
    pub fn new(exec_id: &'a str, started: &Started) -> Self {
        Self {
            exec_id,
            pid: started.pid,
            existing: started.existing,
            stdout_offset: started.stdout_offset,
            stderr_offset: started.stderr_offset,
            detached: started.detached,
        }
    }
}

/// The first frame.
pub fn started(exec_id: &str, started: &Started) -> Bytes {
    frame(STARTED, &serde_json::to_vec(&ExecStarted::new(exec_id, started)).unwrap_or_default())
}

impl From<&Exited> for ExecExit {
    fn from(exited: &Exited) -> Self {
        Self {
            outcome: exited.outcome.word(),
            exit_code: (exited.outcome == Outcome::Exited).then_some(exited.code),
            signal: (exited.signal != 0).then_some(exited.signal),
            errno: (exited.errno != 0).then_some(exited.errno),
            stage: (exited.outcome == Outcome::NotStarted).then(|| exited.stage.word()),
            usage: Usage {
                wall_s: seconds(exited.wall_ns, 1e9),
                user_s: seconds(exited.user_us, 1e6),
                system_s: seconds(exited.system_us, 1e6),
                max_rss_bytes: exited.max_rss_kib.saturating_mul(1024),
                read_bytes: exited.read_bytes,
                written_bytes: exited.written_bytes,
            },
        }
    }
}

fn exit(exited: &Exited) -> Bytes {
    frame(EXIT, &serde_json::to_vec(&ExecExit::from(exited)).unwrap_or_default())
}

#[expect(clippy::cast_precision_loss, reason = "a double counts nanoseconds exactly for 104 days")]
fn seconds(count: u64, unit: f64) -> f64 {
    count as f64 / unit
}

/// The last frame: how the exec ended, or why nobody knows.
pub fn last(end: End) -> Bytes {
    let problem = match end {
        End::Exited(exited) => return exit(&exited),
        End::Failed(failure) => Problem::exec(&failure),
        End::Ended(ending) => ending.to_problem(),
        End::Done => Problem::garbled(),
    };
    failed(&problem)
}

/// The last frame of what ended in an error.
pub fn failed(problem: &Problem) -> Bytes {
    frame(ERROR, &problem.to_json())
}

impl Ending {
    /// The error that a client gets for it.
    pub fn to_problem(&self) -> Problem {
        match self {
            Self::Gone(reason) => Problem::sandbox_gone(reason.as_deref()),
            Self::Lost(why) => Problem::sandbox_lost(why.clone()),
        }
    }
}
