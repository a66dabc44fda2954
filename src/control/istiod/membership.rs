//! Whether the mesh sends anybody to us, asked of istiod with the workload's own credential.
//!
//! An observer stream (our node without the group: it registers nothing and disturbs nothing) tells the names of all
//! clusters, and then their endpoints. The clusters that list our address are the services that select us; their names
//! live on the session's own stream from then on, where each change arrives by itself.

mod known;
mod port;

use super::{
    Istiod,
    ads::{Answer, Stream},
};
use crate::{
    control::{Error, link::Link},
    proto::envoy::config::endpoint::v3::ClusterLoadAssignment,
    status::{Addresses, Health, Membership},
    time::Backoff,
};
use known::Known;
use std::{
    collections::{BTreeSet, VecDeque},
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep_until, timeout};

/// istiod debounces a change of endpoints by 100 ms.
const SETTLED: Duration = Duration::from_millis(400);
/// From being left out of the endpoints to the next look.
const WITHHELD: Duration = Duration::from_secs(5);
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
}

type Work<'a> = Pin<Box<dyn Future<Output = Done> + Send + 'a>>;

/// What a piece of work in the background has brought.
enum Done {
    Looked(Result<Known, &'static str>),
    Peeked(Membership),
}

/// Keeps membership while a session lives.
pub(super) struct Observer<'a> {
    istiod: &'a Istiod,
    known: Known,
    look_at: Option<Instant>,
    waits: Backoff,
    looking: Option<Work<'a>>,
    peeking: Option<Work<'a>>,
    /// What to say next.
    turns: VecDeque<Turn>,
}

impl<'a> Observer<'a> {
    pub(super) fn new(istiod: &'a Istiod) -> Self {
        let waits = Backoff::new(Duration::from_secs(2), Duration::from_secs(300));
        Self {
            istiod,
            known: Known::default(),
            look_at: None,
            waits,
            looking: None,
            peeking: None,
            turns: VecDeque::new(),
        }
    }

    /// The clusters of the services that select us.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.known.names()
    }

    /// Looks `after` the mesh has settled.
    pub(super) fn look_after(&mut self, after: Duration) {
        match self.istiod.membership {
            Some(_) => self.look_at = Some(Instant::now() + SETTLED + after),
            None => self.turns.push_back(Turn::Told(Membership::Unknown { cause: "turned off (membership.enabled)" })),
        }
    }

    /// A verdict was reported: a healthy one makes us visible, so a look may find more than the last.
    pub(super) fn health(&mut self, health: &Health) {
        if *health == Health::Healthy && self.known.names().is_empty() {
            self.waits.reset();
            self.look_after(Duration::ZERO);
        }
    }

    /// Takes in what arrived on the session's stream.
    pub(super) fn heard(&mut self, assignments: &[ClusterLoadAssignment], addresses: &Addresses) {
        if self.known.update(assignments, &addresses.all) {
            self.peek(addresses.primary);
            if matches!(self.known.membership(), Membership::Withheld(_)) {
                // Unhealthy, or not selected any more: a look tells, once we are healthy.
                self.look_after(WITHHELD);
            }
        }
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
    fn peek(&mut self, ip: Option<IpAddr>) {
        let istiod = self.istiod;
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
        if let Some(turn) = self.turns.pop_front() {
            return turn;
        }
        let done = tokio::select! {
            done = finished(&mut self.peeking) => done,
            done = finished(&mut self.looking) => done,
            () = at(self.look_at), if self.looking.is_none() => {
                self.look_at = None;
                return Turn::Due;
            }
        };
        match done {
            Done::Peeked(fact) => Turn::Told(fact),
            Done::Looked(Ok(known)) => {
                self.known = known;
                if self.known.names().is_empty() {
                    // A service may be made later.
                    self.look_at = Some(Instant::now() + self.waits.next_wait());
                    return Turn::Told(Membership::NotSelected);
                }
                self.waits.reset();
                // Their endpoints arrive on the session's stream, and the fact follows from them.
                Turn::Names(self.known.names())
            }
            Done::Looked(Err(cause)) => {
                self.look_at = Some(Instant::now() + self.waits.slowest());
                // What is known already stays known.
                match self.known.names() {
                    names if names.is_empty() => Turn::Told(Membership::Unknown { cause }),
                    names => Turn::Names(names),
                }
            }
        }
    }
}

/// Waits for the work, if there is any, and puts it away.
async fn finished(slot: &mut Option<Work<'_>>) -> Done {
    let Some(work) = slot else { return std::future::pending().await };
    let done = work.await;
    *slot = None;
    done
}

/// Waits until a moment; for ever when there is none.
pub(super) async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

async fn ask(istiod: &Istiod, link: Arc<Link>, addresses: &Addresses, max_bytes: usize) -> Result<Known, Error> {
    let node = istiod.node(addresses, false);
    let mut stream = Stream::new(istiod, link, node, max_bytes).await?;
    stream.watch_clusters();
    let known = loop {
        match stream.next(istiod).await? {
            Answer::Clusters(names) => {
                let outbound: BTreeSet<_> = names.into_iter().filter(|name| name.starts_with("outbound|")).collect();
                if outbound.is_empty() {
                    break Known::default();
                }
                stream.watch_endpoints(outbound);
            }
            Answer::Endpoints(assignments) => break Known::found(assignments, &addresses.all),
        }
    };
    stream.close(Duration::from_secs(1)).await;
    Ok(known)
}
