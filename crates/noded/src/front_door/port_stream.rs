//! A connection to a port in a sandbox as a stream of bytes, over a channel of the agent's connection.

use super::link::{Acknowledger, Channel, End, Link, Role};
use super::problem::{self, Problem};
use super::upload;
use bytes::Bytes;
use shoal_wire::{EOF, Failure, Kind, PortConnect};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio::time::{Instant, sleep_until, timeout_at};

/// A listener whose queue is full takes no connection in; it is given this long.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug)]
pub enum NoPort {
    /// The agent could not connect.
    Refused(Failure),
    /// It took too long.
    Timeout,
    /// The sandbox itself does not answer.
    Sandbox(Problem),
}

impl NoPort {
    /// What a client is told.
    pub fn into_problem(self, port: u16) -> Problem {
        match self {
            Self::Refused(failure) if failure.errno == libc::ECONNREFUSED => {
                Problem::port_unreachable(port, "nothing listens there")
            }
            Self::Refused(failure) => Problem::port_unreachable(port, &problem::describe(&failure)),
            Self::Timeout => Problem::port_unreachable(port, "the server there takes no connection in"),
            Self::Sandbox(problem) => problem,
        }
    }
}

/// A connection to a port. Dropped before both halves are closed, it is reset.
pub struct PortStream {
    channel: Channel,
    acknowledger: Acknowledger,
    /// What came and was not read yet.
    held: Bytes,
    /// Bytes read.
    read: u64,
    shut_down: bool,
}

impl PortStream {
    /// Connects until `deadline`.
    pub async fn connect(link: &Arc<Link>, port: u16, deadline: Instant) -> Result<Self, NoPort> {
        let connecting = async {
            let request = PortConnect { port }.encode();
            let channel = link.open(Role::Port, Kind::PortConnect, request).await.map_err(NoPort::Sandbox)?;
            match channel.head().await {
                Err(End::Failed(failure)) => Err(NoPort::Refused(failure)),
                answer => match upload::settle(answer, Problem::exec) {
                    Ok(_) => Ok(channel),
                    Err(problem) => Err(NoPort::Sandbox(problem)),
                },
            }
        };
        let channel = timeout_at(deadline, connecting).await.unwrap_or(Err(NoPort::Timeout))?;
        let acknowledger = channel.acknowledger();
        Ok(Self { channel, acknowledger, held: Bytes::new(), read: 0, shut_down: false })
    }

    /// Ends a connection on which nothing was sent, as one that has ended and not as one that broke.
    pub fn close(self) {
        // When the agent wants no more, the other end is gone.
        let _ = self.channel.finish(EOF);
    }
}

/// What a reader or writer gets for the end of a channel.
fn broken(end: End) -> io::Error {
    match end {
        End::Failed(failure) => io::Error::from_raw_os_error(failure.errno),
        End::Ended(ending) => io::Error::new(io::ErrorKind::ConnectionAborted, ending.to_problem().detail().to_owned()),
        End::Done | End::Exited(_) => io::ErrorKind::BrokenPipe.into(),
    }
}

impl AsyncRead for PortStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.held.is_empty() {
            match ready!(self.channel.poll_piece(cx)) {
                Ok((piece, _)) => self.held = piece,
                Err(End::Done) => return Poll::Ready(Ok(())),
                Err(end) => return Poll::Ready(Err(broken(end))),
            }
        }
        let count = self.held.len().min(into.remaining());
        into.put_slice(&self.held.split_to(count));
        self.read += count as u64;
        self.acknowledger.consumed([self.read, 0]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PortStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.shut_down {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.channel.poll_send(cx, bytes).map_err(broken)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Closes this half, and waits until the server's socket has taken all of it: only then can the rest be dropped.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.shut_down {
            self.shut_down = true;
            // When the agent wants no more, it said why.
            let _ = self.channel.finish(EOF);
        }
        self.channel.poll_consumed(cx).map_err(broken)
    }
}

/// Carries bytes both ways until both halves are closed or one end breaks.
///
/// Both may be silent as long as they like. When one half is closed, its end may also have gone for good, which looks
/// the same: then `silence` without a byte ends the connection.
pub async fn tunnel(
    client: impl AsyncRead + AsyncWrite + Unpin,
    mut port: impl AsyncRead + AsyncWrite + Unpin,
    silence: Duration,
) {
    let traffic = Arc::new(Traffic { half_closed: AtomicBool::new(false), moved: Mutex::new(Instant::now()) });
    let mut client = Watched { inner: client, traffic: Arc::clone(&traffic) };
    tokio::select! {
        // What breaks one end breaks the other: both are dropped.
        _ = copy_bidirectional(&mut client, &mut port) => {}
        () = traffic.half_closed_and_silent(silence) => {}
    }
}

/// What has gone through a client's end.
struct Traffic {
    half_closed: AtomicBool,
    moved: Mutex<Instant>,
}

impl Traffic {
    fn moved(&self) {
        *self.moved.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn close(&self) {
        self.half_closed.store(true, Ordering::Relaxed);
        self.moved();
    }

    async fn half_closed_and_silent(&self, silence: Duration) {
        let mut next = Instant::now() + silence;
        loop {
            sleep_until(next).await;
            let deadline = *self.moved.lock().unwrap_or_else(PoisonError::into_inner) + silence;
            let now = Instant::now();
            if !self.half_closed.load(Ordering::Relaxed) {
                next = now + silence;
            } else if deadline <= now {
                return;
            } else {
                next = deadline;
            }
        }
    }
}

struct Watched<S> {
    inner: S,
    traffic: Arc<Traffic>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, into);
        if polled.is_ready() {
            if into.filled().len() > before { self.traffic.moved() } else { self.traffic.close() }
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, bytes);
        if polled.is_ready() {
            self.traffic.moved();
        }
        polled
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.traffic.close();
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
