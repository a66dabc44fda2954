//! One call: what is asked comes in, what is offered goes out, a status ends it.

use super::{
    budget::Share,
    consumers::Seat,
    grpc::{Answers, Framed, Gone, Requests},
    offer::Offer,
};
use crate::time::Clock;
use bytes::Bytes;
use std::time::SystemTime;
use tokio::sync::watch;
use tonic::Status;

/// What a call asks for, and what it has been told. It never waits.
pub(super) trait Method {
    /// Bytes of a request at most.
    fn max_request(&self) -> usize;

    /// Takes in a request; none is their end.
    ///
    /// # Errors
    /// What the call ends with, when it cannot be answered.
    fn hear(&mut self, request: Option<Bytes>) -> Result<(), Status>;

    /// What is to be said now.
    fn next(&mut self, offer: &Offer, now: SystemTime) -> Next;

    /// Who calls.
    fn seat(&self) -> &Seat;
}

/// What is to be said.
pub(super) enum Next {
    /// Nothing, until something happens.
    Wait,
    /// This, and perhaps more.
    Answer(Framed),
    /// No more.
    End(Status),
}

/// Holds a call to its end. A consumer is heard whether or not it reads its answers; one that does not read is sent one
/// and later only the newest, and nobody waits for it.
#[expect(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice, and consumers are many")]
pub(super) fn hold(
    mut method: Box<dyn Method + Send>,
    mut requests: Requests,
    mut answers: Answers,
    mut offers: watch::Receiver<Offer>,
    clock: Clock,
    room: Share,
) -> impl Future<Output = Result<(), Gone>> {
    async move {
        let _room = room;
        let (mut open, mut due) = (true, None);
        let status = loop {
            if due.is_none() {
                match method.next(&offers.borrow_and_update(), clock.now()) {
                    Next::Wait => {}
                    Next::Answer(answer) => due = Some(answer),
                    Next::End(status) => break status,
                }
            }
            tokio::select! {
                biased;
                request = requests.next(), if open => {
                    open = matches!(request, Ok(Some(_)));
                    if let Err(status) = request.and_then(|request| method.hear(request)) {
                        method.seat().turned_away(&status);
                        break status;
                    }
                }
                changed = offers.changed() => if changed.is_err() {
                    break Status::unavailable("the agent is stopping; call again");
                },
                room = answers.room(due.is_some()) => {
                    room?;
                    due.take().map_or(Ok(()), |answer| answers.send(answer))?;
                }
            }
        };
        answers.end(&status);
        Ok(())
    }
}
