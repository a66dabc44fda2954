//! The connections of a workload: one for each server and credential, shared by whoever needs it.

use super::{Error, credential::Rung, link::Link, trust::Trust};
use crate::{
    host::Resolver,
    workload::{Authority, Endpoint},
};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

/// Connections that somebody still holds, and what is known of where they lead.
#[derive(Debug)]
pub(crate) struct Links {
    resolver: Resolver,
    trust: Trust,
    places: Mutex<Vec<Arc<Place>>>,
    /// The address that was reached last, for each name.
    good: Mutex<Vec<(Authority, SocketAddr)>>,
    /// A connection on which a stream is asked for again soon.
    kept: Mutex<Option<Arc<Link>>>,
}

/// Room for one connection.
#[derive(Debug)]
struct Place {
    endpoint: Endpoint,
    rung: Rung,
    /// The newest. The one lock that is held across an `.await`: during a dial, which is bounded, so that a request for a
    /// certificate and a session that begin together share one connection. A server that is away keeps nobody else waiting.
    link: tokio::sync::Mutex<Weak<Link>>,
}

impl Place {
    fn is_used(self: &Arc<Self>) -> bool {
        // Whoever dials holds the lock.
        Arc::strong_count(self) > 1 || self.link.try_lock().is_ok_and(|link| link.strong_count() > 0)
    }
}

impl Links {
    pub(crate) fn new(resolver: Resolver, trust: Trust) -> Self {
        Self { resolver, trust, places: Mutex::default(), good: Mutex::default(), kept: Mutex::default() }
    }

    /// A connection to `endpoint` on `rung`: one that is open already and trusts what is trusted now, unless a `fresh` one is
    /// asked for.
    pub(crate) async fn get(&self, endpoint: &Endpoint, rung: &Rung, fresh: bool) -> Result<Arc<Link>, Error> {
        let place = self.place(endpoint, rung);
        let mut last = place.link.lock().await;
        // Held from here on: who has dialled it may be done with it while the roots are read.
        let open = last.upgrade();
        let roots = self.trust.roots(&endpoint.roots).await;
        let open = open.filter(|link| link.is_open() && !fresh);
        // A file that cannot be read is no reason to leave a connection.
        if let Some(link) = open.filter(|link| roots.as_ref().map_or(true, |roots| roots.all == link.roots.all)) {
            return Ok(link);
        }
        let good = self.good().iter().find(|(authority, _)| *authority == endpoint.authority).map(|(_, at)| *at);
        let link = Link::dial(endpoint, rung.clone(), roots?, &self.trust, &self.resolver, good).await?;
        tracing::debug!(peer = %link.peer, credential = %rung.describe(), "connected");
        self.good().retain(|(authority, _)| *authority != endpoint.authority);
        self.good().push((endpoint.authority.clone(), link.peer));
        *last = Arc::downgrade(&link);
        Ok(link)
    }

    fn place(&self, endpoint: &Endpoint, rung: &Rung) -> Arc<Place> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(Place::is_used);
        if let Some(place) = places.iter().find(|place| place.endpoint == *endpoint && place.rung.same(rung)) {
            return place.clone();
        }
        let place = Place { endpoint: endpoint.clone(), rung: rung.clone(), link: Default::default() };
        places.push(Arc::new(place));
        places[places.len() - 1].clone()
    }

    fn good(&self) -> MutexGuard<'_, Vec<(Authority, SocketAddr)>> {
        self.good.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps `link` open although nobody holds it, while it is asked for `again` soon.
    pub(crate) fn keep(&self, link: Arc<Link>, again: bool) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if again {
            *kept = Some(link);
        } else {
            kept.take_if(|kept| Arc::ptr_eq(kept, &link));
        }
    }
}
