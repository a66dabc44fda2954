//! One stream of the aggregated discovery service: requests, answers, acknowledgements, health reports.

#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod outbox;
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
use outbox::Outbox;
use prost::Message;
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tonic::Code;
use wire::{Received, Wire};

pub(super) const CALL: &str = Error::REGISTRATION;
const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
/// Asked for when no service is known to select us: its empty answer is all the acknowledgement that it takes.
const NOBODY: &str = "outbound|80||we-agent.invalid";
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

/// A stream. Dropping it resets it; [`Stream::close`] ends it in order.
pub(super) struct Stream {
    pub(super) link: Arc<Link>,
    wire: Wire,
    /// The verdict that was reported last.
    said: Option<Health>,
}

impl Stream {
    /// A stream on `link`. Nothing is sent before the first subscription; the call is made by [`Stream::next`].
    pub(super) async fn new(istiod: &Istiod, link: Arc<Link>, node: Node, max_bytes: usize) -> Result<Self, Error> {
        let wire = Wire::open(istiod, &link, node, max_bytes).await?;
        Ok(Self { link, wire, said: None })
    }

    /// Asks for the endpoints of these clusters instead of those asked for before. For want of a name nobody's are asked
    /// for: an unknown cluster has an empty answer, and no name at all would mean every cluster.
    pub(super) fn watch_endpoints(&mut self, names: BTreeSet<String>) {
        let names = if names.is_empty() { BTreeSet::from([NOBODY.to_owned()]) } else { names };
        self.wire.outbox.want(ENDPOINTS, names);
    }

    /// Asks for all clusters.
    pub(super) fn watch_clusters(&mut self) {
        self.wire.outbox.want(CLUSTERS, BTreeSet::new());
    }

    /// Reports a verdict, if this stream was not told already.
    pub(super) fn report(&mut self, health: &Health) {
        if self.said.as_ref() != Some(health) {
            self.report_again(health);
        }
    }

    /// Reports a verdict whatever was said before. Nothing is sent for one that is unknown or parked.
    pub(super) fn report_again(&mut self, health: &Health) {
        let detail = match health {
            Health::Unknown | Health::Delayed { .. } | Health::Parked { .. } => return,
            Health::Healthy => None,
            Health::Unhealthy { message } => {
                Some(Detail { code: INTERNAL, message: message.chars().take(MAX_REPORT).collect() })
            }
        };
        self.said = Some(health.clone());
        self.wire.outbox.report(detail);
    }

    /// The next answer, already acknowledged (or refused, when it cannot be decoded). Safe to cancel.
    pub(super) async fn next(&mut self, istiod: &Istiod) -> Result<Answer, Error> {
        loop {
            let received = match self.wire.next().await {
                Ok(Some(received)) => received,
                Ok(None) => {
                    return Err(self.link.broke("istiod ended the stream".to_owned()).await.after_an_answer());
                }
                Err(status) => return Err(istiod.failure(CALL, &self.link, status).await),
            };
            if let Some(answer) = take(&self.wire.outbox, received) {
                return Ok(answer);
            }
        }
    }

    /// Half-closes and waits until istiod has ended the stream too, `within` at most.
    pub(super) async fn close(self, within: Duration) {
        self.wire.close(within).await;
    }
}

/// Acknowledges an answer to a subscription of ours and gives its content; anything else is passed over.
fn take(outbox: &Outbox, received: Received) -> Option<Answer> {
    let (type_url, decoded) = match received.type_url.as_str() {
        ENDPOINTS => {
            let gone = received.removed.into_iter();
            let gone = gone.map(|cluster_name| ClusterLoadAssignment { cluster_name, ..Default::default() });
            (ENDPOINTS, decode(&received.resources).map(|all| Answer::Endpoints(all.into_iter().chain(gone).collect())))
        }
        CLUSTERS => {
            let names = |all: Vec<Cluster>| Answer::Clusters(all.into_iter().map(|c| c.name).collect());
            (CLUSTERS, decode(&received.resources).map(names))
        }
        _ => return None,
    };
    let refusal = decoded.as_ref().err();
    let refusal = refusal.map(|e| Detail { code: Code::InvalidArgument as i32, message: e.to_string() });
    let asked = outbox.answered(type_url, received.version, received.nonce, refusal);
    decoded.ok().filter(|_| asked)
}

fn decode<T: Message + Default>(resources: &[prost_types::Any]) -> Result<Vec<T>, prost::DecodeError> {
    resources.iter().map(|any| T::decode(any.value.as_slice())).collect()
}
