//! The data plane's own ways to a port: wait until something listens, and raw bytes both ways.

use super::body::Body;
use super::exec::no_content;
use super::link::Link;
use super::port_stream::{CONNECT_DEADLINE, NoPort, PortStream, tunnel};
use super::problem::Problem;
use super::registry::Attached;
use super::request::Query;
use super::server::Caller;
use hyper::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Longest wait.
const MAX_WAIT: Duration = Duration::from_mins(10);

/// How long a wait lasts when the request does not say.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// Pauses between two looks: short at first, when it is likely that the server is about to listen.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Serves `ports/…` of one sandbox. `silence`: see [`tunnel`].
pub async fn route(
    attached: &Attached,
    parts: &mut Parts,
    tail: &str,
    query: Query,
    caller: Caller,
    silence: Duration,
) -> Result<Response<Body>, Problem> {
    let segments: Vec<&str> = tail.split('/').collect();
    let ["ports", port, verb @ ("wait" | "connect")] = segments.as_slice() else {
        return Err(Problem::no_route(tail));
    };
    let port = parse_port(port)?;
    match (*verb, parts.method.as_str()) {
        ("wait", "GET") => wait(attached, port, query).await,
        ("connect", "POST") => connect(attached, port, query, parts, caller, silence).await,
        ("wait", method) => Err(Problem::method_not_allowed(method, "GET")),
        (_, method) => Err(Problem::method_not_allowed(method, "POST")),
    }
}

/// Reads the number of a port.
pub fn parse_port(text: &str) -> Result<u16, Problem> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    // One port has one name: no plus sign, no zeros in front.
    text.parse()
        .ok()
        .filter(|_| digits && !text.starts_with('0'))
        .ok_or_else(|| Problem::invalid(format!("port {text:?} is none")).hint("ports are numbered from 1 to 65535"))
}

/// `GET ports/{port}/wait`.
async fn wait(attached: &Attached, port: u16, mut query: Query) -> Result<Response<Body>, Problem> {
    let patience = query.seconds("timeout")?.unwrap_or(DEFAULT_WAIT);
    query.finish()?;
    if patience > MAX_WAIT {
        return Err(Problem::invalid("timeout is longer than 600 seconds").hint("ask again when it has passed"));
    }
    let deadline = Instant::now() + patience;
    let mut pause = FIRST_PAUSE;
    loop {
        // One look is taken even when there is no time at all.
        let look = deadline.max(Instant::now() + Duration::from_millis(10));
        match PortStream::connect(&attached.link, port, look).await {
            Ok(stream) => {
                stream.close();
                return Ok(no_content());
            }
            Err(NoPort::Sandbox(problem)) => return Err(problem),
            Err(NoPort::Refused(_) | NoPort::Timeout) => {}
        }
        if Instant::now() + pause >= deadline {
            let detail = format!("nothing listened on port {port} within {} s", patience.as_secs_f64());
            return Err(Problem::deadline_exceeded(detail)
                .hint("the server in the sandbox may have failed to start: look at its output"));
        }
        sleep(pause).await;
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

/// `POST ports/{port}/connect`.
async fn connect(
    attached: &Attached,
    port: u16,
    query: Query,
    parts: &mut Parts,
    caller: Caller,
    silence: Duration,
) -> Result<Response<Body>, Problem> {
    query.finish()?;
    let upgrade = parts.extensions.remove::<OnUpgrade>();
    let (Some(upgrade), Some("tcp")) = (upgrade, wanted_protocol(&parts.headers)) else {
        return Err(Problem::invalid("the request does not ask for raw bytes")
            .hint("send `Connection: Upgrade` and `Upgrade: tcp`"));
    };
    let stream = open(&attached.link, port).await?;
    tokio::spawn(async move {
        // A client that is gone by now needs nothing.
        if let Ok(client) = upgrade.await {
            tunnel(TokioIo::new(client), stream, silence).await;
        }
        drop(caller);
    });
    Ok(switching(HeaderValue::from_static("tcp")))
}

/// Connects to a port, or says why not in a client's terms.
pub async fn open(link: &Arc<Link>, port: u16) -> Result<PortStream, Problem> {
    PortStream::connect(link, port, Instant::now() + CONNECT_DEADLINE).await.map_err(|none| none.into_problem(port))
}

/// The protocol that a request wants to go on in.
///
/// Source: RFC 9110, 7.8.
pub fn wanted_protocol(headers: &HeaderMap) -> Option<&str> {
    let asks = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).filter(|_| asks)?.to_str().ok()
}

/// 101.
pub fn switching(protocol: HeaderValue) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(UPGRADE, protocol);
    response
}
