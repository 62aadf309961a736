//! Execs: start, stream, stdin, signals.

use super::body::{Body, ExecBody};
use super::link::{End, Head, Role};
use super::outlet::Outlet;
use super::problem::{self, Problem};
use super::registry::{Attached, ProcessDefaults};
use super::request::{Query, check_exec_id, check_no_nul, check_path, json};
use super::{stream, upload};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use shoal_wire::{
    DETACH, EOF, ExecAttach, ExecInput, ExecList, ExecResize, ExecSignal, ExecStart, Exited, Failure, Kind, Outcome,
    Stage, Writer,
};
use std::collections::HashSet;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Longest wait for an exec's end.
const MAX_WAIT: Duration = Duration::from_mins(10);

/// Names and values in the order in which they were given; a name that is given twice is an error.
#[derive(Debug, Default)]
struct Env(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Env {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Env;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Env, A::Error> {
                let mut names = HashSet::new();
                let mut pairs = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("name {name:?} is given twice")));
                    }
                    pairs.push((name, value));
                }
                Ok(Env(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PtySize {
    #[serde(default = "default_rows")]
    rows: u16,
    #[serde(default = "default_cols")]
    cols: u16,
}

fn default_rows() -> u16 {
    24
}

fn default_cols() -> u16 {
    80
}

/// `types.ExecRequest`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExecRequest {
    argv: Vec<String>,
    exec_id: Option<String>,
    #[serde(default)]
    env: Env,
    cwd: Option<String>,
    user: Option<String>,
    #[serde(default)]
    stdin: bool,
    pty: Option<PtySize>,
    timeout: Option<f64>,
    #[serde(default)]
    detached: bool,
}

impl ExecRequest {
    /// Checks everything and fills in the sandbox's defaults.
    fn into_start(self, defaults: &ProcessDefaults) -> Result<ExecStart, Problem> {
        if self.argv.first().is_none_or(String::is_empty) {
            return Err(Problem::invalid("argv names no program").hint("give at least the program's name or path"));
        }
        for argument in &self.argv {
            check_no_nul("argv", argument.as_bytes())?;
        }
        for (name, value) in &self.env.0 {
            if name.is_empty() || name.contains(['=', '\0']) {
                let problem = Problem::invalid(format!("env has the name {name:?}"));
                return Err(problem.hint("a name is not empty and has neither = nor NUL in it"));
            }
            check_no_nul(&format!("env value of {name}"), value.as_bytes())?;
        }
        let exec_id = match self.exec_id {
            Some(exec_id) => {
                check_exec_id(&exec_id)?;
                exec_id
            }
            None => random_id().map_err(|error| Problem::exhausted(format!("no random bytes: {error}")))?,
        };
        let make_cwd = self.cwd.is_none();
        let cwd = self.cwd.unwrap_or_else(|| defaults.cwd.clone());
        if !cwd.is_empty() || !make_cwd {
            check_path("cwd", cwd.as_bytes())?;
        }
        let user = self.user.unwrap_or_else(|| defaults.user.clone());
        check_no_nul("user", user.as_bytes())?;
        let size = self.pty.as_ref().map_or((0, 0), |pty| (pty.rows, pty.cols));
        if self.pty.is_some() {
            check_size(size.0, size.1)?;
        }
        Ok(ExecStart {
            exec_id: exec_id.into_bytes(),
            argv: self.argv.into_iter().map(String::into_bytes).collect(),
            env: overlay(&defaults.env, &self.env.0),
            cwd: cwd.into_bytes(),
            make_cwd,
            user: user.into_bytes(),
            stdin: self.stdin,
            pty: self.pty.is_some(),
            rows: size.0,
            cols: size.1,
            timeout_ms: self.timeout.map_or(Ok(0), timeout_ms)?,
            detached: self.detached,
        })
    }
}

fn check_size(rows: u16, cols: u16) -> Result<(), Problem> {
    if rows == 0 || cols == 0 {
        return Err(Problem::invalid(format!("a terminal of {rows} rows and {cols} columns")));
    }
    Ok(())
}

/// The sandbox's environment, with the request's on top of it. Each name occurs once.
fn overlay(defaults: &[String], request: &[(String, String)]) -> Vec<Vec<u8>> {
    let overridden: HashSet<&str> = request.iter().map(|(name, _)| name.as_str()).collect();
    let mut seen = HashSet::new();
    // Of two defaults of one name the later one counts, as in a shell; hence from the end.
    let mut env: Vec<Vec<u8>> = defaults
        .iter()
        .rev()
        .filter(|pair| {
            let name = pair.split_once('=').map_or(pair.as_str(), |(name, _)| name);
            !overridden.contains(name) && seen.insert(name)
        })
        .map(|pair| pair.clone().into_bytes())
        .collect();
    env.reverse();
    env.extend(request.iter().map(|(name, value)| format!("{name}={value}").into_bytes()));
    env
}

fn timeout_ms(seconds: f64) -> Result<u64, Problem> {
    if !seconds.is_finite() || seconds <= 0.0 {
        return Err(Problem::invalid(format!("timeout is {seconds}"))
            .hint("give seconds above 0, or leave it out to let the command live as long as the sandbox"));
    }
    // A float that is too large becomes the largest number, which is for ever.
    Ok(((seconds * 1000.0).ceil() as u64).max(1))
}

/// `ex-` and 26 characters of 5 random bits each.
fn random_id() -> std::io::Result<String> {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut random = [0_u8; 26];
    // SAFETY: the kernel writes at most `random.len()` bytes into `random`.
    let got = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
    if got != random.len() as isize {
        return Err(std::io::Error::last_os_error());
    }
    let characters = random.iter().filter_map(|byte| ALPHABET.get(usize::from(byte % 32)));
    Ok("ex-".chars().chain(characters.map(|byte| char::from(*byte))).collect())
}

/// A command that leaves everything but its words to the sandbox's defaults.
pub fn start_with_defaults(
    exec_id: Option<String>,
    argv: Vec<String>,
    defaults: &ProcessDefaults,
) -> Result<ExecStart, Problem> {
    ExecRequest { argv, exec_id, ..ExecRequest::default() }.into_start(defaults)
}

/// Why a command did not start.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct NotStarted {
    errno: i32,
    #[serde(serialize_with = "stage_word")]
    stage: Stage,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the form that serde calls")]
fn stage_word<S: Serializer>(stage: &Stage, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(stage.word())
}

impl From<&Exited> for NotStarted {
    fn from(exited: &Exited) -> Self {
        Self { errno: exited.errno, stage: exited.stage }
    }
}

impl NotStarted {
    /// The same for a person; `name` is the command's.
    pub fn describe(self, name: &str) -> String {
        let why = problem::describe(&Failure { errno: self.errno, what: Vec::new() });
        format!("{name} did not start: {why} (errno {}, stage {})", self.errno, self.stage.word())
    }
}

/// Starts a command that goes on whether anybody reads its output or not; returns its pid, or why it did not start.
/// One that runs under this id already is left as it is.
pub async fn start_detached(
    attached: &Attached,
    exec_id: String,
    argv: Vec<String>,
) -> Result<Result<u32, NotStarted>, Problem> {
    let mut start = start_with_defaults(Some(exec_id.clone()), argv, &attached.defaults)?;
    start.detached = true;
    let channel = attached.link.open(Role::Exec(exec_id), Kind::ExecStart, start.encode()).await?;
    match channel.head().await {
        Ok(Head::Started(started)) => Ok(Ok(started.pid)),
        Err(End::Exited(exited)) => Ok(Err(NotStarted::from(&exited))),
        Err(End::Failed(failure)) => Err(Problem::exec(&failure)),
        Err(End::Ended(ending)) => Err(ending.to_problem()),
        Ok(Head::Ok(_)) | Err(End::Done) => Err(Problem::garbled()),
    }
}

/// Whose word it is that output was consumed.
enum Reader {
    /// It is when the client's socket has taken it.
    Socket(Arc<Outlet>),
    /// It is when the client says so, which loses nothing where a connection leads through buffers.
    Client,
    /// Nobody reads now.
    Nobody,
}

impl Reader {
    /// Takes the parameter `ack`.
    fn parse(query: &mut Query, outlet: Arc<Outlet>) -> Result<Self, Problem> {
        match query.bytes("ack").as_deref() {
            None => Ok(Self::Socket(outlet)),
            Some(b"client") => Ok(Self::Client),
            Some(_) => Err(Problem::invalid("ack is neither left out nor client")),
        }
    }
}

/// `POST execs`.
pub async fn start(
    attached: &Attached,
    mut query: Query,
    body: &mut Incoming,
    outlet: Arc<Outlet>,
) -> Result<Response<Body>, Problem> {
    let mut reader = Reader::parse(&mut query, outlet)?;
    query.finish()?;
    let request: ExecRequest = json(body).await?;
    let start = request.into_start(&attached.defaults)?;
    if start.detached {
        reader = Reader::Nobody;
    }
    let exec_id = String::from_utf8_lossy(&start.exec_id).into_owned();
    stream_of(attached, exec_id, Kind::ExecStart, start.encode(), reader).await
}

/// `GET execs/{eid}/stream`.
pub async fn attach(
    attached: &Attached,
    exec_id: &str,
    mut query: Query,
    outlet: Arc<Outlet>,
) -> Result<Response<Body>, Problem> {
    let request = ExecAttach {
        exec_id: exec_id.as_bytes().to_vec(),
        stdout_offset: query.number("stdout_offset")?.unwrap_or(0),
        stderr_offset: query.number("stderr_offset")?.unwrap_or(0),
    };
    let reader = Reader::parse(&mut query, outlet)?;
    query.finish()?;
    stream_of(attached, exec_id.to_owned(), Kind::ExecAttach, request.encode(), reader).await
}

/// Answers with the stream of an exec once the agent says that it runs, or how it ended.
async fn stream_of(
    attached: &Attached,
    exec_id: String,
    kind: Kind,
    payload: Vec<u8>,
    reader: Reader,
) -> Result<Response<Body>, Problem> {
    let channel = attached.link.open(Role::Exec(exec_id.clone()), kind, payload).await?;
    let body = match channel.head().await {
        Ok(Head::Started(started)) => {
            let outlet = match reader {
                Reader::Socket(outlet) => Some(outlet),
                Reader::Client => None,
                Reader::Nobody => {
                    let mut response = json_response(&stream::ExecStarted::new(&exec_id, &started));
                    *response.status_mut() = StatusCode::CREATED;
                    return Ok(response);
                }
            };
            Body::Exec(ExecBody::new(stream::started(&exec_id, &started), channel, outlet))
        }
        Ok(Head::Ok(_)) | Err(End::Done) => return Err(Problem::garbled()),
        Err(End::Failed(failure)) => return Err(Problem::exec(&failure)),
        Err(End::Ended(ending)) => return Err(ending.to_problem()),
        Err(end @ End::Exited(_)) => Body::full(stream::last(end).into()),
    };
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/vnd.shoal.stream"));
    Ok(response)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Consumed {
    stdout: u64,
    stderr: u64,
}

/// `POST execs/{eid}/consumed`.
pub async fn consumed(
    attached: &Attached,
    exec_id: &str,
    query: Query,
    body: &mut Incoming,
) -> Result<Response<Body>, Problem> {
    query.finish()?;
    let Consumed { stdout, stderr } = json(body).await?;
    if attached.link.consumed(exec_id, [stdout, stderr]) {
        return Ok(no_content());
    }
    // Nobody reads now. To attach there says the same; the channel is given up with the answer.
    let request = ExecAttach { exec_id: exec_id.as_bytes().to_vec(), stdout_offset: stdout, stderr_offset: stderr };
    let channel = attached.link.open(Role::Exec(exec_id.to_owned()), Kind::ExecAttach, request.encode()).await?;
    match channel.head().await {
        Ok(Head::Started(_)) | Err(End::Exited(_)) => Ok(no_content()),
        Ok(Head::Ok(_)) | Err(End::Done) => Err(Problem::garbled()),
        Err(End::Failed(failure)) => Err(Problem::exec(&failure)),
        Err(End::Ended(ending)) => Err(ending.to_problem()),
    }
}

#[derive(Serialize)]
struct ExecStatus {
    exec_id: String,
    pid: u32,
    argv: Vec<String>,
    outcome: &'static str,
    exit_code: Option<i32>,
    pty: bool,
}

#[derive(Serialize)]
struct ExecPage {
    execs: Vec<ExecStatus>,
}

/// `GET execs`.
pub async fn list(attached: &Attached, query: Query) -> Result<Response<Body>, Problem> {
    query.finish()?;
    let answer = attached.call(Role::Listing, Kind::ExecList, Vec::new(), Problem::exec).await?;
    let known = ExecList::decode(&answer).map_err(|_| Problem::garbled())?;
    let execs = known
        .execs
        .into_iter()
        .map(|exec| ExecStatus {
            exec_id: String::from_utf8_lossy(&exec.exec_id).into_owned(),
            pid: exec.pid,
            argv: exec.argv.iter().map(|argument| String::from_utf8_lossy(argument).into_owned()).collect(),
            outcome: exec.outcome.word(),
            exit_code: (exec.outcome == Outcome::Exited).then_some(exec.code),
            pty: exec.pty,
        })
        .collect();
    Ok(json_response(&ExecPage { execs }))
}

/// `types.ExecState`.
#[derive(Serialize)]
struct ExecState {
    exec_id: String,
    pid: u32,
    exit: Option<stream::ExecExit>,
}

/// `GET execs/{eid}`: how it ended, or that it still runs after so many seconds; its output stays where it is.
pub async fn state(attached: &Attached, exec_id: &str, mut query: Query) -> Result<Response<Body>, Problem> {
    let patience = query.seconds("wait")?.unwrap_or_default();
    query.finish()?;
    if patience > MAX_WAIT {
        return Err(Problem::invalid("wait is longer than 600 seconds").hint("ask again when it has passed"));
    }
    let mut request = Writer::default();
    request.bytes(exec_id.as_bytes());
    let mut channel = attached.link.open(Role::Wait, Kind::ExecWait, request.into_bytes()).await?;
    let mut pid = 0;
    let end = match channel.head().await {
        Ok(Head::Started(started)) => {
            pid = started.pid;
            match timeout(patience, poll_fn(|cx| channel.poll_piece(cx))).await {
                Ok(Err(end)) => Some(end),
                Ok(Ok(_)) => return Err(Problem::garbled()),
                Err(_) => None,
            }
        }
        Ok(Head::Ok(_)) => return Err(Problem::garbled()),
        Err(end) => Some(end),
    };
    let exit = match end {
        None => None,
        Some(End::Exited(exited)) => {
            pid = exited.pid;
            Some(stream::ExecExit::from(&exited))
        }
        Some(End::Failed(failure)) => return Err(Problem::exec(&failure)),
        Some(End::Ended(ending)) => return Err(ending.to_problem()),
        Some(End::Done) => return Err(Problem::garbled()),
    };
    Ok(json_response(&ExecState { exec_id: exec_id.to_owned(), pid, exit }))
}

/// `POST execs/{eid}/stdin`.
pub async fn stdin(
    attached: &Attached,
    exec_id: &str,
    mut query: Query,
    body: &mut Incoming,
) -> Result<Response<Body>, Problem> {
    let request =
        ExecInput { exec_id: exec_id.as_bytes().to_vec(), offset: query.number("offset")?.unwrap_or(u64::MAX) };
    let end = if query.flag("eof", false)? { EOF } else { DETACH };
    query.finish()?;
    let channel = attached.link.open(Role::Upload, Kind::ExecInput, request.encode()).await?;
    upload::forward(&channel, body, end, Problem::exec).await?;
    Ok(no_content())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SignalRequest {
    signal: u8,
    #[serde(default = "whole_tree")]
    tree: bool,
}

fn whole_tree() -> bool {
    true
}

/// `POST execs/{eid}/signal`.
pub async fn signal(
    attached: &Attached,
    exec_id: &str,
    query: Query,
    body: &mut Incoming,
) -> Result<Response<Body>, Problem> {
    query.finish()?;
    let SignalRequest { signal, tree } = json(body).await?;
    if !(1..=64).contains(&signal) {
        return Err(Problem::invalid(format!("signal {signal} is none")).hint("signals are numbered from 1 to 64"));
    }
    let request = ExecSignal { exec_id: exec_id.as_bytes().to_vec(), signal, tree };
    attached.call(Role::Call, Kind::ExecSignal, request.encode(), Problem::exec).await?;
    Ok(no_content())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResizeRequest {
    rows: u16,
    cols: u16,
}

/// `POST execs/{eid}/resize`.
pub async fn resize(
    attached: &Attached,
    exec_id: &str,
    query: Query,
    body: &mut Incoming,
) -> Result<Response<Body>, Problem> {
    query.finish()?;
    let ResizeRequest { rows, cols } = json(body).await?;
    check_size(rows, cols)?;
    let request = ExecResize { exec_id: exec_id.as_bytes().to_vec(), rows, cols };
    attached.call(Role::Call, Kind::ExecResize, request.encode(), Problem::exec).await?;
    Ok(no_content())
}

/// `DELETE execs/{eid}`.
pub async fn forget(attached: &Attached, exec_id: &str, query: Query) -> Result<Response<Body>, Problem> {
    query.finish()?;
    let mut request = Writer::default();
    request.bytes(exec_id.as_bytes());
    attached.call(Role::Call, Kind::ExecForget, request.into_bytes(), Problem::exec).await?;
    Ok(no_content())
}

/// 204.
pub fn no_content() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// 200 with a document.
pub fn json_response(document: &impl Serialize) -> Response<Body> {
    let mut response = Response::new(Body::full(serde_json::to_vec(document).unwrap_or_default()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start_of(request: &str) -> Result<ExecStart, Problem> {
        let defaults = ProcessDefaults {
            env: vec!["PATH=/bin".to_owned(), "A=1".to_owned(), "A=2".to_owned()],
            cwd: "/app".to_owned(),
            user: "dev".to_owned(),
        };
        let request: ExecRequest = serde_json::from_str(request).map_err(|e| Problem::invalid(e.to_string()))?;
        request.into_start(&defaults)
    }

    #[test]
    fn the_sandbox_s_defaults_fill_what_a_request_leaves_out() {
        let start = start_of(r#"{"argv":["id"],"env":{"B":"x=y"},"timeout":0.0001}"#).unwrap();
        assert_eq!(start.env, [b"PATH=/bin".to_vec(), b"A=2".to_vec(), b"B=x=y".to_vec()]);
        assert_eq!((start.cwd.as_slice(), start.make_cwd, start.user.as_slice()), (&b"/app"[..], true, &b"dev"[..]));
        assert_eq!((start.timeout_ms, start.stdin, start.pty), (1, false, false));
        assert_eq!(start.exec_id.len(), 29);
        let start =
            start_of(r#"{"argv":["id"],"env":{"A":""},"cwd":"/","user":"0","pty":{},"exec_id":"a.b"}"#).unwrap();
        assert_eq!(start.env, [b"PATH=/bin".to_vec(), b"A=".to_vec()]);
        assert_eq!((start.cwd.as_slice(), start.make_cwd, start.user.as_slice()), (&b"/"[..], false, &b"0"[..]));
        assert_eq!((start.pty, start.rows, start.cols, start.timeout_ms), (true, 24, 80, 0));
        assert_eq!(start.exec_id, b"a.b");
    }

    #[test]
    fn a_request_that_makes_no_sense_is_refused() {
        for bad in [
            r#"{"argv":[]}"#,
            r#"{"argv":[""]}"#,
            r#"{"argv":["a\u0000"]}"#,
            r#"{"argv":["a"],"env":{"":"x"}}"#,
            r#"{"argv":["a"],"env":{"A=B":"x"}}"#,
            r#"{"argv":["a"],"env":{"A":"x\u0000"}}"#,
            r#"{"argv":["a"],"env":{"A":"x","A":"y"}}"#,
            r#"{"argv":["a"],"cwd":"here"}"#,
            r#"{"argv":["a"],"cwd":""}"#,
            r#"{"argv":["a"],"user":"a\u0000"}"#,
            r#"{"argv":["a"],"timeout":0}"#,
            r#"{"argv":["a"],"timeout":-1}"#,
            r#"{"argv":["a"],"timeout":1e999}"#,
            r#"{"argv":["a"],"exec_id":"a/b"}"#,
            r#"{"argv":["a"],"exec_id":""}"#,
            r#"{"argv":["a"],"exec_id":"."}"#,
            r#"{"argv":["a"],"exec_id":".."}"#,
            r#"{"argv":["a"],"pty":{"rows":0}}"#,
            r#"{"argv":["a"],"shell":true}"#,
            r#"{"argv":"a"}"#,
            r"{}",
        ] {
            assert_eq!(start_of(bad).map_err(|problem| problem.code()), Err("invalid_argument"), "{bad}");
        }
    }
}
