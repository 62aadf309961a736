//! The public side: accepts connections, finds out whom a request is for.

use super::body::Body;
use super::link::Role;
use super::outlet::{Outlet, Tap};
use super::port_http;
use super::ports;
use super::problem::Problem;
use super::registry::Attached;
use super::request::{Query, check_exec_id, drain, percent_decode};
use super::{Door, exec, files, log, upload};
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, EXPECT, ORIGIN};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use shoal_wire::{Failure, Kind};
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::OwnedSemaphorePermit;

/// Longest head of a request.
const MAX_HEADER: usize = 64 << 10;

/// Bytes that hyper may hold for a connection in each direction, a little more at most.
pub const MAX_BUFFER: usize = 128 << 10;

/// A listener of either family.
pub enum Listener {
    /// On this machine.
    Unix(UnixListener),
    /// From elsewhere.
    Tcp(TcpListener),
}

/// Where a request comes from. It holds the connection's place among those that may be open.
#[derive(Clone)]
pub struct Caller {
    /// `None`: the unix socket, which only the node's owner can open.
    pub address: Option<IpAddr>,
    _places: Arc<Vec<OwnedSemaphorePermit>>,
}

/// Accepts clients for ever.
pub async fn serve(door: Arc<Door>, listener: Listener) {
    loop {
        let error = match &listener {
            Listener::Unix(listener) => match listener.accept().await {
                Ok((stream, _)) => {
                    admit(&door, stream, None);
                    continue;
                }
                Err(error) => error,
            },
            Listener::Tcp(listener) => match listener.accept().await {
                Ok((stream, address)) => {
                    // A frame is written whole; waiting for more to send would only delay it.
                    let _ = stream.set_nodelay(true);
                    admit(&door, stream, Some(address.ip()));
                    continue;
                }
                Err(error) => error,
            },
        };
        pause(&error).await;
    }
}

/// After a failed accept: at once when the client went away, else after a while, for there may be no descriptor left.
async fn pause(error: &io::Error) {
    if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) {
        return;
    }
    log::warning("accept_failed", &[("error", error.to_string().into())]);
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn admit<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(door: &Arc<Door>, stream: S, address: Option<IpAddr>) {
    let limits = address.map(|_| &door.from_tcp).into_iter().chain([&door.connections]);
    match limits.map(|limit| Arc::clone(limit).try_acquire_owned()).collect::<Result<Vec<_>, _>>() {
        Ok(places) => {
            let caller = Caller { address, _places: Arc::new(places) };
            tokio::spawn(connection(Arc::clone(door), stream, caller));
        }
        Err(_) => {
            // As many again may be told so; beyond that they are just closed.
            if let Ok(permit) = Arc::clone(&door.refusals).try_acquire_owned() {
                tokio::spawn(refuse(stream, permit));
            }
        }
    }
}

/// Says that there are too many connections, and closes this one.
async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, _permit: OwnedSemaphorePermit) {
    let problem = Problem::exhausted("too many connections are open").hint("close some, or try again in a moment");
    let body = problem.to_json();
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nContent-Length: {}\r\n\
         Retry-After: 1\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let answer = [head.as_bytes(), &body].concat();
    // A client that does not read it is not owed more.
    let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(&answer)).await;
}

async fn connection<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(door: Arc<Door>, stream: S, caller: Caller) {
    let header_timeout = door.header_timeout;
    let outlet = Arc::new(Outlet::default());
    let tap = Tap::new(stream, Arc::clone(&outlet));
    let service = service_fn(move |request| {
        let (door, outlet, caller) = (Arc::clone(&door), Arc::clone(&outlet), caller.clone());
        async move { Ok::<_, Infallible>(handle(&door, request, outlet, caller).await) }
    });
    // A client that breaks off, sends what is no HTTP or stays silent ends its own connection, and that is all.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_header_size(MAX_HEADER)
        .max_buf_size(MAX_BUFFER)
        .serve_connection(TokioIo::new(tap), service)
        .with_upgrades()
        .await;
}

async fn handle(door: &Arc<Door>, request: Request<Incoming>, outlet: Arc<Outlet>, caller: Caller) -> Response<Body> {
    if request.method() == Method::CONNECT {
        return Problem::method_not_allowed("CONNECT", "GET, POST, PUT, DELETE").into_response();
    }
    let (mut parts, mut body) = request.into_parts();
    match port_http::wanted(&parts) {
        Ok(None) => {}
        Ok(Some(wanted)) => return port_http::serve(door, wanted, Request::from_parts(parts, body), caller).await,
        Err(problem) => return refuse_request(problem, &parts, &mut body).await,
    }
    // No page is served that would have a reason to ask, so whatever page a browser sends this for is foreign.
    if parts.headers.contains_key(ORIGIN) {
        let problem = Problem::forbidden("the request was made by a web page")
            .hint("pages may use the ports of a sandbox, and nothing else of the node");
        return refuse_request(problem, &parts, &mut body).await;
    }
    let Some((attached, tail)) = data_plane(door, parts.uri.path()) else {
        if caller.address.is_some() {
            let problem = Problem::unauthenticated("the control plane is not served over TCP")
                .hint("use the node's unix socket; over TCP there are the ports, execs and files of a known sandbox");
            return refuse_request(problem, &parts, &mut body).await;
        }
        return door.proxy.forward(Request::from_parts(parts, body)).await.unwrap_or_else(Problem::into_response);
    };
    let served = async {
        attached.authorize(parts.headers.get(AUTHORIZATION).map(hyper::header::HeaderValue::as_bytes))?;
        let query = Query::parse(parts.uri.query())?;
        if parts.version < Version::HTTP_11 {
            return Err(Problem::invalid("the data plane needs HTTP/1.1"));
        }
        if tail.starts_with("ports/") {
            return ports::route(&attached, &mut parts, &tail, query, caller, door.half_closed).await;
        }
        route(&attached, &parts.method, &tail, query, &mut body, outlet).await
    };
    match served.await {
        Ok(response) => response,
        Err(problem) => refuse_request(problem, &parts, &mut body).await,
    }
}

/// Answers with an error, after what the client still sends.
pub async fn refuse_request(problem: Problem, parts: &Parts, body: &mut Incoming) -> Response<Body> {
    if !parts.headers.contains_key(EXPECT) {
        drain(body).await;
    }
    problem.into_response()
}

/// The attached sandbox that a path belongs to, and what follows its id; `None`: not ours to serve.
fn data_plane(door: &Door, path: &str) -> Option<(Attached, String)> {
    let (id, tail) = path.strip_prefix("/v1/sandboxes/")?.split_once('/')?;
    // A port by itself, which is published or not, is a matter of the server.
    let ours = match tail.split('/').next()? {
        "execs" | "files" => true,
        "ports" => tail.splitn(3, '/').count() == 3,
        _ => false,
    };
    if !ours {
        return None;
    }
    Some((door.registry.get(id)?, tail.to_owned()))
}

async fn route(
    attached: &Attached,
    method: &Method,
    tail: &str,
    query: Query,
    body: &mut Incoming,
    outlet: Arc<Outlet>,
) -> Result<Response<Body>, Problem> {
    let mut segments = Vec::new();
    for segment in tail.split('/') {
        let segment = String::from_utf8(percent_decode(segment, false)?)
            .map_err(|_| Problem::invalid("the request's path is not UTF-8"))?;
        segments.push(segment);
    }
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    if let ["execs", exec_id, ..] = segments.as_slice() {
        check_exec_id(exec_id)?;
    }
    match (segments.as_slice(), method.as_str()) {
        (["execs"], "POST") => exec::start(attached, query, body, outlet).await,
        (["execs"], "GET") => exec::list(attached, query).await,
        (["execs", exec_id], "GET") => exec::state(attached, exec_id, query).await,
        (["execs", exec_id], "DELETE") => exec::forget(attached, exec_id, query).await,
        (["execs", exec_id, "stream"], "GET") => exec::attach(attached, exec_id, query, outlet).await,
        (["execs", exec_id, "consumed"], "POST") => exec::consumed(attached, exec_id, query, body).await,
        (["execs", exec_id, "stdin"], "POST") => exec::stdin(attached, exec_id, query, body).await,
        (["execs", exec_id, "signal"], "POST") => exec::signal(attached, exec_id, query, body).await,
        (["execs", exec_id, "resize"], "POST") => exec::resize(attached, exec_id, query, body).await,
        (["files"], "DELETE") => files::remove(attached, query).await,
        (["files", "content"], "GET") => files::read(attached, query).await,
        (["files", "content"], "PUT") => files::write(attached, query, body).await,
        (["files", "archive"], "GET") => files::pack(attached, query).await,
        (["files", "archive"], "PUT") => files::unpack(attached, query, body).await,
        (["files", "info"], "GET") => files::info(attached, query).await,
        (["files", "list"], "GET") => files::list(attached, query).await,
        (["files", "watch"], "GET") => files::watch(attached, query).await,
        (["files", "attributes"], "POST") => files::change(attached, query).await,
        (["files", "directory"], "POST") => files::make_directory(attached, query).await,
        (["files", "rename"], "POST") => files::rename(attached, query, body).await,
        (segments, method) => Err(match allowed(segments) {
            Some(allow) => Problem::method_not_allowed(method, allow),
            None => Problem::no_route(tail),
        }),
    }
}

/// The methods of a route; `None`: there is no such route.
fn allowed(segments: &[&str]) -> Option<&'static str> {
    match segments {
        ["execs"] => Some("GET, POST"),
        ["execs", _] => Some("DELETE, GET"),
        ["files"] => Some("DELETE"),
        ["execs", _, "stream"] | ["files", "info" | "list" | "watch"] => Some("GET"),
        ["execs", _, "consumed" | "stdin" | "signal" | "resize"] | ["files", "attributes" | "directory" | "rename"] => {
            Some("POST")
        }
        ["files", "content" | "archive"] => Some("GET, PUT"),
        _ => None,
    }
}

impl Attached {
    /// One request to the agent and its short answer.
    pub async fn call(
        &self,
        role: Role,
        kind: Kind,
        payload: Vec<u8>,
        problem: fn(&Failure) -> Problem,
    ) -> Result<Bytes, Problem> {
        let channel = self.link.open(role, kind, payload).await?;
        upload::settle(channel.head().await, problem)
    }
}
