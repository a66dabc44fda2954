//! What a control plane may say.

use super::{
    super::{membership::known::Known, refusal},
    Answer, CALL, CLUSTERS, ENDPOINTS,
    outbox::Outbox,
    take,
    wire::Received,
};
use crate::{
    control::tap::Tap,
    proto::{
        envoy::{
            config::core::v3::Node,
            service::discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryResponse,
                aggregated_discovery_service_client::AggregatedDiscoveryServiceClient as Ads,
            },
        },
        istio::v1::auth::{
            IstioCertificateRequest, IstioCertificateResponse,
            istio_certificate_service_client::IstioCertificateServiceClient as Ca,
        },
    },
};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt as _,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_stream::Stream as _;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

/// Longer than any call here takes.
const PATIENCE: Duration = Duration::from_secs(30);
const OURS: [IpAddr; 1] = [IpAddr::V4(Ipv4Addr::LOCALHOST)];

/// An answer of the CA: its elements.
pub(crate) fn certificate(bytes: &[u8]) -> Option<Vec<String>> {
    IstioCertificateResponse::decode(bytes).ok().map(|answer| answer.cert_chain)
}

/// A subscription to everything that we ever ask for, of which the requests were sent.
fn subscribed() -> Outbox {
    let outbox = Outbox::new(Node::default());
    outbox.want(ENDPOINTS, BTreeSet::from(["outbound|80||app.example.com".to_owned()]));
    outbox.want(CLUSTERS, BTreeSet::new());
    send(&outbox);
    outbox
}

/// Sends what is to be said.
fn send(outbox: &Outbox) {
    let mut outbox = outbox.clone();
    let mut cx = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(ask)) = Pin::new(&mut outbox).poll_next(&mut cx) {
        drop(DeltaDiscoveryRequest::from(ask).encode_to_vec());
    }
}

/// Answers of one stream, each behind its encoding (a byte) and its length (another, in eights).
pub(crate) fn answers(mut bytes: &[u8]) {
    let (outbox, mut known) = (subscribed(), Known::default());
    while let Some((&[form, length], rest)) = bytes.split_first_chunk() {
        let (message, rest) = rest.split_at(rest.len().min(usize::from(length) * 8));
        bytes = rest;
        let received = match form % 2 {
            0 => DeltaDiscoveryResponse::decode(message).map(Received::from),
            _ => DiscoveryResponse::decode(message).map(Received::from),
        };
        let Ok(received) = received else { continue };
        if let Some(Answer::Endpoints(all)) = take(&outbox, received) {
            if !known.update(&all, &OURS) {
                known = Known::found(all, &OURS);
            }
            drop((known.names(), known.listed(), known.membership()));
        }
        send(&outbox);
    }
}

/// A refusal: its code, and its text.
pub(crate) fn refused(bytes: &[u8]) {
    let Some((code, text)) = bytes.split_first() else { return };
    let error = refusal::classify(CALL, Code::from_i32(i32::from(*code)), &String::from_utf8_lossy(text));
    assert!(error.to_string().len() < 4096, "a line");
    let _ = (error.kind(), error.disposition(), error.cost());
}

fn told(status: &Status) {
    drop(refusal::classify(CALL, status.code(), status.message()).to_string());
}

/// All that a server sends on a connection on which we make our two calls.
pub(crate) async fn connection(bytes: &[u8]) {
    let (ours, mut theirs) = tokio::io::duplex(1 << 20);
    let tapped = Tap::new(ours, watch::Sender::new(false), CancellationToken::new());
    let _ = theirs.write_all(bytes).await;
    let calls = async {
        let Ok((sender, connection)) = http2::handshake(TokioExecutor::new(), TokioIo::new(tapped)).await else {
            return;
        };
        let ended = tokio::spawn(connection);
        let channel = tower::service_fn(move |request| sender.clone().send_request(request));
        let origin = http::Uri::from_static("https://istiod.istio-system.svc:15012/");
        let mut ca = Ca::with_origin(channel.clone(), origin.clone());
        let mut ads = Ads::with_origin(channel, origin);
        let signed = async {
            let signed = ca.create_certificate(IstioCertificateRequest::default()).await;
            signed.map(drop).unwrap_or_else(|status| told(&status));
        };
        let streamed = async {
            let mut answers = match ads.delta_aggregated_resources(tokio_stream::pending()).await {
                Ok(answers) => answers.into_inner(),
                Err(status) => return told(&status),
            };
            let outbox = subscribed();
            while let Ok(Some(answer)) = answers.message().await {
                let _ = take(&outbox, answer.into());
            }
        };
        tokio::join!(signed, streamed);
        let _ = ended.await;
    };
    // The server has said all, and hangs up a while later.
    let hanging_up = async {
        sleep(Duration::from_secs(1)).await;
        drop(theirs);
    };
    let _ = timeout(PATIENCE, async { tokio::join!(calls, hanging_up) }).await;
}
