//! Mutual TLS for an application that speaks none: the mesh calls a port that we listen on, we ask who calls, and
//! forward the bytes to the application on this host.
//!
//! The control loop of a listener ([`Listener`]) lives with the other loops of its workload: it gets the socket, makes a TLS
//! configuration of each identity, and ends the connections in order. The connections live on [`Threads`] of their own,
//! which are there only if some workload has a listener; they share nothing with the loops but that configuration and
//! the counters.

mod accept;
mod admission;
mod budget;
mod connection;
mod deadlines;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod handshake;
mod header;
mod hello;
mod keys;
mod lane;
mod place;
mod pump;
mod refusal;
mod settings;
mod share;
mod threads;
mod tls;

pub use place::Place;
pub use settings::{Listen, Settings};
pub use threads::Threads;

use crate::{
    spiffe::SpiffeId,
    status::{Identity, InboundCounters, InboundPlace, tell},
    time::Clock,
};
use keys::{Guard, Keys};
use refusal::Journal;
use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// From one look whether all connections have ended to the next.
const LOOK: Duration = Duration::from_millis(20);
/// From one look at an identity that is not valid to the next.
const LATER: Duration = Duration::from_secs(3600);
/// What the last connections may be late.
const LATE: Duration = Duration::from_millis(200);

/// What the control loop tells the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    /// To be ended at the first quiet moment, at the latest then.
    Draining(Instant),
}

/// What all connections of a listener share.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    counters: Arc<InboundCounters>,
    keys: watch::Receiver<Option<Arc<Keys>>>,
    phase: watch::Receiver<Phase>,
    admission: admission::Admission,
    shares: share::Shares,
    budget: Arc<budget::Budget>,
    journal: Journal,
}

/// One listener, ready to be run.
#[derive(Debug)]
pub struct Listener {
    /// Where it listens.
    pub place: Place,
    /// Who we are; who may call is seen from here.
    pub id: SpiffeId,
    /// What it does.
    pub settings: Settings,
    /// Where its connections live.
    pub threads: Threads,
    /// The fact that says where it is.
    pub fact: watch::Sender<InboundPlace>,
    /// What it counts.
    pub counters: Arc<InboundCounters>,
}

impl Listener {
    /// Serves until `stop`, then hands the socket on and lets the connections end.
    pub async fn run(self, mut identity: watch::Receiver<Identity>, clock: Clock, stop: CancellationToken) {
        let Self { mut place, id, settings, threads, fact, counters } = self;
        let Some((listener, at)) = stop.run_until_cancelled(place.listen(&fact)).await else { return };
        if let Some(shortage) = threads.shortage(settings.max_connections) {
            tracing::warn!("{shortage}");
        }
        let guard = Arc::new(Guard::new(&id, &settings.allow));
        let (keys, receiver) = watch::channel(keys_of(&identity.borrow_and_update(), &guard, clock.now()));
        let (phase, told) = watch::channel(Phase::Serving);
        let drain = settings.drain;
        let shared = Arc::new(Shared {
            admission: admission::Admission::new(settings.max_handshakes),
            shares: share::Shares::default(),
            budget: Arc::default(),
            settings,
            counters: counters.clone(),
            keys: receiver,
            phase: told,
            journal: Journal::new(tracing::Span::current()),
        });
        let spare = listener.try_clone();
        let mut accepting = threads.run(accept::run(listener, shared, threads.clone(), stop.clone()));
        loop {
            let (known, now) = (identity.borrow_and_update().clone(), clock.now());
            tell(&fact, place_of(at, &known, keys.borrow().is_some(), now));
            let valid = known.valid(now).is_some();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                // We are started again.
                _ = &mut accepting => return tell(&fact, InboundPlace::Failed("connections are not taken".to_owned())),
                Ok(()) = identity.changed() => {}
                () = clock.until(|now| next_look(&known, valid, now)) => {}
            }
            keys.send_replace(keys_of(&identity.borrow(), &guard, clock.now()));
        }
        let _ = accepting.await; // it ends by itself
        if let Ok(listener) = spare {
            place.hand_on(listener);
        }
        tell(&fact, InboundPlace::Absent);
        let until = Instant::now() + drain;
        phase.send_replace(Phase::Draining(until));
        // The connections end by themselves, the last ones at the deadline.
        while counters.open.load(Ordering::Relaxed) > 0 && Instant::now() < until + LATE {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Where it listens, and whether it can serve there: without a certificate that is `usable` every call of the mesh is refused.
fn place_of(at: SocketAddr, identity: &Identity, usable: bool, now: SystemTime) -> InboundPlace {
    let lack = match &identity.current {
        _ if usable && identity.valid(now).is_some() => return InboundPlace::Bound(at),
        None => "there is no certificate yet",
        Some(context) if context.svid.not_after() <= now => "the certificate has expired",
        Some(_) => "the certificate cannot be used",
    };
    InboundPlace::Deaf { at, cause: format!("{lack}, so every call of the mesh is refused at {at}") }
}

/// When it is to be looked whether the certificate still is what it was: at its end; while none is valid, from time to time,
/// for the clock may be set.
fn next_look(identity: &Identity, valid: bool, now: SystemTime) -> SystemTime {
    match &identity.current {
        _ if identity.valid(now).is_some() != valid => now,
        Some(context) if valid => context.svid.not_after(),
        _ => now + LATER,
    }
}

/// What is served from now on; none without a certificate that is valid.
fn keys_of(identity: &Identity, guard: &Arc<Guard>, now: SystemTime) -> Option<Arc<Keys>> {
    match Keys::new(identity.valid(now)?, identity.previous.as_deref(), guard, now) {
        Ok(keys) => Some(Arc::new(keys)),
        Err(error) => {
            tracing::error!(cause = %error, "the certificate cannot be used for inbound TLS");
            None
        }
    }
}
