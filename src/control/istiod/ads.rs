//! One stream of the aggregated discovery service: requests, answers, acknowledgements, health reports.

mod wire;

use super::Istiod;
use crate::{
    control::{Error, link::Link},
    proto::{
        envoy::config::{cluster::v3::Cluster, core::v3::Node, endpoint::v3::ClusterLoadAssignment},
        google::rpc::Status as Detail,
    },
    status::Health,
};
use prost::Message;
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tonic::Code;
use wire::{Ask, Received, Wire};

pub(super) const CALL: &str = Error::REGISTRATION;
const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
const CLUSTERS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
/// Not a resource: a request of this type reports health (Istio's own extension of the protocol).
const HEALTH: &str = "type.googleapis.com/istio.v1.HealthInformation";
/// gRPC's INTERNAL, which Istio's agent puts into a failing report; istiod looks at its presence and text alone.
const INTERNAL: i32 = 13;
/// istiod's bound for a status message is etcd's; nobody reads more of a probe's text.
const MAX_REPORT: usize = 4096;

/// What a stream was told.
#[derive(Debug)]
pub(super) enum Answer {
    /// Endpoints of some of the clusters asked for.
    Endpoints(Vec<ClusterLoadAssignment>),
    /// Names of all clusters.
    Clusters(Vec<String>),
}

/// What we have asked for of one type. Only an answer to it can be acknowledged or refused: error details on a type
/// that was not asked for crash istiod, and cannot be built here.
#[derive(Debug, Default)]
struct Subscription {
    names: BTreeSet<String>,
    /// Version and nonce of the last answer, empty before it.
    version: String,
    nonce: String,
}

/// A stream. Dropping it resets it; [`Stream::close`] ends it in order.
pub(super) struct Stream {
    pub(super) link: Arc<Link>,
    wire: Wire,
    /// Said with the first request of the stream only.
    node: Option<Node>,
    endpoints: Option<Subscription>,
    clusters: Option<Subscription>,
}

impl Stream {
    /// A stream on `link`. Nothing is sent before the first subscription; the call is made by [`Stream::next`].
    pub(super) async fn new(istiod: &Istiod, link: Arc<Link>, node: Node, max_bytes: usize) -> Result<Self, Error> {
        let wire = Wire::open(istiod, &link, max_bytes).await?;
        Ok(Self { link, wire, node: Some(node), endpoints: None, clusters: None })
    }

    /// Asks for the endpoints of these clusters instead of those asked for before.
    pub(super) fn watch_endpoints(&mut self, names: BTreeSet<String>) {
        let before = self.endpoints.take().unwrap_or_default();
        if before.names == names {
            self.endpoints = Some(before);
            return;
        }
        let ask = Ask {
            node: self.node.take(),
            subscribe: names.difference(&before.names).cloned().collect(),
            unsubscribe: before.names.difference(&names).cloned().collect(),
            names: names.iter().cloned().collect(),
            version: before.version.clone(),
            // Only state of the world wants the nonce here; in the incremental encoding it would make this an answer.
            nonce: if matches!(self.wire, Wire::Sotw(..)) { before.nonce.clone() } else { String::new() },
            ..Ask::of(ENDPOINTS)
        };
        self.wire.send(ask);
        self.endpoints = Some(Subscription { names, ..before });
    }

    /// Asks for all clusters.
    pub(super) fn watch_clusters(&mut self) {
        let ask = Ask { node: self.node.take(), ..Ask::of(CLUSTERS) };
        self.wire.send(ask);
        self.clusters = Some(Subscription::default());
    }

    /// Reports a verdict. Nothing is sent for one that is unknown or parked, nor before the first subscription: istiod
    /// drops a report that comes first.
    pub(super) fn report(&self, health: &Health) {
        let detail = match health {
            Health::Unknown | Health::Delayed { .. } | Health::Parked { .. } => return,
            Health::Healthy => None,
            Health::Unhealthy { message } => {
                Some(Detail { code: INTERNAL, message: message.chars().take(MAX_REPORT).collect() })
            }
        };
        if self.node.is_none() {
            self.wire.send(Ask { detail, ..Ask::of(HEALTH) });
        }
    }

    /// The next answer, already acknowledged (or refused, when it cannot be decoded). Safe to cancel.
    pub(super) async fn next(&mut self, istiod: &Istiod) -> Result<Answer, Error> {
        loop {
            let received = match self.wire.next().await {
                Ok(Some(received)) => received,
                Ok(None) => {
                    let cause = self.link.end().await.unwrap_or_else(|| "istiod ended the stream".to_owned());
                    return Err(Error::Ended { address: self.link.address(), cause });
                }
                Err(status) => return Err(istiod.failure(CALL, &self.link, status).await),
            };
            if let Some(answer) = self.take(received) {
                return Ok(answer);
            }
        }
    }

    /// Acknowledges an answer to a subscription of ours and gives its content; anything else is passed over.
    fn take(&mut self, received: Received) -> Option<Answer> {
        let subscription = match received.type_url.as_str() {
            ENDPOINTS => self.endpoints.as_mut()?,
            CLUSTERS => self.clusters.as_mut()?,
            _ => return None,
        };
        subscription.nonce.clone_from(&received.nonce);
        let decoded = match received.type_url.as_str() {
            ENDPOINTS => decode(&received.resources).map(|mut all| {
                let gone = received.removed.iter().map(|name| name.to_owned());
                all.extend(gone.map(|cluster_name| ClusterLoadAssignment { cluster_name, ..Default::default() }));
                Answer::Endpoints(all)
            }),
            _ => decode::<Cluster>(&received.resources)
                .map(|all| Answer::Clusters(all.into_iter().map(|c| c.name).collect())),
        };
        let refusal = match &decoded {
            Ok(_) => {
                subscription.version = received.version;
                None
            }
            Err(e) => Some(Detail { code: Code::InvalidArgument as i32, message: e.to_string() }),
        };
        let ask = Ask {
            names: subscription.names.iter().cloned().collect(),
            version: subscription.version.clone(),
            nonce: received.nonce,
            detail: refusal,
            ..Ask::of(if received.type_url == ENDPOINTS { ENDPOINTS } else { CLUSTERS })
        };
        self.wire.send(ask);
        decoded.ok()
    }

    /// Half-closes and waits until istiod has ended the stream too, `within` at most.
    pub(super) async fn close(self, within: Duration) {
        self.wire.close(within).await;
    }
}

fn decode<T: Message + Default>(resources: &[prost_types::Any]) -> Result<Vec<T>, prost::DecodeError> {
    resources.iter().map(|any| T::decode(any.value.as_slice())).collect()
}
