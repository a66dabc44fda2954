//! One stream of the aggregated discovery service: requests, answers, acknowledgements, health reports.

use super::{Istiod, origin};
use crate::{
    control::{Error, link::Link},
    proto::{
        envoy::{
            config::{cluster::v3::Cluster, core::v3::Node, endpoint::v3::ClusterLoadAssignment},
            service::discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
                aggregated_discovery_service_client::AggregatedDiscoveryServiceClient as Client,
            },
        },
        google::rpc::Status as Detail,
    },
    status::Health,
};
use prost::Message;
use std::{collections::BTreeSet, pin::Pin, sync::Arc, time::Duration};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming};

use super::Xds;

pub(super) const CALL: &str = "registration";
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

type Opening<T> = Pin<Box<dyn Future<Output = Result<Streaming<T>, Status>> + Send>>;

/// The receiving half: a call that is being opened, then its messages.
enum Incoming<T> {
    Opening(Opening<T>),
    Open(Box<Streaming<T>>),
}

impl<T> Incoming<T> {
    async fn message(&mut self) -> Result<Option<T>, Status> {
        if let Self::Opening(call) = self {
            *self = Self::Open(Box::new(call.await?));
        }
        match self {
            Self::Open(stream) => stream.message().await,
            Self::Opening(_) => Ok(None),
        }
    }
}

/// Both encodings of the protocol: they differ in the messages alone.
enum Wire {
    Delta(mpsc::UnboundedSender<DeltaDiscoveryRequest>, Incoming<DeltaDiscoveryResponse>),
    Sotw(mpsc::UnboundedSender<DiscoveryRequest>, Incoming<DiscoveryResponse>),
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
    pub(super) fn new(istiod: &Istiod, link: Arc<Link>, node: Node, xds: Xds, max_bytes: usize) -> Result<Self, Error> {
        let mut client =
            Client::with_origin(link.channel(), origin(&link.endpoint.authority)).max_decoding_message_size(max_bytes);
        let wire = match xds {
            Xds::Delta => {
                let (requests, sent) = mpsc::unbounded_channel();
                let request = istiod.request(UnboundedReceiverStream::new(sent), &link)?;
                let call = async move { Ok(client.delta_aggregated_resources(request).await?.into_inner()) };
                Wire::Delta(requests, Incoming::Opening(Box::pin(call)))
            }
            Xds::Sotw => {
                let (requests, sent) = mpsc::unbounded_channel();
                let request = istiod.request(UnboundedReceiverStream::new(sent), &link)?;
                let call = async move { Ok(client.stream_aggregated_resources(request).await?.into_inner()) };
                Wire::Sotw(requests, Incoming::Opening(Box::pin(call)))
            }
        };
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
        self.send(ask);
        self.endpoints = Some(Subscription { names, ..before });
    }

    /// Asks for all clusters.
    pub(super) fn watch_clusters(&mut self) {
        let ask = Ask { node: self.node.take(), ..Ask::of(CLUSTERS) };
        self.send(ask);
        self.clusters = Some(Subscription::default());
    }

    /// Reports a verdict. Nothing is sent for one that is unknown or parked, nor before the first subscription: istiod
    /// drops a report that comes first.
    pub(super) fn report(&self, health: &Health) {
        let detail = match health {
            Health::Unknown | Health::Parked { .. } => return,
            Health::Healthy => None,
            Health::Unhealthy { message } => {
                Some(Detail { code: INTERNAL, message: message.chars().take(MAX_REPORT).collect() })
            }
        };
        if self.node.is_none() {
            self.send(Ask { detail, ..Ask::of(HEALTH) });
        }
    }

    fn send(&self, ask: Ask) {
        // A stream that has ended says so when it is read next.
        let _ = match &self.wire {
            Wire::Delta(requests, _) => requests.send(ask.delta()).is_ok(),
            Wire::Sotw(requests, _) => requests.send(ask.sotw()).is_ok(),
        };
    }

    /// The next answer, already acknowledged (or refused, when it cannot be decoded). Safe to cancel.
    pub(super) async fn next(&mut self, istiod: &Istiod) -> Result<Answer, Error> {
        loop {
            let message = match &mut self.wire {
                Wire::Delta(_, incoming) => incoming.message().await.map(|m| m.map(Received::from)),
                Wire::Sotw(_, incoming) => incoming.message().await.map(|m| m.map(Received::from)),
            };
            let received = match message {
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
        self.send(ask);
        decoded.ok()
    }

    /// Half-closes and waits until istiod has ended the stream too, `within` at most.
    pub(super) async fn close(self, within: Duration) {
        let _ = match self.wire {
            Wire::Delta(requests, mut incoming) => {
                drop(requests);
                timeout(within, async { while let Ok(Some(_)) = incoming.message().await {} }).await
            }
            Wire::Sotw(requests, mut incoming) => {
                drop(requests);
                timeout(within, async { while let Ok(Some(_)) = incoming.message().await {} }).await
            }
        };
    }
}

/// A request in either encoding.
#[derive(Default)]
struct Ask {
    type_url: &'static str,
    node: Option<Node>,
    /// All names wanted, for state of the world.
    names: Vec<String>,
    /// What changes, for the incremental encoding.
    subscribe: Vec<String>,
    unsubscribe: Vec<String>,
    version: String,
    nonce: String,
    detail: Option<Detail>,
}

impl Ask {
    fn of(type_url: &'static str) -> Self {
        Self { type_url, ..Default::default() }
    }

    fn delta(self) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            node: self.node,
            type_url: self.type_url.to_owned(),
            resource_names_subscribe: self.subscribe,
            resource_names_unsubscribe: self.unsubscribe,
            response_nonce: self.nonce,
            error_detail: self.detail,
            ..Default::default()
        }
    }

    fn sotw(self) -> DiscoveryRequest {
        DiscoveryRequest {
            node: self.node,
            type_url: self.type_url.to_owned(),
            resource_names: self.names,
            version_info: self.version,
            response_nonce: self.nonce,
            error_detail: self.detail,
        }
    }
}

/// An answer in either encoding.
struct Received {
    type_url: String,
    nonce: String,
    version: String,
    resources: Vec<prost_types::Any>,
    removed: Vec<String>,
}

impl From<DeltaDiscoveryResponse> for Received {
    fn from(m: DeltaDiscoveryResponse) -> Self {
        let resources = m.resources.into_iter().filter_map(|r| r.resource).collect();
        Self {
            type_url: m.type_url,
            nonce: m.nonce,
            version: m.system_version_info,
            resources,
            removed: m.removed_resources,
        }
    }
}

impl From<DiscoveryResponse> for Received {
    fn from(m: DiscoveryResponse) -> Self {
        Self {
            type_url: m.type_url,
            nonce: m.nonce,
            version: m.version_info,
            resources: m.resources,
            removed: Vec::new(),
        }
    }
}

fn decode<T: Message + Default>(resources: &[prost_types::Any]) -> Result<Vec<T>, prost::DecodeError> {
    resources.iter().map(|any| T::decode(any.value.as_slice())).collect()
}
