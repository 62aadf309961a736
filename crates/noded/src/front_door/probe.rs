//! One look at whether a sandbox is ready: a port, an answer over HTTP, or a command of its own.
//!
//! The Python server asks as often as it likes; nothing here waits longer than it was told to.

use super::body::Body;
use super::exec::{self, NotStarted};
use super::link::{Channel, End, Head, Role};
use super::port_http::ask;
use super::port_stream::{NoPort, PortStream};
use super::problem::Problem;
use super::registry::Attached;
use super::request::drain;
use super::stream;
use bytes::Bytes;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper::{Request, StatusCode};
use serde::{Deserialize, Serialize};
use shoal_wire::{ExecAttach, ExecList, Exited, Kind, Outcome, Writer};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Bytes kept of each of a command's streams, to say why it failed.
const TAIL: usize = 2048;

/// Bytes of that in a sentence.
const WORDS: usize = 400;

/// How long the agent may take to tell of a command that it has killed at its deadline.
const LATE: Duration = Duration::from_secs(1);

/// What makes a sandbox ready: exactly one of a port, a port with a path, and a command.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Probe {
    /// It answers a GET with a status from 200 to 399.
    Http(Http),
    /// Something listens.
    Port(Port),
    /// It exits with 0.
    Command(Command),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    port: u16,
    path: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    port: u16,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    command: Vec<String>,
}

/// What a look saw.
#[derive(Debug, Serialize)]
pub struct Seen {
    ready: bool,
    /// Why it is not ready, for a person.
    detail: String,
    /// How the main command ended, if it did.
    ended: Option<Ended>,
}

/// How a command ended.
#[derive(Debug, Serialize)]
pub struct Ended {
    outcome: &'static str,
    exit_code: Option<i32>,
    signal: Option<i32>,
    /// The last that it printed.
    stdout_tail: String,
    stderr_tail: String,
}

/// Looks once.
pub async fn look(
    attached: &Attached,
    probe: Probe,
    main: Option<String>,
    patience: Duration,
) -> Result<Seen, Problem> {
    let deadline = Instant::now() + patience;
    let why = match probe {
        Probe::Http(Http { port, path }) => answers(attached, port, &path, deadline).await?,
        Probe::Port(Port { port }) => match PortStream::connect(&attached.link, port, deadline).await {
            Ok(stream) => {
                stream.close();
                None
            }
            Err(no_port) => Some(describe(no_port, port)?),
        },
        Probe::Command(Command { command }) => succeeds(attached, command, patience).await?,
    };
    let ended = match main {
        Some(exec_id) => timeout_at(deadline.max(Instant::now() + LATE), ended(attached, exec_id)).await,
        None => Ok(Ok(None)),
    };
    let ended = ended.map_err(|_| Problem::deadline_exceeded("the guest agent does not answer"))??;
    Ok(Seen { ready: why.is_none(), detail: why.unwrap_or_default(), ended })
}

/// Why there is no connection, unless the sandbox itself is at fault.
fn describe(no_port: NoPort, port: u16) -> Result<String, Problem> {
    match no_port {
        NoPort::Sandbox(problem) => Err(problem),
        other => Ok(other.into_problem(port).detail().to_owned()),
    }
}

/// Asks for a path; `None`: the answer is good.
async fn answers(attached: &Attached, port: u16, path: &str, deadline: Instant) -> Result<Option<String>, Problem> {
    let request = Request::get(path)
        .header(HOST, format!("localhost:{port}"))
        .header(USER_AGENT, "shoal-probe")
        .header(CONNECTION, "close")
        .body(Body::empty())
        .map_err(|error| Problem::invalid(format!("path {path:?}: {error}")))?;
    let stream = match PortStream::connect(&attached.link, port, deadline).await {
        Ok(stream) => stream,
        Err(no_port) => return describe(no_port, port).map(Some),
    };
    Ok(match timeout_at(deadline, ask(stream, request, std::future::pending())).await {
        Ok(Ok((response, keep))) => {
            let status = response.status();
            // A server that is cut off in the middle of its answer would complain in its log, at each look.
            let mut rest = response.into_body();
            tokio::spawn(async move {
                drain(&mut rest).await;
                drop(keep);
            });
            let good = status.is_success() || status.is_redirection();
            (!good).then(|| format!("GET {path} on port {port} gives {}", words(status)))
        }
        Ok(Err(error)) => Some(format!("GET {path} on port {port}: {error}")),
        Err(_) => Some(format!("GET {path} on port {port} was not answered in time")),
    })
}

fn words(status: StatusCode) -> String {
    status
        .canonical_reason()
        .map_or_else(|| status.as_str().to_owned(), |reason| format!("{} {reason}", status.as_str()))
}

/// Runs a command to its end, or to that of its time; `None`: it exited with 0.
async fn succeeds(attached: &Attached, argv: Vec<String>, patience: Duration) -> Result<Option<String>, Problem> {
    let name = argv.first().cloned().unwrap_or_default();
    let mut start = exec::start_with_defaults(None, argv, &attached.defaults)?;
    start.timeout_ms = (patience.as_millis() as u64).max(1);
    let exec_id = start.exec_id.clone();
    let run = async {
        let mut channel = attached.link.open(Role::Exec(utf8(&exec_id)), Kind::ExecStart, start.encode()).await?;
        let (end, output) = read_out(&mut channel, true).await;
        drop(channel);
        // It was ours alone; the list of those that have ended is not long.
        let mut request = Writer::default();
        request.bytes(&exec_id);
        let forgotten = attached.call(Role::Call, Kind::ExecForget, request.into_bytes(), Problem::exec).await;
        // One that could not be told to be forgotten is forgotten when others have ended.
        drop(forgotten);
        match end {
            End::Exited(exited) if exited.outcome == Outcome::Exited && exited.code == 0 => Ok(None),
            End::Exited(exited) if exited.outcome == Outcome::NotStarted => {
                Ok(Some(NotStarted::from(&exited).describe(&name)))
            }
            End::Exited(exited) => Ok(Some(format!("{name} {}{}", how(&exited), output.words()))),
            End::Failed(failure) => Err(Problem::exec(&failure)),
            End::Ended(ending) => Err(ending.to_problem()),
            End::Done => Err(Problem::garbled()),
        }
    };
    let late = Instant::now() + patience + LATE;
    timeout_at(late, run).await.unwrap_or_else(|_| Ok(Some(format!("{name} did not end in time"))))
}

fn how(exited: &Exited) -> String {
    match exited.outcome {
        Outcome::Exited => format!("exited with {}", exited.code),
        Outcome::TimedOut => "did not end in time".to_owned(),
        _ => format!("was ended by signal {}", exited.signal),
    }
}

fn utf8(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Reads an exec's channel to its end; returns that, and the last of what came. Without `consume` the agent keeps all of
/// it for who reads it next.
async fn read_out(channel: &mut Channel, consume: bool) -> (End, Output) {
    let mut output = Output::default();
    match channel.head().await {
        Ok(Head::Started(_)) => {}
        Ok(Head::Ok(_)) => return (End::Done, output),
        Err(end) => return (end, output),
    }
    let acknowledger = channel.acknowledger();
    loop {
        match std::future::poll_fn(|cx| channel.poll_piece(cx)).await {
            Ok((piece, offsets)) => {
                if consume {
                    acknowledger.consumed(offsets);
                }
                output.push(&piece);
            }
            Err(end) => return (end, output),
        }
    }
}

/// The last of a command's output, taken out of the frames of a client's stream.
#[derive(Default)]
struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Output {
    fn push(&mut self, mut piece: &[u8]) {
        while let Some((header, rest)) = piece.split_first_chunk::<{ stream::HEADER_LEN }>() {
            let [kind, _, _, _, a, b, c, d] = *header;
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            let (payload, rest) = rest.split_at_checked(length).unwrap_or((rest, &[]));
            let tail = if kind == stream::STDERR { &mut self.stderr } else { &mut self.stdout };
            tail.extend_from_slice(last(payload, TAIL));
            tail.drain(..tail.len().saturating_sub(TAIL));
            piece = rest;
        }
    }

    /// What it said of its failure, ready to be put behind other words.
    fn words(&self) -> String {
        let said = if self.stderr.trim_ascii().is_empty() { &self.stdout } else { &self.stderr };
        let said = text(last(said.trim_ascii(), WORDS));
        if said.is_empty() { said } else { format!(": {said}") }
    }
}

/// The last `most` bytes.
fn last(bytes: &[u8], most: usize) -> &[u8] {
    bytes.get(bytes.len().saturating_sub(most)..).unwrap_or_default()
}

/// The end of a text that was cut anywhere.
fn text(bytes: &[u8]) -> String {
    let half = bytes.iter().take_while(|byte| **byte & 0xC0 == 0x80).count();
    // A character has three more bytes than its first at the most: what begins with more of them is no UTF-8.
    utf8(bytes.get(half.min(3)..).unwrap_or_default())
}

/// How the main command ended; `None`: it runs.
async fn ended(attached: &Attached, exec_id: String) -> Result<Option<Ended>, Problem> {
    let answer: Bytes = attached.call(Role::Listing, Kind::ExecList, Vec::new(), Problem::exec).await?;
    let known = ExecList::decode(&answer).map_err(|_| Problem::garbled())?;
    let Some(status) = known.execs.into_iter().find(|exec| exec.exec_id == exec_id.as_bytes()) else {
        return Err(Problem::exec(&shoal_wire::Failure { errno: libc::ENOENT, what: exec_id.into_bytes() }));
    };
    if status.outcome == Outcome::Running {
        return Ok(None);
    }
    // The list does not tell the signal. What it has printed is left for who asks why.
    let request = ExecAttach { exec_id: status.exec_id, ..ExecAttach::default() };
    let mut channel = attached.link.open(Role::Exec(exec_id), Kind::ExecAttach, request.encode()).await?;
    let (end, output) = read_out(&mut channel, false).await;
    let signal = match end {
        End::Exited(exited) => (exited.signal != 0).then_some(exited.signal),
        End::Ended(ending) => return Err(ending.to_problem()),
        // Somebody else reads it now.
        End::Failed(_) | End::Done => None,
    };
    Ok(Some(Ended {
        outcome: status.outcome.word(),
        exit_code: (status.outcome == Outcome::Exited).then_some(status.code),
        signal,
        stdout_tail: text(&output.stdout),
        stderr_tail: text(&output.stderr),
    }))
}
