//! What a stream asks for, in one shape for both encodings, and what it has of it.

use std::collections::{BTreeMap, BTreeSet};

use prost_types::Any;

use crate::{
    grpc::{End, Reader},
    proto::{
        envoy::{
            config::core::v3 as core,
            service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
        },
        google::rpc,
    },
};

/// The two encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rpc {
    Delta,
    StateOfTheWorld,
}

/// A request of either encoding.
pub(super) struct Request {
    pub(super) node: Option<core::Node>,
    pub(super) type_url: String,
    pub(super) subscribe: Vec<String>,
    pub(super) unsubscribe: Vec<String>,
    pub(super) nonce: String,
    pub(super) error: Option<rpc::Status>,
}

/// The next request.
pub(super) async fn read(rpc: Rpc, reader: &mut Reader) -> Result<Request, End> {
    Ok(match rpc {
        Rpc::Delta => {
            let r: DeltaDiscoveryRequest = reader.next().await?;
            Request {
                node: r.node,
                type_url: r.type_url,
                subscribe: r.resource_names_subscribe,
                unsubscribe: r.resource_names_unsubscribe,
                nonce: r.response_nonce,
                error: r.error_detail,
            }
        }
        Rpc::StateOfTheWorld => {
            let r: DiscoveryRequest = reader.next().await?;
            Request {
                node: r.node,
                type_url: r.type_url,
                subscribe: r.resource_names,
                unsubscribe: Vec::new(),
                nonce: r.response_nonce,
                error: r.error_detail,
            }
        }
    })
}

/// What a stream wants of one type, and what it has.
#[derive(Default)]
pub(super) struct Subscription {
    pub(super) names: BTreeSet<String>,
    pub(super) sent: BTreeMap<String, Any>,
    pub(super) nonce: String,
}

/// What of a subscription is to be answered.
pub(super) enum Wanted {
    All,
    These(Vec<String>),
}

impl Subscription {
    /// A first request is answered whole; later ones only for names that they add.
    pub(super) fn subscribe(&mut self, request: &Request, known: bool) -> Option<Wanted> {
        for name in &request.unsubscribe {
            self.names.remove(name);
            self.sent.remove(name);
        }
        let added: Vec<String> = request.subscribe.iter().filter(|n| *n != "*").cloned().collect();
        self.names.extend(added.iter().cloned());
        match (known, added.is_empty()) {
            (false, true) => Some(Wanted::All),
            (true, true) => None,
            (_, false) => Some(Wanted::These(added)),
        }
    }

    /// No nonce asks for everything; a stale one is nothing; the last one is an acknowledgement, perhaps with other names.
    pub(super) fn state(&mut self, request: &Request) -> Option<Wanted> {
        let names: BTreeSet<String> = request.subscribe.iter().cloned().collect();
        if request.nonce.is_empty() {
            self.names = names;
            return Some(Wanted::All);
        }
        if request.nonce != self.nonce || names == self.names {
            return None;
        }
        let added: Vec<String> = names.difference(&self.names).cloned().collect();
        self.sent.retain(|name, _| names.contains(name));
        self.names = names;
        (!added.is_empty()).then_some(Wanted::These(added))
    }
}
