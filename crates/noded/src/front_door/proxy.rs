//! What the front door does not serve itself goes to the Python server, streaming both ways.

use super::body::Body;
use super::problem::Problem;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{
    CONNECTION, HeaderMap, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until, timeout};

/// Idle connections kept.
const POOL: usize = 32;

/// How long one is kept; a burst's connections are not held for ever.
const IDLE: Duration = Duration::from_secs(5);

/// The listener is always there; an accept queue that stays full for so long is a server that hangs.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// How long the server may think after the last byte of a request's body. An image that was
/// uploaded is unpacked in this time.
const ANSWER_DEADLINE: Duration = Duration::from_mins(15);

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Connections to the Python server.
pub struct Proxy {
    socket: PathBuf,
    idle: Mutex<Pool>,
}

/// Connections that nobody uses, each with the time since when; the last one is used next.
#[derive(Default)]
struct Pool {
    connections: Vec<(Instant, Connection)>,
    sweeping: bool,
}

/// A connection to the Python server.
struct Connection {
    sender: SendRequest<Watched>,
    /// Something was read since this was last cleared.
    heard: Arc<AtomicBool>,
    /// It has served a request before, so the server may have closed it just now.
    reused: bool,
}

/// A connection's socket, which notes that the server said something.
struct Ear {
    inner: UnixStream,
    heard: Arc<AtomicBool>,
}

impl AsyncRead for Ear {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, into);
        if into.filled().len() > before {
            self.heard.store(true, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Ear {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }
    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A request's body, with the time at which it was last moved.
pub struct Watched {
    /// `None`: there are no bytes.
    body: Option<Incoming>,
    moved: Arc<Mutex<Instant>>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = hyper::Error;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(cx);
        if polled.is_ready() {
            *self.moved.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
        polled
    }
    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }
    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Proxy {
    /// Connects to `socket` when there is something to pass on.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, idle: Mutex::new(Pool::default()) }
    }

    /// Passes a request on and its answer back.
    ///
    /// A server may close an idle connection just as the next request goes out on it. A request that was not written
    /// at all takes another connection. One that was, and of which nobody knows whether the server saw it, is sent
    /// once more, on a fresh connection, if it has no body and repeating it does no harm.
    ///
    /// Source: RFC 9110, 9.2.2; RFC 9112, 9.3.1.
    pub async fn forward(self: &Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, Problem> {
        let (mut parts, body) = request.into_parts();
        drop_hop_by_hop(&mut parts.headers);
        parts.version = hyper::Version::HTTP_11;
        // A server may tell its client apart by path alone.
        if let Some(path) = parts.uri.path_and_query().cloned() {
            parts.uri = path.into();
        }
        let moved = Arc::new(Mutex::new(Instant::now()));
        let body = (!body.is_end_stream()).then_some(body);
        let mut again = (body.is_none() && repeats_safely(&parts.method)).then(|| parts.clone());
        let mut request = Request::from_parts(parts, Watched { body, moved: Arc::clone(&moved) });
        let mut fresh = false;
        loop {
            let mut connection = if fresh { self.connect().await? } else { self.connection().await? };
            connection.heard.store(false, Ordering::Relaxed);
            let answer = tokio::select! {
                answer = connection.sender.try_send_request(request) => answer,
                () = silence(&moved) => return Err(Problem::node_unavailable("the node's server does not answer")),
            };
            match answer {
                Ok(response) => {
                    self.keep(connection);
                    let (mut parts, body) = response.into_parts();
                    drop_hop_by_hop(&mut parts.headers);
                    return Ok(Response::from_parts(parts, Body::Proxied(body)));
                }
                Err(mut error) => {
                    let unsent = error.take_message().filter(|_| connection.reused);
                    let silent = connection.reused && !connection.heard.load(Ordering::Relaxed);
                    if let Some(unsent) = unsent {
                        request = unsent;
                    } else if let Some(parts) = again.take_if(|_| silent) {
                        request = Request::from_parts(parts, Watched { body: None, moved: Arc::clone(&moved) });
                        fresh = true;
                    } else {
                        let error = error.into_error();
                        let detail = format!("the node's server broke off: {error}");
                        return Err(Problem::node_unavailable(detail));
                    }
                }
            }
        }
    }

    /// A connection that is ready: an idle one, or else a fresh one.
    async fn connection(&self) -> Result<Connection, Problem> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).connections.pop();
            match idle {
                Some((_, connection)) if connection.sender.is_ready() => return Ok(connection),
                Some(_) => {}
                None => return self.connect().await,
            }
        }
    }

    /// A fresh connection.
    async fn connect(&self) -> Result<Connection, Problem> {
        let failed = |error: &dyn std::fmt::Display| {
            Problem::node_unavailable(format!("the node's server cannot be reached: {error}"))
        };
        let connect = async {
            loop {
                match UnixStream::connect(&self.socket).await {
                    // The accept queue is full: a burst.
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    other => return other,
                }
            }
        };
        let stream = timeout(CONNECT_DEADLINE, connect)
            .await
            .map_err(|_| Problem::node_unavailable("the node's server does not accept connections"))?
            .map_err(|error| failed(&error))?;
        let heard = Arc::new(AtomicBool::new(false));
        let ear = Ear { inner: stream, heard: Arc::clone(&heard) };
        let (sender, connection) = http1::handshake(TokioIo::new(ear)).await.map_err(|error| failed(&error))?;
        tokio::spawn(async move {
            // What breaks here is told to whoever waits for the answer.
            let _ = connection.await;
        });
        Ok(Connection { sender, heard, reused: false })
    }

    /// Keeps a connection for the next request, once this one's answer has been read.
    fn keep(self: &Arc<Self>, mut connection: Connection) {
        let proxy = Arc::clone(self);
        tokio::spawn(async move {
            if connection.sender.ready().await.is_err() {
                return;
            }
            connection.reused = true;
            let mut idle = proxy.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.connections.len() < POOL {
                idle.connections.push((Instant::now(), connection));
                if !std::mem::replace(&mut idle.sweeping, true) {
                    tokio::spawn(Self::sweep(Arc::clone(&proxy)));
                }
            }
        });
    }

    /// Closes what has been idle for long, until nothing is.
    async fn sweep(proxy: Arc<Self>) {
        loop {
            tokio::time::sleep(IDLE).await;
            let mut idle = proxy.idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.connections.retain(|(since, _)| since.elapsed() < IDLE);
            if idle.connections.is_empty() {
                idle.sweeping = false;
                return;
            }
        }
    }
}

/// Repeating a request of this method does what doing it once does: those that the server has of RFC 9110, 9.2.2.
fn repeats_safely(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::DELETE)
}

/// Waits until nothing has moved for [`ANSWER_DEADLINE`].
async fn silence(moved: &Mutex<Instant>) {
    loop {
        let deadline = *moved.lock().unwrap_or_else(PoisonError::into_inner) + ANSWER_DEADLINE;
        if deadline <= Instant::now() {
            return;
        }
        sleep_until(deadline).await;
    }
}

/// Drops what concerns one connection only.
///
/// Source: RFC 9110, 7.6.1.
pub fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&[
        CONNECTION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
    ]) {
        headers.remove(name);
    }
}
