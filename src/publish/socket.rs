//! The socket of one workload, `/run/we-agent/<workload>/agent.sock`: Envoy's secret discovery and the SPIFFE Workload
//! API on one name, for whoever the policy lets in.
//!
//! Nothing here can hold up a rotation: the newest identity is put where consumers look for it, and each takes it when
//! it has room. What one user can use is bounded (`budget`), and beyond it is turned away.

mod connection;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod place;
mod places;

pub use place::Place;

use super::{
    budget::{self, Budget},
    consumers::Consumers,
    offer::Offer,
    policy::Policy,
    refusals::Refusals,
};
use crate::{
    status::{self, Identity, Publication},
    time::Clock,
};
pub(super) use connection::{Connection, Services};
use places::Places;
use std::{collections::HashMap, io, sync::Arc, time::Duration};
use tokio::{
    net::UnixStream,
    sync::watch,
    task::{Id, JoinSet},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, warn};

/// Connections at a time of one user. One Envoy has one.
const MAX_OF_USER: usize = 1024;
/// Connections at a time of all users; further ones wait in the kernel's queue.
const MAX: usize = 4096;
/// How long accepting rests when descriptors have run out: they come back when others close theirs.
const REST: Duration = Duration::from_millis(100);
/// How long the end of their streams may take to reach all consumers when the agent stops. It takes milliseconds, unless
/// one does not read.
const FAREWELL: Duration = Duration::from_secs(1);

/// Serves the newest identity on `place` until `shutdown`; then streams end with `UNAVAILABLE`. A socket that cannot be
/// had is tried again and told in `fact`. `consumers` says who takes what.
pub async fn serve(
    place: Place,
    policy: Policy,
    mut identity: watch::Receiver<Identity>,
    fact: watch::Sender<Publication>,
    consumers: watch::Sender<status::Consumers>,
    clock: Clock,
    shutdown: CancellationToken,
) {
    // Streams end when this does.
    let offers = watch::Sender::new(Offer::default());
    let services = Services {
        policy: Arc::new(policy),
        offers: offers.subscribe(),
        consumers: Consumers::new(consumers),
        clock,
        shutdown: shutdown.clone(),
    };
    let mut places = Places::new(place, fact, clock);
    let mut crowd = Crowd::new(MAX_OF_USER, budget::OF_USER);
    identity.mark_changed();
    loop {
        let room = crowd.connections.len() < MAX;
        tokio::select! {
            // News first: whoever comes now gets the newest.
            biased;
            () = shutdown.cancelled() => break,
            changed = identity.changed() => {
                if changed.is_err() {
                    break;
                }
                offers.send_if_modified(|offer| offer.follow(&identity.borrow_and_update(), clock.now()));
                if let Some(serial) = offers.borrow().serial() {
                    places.offer(serial);
                }
            }
            () = crowd.left() => {}
            came = places.accept(room) => match came {
                Ok(stream) => crowd.admit(stream, &services),
                Err(error) => {
                    crowd.missed(&error);
                    tokio::time::sleep(REST).await;
                }
            },
        }
    }
    drop(offers);
    let _ = timeout(FAREWELL, crowd.gone()).await;
    places.end();
}

/// Everybody who is connected.
struct Crowd {
    /// Connections at a time of one user.
    of_each: usize,
    /// What all calls of one user may take, in bytes.
    budget: usize,
    connections: JoinSet<()>,
    users: HashMap<Id, u32>,
    of_user: HashMap<u32, User>,
    /// Of those of whom nothing is known.
    missed: Refusals,
}

/// What one user has.
struct User {
    connections: usize,
    budget: Budget,
}

impl Crowd {
    fn new(of_each: usize, budget: usize) -> Self {
        Self {
            of_each,
            budget,
            connections: JoinSet::new(),
            users: HashMap::new(),
            of_user: HashMap::new(),
            missed: Refusals::default(),
        }
    }

    fn admit(&mut self, stream: UnixStream, services: &Services) {
        let peer = match crate::host::Peer::of(&stream) {
            Ok(peer) => peer,
            Err(error) => return self.missed(&error),
        };
        let uid = peer.uid;
        let user = self.of_user.entry(uid).or_insert_with(|| User { connections: 0, budget: Budget::new(self.budget) });
        if user.connections >= self.of_each {
            return services.policy.crowded(&peer, self.of_each);
        }
        user.connections += 1;
        let connection = Connection::new(stream, peer, user.budget.clone(), services);
        let task = self.connections.spawn(connection.run().in_current_span());
        self.users.insert(task.id(), uid);
    }

    /// Tells that somebody cannot be accepted, or that the system does not say who it is. Once a minute: when descriptors
    /// have run out, it is so ten times a second.
    fn missed(&self, error: &io::Error) {
        match self.missed.due(None) {
            Some(before) => warn!(cause = %error, before, "a consumer cannot be let in at present"),
            None => debug!(cause = %error, "a consumer cannot be let in at present"),
        }
    }

    /// Waits until all have left.
    async fn gone(&mut self) {
        while !self.connections.is_empty() {
            self.left().await;
        }
    }

    /// Waits until somebody has left.
    async fn left(&mut self) {
        let id = match self.connections.join_next_with_id().await {
            None => return std::future::pending().await,
            Some(Ok((id, ()))) => id,
            Some(Err(error)) => {
                tracing::error!(cause = %error, "a connection failed, which is a bug; the others live on");
                error.id()
            }
        };
        if let Some(uid) = self.users.remove(&id)
            && let Some(user) = self.of_user.get_mut(&uid)
        {
            user.connections -= 1;
            if user.connections == 0 {
                self.of_user.remove(&uid);
            }
        }
    }
}

#[cfg(test)]
mod tests;
