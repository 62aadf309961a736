//! `door.sock`: the Python server says which sandboxes there are. One JSON object a line.

use super::Door;
use super::connection::{self, ConnectError};
use super::link::{Ending, Link};
use super::log;
use super::registry::{Attached, ProcessDefaults, Token};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Longest line taken.
const MAX_LINE: u64 = 4 << 20;

/// Lines that may wait for a peer that does not read; then its connection ends.
const MAX_WAITING: usize = 64 << 10;

/// How long attach waits for READY when the request does not say.
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

struct Refusal {
    code: &'static str,
    message: String,
}

fn invalid(message: impl Into<String>) -> Refusal {
    Refusal { code: "invalid_request", message: message.into() }
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
                        Err(Refusal { code, message }) => {
                            json!({"id": request.id, "error": {"code": code, "message": message}})
                        }
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
        _ => Err(invalid(format!("unknown op {op:?}"))),
    }
}

async fn attach(door: &Arc<Door>, request: Attach) -> Result<Value, Refusal> {
    let Attach { sandbox, socket, token, process, deadline_ms } = request;
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
        door.registry.insert(sandbox, Attached { token, defaults, ..attached });
        return Ok(json!({"generation": generation, "version": shoal_wire::VERSION, "ready_us": 0}));
    }
    let deadline = started + Duration::from_millis(deadline_ms.min(MAX_DEADLINE_MS));
    let (stream, ready) = connection::connect(&socket, deadline).await.map_err(|error| {
        let code = if matches!(error, ConnectError::Timeout) { "start_timeout" } else { "start_failed" };
        Refusal { code, message: error.to_string() }
    })?;
    let ready_us = started.elapsed().as_micros() as u64;
    let link = Arc::new(Link::new());
    let generation = ready.generation;
    let attached = Attached { link: Arc::clone(&link), socket: socket.clone(), generation, token, defaults };
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
