//! The two encodings of the discovery protocol. They differ in their messages alone; nobody else looks at those.

use super::super::{Istiod, Xds, origin};
use crate::{
    control::{Error, link::Link},
    proto::{
        envoy::{
            config::core::v3::Node,
            service::discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
                aggregated_discovery_service_client::AggregatedDiscoveryServiceClient as Client,
            },
        },
        google::rpc::Status as Detail,
    },
};
use std::{pin::Pin, time::Duration};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Status, Streaming};

type Opening<T> = Pin<Box<dyn Future<Output = Result<Streaming<T>, Status>> + Send>>;

/// The receiving half: a call that is being opened, then its messages.
pub(super) enum Incoming<T> {
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
pub(super) enum Wire {
    Delta(mpsc::UnboundedSender<DeltaDiscoveryRequest>, Incoming<DeltaDiscoveryResponse>),
    Sotw(mpsc::UnboundedSender<DiscoveryRequest>, Incoming<DiscoveryResponse>),
}

impl Wire {
    /// A call that is made when it is read first.
    pub(super) async fn open(istiod: &Istiod, link: &Link, max_bytes: usize) -> Result<Self, Error> {
        let authority = &link.endpoint.authority;
        let mut client = Client::with_origin(link.channel(), origin(authority)).max_decoding_message_size(max_bytes);
        Ok(match istiod.xds {
            Xds::Delta => {
                let (requests, sent) = mpsc::unbounded_channel();
                let request = istiod.request(UnboundedReceiverStream::new(sent), link).await?;
                let call = async move { Ok(client.delta_aggregated_resources(request).await?.into_inner()) };
                Self::Delta(requests, Incoming::Opening(Box::pin(call)))
            }
            Xds::Sotw => {
                let (requests, sent) = mpsc::unbounded_channel();
                let request = istiod.request(UnboundedReceiverStream::new(sent), link).await?;
                let call = async move { Ok(client.stream_aggregated_resources(request).await?.into_inner()) };
                Self::Sotw(requests, Incoming::Opening(Box::pin(call)))
            }
        })
    }

    /// Sends a request. A stream that has ended says so when it is read next.
    pub(super) fn send(&self, ask: Ask) {
        let _ = match self {
            Self::Delta(requests, _) => requests.send(ask.delta()).is_ok(),
            Self::Sotw(requests, _) => requests.send(ask.sotw()).is_ok(),
        };
    }

    /// The next answer; none when the server has ended the stream in order. Safe to cancel.
    pub(super) async fn next(&mut self) -> Result<Option<Received>, Status> {
        match self {
            Self::Delta(_, incoming) => Ok(incoming.message().await?.map(Received::from)),
            Self::Sotw(_, incoming) => Ok(incoming.message().await?.map(Received::from)),
        }
    }

    /// Half-closes and waits until the server has ended the stream too, `within` at most.
    pub(super) async fn close(self, within: Duration) {
        let _ = match self {
            Self::Delta(requests, mut incoming) => {
                drop(requests);
                timeout(within, async { while let Ok(Some(_)) = incoming.message().await {} }).await
            }
            Self::Sotw(requests, mut incoming) => {
                drop(requests);
                timeout(within, async { while let Ok(Some(_)) = incoming.message().await {} }).await
            }
        };
    }
}

/// A request in either encoding.
#[derive(Default)]
pub(super) struct Ask {
    pub(super) type_url: &'static str,
    pub(super) node: Option<Node>,
    /// All names wanted, for state of the world.
    pub(super) names: Vec<String>,
    /// What changes, for the incremental encoding.
    pub(super) subscribe: Vec<String>,
    pub(super) unsubscribe: Vec<String>,
    pub(super) version: String,
    pub(super) nonce: String,
    pub(super) detail: Option<Detail>,
}

impl Ask {
    /// An empty one.
    pub(super) fn of(type_url: &'static str) -> Self {
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
pub(super) struct Received {
    pub(super) type_url: String,
    pub(super) nonce: String,
    pub(super) version: String,
    pub(super) resources: Vec<prost_types::Any>,
    pub(super) removed: Vec<String>,
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
