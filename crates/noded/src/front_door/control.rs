//! `door.sock`: the Python server says which sandboxes there are. One JSON object a line.

use super::Door;
use super::connection::{self, ConnectError};
use super::exec::{NotStarted, start_detached};
use super::link::{Ending, Link};
use super::log;
use super::probe::{self, Probe};
use super::problem::Problem;
use super::registry::{Attached, ProcessDefaults, Token};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

/// Longest line taken.
const MAX_LINE: u64 = 4 << 20;

/// Lines that may wait for a peer that does not read; then its connection ends.
const MAX_WAITING: usize = 64 << 10;

/// How long the guest agent may take when the request does not say.
const DEADLINE_MS: u64 = 5_000;

/// No agent takes longer, whatever the request says.
const MAX_DEADLINE_MS: u64 = 600_000;

/// Everything that a connected server may be told.
pub type Peer = mpsc::Sender<String>;

#[derive(Deserialize)]
struct Request {
    id: Value,
    op: String,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Attach {
    sandbox: String,
    socket: PathBuf,
    token: String,
    #[serde(default)]
    process: ProcessDefaults,
    #[serde(default = "default_deadline")]
    deadline_ms: u64,
    /// Ports that anybody may use.
    #[serde(default)]
    public_ports: BTreeSet<u16>,
}

fn default_deadline() -> u64 {
    DEADLINE_MS
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Detach {
    sandbox: String,
    /// Member of `types.Reason`, passed on to clients.
    #[serde(default)]
    reason: Option<String>,
}

/// Another set of ports that anybody may use.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ports {
    sandbox: String,
    public_ports: BTreeSet<u16>,
}

/// A command that runs whether anybody reads its output or not.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Launch {
    sandbox: String,
    exec_id: String,
    argv: Vec<String>,
    #[serde(default = "default_deadline")]
    deadline_ms: u64,
}

/// One look at whether a sandbox is ready.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Look {
    sandbox: String,
    probe: Probe,
    /// The command whose end is told of.
    #[serde(default)]
    main: Option<String>,
    #[serde(default = "default_deadline")]
    deadline_ms: u64,
}

#[derive(Serialize)]
struct Refusal {
    code: &'static str,
    message: String,
    /// Why a command did not start, and where.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    not_started: Option<NotStarted>,
}

fn invalid(message: impl Into<String>) -> Refusal {
    Refusal { code: "invalid_request", message: message.into(), not_started: None }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self { code: problem.code(), message: problem.detail().to_owned(), not_started: None }
    }
}

/// Accepts the server's connections, as often as it is started.
pub async fn serve(door: Arc<Door>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(connection(Arc::clone(&door), stream));
            }
            Err(error) => {
                log::warning("control_accept_failed", &[("error", error.to_string().into())]);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(door: Arc<Door>, stream: UnixStream) {
    let (reader, writer) = stream.into_split();
    let (peer, lines) = mpsc::channel(MAX_WAITING);
    door.add_peer(peer.clone());
    let mut writing = tokio::spawn(write(writer, lines));
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = (&mut reader).take(MAX_LINE);
        let read = tokio::select! {
            read = limited.read_until(b'\n', &mut line) => read,
            _ = &mut writing => break,
        };
        match read {
            Ok(0) | Err(_) => break,
            Ok(_) if line.last() != Some(&b'\n') => {
                log::warning("control_line_too_long", &[("bytes", line.len().into())]);
                break;
            }
            Ok(_) => {}
        }
        match serde_json::from_slice::<Request>(&line) {
            Ok(request) => {
                let (door, peer) = (Arc::clone(&door), peer.clone());
                tokio::spawn(async move {
                    let reply = match act(&door, &request.op, request.rest).await {
                        Ok(value) => json!({"id": request.id, "ok": value}),
                        Err(refusal) => json!({"id": request.id, "error": refusal}),
                    };
                    // A peer that is gone needs no answer.
                    let _ = peer.send(reply.to_string()).await;
                });
            }
            Err(error) => {
                let reply =
                    json!({"id": null, "error": {"code": "invalid_request", "message": format!("request: {error}")}});
                if peer.send(reply.to_string()).await.is_err() {
                    break;
                }
            }
        }
    }
    writing.abort();
}

async fn write(mut writer: OwnedWriteHalf, mut lines: mpsc::Receiver<String>) {
    while let Some(mut line) = lines.recv().await {
        line.push('\n');
        if writer.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn act(door: &Arc<Door>, op: &str, fields: serde_json::Map<String, Value>) -> Result<Value, Refusal> {
    let fields = Value::Object(fields);
    match op {
        "hello" => Ok(json!({"version": env!("CARGO_PKG_VERSION")})),
        "attach" => attach(door, Attach::deserialize(fields).map_err(|e| invalid(format!("attach: {e}")))?).await,
        "detach" => {
            let request = Detach::deserialize(fields).map_err(|e| invalid(format!("detach: {e}")))?;
            if let Some(attached) = door.registry.remove(&request.sandbox) {
                attached.link.end(&Ending::Gone(request.reason));
                log::info("sandbox_detached", &[("sandbox", request.sandbox.into())]);
            }
            Ok(json!({}))
        }
        "ports" => {
            let request = Ports::deserialize(fields).map_err(|e| invalid(format!("ports: {e}")))?;
            if !door.registry.publish(&request.sandbox, request.public_ports) {
                return Err(Problem::sandbox_not_found().into());
            }
            Ok(json!({}))
        }
        "exec" => exec(door, Launch::deserialize(fields).map_err(|e| invalid(format!("exec: {e}")))?).await,
        "probe" => {
            let request = Look::deserialize(fields).map_err(|e| invalid(format!("probe: {e}")))?;
            let attached = find(door, &request.sandbox)?;
            let patience = Duration::from_millis(request.deadline_ms.min(MAX_DEADLINE_MS));
            Ok(json!(probe::look(&attached, request.probe, request.main, patience).await?))
        }
        _ => Err(invalid(format!("unknown op {op:?}"))),
    }
}

fn find(door: &Door, sandbox: &str) -> Result<Attached, Refusal> {
    door.registry.get(sandbox).ok_or_else(|| Problem::sandbox_not_found().into())
}

async fn exec(door: &Door, request: Launch) -> Result<Value, Refusal> {
    let Launch { sandbox, exec_id, argv, deadline_ms } = request;
    let attached = find(door, &sandbox)?;
    let name = argv.first().cloned().unwrap_or_default();
    let patience = Duration::from_millis(deadline_ms.min(MAX_DEADLINE_MS));
    let started = timeout(patience, start_detached(&attached, exec_id, argv)).await;
    match started.map_err(|_| Problem::deadline_exceeded("the guest agent does not answer"))?? {
        Ok(pid) => Ok(json!({"pid": pid})),
        Err(why) => Err(Refusal { code: "not_started", message: why.describe(&name), not_started: Some(why) }),
    }
}

async fn attach(door: &Arc<Door>, request: Attach) -> Result<Value, Refusal> {
    let Attach { sandbox, socket, token, process, deadline_ms, public_ports } = request;
    if sandbox.is_empty() || !sandbox.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        return Err(invalid(format!("sandbox {sandbox:?} is no id")));
    }
    if token.is_empty() {
        return Err(invalid("token is empty"));
    }
    let started = Instant::now();
    let (token, defaults) = (Arc::new(Token::new(token)), Arc::new(process));
    // A server that was started anew attaches what is attached: the connection and its streams stay.
    if let Some(attached) = door.registry.get(&sandbox)
        && attached.socket == socket
        && !attached.link.is_ended()
    {
        let generation = attached.generation;
        attached.public_ports.send_replace(public_ports);
        door.registry.insert(sandbox, Attached { token, defaults, ..attached });
        return Ok(json!({"generation": generation, "version": shoal_wire::VERSION, "ready_us": 0}));
    }
    let deadline = started + Duration::from_millis(deadline_ms.min(MAX_DEADLINE_MS));
    let (stream, ready) = connection::connect(&socket, deadline).await.map_err(|error| {
        let code = if matches!(error, ConnectError::Timeout) { "start_timeout" } else { "start_failed" };
        Refusal { code, message: error.to_string(), not_started: None }
    })?;
    let ready_us = started.elapsed().as_micros() as u64;
    let link = Arc::new(Link::new());
    let generation = ready.generation;
    let public_ports = Arc::new(watch::Sender::new(public_ports));
    let attached =
        Attached { link: Arc::clone(&link), socket: socket.clone(), generation, token, defaults, public_ports };
    if let Some(replaced) = door.registry.insert(sandbox.clone(), attached) {
        replaced.link.end(&Ending::Gone(None));
    }
    log::info("sandbox_attached", &[("sandbox", sandbox.clone().into()), ("ready_us", ready_us.into())]);
    tokio::spawn(watch(Arc::clone(door), sandbox, link, socket, stream, generation));
    Ok(json!({"generation": generation, "version": ready.version, "ready_us": ready_us}))
}

/// Serves a sandbox's connection to its end, and tells the server when that came unasked.
async fn watch(
    door: Arc<Door>,
    sandbox: String,
    link: Arc<Link>,
    socket: PathBuf,
    stream: UnixStream,
    generation: u64,
) {
    let Some(why) = connection::serve(Arc::clone(&link), socket, stream, generation, door.grace).await else { return };
    door.registry.remove_link(&sandbox, &link);
    log::warning("sandbox_lost", &[("sandbox", sandbox.clone().into()), ("why", why.clone().into())]);
    door.tell_peers(&json!({"event": "sandbox_lost", "sandbox": sandbox, "message": why}).to_string());
}
