//! One stream after another: opening the next, and what follows from its answer.

use super::{
    Session,
    fact::followed_a_failure,
    live::{Live, open},
    machine::{Event, Reason, Reasons},
    repeat::Repeat,
};
use crate::{
    control::{Cost, Error, istiod::ads::Answer},
    status::Registration,
};
use std::sync::Arc;
use tokio::time::Instant;

impl Session<'_> {
    /// Begins to open a stream.
    pub(super) fn open(&mut self, reasons: &Reasons) {
        let mut rungs = self.istiod.credential.rungs(self.istiod.clock.now());
        if *reasons == Reasons::from([Reason::Renewed]) {
            rungs.truncate(1); // a proof of this one, not of an older
        }
        let (addresses, health) = (self.post.addresses.borrow().clone(), self.post.health.clone());
        let fresh = reasons.contains(&Reason::Address);
        self.opening = Some(Box::pin(open(self.istiod, addresses, rungs, fresh, self.observer.names(), health)));
    }

    /// What has become of the stream that was being opened.
    pub(super) fn opened(&mut self, opened: Result<Live, Error>) -> Event {
        let taken = self.machine.taken().clone();
        match opened {
            Ok(live) => {
                self.retry.reset();
                // The next renewal may be half a day away: the newest certificate is proven again before.
                let refused = live.refused.is_some();
                let again = refused.then(|| Instant::now() + self.retry.after(Cost::Handshake));
                self.answered = Some(live);
                Event::Answered(again)
            }
            Err(error) => {
                if taken == Reasons::from([Reason::Renewed]) && error.is_about_credential() {
                    self.trouble = Some(self.refusal(&error));
                } else if taken.contains(&Reason::Disowned) {
                    self.disowned(&error);
                }
                tracing::debug!(reasons = ?taken, cause = %error, "could not open a new stream");
                // A report repairs more than a stream does, and a stream that comes before it makes istiod's picture of the
                // entry older than the entry is: reports go first when an API server is back.
                let only_disowned = taken == Reasons::from([Reason::Disowned]);
                let cost = if only_disowned { Cost::PushBack } else { error.cost() };
                let again = Instant::now() + self.retry.after(cost);
                self.error = Some(error);
                self.tell();
                Event::Failed(again)
            }
        }
    }

    /// The stream that was answered is the one that counts.
    pub(super) fn adopt(&mut self) {
        let Some(mut live) = self.answered.take() else { return };
        live.stream.report(&self.post.health.borrow());
        let refused = live.refused.take();
        self.trouble = refused.map(|error| self.refusal(&error));
        let lost = !matches!(&*self.post.registration.borrow(), Registration::Registered { .. });
        let moved = self.live.as_ref().is_some_and(|before| before.addresses.primary != live.addresses.primary);
        if lost || moved {
            self.since = self.istiod.clock.now();
        }
        let failed = self.error.take().is_some() || followed_a_failure(&self.post.registration.borrow());
        self.repeat = Some(Repeat::new(Instant::now(), failed));
        self.observer.registered(live.took);
        if let Answer::Endpoints(assignments) = &live.answer {
            self.observer.heard(assignments, &live.addresses);
        }
        tracing::debug!(peer = %live.stream.link.peer, "a stream is answered");
        if let Some(before) = self.live.replace(live) {
            self.older = Some(before.stream);
        }
        self.forget_what_is_no_reason();
        self.tell();
    }

    /// What was wanted of the stream before this one may be true of this one.
    pub(super) fn forget_what_is_no_reason(&mut self) {
        let Some(live) = &self.live else { return };
        let (now, link) = (self.istiod.clock.now(), &live.stream.link);
        let same_link = self.older.as_ref().is_some_and(|older| Arc::ptr_eq(&older.link, link));
        let proven = self.istiod.credential.rungs(now).first().is_some_and(|rung| rung.same(&link.rung));
        let here = self.post.addresses.borrow().primary == live.addresses.primary;
        for (reason, moot) in
            [(Reason::Goaway, !same_link), (Reason::Renewed, proven), (Reason::Address, here), (Reason::Disowned, true)]
        {
            if moot {
                self.machine.forget(reason);
            }
        }
    }
}
