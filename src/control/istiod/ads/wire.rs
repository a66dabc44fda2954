//! The two encodings of the discovery protocol. They differ in their messages alone; nobody else looks at those.

use super::{
    super::{Istiod, Xds, origin},
    outbox::Outbox,
};
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
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt};
use tonic::{Response, Status, Streaming};

type Answers = Pin<Box<dyn Stream<Item = Result<Received, Status>> + Send>>;
type Call = Pin<Box<dyn Future<Output = Result<Answers, Status>> + Send>>;

/// The receiving half: a call that is being made, its messages, its end. An end is told as often as it is asked for:
/// whoever was told may have been cancelled before it could act.
enum Incoming {
    Calling(Call),
    Open(Answers),
    Over(Result<(), Status>),
}

impl Incoming {
    async fn next(&mut self) -> Result<Option<Received>, Status> {
        loop {
            *self = match self {
                Self::Calling(call) => call.await.map_or_else(|status| Self::Over(Err(status)), Self::Open),
                Self::Open(answers) => match answers.next().await {
                    Some(Ok(received)) => return Ok(Some(received)),
                    Some(Err(status)) => Self::Over(Err(status)),
                    None => Self::Over(Ok(())),
                },
                Self::Over(end) => return end.clone().map(|()| None),
            }
        }
    }
}

/// A call in the encoding that the configuration wants. Dropping it resets the stream.
pub(super) struct Wire {
    pub(super) outbox: Outbox,
    incoming: Incoming,
}

impl Wire {
    /// A call that is made when it is read first.
    pub(super) async fn open(istiod: &Istiod, link: &Link, node: Node, max_bytes: usize) -> Result<Self, Error> {
        let outbox = Outbox::new(node);
        let asks = outbox.clone();
        let mut client = Client::with_origin(link.channel(), origin(&link.endpoint.authority));
        client = client.max_decoding_message_size(max_bytes);
        let call: Call = match istiod.xds {
            Xds::Delta => {
                let request = istiod.request(asks.map(DeltaDiscoveryRequest::from), link).await?;
                Box::pin(async move { client.delta_aggregated_resources(request).await.map(answers) })
            }
            Xds::Sotw => {
                let request = istiod.request(asks.map(DiscoveryRequest::from), link).await?;
                Box::pin(async move { client.stream_aggregated_resources(request).await.map(answers) })
            }
        };
        Ok(Self { outbox, incoming: Incoming::Calling(call) })
    }

    /// The next answer; none when the server has ended the stream in order. Safe to cancel.
    pub(super) async fn next(&mut self) -> Result<Option<Received>, Status> {
        self.incoming.next().await
    }

    /// Half-closes and waits until the server has ended the stream too, `within` at most.
    pub(super) async fn close(mut self, within: Duration) {
        self.outbox.close();
        let _ = timeout(within, async { while let Ok(Some(_)) = self.incoming.next().await {} }).await;
    }
}

impl Drop for Wire {
    /// The connection holds the other end of the outbox, and keeps the stream until that has ended.
    fn drop(&mut self) {
        self.outbox.close();
    }
}

fn answers<M: Into<Received> + Send + 'static>(response: Response<Streaming<M>>) -> Answers {
    Box::pin(response.into_inner().map(|message| message.map(Into::into)))
}

/// A request in either encoding.
#[derive(Debug, Default)]
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
    /// Whether this acknowledges (or refuses) the answer of that nonce.
    pub(super) answers: bool,
    pub(super) detail: Option<Detail>,
}

impl Ask {
    /// An empty one.
    pub(super) fn of(type_url: &'static str) -> Self {
        Self { type_url, ..Default::default() }
    }
}

impl From<Ask> for DeltaDiscoveryRequest {
    fn from(ask: Ask) -> Self {
        Self {
            node: ask.node,
            type_url: ask.type_url.to_owned(),
            resource_names_subscribe: ask.subscribe,
            resource_names_unsubscribe: ask.unsubscribe,
            // In this encoding a nonce makes a request an answer.
            response_nonce: if ask.answers { ask.nonce } else { String::new() },
            error_detail: ask.detail,
            ..Default::default()
        }
    }
}

impl From<Ask> for DiscoveryRequest {
    fn from(ask: Ask) -> Self {
        Self {
            node: ask.node,
            type_url: ask.type_url.to_owned(),
            resource_names: ask.names,
            version_info: ask.version,
            response_nonce: ask.nonce,
            error_detail: ask.detail,
        }
    }
}

/// An answer in either encoding.
#[derive(Debug)]
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn an_end_is_told_again_to_who_was_cancelled_before_it_could_act() {
        let mut refused = Incoming::Calling(Box::pin(async { Err(Status::unavailable("closed")) }));
        for _ in 0..2 {
            assert_eq!(refused.next().await.unwrap_err().message(), "closed");
        }
        let one = || Received {
            type_url: String::new(),
            nonce: String::new(),
            version: String::new(),
            resources: Vec::new(),
            removed: Vec::new(),
        };
        let stream = tokio_stream::iter([Ok(one()), Err(Status::unavailable("cut"))]);
        let mut cut = Incoming::Calling(Box::pin(async { Ok(Box::pin(stream) as Answers) }));
        assert!(cut.next().await.unwrap().is_some());
        for _ in 0..2 {
            assert_eq!(cut.next().await.unwrap_err().message(), "cut");
        }
    }
}
