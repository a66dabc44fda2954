//! One stream, as both its halves know it: the one that listens, and the one that answers.

use super::{
    secrets::{self, Secrets},
    subscription::{Subscription, Verdict},
    wire::Request,
};
use crate::publish::consumers::Seat;
use std::{
    task::{Context, Poll, Waker},
    time::SystemTime,
};
use tonic::Status;

/// What was asked on a stream and is still to be answered.
pub(super) struct Talk {
    subscription: Subscription,
    seat: Seat,
    state: State,
    /// Of the half that answers, when it has nothing to say.
    waker: Option<Waker>,
}

enum State {
    /// The consumer may ask.
    Open,
    /// It asks no more, and is sent what it still waits for.
    Asked,
    /// There are no more answers but this.
    Failed(Status),
    /// All is said.
    Over,
}

impl Talk {
    /// A stream on which nothing was asked yet.
    pub(super) fn new(seat: Seat) -> Self {
        Self { subscription: Subscription::default(), seat, state: State::Open, waker: None }
    }

    /// Whether the consumer may ask.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::Open)
    }

    /// Whether it has come to an end that is not in order.
    pub(super) fn has_failed(&self) -> bool {
        matches!(self.state, State::Failed(_) | State::Over)
    }

    /// Takes in a request, what is none, or the end of them.
    pub(super) fn heard<R: Request>(&mut self, request: Option<Result<R, Status>>) {
        match request.map(|request| request.and_then(|request| self.hear(request))) {
            None => self.state = State::Asked,
            Some(Ok(())) => {}
            Some(Err(status)) => {
                self.seat.turned_away(&status);
                self.state = State::Failed(status);
            }
        }
        self.rouse();
    }

    /// The secrets are others, or there will be none any more.
    pub(super) fn news(&mut self, more: bool) {
        if !more {
            self.state = State::Failed(Status::unavailable("the agent is stopping; call again"));
        }
        self.rouse();
    }

    fn rouse(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn hear(&mut self, request: impl Request) -> Result<(), Status> {
        let ask = request.read()?;
        if let Some(node) = &ask.node {
            self.seat.named(node);
        }
        match self.subscription.hear(&ask) {
            None => {}
            Some(Verdict::Accepted(versions)) => {
                versions.into_iter().for_each(|(name, version)| self.seat.accepted(name.as_str(), version));
            }
            Some(Verdict::Refused(versions, why)) => {
                versions.into_iter().for_each(|(name, version)| self.seat.refused(name.as_str(), &version, &why));
            }
        }
        let names: Vec<_> = self.subscription.names().map(secrets::Name::as_str).collect();
        self.seat.wants(&names);
        Ok(())
    }

    /// What is to be sent now; none when all is said.
    pub(super) fn poll_answer<R: Request>(
        &mut self,
        secrets: &Secrets,
        now: SystemTime,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<R::Response, Status>>> {
        match &self.state {
            State::Open | State::Asked => {}
            State::Over => return Poll::Ready(None),
            State::Failed(status) => {
                let status = status.clone();
                self.state = State::Over;
                return Poll::Ready(Some(Err(status)));
            }
        }
        if let Some(reply) = self.subscription.reply(secrets, now) {
            for secret in &reply.secrets {
                self.seat.sent(secret.name.as_str(), secret.version.clone());
            }
            return Poll::Ready(Some(Ok(R::write(&reply))));
        }
        if matches!(self.state, State::Asked) && self.subscription.has_all() {
            self.state = State::Over;
            return Poll::Ready(None);
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}
