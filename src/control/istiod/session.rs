//! The session with istiod: a stream whose life is the registration.
//!
//! There is at most one stream that counts. It is replaced, never interrupted: on GOAWAY, for a renewed certificate and
//! for a new address the next stream is opened first; when istiod has answered it, and 100 ms later, the old one is
//! closed. Always the older first: istiod forgets to mark an entry whose newer stream ended before the older.

mod live;

use super::{
    Istiod,
    ads::{Answer, Stream},
    membership::{Observer, Turn, at},
};
use crate::{
    control::{Error, Post},
    status::{self, Health, Identity, Membership, Registration, Trouble},
    time::{Backoff, between},
};
use live::{Live, entry, open};
use std::{
    collections::BTreeSet,
    pin::Pin,
    time::{Duration, SystemTime},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

/// Between the answer to a new stream and the end of the old one, and before a conflict is tried again.
const OVERLAP: Duration = Duration::from_millis(100);
/// A report that istiod lost is repeated after this, ±10 %: nothing acknowledges a report.
const REPEAT: Duration = Duration::from_secs(300);
/// How long istiod is given to end a stream that we have half-closed.
const FAREWELL: Duration = Duration::from_secs(2);
/// From an unhealthy report to the end of the stream, when leaving for good: the close must not overtake it.
const REPORTED: Duration = Duration::from_millis(300);

/// Why the stream shall be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    /// The server asked for it.
    Goaway,
    /// A renewed certificate is to be proven.
    Renewed,
    /// The host has another address.
    Address,
}

type Opening<'a> = Pin<Box<dyn Future<Output = Result<Live, Error>> + Send + 'a>>;

/// Holds the session while it runs.
pub(super) async fn hold(istiod: &Istiod, post: &mut Post) -> Result<(), Error> {
    let addresses = post.addresses.borrow_and_update().clone();
    let (entry, since) = (entry(istiod, &addresses)?, istiod.clock.now());
    if *post.registration.borrow() == Registration::Absent {
        post.registration.send_replace(Registration::Asked { entry, since, trouble: None });
    }
    let mut identity = istiod.credential.identity.clone();
    identity.mark_unchanged();
    let rungs = istiod.credential.rungs(since);
    let opening = open(istiod, addresses, rungs, false, BTreeSet::new(), post.health.clone());
    let live = tokio::select! {
        live = opening => live?,
        () = post.stop.cancelled() => return Ok(()),
    };
    Session::new(istiod, live).run(post, identity).await
}

/// A session whose registration was acknowledged.
struct Session<'a> {
    istiod: &'a Istiod,
    live: Live,
    /// Since when the entry is held without a gap.
    since: SystemTime,
    /// The stream before this one, and when it may be closed.
    older: Option<(Stream, Instant)>,
    /// When the last stream was closed.
    retired: Option<Instant>,
    /// When a replacement is due, and for which reason.
    due: Option<(Move, Instant)>,
    moving: Option<(Move, Opening<'a>)>,
    backoff: Backoff,
    /// What the control plane says against our newest certificate.
    refused: Option<Trouble>,
    observer: Observer<'a>,
    repeat_at: Instant,
}

impl<'a> Session<'a> {
    fn new(istiod: &'a Istiod, live: Live) -> Self {
        Self {
            istiod,
            since: istiod.clock.now(),
            older: None,
            retired: None,
            due: None,
            moving: None,
            backoff: Backoff::new(Duration::from_millis(500), Duration::from_secs(30)),
            refused: None,
            observer: Observer::new(istiod),
            repeat_at: Instant::now() + REPEAT,
            live,
        }
    }

    async fn run(mut self, post: &mut Post, mut identity: watch::Receiver<Identity>) -> Result<(), Error> {
        self.settle(post);
        loop {
            let link = self.live.stream.link.clone();
            // A certificate that waits for its next proof does not keep us on a connection that ends.
            let staying = self.moving.is_none() && self.due.is_none_or(|(why, _)| why == Move::Renewed);
            tokio::select! {
                biased;
                () = post.stop.cancelled() => {
                    let for_good = *post.leaving.borrow();
                    self.leave(for_good).await;
                    return Ok(());
                }
                answer = self.live.stream.next(self.istiod) => match (answer, self.moving.take()) {
                    (Ok(answer), moving) => {
                        self.moving = moving;
                        if let Answer::Endpoints(assignments) = answer {
                            self.observer.heard(&assignments, &self.live.addresses);
                        }
                    }
                    // The next stream is on its way already.
                    (Err(_), Some((_, opening))) => {
                        self.live = tokio::select! {
                            live = opening => live?,
                            () = post.stop.cancelled() => return Ok(()),
                        };
                        self.settle(post);
                    }
                    (Err(error), None) => return Err(error.after_an_answer()),
                },
                Ok(()) = post.health.changed() => {
                    let health = post.health.borrow_and_update().clone();
                    self.live.stream.report(&health);
                    self.observer.health(&health);
                }
                () = at(Some(self.repeat_at)) => {
                    self.live.stream.report(&post.health.borrow());
                    self.repeat_at = Instant::now() + between(REPEAT.mul_f64(0.9), REPEAT.mul_f64(1.1));
                }
                moved = opened(&mut self.moving) => self.moved(moved, post),
                () = at(self.older.as_ref().map(|(_, at)| *at)) => self.retire(),
                () = at(self.due.map(|(_, at)| at)) => self.start_move(post),
                () = link.told_to_go(), if staying => self.due = Some((Move::Goaway, Instant::now())),
                Ok(()) = identity.changed(), if self.moving.is_none() => {
                    // The first certificate has no predecessor: the token's connection will do until it is renewed.
                    if identity.borrow_and_update().previous.is_some() {
                        self.due = Some((Move::Renewed, Instant::now()));
                    }
                }
                Ok(()) = post.addresses.changed(), if self.moving.is_none() => {
                    let now = post.addresses.borrow_and_update().primary;
                    if now.is_some() && now != self.live.addresses.primary {
                        self.due = Some((Move::Address, Instant::now()));
                    }
                }
                turn = self.observer.next() => self.observed(turn, post),
            }
        }
    }

    /// What follows from a stream that was just answered.
    fn settle(&mut self, post: &Post) {
        let refused = self.live.refused.take();
        self.refused = refused.map(|error| self.refusal(&error));
        if let Some(Answer::Endpoints(assignments)) = self.live.answer.take() {
            self.observer.heard(&assignments, &self.live.addresses);
        }
        self.backoff.reset();
        if self.refused.is_some() {
            // The next renewal may be half a day away: the newest certificate is proven again before.
            self.due = Some((Move::Renewed, Instant::now() + self.backoff.next_wait()));
        }
        // A slow istiod has enough to do: the look is put off.
        let slow = self.live.took > Duration::from_secs(1);
        self.observer.look_after(if slow { between(Duration::ZERO, REPEAT / 10) } else { Duration::ZERO });
        self.tell(post);
    }

    fn refusal(&self, error: &Error) -> Trouble {
        let since = self.refused.as_ref().map(|before| before.since);
        Trouble {
            since: since.unwrap_or_else(|| self.istiod.clock.now()),
            kind: Trouble::NEW_CERTIFICATE_REFUSED,
            cause: format!(
                "the control plane refuses our newest certificate, so the previous credential stays in use: {error}; \
                 if the mesh's CA was just changed, restart istiod"
            ),
        }
    }

    fn tell(&self, post: &Post) {
        let Ok(entry) = entry(self.istiod, &self.live.addresses) else { return };
        status::tell(
            &post.registration,
            Registration::Registered { entry, since: self.since, trouble: self.refused.clone() },
        );
    }

    fn start_move(&mut self, post: &Post) {
        let Some((why, _)) = self.due.take() else { return };
        let mut rungs = self.istiod.credential.rungs(self.istiod.clock.now());
        if why == Move::Renewed {
            rungs.truncate(1); // a proof of this one, not of an older
            if rungs.iter().all(|rung| rung.same(&self.live.stream.link.rung)) {
                return;
            }
        }
        let addresses = post.addresses.borrow().clone();
        let fresh = why == Move::Address;
        let opening = open(self.istiod, addresses, rungs, fresh, self.observer.names(), post.health.clone());
        self.moving = Some((why, Box::pin(opening)));
    }

    fn moved(&mut self, (why, live): (Move, Result<Live, Error>), post: &Post) {
        match live {
            Ok(live) => {
                self.retire(); // should there still be one
                let old = std::mem::replace(&mut self.live, live);
                if old.addresses.primary != self.live.addresses.primary {
                    self.since = self.istiod.clock.now();
                }
                self.older = Some((old.stream, Instant::now() + OVERLAP));
                tracing::debug!(?why, peer = %self.live.stream.link.peer, "moved to a new stream");
                self.settle(post);
            }
            Err(error) => {
                if why == Move::Renewed && error.is_about_credential() {
                    self.refused = Some(self.refusal(&error));
                }
                tracing::debug!(?why, cause = %error, "could not move to a new stream, the old one lives on");
                self.due = Some((why, Instant::now() + self.backoff.next_wait()));
                self.tell(post);
            }
        }
    }

    /// Closes the older stream, aside.
    fn retire(&mut self) {
        if let Some((stream, _)) = self.older.take() {
            self.retired = Some(Instant::now());
            tokio::spawn(stream.close(FAREWELL));
        }
    }

    /// Ends the session in order: older stream first. Only when the machine goes down is the workload taken out of
    /// service before; otherwise it runs on, and its entry with it, inside istiod's grace period.
    async fn leave(mut self, for_good: bool) {
        if for_good {
            self.live.stream.report(&Health::Unhealthy { message: "the host is shutting down".to_owned() });
            sleep(REPORTED).await;
        }
        self.retire();
        if let Some(retired) = self.retired {
            sleep_until(retired + OVERLAP).await;
        }
        self.live.stream.close(FAREWELL).await;
    }

    fn observed(&mut self, turn: Turn, post: &Post) {
        match turn {
            Turn::Due if self.istiod.workload.probe.is_some() && *post.health.borrow() != Health::Healthy => {
                // Such an entry is no endpoint of anything, so the mesh cannot tell which services would select it.
                if self.observer.names().is_empty() {
                    status::tell(&post.membership, Membership::Unknown { cause: "the application is not healthy yet" });
                }
            }
            Turn::Due => self.observer.look(self.live.stream.link.clone(), self.live.addresses.clone()),
            Turn::Names(names) => self.live.stream.watch_endpoints(names),
            Turn::Told(fact) => status::tell(&post.membership, fact),
        }
    }
}

async fn opened(moving: &mut Option<(Move, Opening<'_>)>) -> (Move, Result<Live, Error>) {
    let Some((why, opening)) = moving else { return std::future::pending().await };
    let done = (*why, opening.await);
    *moving = None;
    done
}
