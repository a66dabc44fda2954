//! What one stream has asked for, was sent, and has said to it: pure.

use super::{Name, Offer};
use crate::publish::offer::Secret;
use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

/// A request of either protocol, read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::publish) struct Ask {
    /// Who Envoy says it is; only in the first request.
    pub(super) node: Option<String>,
    /// What is wanted from now on.
    pub(super) names: Names,
    /// What is wanted and is not here.
    pub(super) unknown: Vec<String>,
    /// Of the response that is answered; empty in a first request.
    pub(super) nonce: String,
    /// Why that response was refused (NACK); none in an ACK.
    pub(super) refusal: Option<String>,
}

/// How a request names what it wants.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::publish) enum Names {
    /// State of the world: all that is wanted.
    Exactly(Vec<Name>),
    /// Incremental: what is wanted beside the rest, and what no longer.
    Change {
        /// To be sent, also when it was sent before.
        add: Vec<Name>,
        /// Not wanted any more.
        drop: Vec<Name>,
    },
}

impl Default for Names {
    fn default() -> Self {
        Self::Exactly(Vec::new())
    }
}

/// A version of a secret.
pub(super) type Version = (Name, Arc<str>);

/// What a consumer has said to a response.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It uses these.
    Accepted(Vec<Version>),
    /// It goes on with those from before; and why.
    Refused(Vec<Version>, String),
}

/// What is to be sent.
pub(in crate::publish) struct Reply<'a> {
    pub(super) nonce: String,
    pub(super) secrets: Vec<&'a Secret>,
    /// What is not here.
    pub(super) unknown: Vec<String>,
}

/// One stream. The newest secret is sent once; neither ACK nor NACK is answered, for the next secret is the retry.
#[derive(Debug, Default)]
pub(super) struct Subscription {
    /// What is wanted, and the version that was sent last.
    wanted: BTreeMap<Name, Option<Arc<str>>>,
    /// What is wanted, is not here, and has not been answered yet.
    unknown: Vec<String>,
    /// How many responses were sent: the nonce of the last.
    sent: u64,
    /// What was in the last response; empty once it was answered.
    unanswered: Vec<Version>,
}

impl Subscription {
    /// Takes a request in. A request that answers any but the last response is stale: a newer one is on its way, and
    /// in the state of the world its names are as old. A nonce of another stream, before anything was sent on this one,
    /// begins a subscription.
    pub(super) fn hear(&mut self, ask: &Ask) -> Option<Verdict> {
        let first = ask.nonce.is_empty() || self.sent == 0;
        let current = !first && ask.nonce == self.sent.to_string();
        match &ask.names {
            Names::Exactly(names) if first || current => {
                self.wanted.retain(|name, _| names.contains(name));
                for name in names {
                    let version = self.wanted.entry(*name).or_default();
                    if first {
                        *version = None;
                    }
                }
            }
            Names::Exactly(_) => {}
            Names::Change { add, drop } => {
                self.wanted.extend(add.iter().map(|name| (*name, None)));
                self.wanted.retain(|name, _| !drop.contains(name));
            }
        }
        self.unknown.extend_from_slice(&ask.unknown);
        if !current || self.unanswered.is_empty() {
            return None;
        }
        let versions = std::mem::take(&mut self.unanswered);
        Some(match &ask.refusal {
            None => Verdict::Accepted(versions),
            Some(why) => Verdict::Refused(versions, why.clone()),
        })
    }

    /// What is wanted at present.
    pub(super) fn names(&self) -> impl Iterator<Item = Name> {
        self.wanted.keys().copied()
    }

    /// How much there is to be said of what is not here.
    pub(super) fn unknown(&self) -> usize {
        self.unknown.len()
    }

    /// Whether everything wanted was sent, in whatever version: who asks no more has had its answer.
    pub(super) fn has_all(&self) -> bool {
        self.wanted.values().all(Option::is_some)
    }

    /// What is to be sent now: everything wanted whose newest version was not sent yet. None while that is not there,
    /// or has expired: the answer is held, so that Envoy waits and does not retry with its long back-off.
    pub(super) fn reply<'a>(&mut self, offer: &'a Offer, now: SystemTime) -> Option<Reply<'a>> {
        let mut due = Vec::new();
        for (name, version) in &mut self.wanted {
            let Some(secret) = offer.secret(*name, now) else { continue };
            if version.as_ref() != Some(&secret.version) {
                *version = Some(secret.version.clone());
                due.push(secret);
            }
        }
        if due.is_empty() && self.unknown.is_empty() {
            return None;
        }
        self.sent += 1;
        self.unanswered = due.iter().map(|secret| (secret.name, secret.version.clone())).collect();
        Some(Reply { nonce: self.sent.to_string(), secrets: due, unknown: std::mem::take(&mut self.unknown) })
    }
}

#[cfg(test)]
mod tests;
