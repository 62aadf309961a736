//! Bodies of answers, each a stream that is pulled only as fast as its client reads.

use super::link::{Channel, End};
use super::outlet::Outlet;
use super::problem::Problem;
use super::stream;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::oneshot;

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
    /// What a server in a sandbox sends; its connection ends soon after the rest of this is dropped.
    Port(Incoming, #[expect(dead_code, reason = "what counts is that it is dropped")] oneshot::Sender<()>),
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
            Self::Proxied(body) | Self::Port(body, _) => {
                Pin::new(body).poll_frame(cx).map_err(|error| Broken(error.to_string()))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Exec(body) => body.channel.is_none(),
            Self::Download(body) => body.finished && body.payload.is_none(),
            Self::Proxied(body) | Self::Port(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Exec(_) => SizeHint::default(),
            Self::Download(body) if body.framed => SizeHint::default(),
            Self::Download(body) => body.left.map_or_else(SizeHint::default, SizeHint::with_exact),
            Self::Proxied(body) | Self::Port(body, _) => body.size_hint(),
        }
    }
}

/// The stream of an exec: started, output as it comes, and one last frame.
pub struct ExecBody {
    first: Option<Bytes>,
    /// `None` when all of it is handed over.
    channel: Option<Channel>,
    outlet: Option<Arc<Outlet>>,
}

impl ExecBody {
    /// Streams what comes on `channel`, behind the frame `first`; the agent is told of progress as the client's
    /// socket `outlet` takes it, or by the client itself.
    pub fn new(first: Bytes, mut channel: Channel, outlet: Option<Arc<Outlet>>) -> Self {
        match &outlet {
            Some(outlet) => outlet.begin(channel.acknowledger()),
            None => channel.leave_to_client(),
        }
        Self { first: Some(first), channel: Some(channel), outlet }
    }

    fn hand_over(&self, length: usize, offsets: Option<[u64; 2]>) {
        if let Some(outlet) = &self.outlet {
            outlet.piece(length, offsets);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Polled {
        if let Some(first) = self.first.take() {
            self.hand_over(first.len(), None);
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let Some(channel) = &mut self.channel else { return Poll::Ready(None) };
        let piece = match channel.poll_piece(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok((piece, offsets))) => {
                self.hand_over(piece.len(), Some(offsets));
                piece
            }
            Poll::Ready(Err(end)) => {
                if let (Some(channel), Some(outlet)) = (self.channel.take(), &self.outlet) {
                    outlet.finish(channel);
                }
                stream::last(end)
            }
        };
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }
}

impl Drop for ExecBody {
    fn drop(&mut self) {
        if let (Some(_), Some(outlet)) = (&self.channel, &self.outlet) {
            outlet.abandon();
        }
    }
}

/// The bytes of a file or archive.
pub struct DownloadBody {
    channel: Channel,
    left: Option<u64>,
    /// In frames, of which the last one says what went wrong, if anything did.
    framed: bool,
    /// What follows a frame's header.
    payload: Option<Bytes>,
    broken: bool,
    finished: bool,
}

impl DownloadBody {
    /// Streams what comes on `channel`: `length` bytes, or up to its end.
    pub fn new(channel: Channel, length: Option<u64>, framed: bool) -> Self {
        let finished = length == Some(0);
        Self { channel, left: length, framed, payload: None, broken: false, finished }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Polled {
        if let Some(payload) = self.payload.take() {
            return Poll::Ready(Some(Ok(Frame::data(payload))));
        }
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
                if self.framed {
                    let header = stream::header(stream::STDOUT, piece.len());
                    self.payload = Some(piece);
                    piece = Bytes::copy_from_slice(&header);
                }
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
            Poll::Ready(Err(end)) => {
                if end == End::Done && self.left.is_none_or(|left| left == 0) {
                    self.finished = true;
                    return Poll::Ready(None);
                }
                if self.framed {
                    self.finished = true;
                    return Poll::Ready(Some(Ok(Frame::data(stream::failed(&why_incomplete(end))))));
                }
                let why = match end {
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

/// The error behind a download that is not whole.
fn why_incomplete(end: End) -> Problem {
    match end {
        End::Done => Problem::conflict("the file shrank while it was read"),
        End::Failed(failure) => Problem::path(&failure),
        End::Ended(ending) => ending.to_problem(),
        End::Exited(_) => Problem::garbled(),
    }
}
