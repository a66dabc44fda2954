//! Envoy's secret discovery service: the certificate with its key as `default`, the roots as `ROOTCA`, the names that
//! istiod writes into every Envoy's configuration. Both forms of the protocol are served, `StreamSecrets` and
//! `DeltaSecrets`.
//!
//! Envoy takes and serves whatever BoringSSL can load: expired, not valid yet, without intermediates. So nothing is
//! sent but what was verified when it was made and is valid now.

mod grpc;
mod secrets;
mod subscription;
mod talk;
mod wire;

pub(in crate::publish) use secrets::Secrets;

use super::{
    budget::{Budget, Share},
    consumers::Consumers,
};
use crate::{
    proto::envoy::service::secret::v3::{DeltaSecretRequest, SecretRequest},
    time::Clock,
};
use grpc::Requests;
use http::{Request, Response};
use hyper::body::Incoming;
use std::{
    marker::PhantomData,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};
use talk::Talk;
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, body::Body};
use tracing::Instrument as _;

/// The name of the service.
pub(super) const SERVICE: &str = "envoy.service.secret.v3.SecretDiscoveryService";

/// The service, for one connection.
pub(super) struct Sds {
    /// What is to be sent.
    pub(super) secrets: watch::Receiver<Secrets>,
    /// Where consumers are kept.
    pub(super) consumers: Consumers,
    /// What the user has room for.
    pub(super) budget: Budget,
    /// When it is.
    pub(super) clock: Clock,
}

impl Sds {
    /// The response to a call of this service, for which there is room.
    pub(super) fn answer(&self, request: Request<Incoming>, room: Share) -> Response<Body> {
        match request.uri().path().rsplit('/').next() {
            Some("StreamSecrets") => self.begin::<SecretRequest>(request.into_body(), room),
            Some("DeltaSecrets") => self.begin::<DeltaSecretRequest>(request.into_body(), room),
            other => Status::unimplemented(format!(
                "{:.64}: here are StreamSecrets and DeltaSecrets",
                other.unwrap_or_default()
            ))
            .into_http(),
        }
    }

    fn begin<R: wire::Request>(&self, requests: Incoming, room: Share) -> Response<Body> {
        let talk = Arc::new(Mutex::new(Talk::new(self.consumers.seat("sds"))));
        let listening = listen(Requests::<R>::new(requests, self.budget.clone()), self.secrets.clone(), talk.clone());
        grpc::response(Answers::<R> {
            talk,
            secrets: self.secrets.clone(),
            clock: self.clock,
            _listening: AbortOnDropHandle::new(tokio::spawn(listening.in_current_span())),
            _room: room,
            kind: PhantomData,
        })
    }
}

/// Hears a consumer, whether or not it reads its answers: nothing that it sends waits here.
#[expect(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice, and consumers are many")]
fn listen<R: wire::Request>(
    mut requests: Requests<R>,
    mut secrets: watch::Receiver<Secrets>,
    talk: Arc<Mutex<Talk>>,
) -> impl Future<Output = ()> + Send {
    async move {
        while !lock(&talk).has_failed() {
            let asks = lock(&talk).is_open();
            tokio::select! {
                request = requests.next(), if asks => lock(&talk).heard(request),
                changed = secrets.changed() => lock(&talk).news(changed.is_ok()),
            }
        }
    }
}

fn lock(talk: &Mutex<Talk>) -> MutexGuard<'_, Talk> {
    talk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The responses of one stream, made when the consumer has room for them. A consumer that does not read is sent nothing,
/// and later only the newest; nobody waits for it.
struct Answers<R> {
    talk: Arc<Mutex<Talk>>,
    secrets: watch::Receiver<Secrets>,
    clock: Clock,
    _listening: AbortOnDropHandle<()>,
    _room: Share,
    kind: PhantomData<fn() -> R>,
}

impl<R: wire::Request> Stream for Answers<R> {
    type Item = Result<R::Response, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        lock(&self.talk).poll_answer::<R>(&self.secrets.borrow(), self.clock.now(), cx)
    }
}
