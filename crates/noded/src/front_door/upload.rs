//! A request's body on its way to the agent.

use super::link::{Channel, End, Head};
use super::problem::Problem;
use bytes::Bytes;
use hyper::body::{Body as _, Incoming};
use shoal_wire::Failure;
use std::future::poll_fn;
use std::pin::{Pin, pin};

/// Forwards a body as it arrives, ends it with the flag `end`, and returns the agent's answer.
///
/// The body is read no faster than the agent's window opens. When the agent answers before the
/// body's end, what is left of it is not forwarded.
pub async fn forward(
    channel: &Channel,
    body: &mut Incoming,
    end: u8,
    problem: fn(&Failure) -> Problem,
) -> Result<Bytes, Problem> {
    loop {
        let frame = {
            let mut head = pin!(channel.head());
            let mut next = pin!(poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)));
            tokio::select! {
                biased;
                answer = &mut head => return settle(answer, problem),
                frame = &mut next => frame,
            }
        };
        match frame {
            None => break,
            Some(Err(error)) => return Err(Problem::invalid(format!("body: {error}"))),
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                if channel.send(data).await.is_err() {
                    break;
                }
            }
        }
    }
    // When the agent wants no more, its answer is there already.
    let _ = channel.finish(end);
    settle(channel.head().await, problem)
}

/// Turns the answer to a request into its payload or its error.
pub fn settle(answer: Result<Head, End>, problem: fn(&Failure) -> Problem) -> Result<Bytes, Problem> {
    match answer {
        Ok(Head::Ok(payload)) => Ok(payload),
        Err(End::Failed(failure)) => Err(problem(&failure)),
        Err(End::Ended(ending)) => Err(ending.to_problem()),
        Ok(Head::Started(_)) | Err(End::Done | End::Exited(_)) => Err(Problem::garbled()),
    }
}
