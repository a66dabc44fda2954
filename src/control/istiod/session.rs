//! The session with istiod: a stream whose life is the registration.
//!
//! There is at most one stream that counts. It is replaced, never interrupted: on GOAWAY, for a renewed certificate, for
//! a new address and when the mesh has lost our entry the next stream is opened first; when istiod has answered it, and
//! 100 ms later, the old one is closed. What is to be done when is decided by [`machine`]; here it is done.

mod fact;
mod live;
mod machine;
mod repeat;
mod succession;

use super::{
    Istiod,
    ads::{Answer, Stream},
    finished,
    membership::{Observer, Turn},
};
use crate::{
    control::{Error, Post, Retry, link::Link},
    status::{self, Health, Identity, Registration, Trouble},
    time::{at, between},
};
use live::{Live, entry, open};
use machine::{Action, Event, Machine, Reason};
use repeat::Repeat;
use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, time::Instant};

/// Between the answer to a new stream and the end of the old one, and before a conflict is tried again.
const OVERLAP: Duration = Duration::from_millis(100);
/// How long a workload may be called registered while its next stream is on its way: half of the time that istiod keeps
/// the entry.
const GRACE: Duration = Duration::from_secs(5);
/// What befalls a fleet shall not bring all of it back at once.
const SPREAD: Duration = Duration::from_secs(2);
/// How long istiod is given to end a stream that we have half-closed.
const FAREWELL: Duration = Duration::from_secs(2);
/// From an unhealthy report to the end of the stream, when leaving for good: the close must not overtake it.
const REPORTED: Duration = Duration::from_millis(300);

type Opening<'a> = Pin<Box<dyn Future<Output = Result<Live, Error>> + Send + 'a>>;

/// Holds the session while it runs.
pub(super) async fn hold(istiod: &Istiod, post: &mut Post) -> Result<(), Error> {
    Session::begin(istiod, post)?.run().await
}

struct Session<'a> {
    istiod: &'a Istiod,
    post: &'a mut Post,
    identity: watch::Receiver<Identity>,
    machine: Machine,
    opening: Option<Opening<'a>>,
    /// The stream that was opened last, before it is adopted.
    answered: Option<Live>,
    live: Option<Live>,
    older: Option<Stream>,
    /// Since when the entry is held without a gap.
    since: SystemTime,
    retry: Retry,
    /// Why the last stream ended or could not be opened; none since one was answered.
    error: Option<Error>,
    /// What is wrong although the session lives.
    trouble: Option<Trouble>,
    observer: Observer<'a>,
    repeat: Option<Repeat>,
}

impl<'a> Session<'a> {
    fn begin(istiod: &'a Istiod, post: &'a mut Post) -> Result<Self, Error> {
        let addresses = post.addresses.borrow_and_update().clone();
        let (entry, since) = (entry(istiod, &addresses)?, istiod.clock.now());
        post.registration.send_if_modified(|fact| {
            let news = match fact {
                Registration::Absent => Registration::Asked { entry, since, trouble: None },
                Registration::Asked { entry: before, since, trouble } if *before != entry => {
                    Registration::Asked { entry, since: *since, trouble: trouble.clone() }
                }
                _ => return false,
            };
            *fact = news;
            true
        });
        let mut identity = istiod.credential.identity.clone();
        identity.mark_unchanged();
        let rungs = istiod.credential.rungs(since);
        let observer = Observer::new(istiod, &post.health.borrow_and_update());
        let opening = open(istiod, addresses, rungs, false, observer.names(), post.health.clone());
        Ok(Self {
            istiod,
            identity,
            machine: Machine::new(),
            opening: Some(Box::pin(opening)),
            answered: None,
            live: None,
            older: None,
            since,
            retry: Retry::new(Duration::from_millis(500), Duration::from_secs(30)),
            error: None,
            trouble: None,
            observer,
            repeat: None,
            post,
        })
    }

    async fn run(mut self) -> Result<(), Error> {
        loop {
            let stopped = self.machine.is_leaving();
            let link = self.live.as_ref().filter(|_| !self.machine.has(Reason::Goaway));
            let link = link.map(|live| live.stream.link.clone());
            let event = tokio::select! {
                // Pushes come last: a flood of them delays neither a report nor a stop.
                biased;
                () = self.post.stop.cancelled(), if !stopped => Event::Stop { for_good: *self.post.leaving.borrow() },
                () = at(self.machine.next()) => Event::Time,
                Ok(()) = self.post.health.changed() => { self.verdict(); continue }
                () = at(self.repeat.as_ref().map(|repeat| repeat.at)) => { self.repeat(); continue }
                opened = finished(&mut self.opening) => self.opened(opened),
                () = told_to_go(link) => {
                    Event::Reason(Reason::Goaway, Instant::now() + between(Duration::ZERO, SPREAD))
                }
                // The first certificate has no predecessor: the token's connection will do until it is renewed.
                Ok(()) = self.identity.changed() => match self.identity.borrow_and_update().previous.is_some() {
                    true => Event::Reason(Reason::Renewed, Instant::now()),
                    false => continue,
                },
                Ok(()) = self.post.addresses.changed() => self.moved(),
                turn = self.observer.next() => match self.observed(turn) {
                    Some(event) => event,
                    None => continue,
                },
                answer = heard(self.live.as_mut(), self.istiod) => match answer {
                    Ok(answer) => { self.take(answer); continue }
                    Err(error) => {
                        self.live = None;
                        self.error = Some(error.after_an_answer());
                        Event::Ended
                    }
                },
            };
            for action in self.machine.on(event, Instant::now()) {
                tracing::trace!(?event, ?action, "session");
                match action {
                    Action::Open(reasons) => self.open(&reasons),
                    Action::Adopt => self.adopt(),
                    Action::Retire => self.older.take().into_iter().for_each(|stream| {
                        tokio::spawn(stream.close(FAREWELL));
                    }),
                    Action::Lose => self.lose(),
                    Action::Withdraw => self.withdraw(),
                    Action::Close => {
                        if let Some(live) = self.live.take() {
                            live.stream.close(FAREWELL).await;
                        }
                    }
                    Action::End => return Ok(()),
                    Action::Fail => return self.error.map_or(Ok(()), Err),
                }
            }
        }
    }

    /// There is a new verdict.
    fn verdict(&mut self) {
        let health = self.post.health.borrow_and_update().clone();
        if let Some(live) = self.live.as_mut().filter(|_| !self.machine.is_leaving()) {
            live.stream.report(&health);
        }
        self.observer.health(&health);
    }

    /// The verdict is reported again.
    fn repeat(&mut self) {
        self.report_again();
        self.repeat.iter_mut().for_each(|repeat| repeat.done(Instant::now()));
    }

    fn report_again(&mut self) {
        if let Some(live) = self.live.as_mut().filter(|_| !self.machine.is_leaving()) {
            live.stream.report_again(&self.post.health.borrow());
        }
    }

    /// The addresses have changed.
    fn moved(&mut self) -> Event {
        let now = self.post.addresses.borrow_and_update().primary;
        let differs = |live: &Live| now.is_some() && now != live.addresses.primary;
        // While a stream is being opened it is that one which may have the wrong address.
        if self.opening.is_some() && now.is_some() || self.live.as_ref().is_some_and(differs) {
            return Event::Reason(Reason::Address, Instant::now());
        }
        Event::Moot(Reason::Address)
    }

    fn take(&mut self, answer: Answer) {
        if let (Answer::Endpoints(assignments), Some(live)) = (answer, &self.live) {
            self.observer.heard(&assignments, &live.addresses);
        }
    }

    /// The machine goes down, or the workload leaves for good. Otherwise the application runs on when a session ends, and
    /// its entry with it, inside istiod's grace period.
    fn withdraw(&mut self) {
        if let Some(live) = &mut self.live {
            live.stream.report(&Health::Unhealthy { message: "the host is shutting down".to_owned() });
        }
    }

    fn observed(&mut self, turn: Turn) -> Option<Event> {
        match turn {
            Turn::Due => {
                if let Some(live) = self.live.as_ref().filter(|_| self.observer.can_look()) {
                    self.observer.look(live.stream.link.clone(), live.addresses.clone());
                }
            }
            Turn::Names(names) => self.live.iter_mut().for_each(|live| live.stream.watch_endpoints(names.clone())),
            Turn::Told(fact) if self.live.is_some() => status::tell(&self.post.membership, fact),
            Turn::Told(_) => {}
            Turn::Report => self.report_again(),
            Turn::Anew { first } => {
                if first {
                    tracing::warn!(
                        "the mesh's list has contradicted the verdict on the application for 10 s: registering anew"
                    );
                }
                // Who has deleted our entry may have deleted many.
                return Some(Event::Reason(Reason::Disowned, Instant::now() + between(Duration::ZERO, SPREAD)));
            }
            Turn::Agreed => {
                if self.trouble.as_ref().is_some_and(|trouble| trouble.kind == Trouble::DISOWNED) {
                    self.trouble = None;
                    self.tell();
                }
                return Some(Event::Moot(Reason::Disowned));
            }
        }
        None
    }
}

async fn told_to_go(link: Option<Arc<Link>>) {
    match link {
        Some(link) => link.told_to_go().await,
        None => std::future::pending().await,
    }
}

async fn heard(live: Option<&mut Live>, istiod: &Istiod) -> Result<Answer, Error> {
    match live {
        Some(live) => live.stream.next(istiod).await,
        None => std::future::pending().await,
    }
}
