//! The writing ends of a workload's facts. They outlive the parts that write them: a part that is replaced goes on where
//! the one before it was, and no reader takes notice.

use crate::{
    files::Versions,
    identity,
    status::{
        Addresses, Consumers, Durable, Health, Identity, InboundCounters, InboundPlace, Located, Membership,
        Publication, Registration, Reload, Token,
    },
};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

/// Where the parts of one workload write.
#[derive(Debug, Default)]
pub(super) struct Writers {
    pub(super) identity: watch::Sender<Identity>,
    pub(super) durable: watch::Sender<Durable>,
    pub(super) token: watch::Sender<Token>,
    pub(super) registration: watch::Sender<Registration>,
    pub(super) membership: watch::Sender<Membership>,
    pub(super) health: watch::Sender<Health>,
    pub(super) addresses: watch::Sender<Addresses>,
    pub(super) located: watch::Sender<Located>,
    /// What token and roots are, as each look finds them.
    pub(super) local: watch::Sender<Versions>,
    pub(super) consumers: watch::Sender<Consumers>,
    publications: BTreeMap<String, watch::Sender<Publication>>,
    reloads: BTreeMap<String, watch::Sender<Reload>>,
    inbounds: BTreeMap<String, (watch::Sender<InboundPlace>, Arc<InboundCounters>)>,
}

impl Writers {
    /// Of the loops that own the identity.
    pub(super) fn kept(&self) -> identity::Facts {
        identity::Facts { identity: self.identity.clone(), durable: self.durable.clone(), token: self.token.clone() }
    }

    /// Of the publisher of that name.
    pub(super) fn publication(&mut self, name: &str) -> watch::Sender<Publication> {
        self.publications.entry(name.to_owned()).or_default().clone()
    }

    /// Of the hook of that name.
    pub(super) fn reload(&mut self, name: &str) -> watch::Sender<Reload> {
        self.reloads.entry(name.to_owned()).or_default().clone()
    }

    /// Of the listener at that address, as configured.
    pub(super) fn inbound(&mut self, listen: &str) -> (watch::Sender<InboundPlace>, Arc<InboundCounters>) {
        self.inbounds.entry(listen.to_owned()).or_default().clone()
    }
}
