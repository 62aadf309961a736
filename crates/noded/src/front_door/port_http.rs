//! HTTP to a server in a sandbox, for whoever may use its port: requests that name a sandbox and a port in their Host,
//! or in two headers of ours.
//!
//! A sandbox's pages are foreign code in the user's browser. What keeps them apart from each other is the browser's own
//! rule of origins: each port of each sandbox has a host name of its own, and no other plane is served under it.

use super::Door;
use super::body::Body;
use super::exec::no_content;
use super::port_enter;
use super::port_stream::{PortStream, tunnel};
use super::port_token::{self, Refused};
use super::ports::{open, parse_port, switching, wanted_protocol};
use super::problem::Problem;
use super::proxy::drop_hop_by_hop;
use super::registry::Attached;
use super::request::text;
use super::server::{Caller, MAX_BUFFER, refuse_request};
use hyper::body::{Body as HttpBody, Incoming};
use hyper::client::conn::http1;
use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue,
    ORIGIN, SET_COOKIE, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::future::pending;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::pin;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::timeout;

const SANDBOX: HeaderName = HeaderName::from_static("x-shoal-sandbox");
const PORT: HeaderName = HeaderName::from_static("x-shoal-port");
const TOKEN: HeaderName = HeaderName::from_static("x-shoal-token");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Name of the cookie that holds a browser's token.
const COOKIE_NAME: &str = "shoal_port";

/// The one path of a port's host that is ours.
const ENTER: &str = "/.shoal/enter";

/// Longest token.
const MAX_TOKEN: usize = 1024;

/// How long a connection may take to end when its answer is no longer wanted.
const GOODBYE: Duration = Duration::from_secs(1);

/// The port that a request is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    sandbox: String,
    port: u16,
    /// The host as the client knows it.
    host: String,
}

/// How a request got in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admitted {
    /// Anybody may.
    Public,
    /// It holds a token.
    Token,
    /// Its browser holds one, and sends it whoever made the request.
    Cookie,
}

/// The port that a request is for; `None`: it is for the node.
pub fn wanted(parts: &Parts) -> Result<Option<Wanted>, Problem> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let header = hosts.next();
    if hosts.next().is_some() {
        return Err(Problem::invalid("the request has two Host headers"));
    }
    // Source: RFC 9112, 3.2.2: a host in the request's target is the one that counts.
    let host = parts.uri.authority().map_or_else(
        || header.and_then(|host| host.to_str().ok()).unwrap_or_default(),
        hyper::http::uri::Authority::as_str,
    );
    // Source: RFC 9110, 4.2.4: what stands before an `@` is there to mislead.
    if host.contains('@') {
        return Err(Problem::invalid("the request's host has a user in it"));
    }
    let named = match (parts.headers.get(&SANDBOX), parts.headers.get(&PORT)) {
        (Some(sandbox), Some(port)) => {
            let plain = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
            Some((plain(sandbox), plain(port)))
        }
        (None, None) => of_host(host),
        _ => {
            return Err(Problem::invalid("the request has one of X-Shoal-Sandbox and X-Shoal-Port")
                .hint("send both, or use the port's own host name"));
        }
    };
    let Some((sandbox, port)) = named else { return Ok(None) };
    Ok(Some(Wanted { sandbox, port: parse_port(&port)?, host: host.to_owned() }))
}

/// Sandbox and port in `PORT-SANDBOX.ANYTHING`.
fn of_host(host: &str) -> Option<(String, String)> {
    let (label, rest) = host.split_once('.')?;
    let (port, sandbox) = label.split_once('-')?;
    let sandbox = sandbox.to_ascii_lowercase();
    let fits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let named = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':');
    let anything = !rest.is_empty() && !rest.starts_with(':') && rest.bytes().all(named);
    (fits && anything && sandbox.starts_with("sb-")).then(|| (sandbox, port.to_owned()))
}

/// Serves a request for a port.
pub async fn serve(door: &Door, wanted: Wanted, request: Request<Incoming>, caller: Caller) -> Response<Body> {
    let (mut parts, mut body) = request.into_parts();
    let (attached, admitted) = match admit(door, &wanted, &parts, &mut body).await {
        Ok(Entrance::To(attached, admitted)) => (attached, admitted),
        Ok(Entrance::Answered(response)) => return response,
        Err(problem) => return refuse_request(problem, &parts, &mut body).await,
    };
    let upgrade = parts.extensions.remove::<OnUpgrade>();
    let asked = wanted_protocol(&parts.headers).map(str::to_owned);
    let over = || over(attached.clone(), wanted.port, admitted);
    match forward(&attached, &wanted, parts, body, &caller, asked.as_deref(), over()).await {
        Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
            let client = upgrade.filter(|_| asked.is_some());
            switch(response, client, &wanted, caller, door.half_closed, over())
        }
        Ok(response) => response,
        Err(problem) => problem.into_response(),
    }
}

/// Waits until who was admitted no longer is: a port that was public is taken back.
async fn over(attached: Attached, port: u16, admitted: Admitted) {
    match admitted {
        Admitted::Public => attached.private(port).await,
        Admitted::Token | Admitted::Cookie => pending().await,
    }
}

enum Entrance {
    /// The request goes to this sandbox.
    To(Attached, Admitted),
    /// It was for us.
    Answered(Response<Body>),
}

/// Lets a request through, or not.
async fn admit(door: &Door, wanted: &Wanted, parts: &Parts, body: &mut Incoming) -> Result<Entrance, Problem> {
    let attached = door.registry.get(&wanted.sandbox).ok_or_else(Problem::sandbox_not_found)?;
    if parts.uri.path() == ENTER {
        return enter(&attached, wanted, parts, body).await.map(Entrance::Answered);
    }
    let admitted = authorize(&attached, wanted, &parts.headers)?;
    let safe = matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
    if admitted == Admitted::Cookie && (!safe || wanted_protocol(&parts.headers).is_some()) {
        check_origin(wanted, &parts.headers)?;
    }
    Ok(Entrance::To(attached, admitted))
}

fn authorize(attached: &Attached, wanted: &Wanted, headers: &HeaderMap) -> Result<Admitted, Problem> {
    if attached.public_ports.borrow().contains(&wanted.port) {
        return Ok(Admitted::Public);
    }
    if let Some(token) = headers.get(&TOKEN) {
        let checked = port_token::check(attached, &wanted.sandbox, wanted.port, token.as_bytes());
        return checked.map(|()| Admitted::Token).map_err(refusal);
    }
    let mut refused = Problem::unauthenticated("this port is not public, and no token was sent");
    // A page of a neighbouring host may have put a second cookie of this name in the way; any good one will do.
    for token in cookies(headers).filter_map(|(name, value)| (name == COOKIE_NAME).then_some(value)) {
        match port_token::check_made(attached, &wanted.sandbox, wanted.port, token) {
            Ok(()) => return Ok(Admitted::Cookie),
            Err(why) => refused = refusal(why),
        }
    }
    Err(refused.hint("send the sandbox's access token or a token for this port as X-Shoal-Token"))
}

fn refusal(refused: Refused) -> Problem {
    Problem::unauthenticated(match refused {
        Refused::Wrong => "the token does not open this port",
        Refused::Expired => "the token for this port has expired",
    })
    .hint("make a new one for this port with the sandbox's access token")
}

/// Refuses what another site's page had the browser send.
fn check_origin(wanted: &Wanted, headers: &HeaderMap) -> Result<(), Problem> {
    let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
    let own =
        origin.to_str().ok().and_then(|origin| origin.split_once("://")).is_some_and(|(scheme, host)| {
            matches!(scheme, "http" | "https") && host.eq_ignore_ascii_case(&wanted.host)
        });
    if own { Ok(()) } else { Err(Problem::forbidden("the request comes from a page of another origin")) }
}

/// Names and values of all cookies.
fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&str, &[u8])> {
    headers.get_all(COOKIE).iter().flat_map(|header| header.as_bytes().split(|byte| *byte == b';')).filter_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let (name, value) = pair.split_at_checked(at)?;
        Some((std::str::from_utf8(name.trim_ascii()).ok()?, value.get(1..)?.trim_ascii()))
    })
}

/// `/.shoal/enter`: gives a browser its cookie. The token comes in a body that no log has, and never in a URL.
async fn enter(
    attached: &Attached,
    wanted: &Wanted,
    parts: &Parts,
    body: &mut Incoming,
) -> Result<Response<Body>, Problem> {
    match parts.method {
        Method::GET => Ok(port_enter::page()),
        Method::POST => {
            check_origin(wanted, &parts.headers)?;
            let token = text(body, MAX_TOKEN).await?;
            let token = token.trim();
            port_token::check_made(attached, &wanted.sandbox, wanted.port, token.as_bytes()).map_err(refusal)?;
            let cookie = format!("{COOKIE_NAME}={token}; HttpOnly; SameSite=Strict; Path=/");
            let cookie = HeaderValue::from_str(&cookie).map_err(|_| Problem::invalid("the token fits no cookie"))?;
            let mut response = no_content();
            response.headers_mut().insert(SET_COOKIE, cookie);
            Ok(response)
        }
        ref method => Err(Problem::method_not_allowed(method.as_str(), "GET, POST")),
    }
}

/// Passes a request on to the server in the sandbox, over a connection of its own, and its answer back.
async fn forward(
    attached: &Attached,
    wanted: &Wanted,
    mut parts: Parts,
    body: Incoming,
    caller: &Caller,
    protocol: Option<&str>,
    over: impl Future<Output = ()> + Send + 'static,
) -> Result<Response<Body>, Problem> {
    rewrite(&mut parts, attached, wanted, caller, protocol)?;
    let head_only = parts.method == Method::HEAD;
    let stream = open(&attached.link, wanted.port).await?;
    let (response, keep) = ask(stream, Request::from_parts(parts, body), over).await.map_err(|error| {
        Problem::port_unreachable(wanted.port, &format!("the server there gave no answer: {error}"))
    })?;
    let (mut parts, body) = response.into_parts();
    parts.version = Version::HTTP_11;
    let kept: Vec<HeaderValue> =
        parts.headers.get_all(SET_COOKIE).iter().filter(|set| !sets_token(set)).cloned().collect();
    parts.headers.remove(SET_COOKIE);
    for set in kept {
        parts.headers.append(SET_COOKIE, set);
    }
    // The length as it was understood here is written anew: no two readers shall disagree about it.
    if !head_only && parts.status != StatusCode::NOT_MODIFIED {
        parts.headers.remove(CONTENT_LENGTH);
    }
    if parts.status != StatusCode::SWITCHING_PROTOCOLS {
        drop_hop_by_hop(&mut parts.headers);
    }
    Ok(Response::from_parts(parts, Body::Port(body, keep)))
}

/// Sends a request over a connection of its own.
///
/// Returns the answer, and what keeps the connection open: a moment after it is dropped, or this is cancelled, the
/// connection ends, whatever the server would still have to say. It ends at once when `over` does.
pub async fn ask<B>(
    stream: PortStream,
    request: Request<B>,
    over: impl Future<Output = ()> + Send + 'static,
) -> hyper::Result<(Response<Incoming>, oneshot::Sender<()>)>
where
    B: HttpBody<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let (mut sender, connection) =
        http1::Builder::new().title_case_headers(true).max_buf_size(MAX_BUFFER).handshake(TokioIo::new(stream)).await?;
    let (keep, dropped) = oneshot::channel();
    tokio::spawn(async move {
        let mut connection = pin!(connection.with_upgrades());
        tokio::select! {
            // What breaks here is told to whoever waits for the answer.
            _ = &mut connection => return,
            () = over => return,
            _ = dropped => {}
        }
        let _ = timeout(GOODBYE, connection).await;
    });
    Ok((sender.send_request(request).await?, keep))
}

/// Makes of a client's request the one that the server in the sandbox sees.
fn rewrite(
    parts: &mut Parts,
    attached: &Attached,
    wanted: &Wanted,
    caller: &Caller,
    protocol: Option<&str>,
) -> Result<(), Problem> {
    let bad = |_| Problem::invalid("the request's Host or Upgrade makes no sense");
    let kept: Vec<Vec<u8>> = parts.headers.get_all(COOKIE).iter().filter_map(without_token).collect();
    let headers = &mut parts.headers;
    drop_hop_by_hop(headers);
    // A body that a client holds back was asked for as soon as somebody here reads it.
    for name in [TOKEN, SANDBOX, PORT, COOKIE, FORWARDED, EXPECT] {
        headers.remove(name);
    }
    // What opens the data plane is not for the sandbox, though its owner may send it with everything.
    if attached.authorize(headers.get(AUTHORIZATION).map(HeaderValue::as_bytes)).is_ok() {
        headers.remove(AUTHORIZATION);
    }
    for cookie in kept {
        headers.append(COOKIE, HeaderValue::from_bytes(&cookie).map_err(bad)?);
    }
    let host = HeaderValue::from_str(&wanted.host).map_err(bad)?;
    let address = caller.address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)).to_string();
    headers.insert(FORWARDED_FOR, HeaderValue::from_str(&address).map_err(bad)?);
    headers.insert(FORWARDED_HOST, host.clone());
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    headers.insert(HOST, host);
    if let Some(protocol) = protocol {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_str(protocol).map_err(bad)?);
    } else {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    parts.version = Version::HTTP_11;
    if let Some(path) = parts.uri.path_and_query().cloned() {
        parts.uri = path.into();
    }
    Ok(())
}

/// Whether a Set-Cookie header would put another token in the place of ours.
fn sets_token(header: &HeaderValue) -> bool {
    let pair = header.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
    pair.split(|byte| *byte == b'=').next().unwrap_or_default().trim_ascii() == COOKIE_NAME.as_bytes()
}

/// A Cookie header without our cookie; `None` when nothing else is in it.
fn without_token(header: &HeaderValue) -> Option<Vec<u8>> {
    let foreign = |pair: &&[u8]| {
        let name = pair.split(|byte| *byte == b'=').next().unwrap_or_default();
        name.trim_ascii() != COOKIE_NAME.as_bytes()
    };
    let kept: Vec<&[u8]> =
        header.as_bytes().split(|byte| *byte == b';').filter(foreign).map(<[u8]>::trim_ascii).collect();
    let kept = kept.join(b"; ".as_slice());
    (!kept.is_empty()).then_some(kept)
}

/// The server in the sandbox goes on in another protocol: from here on bytes are carried as they are.
fn switch(
    mut response: Response<Body>,
    client: Option<OnUpgrade>,
    wanted: &Wanted,
    caller: Caller,
    silence: Duration,
    over: impl Future<Output = ()> + Send + 'static,
) -> Response<Body> {
    let protocol = response.headers().get(UPGRADE).cloned();
    let (Some(client), Some(protocol)) = (client, protocol) else {
        let why = "the server there changed the protocol, which nobody asked for";
        return Problem::port_unreachable(wanted.port, why).into_response();
    };
    let server = hyper::upgrade::on(&mut response);
    tokio::spawn(async move {
        // Whoever is gone by now needs nothing.
        if let (Ok(client), Ok(server)) = (client.await, server.await) {
            tokio::select! {
                () = tunnel(TokioIo::new(client), TokioIo::new(server), silence) => {}
                () = over => {}
            }
        }
        drop(caller);
    });
    let mut headers = std::mem::take(response.headers_mut());
    drop_hop_by_hop(&mut headers);
    let mut switched = switching(protocol);
    headers.extend(std::mem::take(switched.headers_mut()));
    *switched.headers_mut() = headers;
    switched
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_names_port_and_sandbox_or_neither() {
        let named = |host| of_host(host).map(|(sandbox, port)| format!("{sandbox} {port}"));
        assert_eq!(named("8000-sb-abc.localhost:41234").as_deref(), Some("sb-abc 8000"));
        assert_eq!(named("8000-SB-ABC.Ports.example.com").as_deref(), Some("sb-abc 8000"));
        assert_eq!(named("99999-sb-abc.x").as_deref(), Some("sb-abc 99999"));
        for host in [
            "",
            "localhost",
            "127.0.0.1:41234",
            "[::1]:41234",
            "8000-sb-abc",
            "8000-sb-abc.",
            "8000-sb-abc.:80",
            "8000-sb-abc:80",
            "-sb-abc.x",
            "+80-sb-abc.x",
            "10-0-0-1.example.com",
            "sb-abc.localhost",
            "x.8000-sb-abc.localhost",
            "8000-sb-abc.x/<b>",
            "8000-sb-abc.x@evil.example",
            "8000-sb-abc.x y",
        ] {
            assert_eq!(named(host), None, "{host}");
        }
    }

    #[test]
    fn only_our_cookie_is_taken_out() {
        let kept = |header: &str| {
            without_token(&HeaderValue::from_str(header).unwrap()).map(|kept| String::from_utf8(kept).unwrap())
        };
        assert_eq!(kept("a=1; shoal_port=secret; b=x=y").as_deref(), Some("a=1; b=x=y"));
        assert_eq!(kept("shoal_port=one;shoal_port=two"), None);
        assert_eq!(kept(" shoal_port = secret ;a").as_deref(), Some("a"));
        assert_eq!(kept("shoal_portal=1; shoal_port=").as_deref(), Some("shoal_portal=1"));
    }
}
