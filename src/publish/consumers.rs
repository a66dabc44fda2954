//! Who takes the identity from the socket, and which version of it: the fact, and the one way to write it.

use super::refusals::Refusals;
use crate::status;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use tokio::sync::watch;
use tracing::{debug, warn};

/// The number of the next stream: several sockets write to one fact.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The consumers of one connection's peer. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Consumers {
    fact: watch::Sender<status::Consumers>,
    turned_away: Arc<Refusals>,
    refused: Arc<Refusals>,
    uid: u32,
    pid: Option<i32>,
}

impl Consumers {
    /// Nobody yet; written to `fact`.
    pub(super) fn new(fact: watch::Sender<status::Consumers>) -> Self {
        Self { fact, turned_away: Arc::default(), refused: Arc::default(), uid: u32::MAX, pid: None }
    }

    /// Those of one peer.
    pub(super) fn of(&self, uid: u32, pid: Option<i32>) -> Self {
        Self { uid, pid, ..self.clone() }
    }

    /// Tells that one of them asks for what it cannot have; once a minute for each user.
    pub(super) fn turned_away(&self, protocol: &'static str, node: &str, why: &tonic::Status) {
        let (Self { uid, pid, .. }, cause) = (self, why.message());
        match self.turned_away.due(*uid) {
            Some(before) => warn!(protocol, node, uid, pid, cause, before, "a consumer is turned away"),
            None => debug!(protocol, node, uid, pid, cause, "a consumer is turned away"),
        }
    }

    /// A place for one stream of `protocol`; given up when dropped.
    pub(super) fn seat(&self, protocol: &'static str) -> Seat {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Seat { consumers: self.clone(), number, protocol, node: String::new(), takes: Vec::new() }
    }
}

/// What one stream takes.
#[derive(Debug)]
pub(super) struct Seat {
    consumers: Consumers,
    number: u64,
    protocol: &'static str,
    node: String,
    takes: Vec<&'static str>,
}

impl Seat {
    /// It has said who it is.
    pub(super) fn named(&mut self, node: &str) {
        node.clone_into(&mut self.node);
    }

    /// From now on it takes exactly these.
    pub(super) fn wants(&mut self, takes: &[&'static str]) {
        if self.takes == takes {
            return;
        }
        self.consumers.fact.send_modify(|all| {
            for gone in self.takes.iter().filter(|name| !takes.contains(name)) {
                all.remove(&(self.number, *gone));
            }
            for name in takes {
                all.entry((self.number, *name)).or_insert_with(|| status::Consumer {
                    protocol: self.protocol,
                    node: self.node.clone(),
                    uid: self.consumers.uid,
                    pid: self.consumers.pid,
                    sent: None,
                    accepted: None,
                    refusal: None,
                });
            }
        });
        self.takes = takes.to_vec();
        let Consumers { uid, pid, .. } = self.consumers;
        debug!(protocol = self.protocol, node = self.node, ?takes, uid, pid, "a consumer");
    }

    /// It was sent this.
    pub(super) fn sent(&self, name: &'static str, version: Arc<str>) {
        self.modify(name, |consumer| consumer.sent = Some(version));
    }

    /// It uses this.
    pub(super) fn accepted(&self, name: &'static str, version: Arc<str>) {
        debug!(protocol = self.protocol, node = self.node, name, version = &*version, "taken by a consumer");
        self.modify(name, |consumer| {
            consumer.accepted = Some(version);
            consumer.refusal = None;
        });
    }

    /// It was sent this by a protocol in which nobody answers: what was sent counts as used.
    pub(super) fn given(&self, name: &'static str, version: &Arc<str>) {
        self.sent(name, version.clone());
        self.accepted(name, version.clone());
    }

    /// It does not want this. Said once a minute for each user: a version is sent again to whoever asks anew, and can be
    /// refused again.
    pub(super) fn refused(&self, name: &'static str, version: &str, why: &str) {
        let (Self { protocol, node, consumers, .. }, cause) = (self, why);
        let Consumers { uid, pid, .. } = *consumers;
        let what = "a consumer refuses what it was sent and goes on with what it has";
        match consumers.refused.due(uid) {
            Some(before) => warn!(protocol, node, uid, pid, name, version, cause, before, "{what}"),
            None => debug!(protocol, node, uid, pid, name, version, cause, "{what}"),
        }
        self.modify(name, |consumer| consumer.refusal = Some(why.to_owned()));
    }

    /// It asks for what is not served.
    pub(super) fn turned_away(&self, why: &tonic::Status) {
        self.consumers.turned_away(self.protocol, &self.node, why);
    }

    fn modify(&self, name: &'static str, change: impl FnOnce(&mut status::Consumer)) {
        self.consumers.fact.send_modify(|all| {
            if let Some(consumer) = all.get_mut(&(self.number, name)) {
                change(consumer);
            }
        });
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if !self.takes.is_empty() {
            self.consumers.fact.send_modify(|all| {
                for name in &self.takes {
                    all.remove(&(self.number, *name));
                }
            });
        }
    }
}
