//! A client's socket that knows which part of a stream it has taken.
//!
//! The agent keeps every byte of an exec's output until it is told that the byte was consumed. What
//! hyper holds in its buffer is not consumed yet: should this process die, or the client's
//! connection break, the client comes back with the offset it really got to, and the agent must
//! still have the rest. So progress is told when bytes go into the socket, and not before.

use super::link::{Acknowledger, Channel};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// More than an answer's head ever takes. Until the first flush a stream counts as written this much later.
const HEAD: u64 = 1024;

#[derive(Default)]
struct State {
    /// Bytes that went into the socket since it was opened.
    written: u64,
    stream: Option<Tracked>,
}

struct Tracked {
    acknowledger: Acknowledger,
    /// Where in the socket the next piece begins, at the latest.
    place: u64,
    /// Pieces on their way: where each ends in the socket, and the offsets of stdout and stderr after it.
    marks: VecDeque<(u64, [u64; 2])>,
    /// The offsets of the last piece that the socket has taken.
    reached: Option<[u64; 2]>,
    /// All pieces are handed over; the channel stays open until they are written.
    finished: Option<Channel>,
}

impl Tracked {
    /// The socket has taken everything before `place`.
    fn reach(&mut self, place: u64) {
        let waiting = self.marks.len();
        while let Some((_, offsets)) = self.marks.front().filter(|(end, _)| *end <= place) {
            self.reached = Some(*offsets);
            self.marks.pop_front();
        }
        if self.marks.len() < waiting {
            self.tell();
        }
    }

    /// Tells how far the socket has got.
    fn tell(&self) {
        if let Some(offsets) = self.reached {
            self.acknowledger.consumed(offsets);
        }
    }
}

/// What one client connection has written.
#[derive(Default)]
pub struct Outlet(Mutex<State>);

impl Outlet {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection's next answer is a stream.
    pub fn begin(&self, acknowledger: Acknowledger) {
        let mut state = self.lock();
        let place = state.written + HEAD;
        state.stream = Some(Tracked { acknowledger, place, marks: VecDeque::new(), reached: None, finished: None });
    }

    /// A piece of this length goes out next; `offsets` are reached when it is written.
    pub fn piece(&self, length: usize, offsets: Option<[u64; 2]>) {
        let mut state = self.lock();
        let Some(stream) = &mut state.stream else { return };
        // A chunk is the length in hexadecimal, the bytes, and two line ends.
        let digits = u64::from((usize::BITS - length.leading_zeros()).div_ceil(4).max(1));
        stream.place += digits + length as u64 + 4;
        if let Some(offsets) = offsets {
            stream.marks.push_back((stream.place, offsets));
        }
    }

    /// The stream is complete: its channel is closed when all of it is written, or the connection ends.
    pub fn finish(&self, channel: Channel) {
        if let Some(stream) = &mut self.lock().stream {
            stream.finished = Some(channel);
        }
    }

    /// Nobody wants the stream any more.
    pub fn abandon(&self) {
        self.lock().stream = None;
    }

    fn wrote(&self, bytes: usize) {
        let mut state = self.lock();
        state.written += bytes as u64;
        let written = state.written;
        let Some(stream) = &mut state.stream else { return };
        stream.reach(written);
    }

    /// Nothing is held back any more.
    fn flushed(&self) {
        let mut state = self.lock();
        let Some(stream) = &mut state.stream else { return };
        stream.reach(u64::MAX);
        if stream.finished.is_some() {
            // While the command ran a few bytes were not worth a word; after its end each one is.
            stream.tell();
            state.stream = None;
        }
    }
}

/// The socket itself.
pub struct Tap<S> {
    inner: S,
    outlet: Arc<Outlet>,
}

impl<S> Tap<S> {
    /// Counts what is written to `inner`.
    pub fn new(inner: S, outlet: Arc<Outlet>) -> Self {
        Self { inner, outlet }
    }

    fn count(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = polled {
            self.outlet.wrote(bytes);
        }
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Tap<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tap<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.count(polled)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.count(polled)
    }
    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes the socket when its own buffer is empty, and only then.
        self.outlet.flushed();
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
