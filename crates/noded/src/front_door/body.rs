//! Bodies of answers, each a stream that is pulled only as fast as its client reads.

use super::link::{Channel, End};
use super::outlet::Outlet;
use super::stream;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Why a body broke off; the client sees its connection end without a proper last chunk.
#[derive(Debug)]
pub struct Broken(String);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Broken {}

/// An answer's body.
pub enum Body {
    /// A few bytes, or none.
    Full(Option<Bytes>),
    /// Frames of an exec.
    Exec(ExecBody),
    /// A file or archive.
    Download(DownloadBody),
    /// What the Python server sends.
    Proxied(Incoming),
}

impl Body {
    /// No bytes.
    pub fn empty() -> Self {
        Self::Full(None)
    }
    /// These bytes.
    pub fn full(bytes: Vec<u8>) -> Self {
        Self::Full(Some(Bytes::from(bytes)))
    }
}

type Polled = Poll<Option<Result<Frame<Bytes>, Broken>>>;

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Exec(body) => body.poll(cx),
            Self::Download(body) => body.poll(cx),
            Self::Proxied(body) => Pin::new(body).poll_frame(cx).map_err(|error| Broken(error.to_string())),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Exec(body) => body.channel.is_none(),
            Self::Download(body) => body.finished,
            Self::Proxied(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Exec(_) => SizeHint::default(),
            Self::Download(body) => body.left.map_or_else(SizeHint::default, SizeHint::with_exact),
            Self::Proxied(body) => body.size_hint(),
        }
    }
}

/// The stream of an exec: started, output as it comes, and one last frame.
pub struct ExecBody {
    first: Option<Bytes>,
    /// `None` when all of it is handed over.
    channel: Option<Channel>,
    outlet: Arc<Outlet>,
}

impl ExecBody {
    /// Streams what comes on `channel`, behind the frame `first`; the agent is told of progress as the client's
    /// socket `outlet` takes it.
    pub fn new(first: Bytes, channel: Channel, outlet: Arc<Outlet>) -> Self {
        outlet.begin(channel.acknowledger());
        Self { first: Some(first), channel: Some(channel), outlet }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Polled {
        if let Some(first) = self.first.take() {
            self.outlet.piece(first.len(), None);
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let Some(channel) = &mut self.channel else { return Poll::Ready(None) };
        let piece = match channel.poll_piece(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok((piece, offsets))) => {
                self.outlet.piece(piece.len(), Some(offsets));
                piece
            }
            Poll::Ready(Err(end)) => {
                if let Some(channel) = self.channel.take() {
                    self.outlet.finish(channel);
                }
                stream::last(end)
            }
        };
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }
}

impl Drop for ExecBody {
    fn drop(&mut self) {
        if self.channel.is_some() {
            self.outlet.abandon();
        }
    }
}

/// The bytes of a file or archive.
pub struct DownloadBody {
    channel: Channel,
    left: Option<u64>,
    broken: bool,
    finished: bool,
}

impl DownloadBody {
    /// Streams what comes on `channel`: `length` bytes, or up to its end.
    pub fn new(channel: Channel, length: Option<u64>) -> Self {
        Self { channel, left: length, broken: false, finished: length == Some(0) }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Polled {
        if self.finished {
            return Poll::Ready(None);
        }
        match self.channel.poll_piece(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok((mut piece, offsets))) => {
                self.channel.acknowledger().consumed(offsets);
                if let Some(left) = &mut self.left {
                    // The file grew while it was read: what was promised is sent, and no more.
                    piece.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= piece.len() as u64;
                    self.finished = *left == 0;
                }
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
            Poll::Ready(Err(end)) => {
                let why = match end {
                    End::Done if self.left.is_none_or(|left| left == 0) => {
                        self.finished = true;
                        return Poll::Ready(None);
                    }
                    End::Done => "the file shrank while it was read".to_owned(),
                    End::Failed(failure) => String::from_utf8_lossy(&failure.what).into_owned(),
                    End::Exited(_) | End::Ended(_) => "the sandbox is gone".to_owned(),
                };
                // An error makes hyper drop what it has not written yet. The client shall see the head and the
                // bytes that came, and then that there are no more: one more turn lets hyper write them.
                if self.broken {
                    self.finished = true;
                    return Poll::Ready(Some(Err(Broken(why))));
                }
                self.broken = true;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }
}
