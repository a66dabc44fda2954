//! Whether the mesh sends anybody to us, asked of istiod with the workload's own credential.
//!
//! An observer stream (our node without the group: it registers nothing and disturbs nothing) tells the names of all
//! clusters, and then their endpoints. The clusters that list our address are the services that select us; their names
//! live on the session's own stream from then on, where each change arrives by itself.
//!
//! What arrives there is also the mesh's answer to our reports: where it contradicts the verdict for long, the session is
//! told to report again, or to register anew.

mod agree;
pub(super) mod known;
mod port;

use super::{
    Istiod,
    ads::{Answer, Stream},
    finished,
};
use crate::{
    control::{Error, link::Link},
    proto::envoy::config::endpoint::v3::ClusterLoadAssignment,
    status::{Addresses, Health, Membership},
    time::{Backoff, at, between},
};
use agree::{Agreement, Step};
use known::{Known, Seen};
use std::{
    collections::{BTreeSet, VecDeque},
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, timeout};

/// istiod debounces a change of endpoints by 100 ms.
const SETTLED: Duration = Duration::from_millis(400);
/// From being left out of the endpoints to the next look.
const WITHHELD: Duration = Duration::from_secs(5);
/// Over how long the looks are spread after a slow answer.
const SPREAD: Duration = Duration::from_secs(30);
/// Bound on a whole look.
const LOOK: Duration = Duration::from_secs(30);

/// What the observer wants of the session, or tells it.
pub(super) enum Turn {
    /// A look is due.
    Due,
    /// The services that select us: their endpoints are to be watched.
    Names(BTreeSet<String>),
    /// The fact.
    Told(Membership),
    /// The mesh's list contradicts our verdict: that is to be reported again.
    Report,
    /// It does so for long: a new stream is to register anew. Whether that is worth a line.
    Anew { first: bool },
    /// It does so no more.
    Agreed,
}

type Work<'a> = Pin<Box<dyn Future<Output = Done> + Send + 'a>>;

/// What a piece of work in the background has brought.
enum Done {
    Looked(Result<Seen, &'static str>),
    Peeked(Membership),
}

/// Keeps membership while a session lives.
pub(super) struct Observer<'a> {
    istiod: &'a Istiod,
    known: Known,
    /// Whether our verdict would have us listed; none while there is no verdict.
    wanted: Option<bool>,
    agreement: Agreement,
    /// No look was made since the last stream was answered.
    first: bool,
    look_at: Option<Instant>,
    waits: Backoff,
    looking: Option<Work<'a>>,
    peeking: Option<Work<'a>>,
    /// Our address in the list that was heard last.
    ip: Option<IpAddr>,
    /// What to say next.
    turns: VecDeque<Turn>,
}

impl<'a> Observer<'a> {
    pub(super) fn new(istiod: &'a Istiod, health: &Health) -> Self {
        let waits = Backoff::new(Duration::from_secs(2), Duration::from_secs(300));
        let wanted = wanted(istiod, health);
        Self {
            istiod,
            known: Known::default(),
            wanted,
            agreement: Agreement::new(),
            first: true,
            look_at: None,
            waits,
            looking: None,
            peeking: None,
            ip: None,
            turns: VecDeque::new(),
        }
    }

    /// The clusters of the services that select us.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.known.names()
    }

    /// A stream was answered after `took`, and has registered us.
    pub(super) fn registered(&mut self, took: Duration) {
        self.agreement.registered(Instant::now());
        self.first = true;
        if self.istiod.membership.is_none() {
            self.turns.push_back(Turn::Told(Membership::Unknown { cause: "turned off (membership.enabled)" }));
        } else if self.agreement.is_final() {
            // What it finds is decisive, so the mesh is given time to list us.
            self.look_after(WITHHELD);
        } else {
            // A slow istiod has enough to do: the look is put off. One that admits no more is left to those who wait to be
            // registered.
            let slow = took > Duration::from_secs(1);
            self.look_after(match self.istiod.is_pushing_back() {
                true => between(SPREAD, 2 * SPREAD),
                false if slow => between(Duration::ZERO, SPREAD),
                false => Duration::ZERO,
            });
        }
    }

    /// Looks `after` the mesh has settled.
    fn look_after(&mut self, after: Duration) {
        if self.istiod.membership.is_some() {
            self.look_at = Some(Instant::now() + SETTLED + after);
        }
    }

    /// A verdict was reported: a healthy one makes us visible, so a look may find more than the last; and a first one may
    /// find what somebody before us has reported.
    pub(super) fn health(&mut self, health: &Health) {
        self.wanted = wanted(self.istiod, health);
        let worth = *health == Health::Healthy || self.wanted.is_some() && self.first;
        if worth && self.known.names().is_empty() {
            self.waits.reset();
            self.look_after(Duration::ZERO);
        }
        self.weigh();
    }

    fn weigh(&mut self) {
        if self.agreement.weigh(self.wanted, self.known.listed(), Instant::now()) {
            self.turns.push_back(Turn::Agreed);
        }
    }

    /// Takes in what arrived on the session's stream.
    pub(super) fn heard(&mut self, assignments: &[ClusterLoadAssignment], addresses: &Addresses) {
        self.ip = addresses.primary;
        let before = self.known.listed();
        if !self.known.update(assignments, &addresses.all) {
            return;
        }
        self.peek();
        if self.known.lacks() {
            // The service may be gone, or not select us any more: a look tells. While we are unhealthy that is not why we
            // are left out, but to be told so a second time means that something else has changed.
            let soon = self.wanted == Some(true) || before == Some(false);
            self.look_after(if soon { WITHHELD } else { self.waits.slowest() });
        }
        self.weigh();
    }

    /// Begins a look, on a connection that is open anyway.
    pub(super) fn look(&mut self, link: Arc<Link>, addresses: Addresses) {
        let Some(settings) = &self.istiod.membership else { return };
        let istiod = self.istiod;
        self.looking = Some(Box::pin(async move {
            Done::Looked(match timeout(LOOK, ask(istiod, link, &addresses, settings.max_bytes)).await {
                Ok(Ok(known)) => Ok(known),
                Ok(Err(Error::Refused { code: 8 | 11, .. })) => {
                    Err("the mesh's configuration is larger than membership.maxBytes")
                }
                Ok(Err(error)) => {
                    tracing::debug!(cause = %error, "membership could not be asked for");
                    Err("istiod did not answer the question")
                }
                Err(_) => Err("istiod did not answer the question in time"),
            })
        }));
    }

    /// Finds out whether the listed ports speak what the mesh will speak, then tells the fact.
    fn peek(&mut self) {
        let (istiod, ip) = (self.istiod, self.ip);
        let mut fact = self.known.membership();
        self.peeking = Some(Box::pin(async move {
            if let (Membership::Listed(selection), Some(ip)) = (&mut fact, ip) {
                selection.mismatch = port::mismatch(istiod, ip, selection).await;
            }
            Done::Peeked(fact)
        }));
    }

    /// The next turn. Safe to cancel.
    pub(super) async fn next(&mut self) -> Turn {
        loop {
            if let Some(turn) = self.turns.pop_front() {
                return turn;
            }
            tokio::select! {
                done = finished(&mut self.peeking) => self.done(done),
                done = finished(&mut self.looking) => self.done(done),
                () = at(self.look_at), if self.looking.is_none() => {
                    self.look_at = None;
                    return Turn::Due;
                }
                () = at(self.agreement.next()) => match self.agreement.due(Instant::now()) {
                    Some(Step::Report) => return Turn::Report,
                    Some(Step::Anew { first }) => return Turn::Anew { first },
                    None => {}
                }
            }
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Peeked(fact) => self.turns.push_back(Turn::Told(fact)),
            Done::Looked(Ok(seen)) => {
                let before = self.known.names();
                self.known.take(seen, self.agreement.is_final() && self.wanted == Some(true));
                match self.known.listed() {
                    Some(true) => self.waits.reset(),
                    // A service may be made later, or go away.
                    _ if self.wanted == Some(true) => self.look_at = Some(Instant::now() + self.waits.next_wait()),
                    _ => self.look_at = Some(Instant::now() + self.waits.slowest()),
                }
                // Their endpoints arrive on the session's stream, and the fact follows from them.
                let names = self.known.names();
                if names.is_empty() {
                    self.turns.push_back(Turn::Told(self.unselected()));
                } else if names != before && names.is_subset(&before) {
                    self.peek();
                }
                self.turns.push_back(Turn::Names(names));
                self.weigh();
            }
            Done::Looked(Err(cause)) => {
                self.look_at = Some(Instant::now() + self.waits.slowest());
                // What is known already stays known.
                match self.known.names() {
                    names if names.is_empty() => self.turns.push_back(Turn::Told(Membership::Unknown { cause })),
                    names => self.turns.push_back(Turn::Names(names)),
                }
            }
        }
    }

    /// The fact when no service is known to select us. One that is not healthy is no endpoint of anything, so the mesh
    /// cannot tell which services would select it.
    fn unselected(&self) -> Membership {
        match self.wanted {
            Some(true) => Membership::NotSelected,
            _ => Membership::Unknown { cause: "the application is not healthy yet" },
        }
    }

    /// Whether a look can find anything now; says so if not. The first one can while we are unhealthy, too: that a report
    /// was lost which somebody before us has made.
    pub(super) fn can_look(&mut self) -> bool {
        let first = self.wanted.is_some() && std::mem::take(&mut self.first);
        let can = first || self.wanted == Some(true) || !self.known.names().is_empty();
        if !can {
            self.turns.push_back(Turn::Told(self.unselected()));
        }
        can
    }
}

/// Whether this verdict would have us listed; none while there is none. Without a probe everybody is.
fn wanted(istiod: &Istiod, health: &Health) -> Option<bool> {
    match health {
        _ if istiod.workload.probe.is_none() => Some(true),
        Health::Healthy => Some(true),
        Health::Unhealthy { .. } => Some(false),
        Health::Unknown | Health::Delayed { .. } | Health::Parked { .. } => None,
    }
}

async fn ask(istiod: &Istiod, link: Arc<Link>, addresses: &Addresses, max_bytes: usize) -> Result<Seen, Error> {
    let node = istiod.node(addresses, false);
    let mut stream = Stream::new(istiod, link, node, max_bytes).await?;
    stream.watch_clusters();
    let mut seen = Seen::default();
    loop {
        match stream.next(istiod).await? {
            Answer::Clusters(names) => {
                seen.clusters = names.into_iter().filter(|name| name.starts_with("outbound|")).collect();
                if seen.clusters.is_empty() {
                    break;
                }
                stream.watch_endpoints(seen.clusters.clone());
            }
            Answer::Endpoints(assignments) => {
                seen.listing = Known::found(assignments, &addresses.all);
                break;
            }
        }
    }
    stream.close(Duration::from_secs(1)).await;
    Ok(seen)
}
