//! Envoy's secret discovery service: the certificate with its key as `default`, the roots as `ROOTCA`, the names that
//! istiod writes into every Envoy's configuration. Both forms of the protocol are served, `StreamSecrets` and
//! `DeltaSecrets`.
//!
//! Envoy takes and serves whatever BoringSSL can load: expired, not valid yet, without intermediates. So nothing is
//! sent but what was verified when it was made and is valid now.

mod grpc;
mod secrets;
mod subscription;
mod wire;

pub(in crate::publish) use secrets::Secrets;

use super::consumers::{Consumers, Seat};
use crate::{
    proto::envoy::service::secret::v3::{DeltaSecretRequest, SecretRequest},
    time::Clock,
};
use grpc::Requests;
use http::{Request, Response};
use hyper::body::Incoming;
use std::{
    pin::Pin,
    task::{Context, Poll},
};
use subscription::{Subscription, Verdict};
use tokio::sync::watch;
use tokio_stream::{Stream, wrappers::WatchStream};
use tonic::{Status, body::Body};

/// The name of the service.
pub(super) const SERVICE: &str = "envoy.service.secret.v3.SecretDiscoveryService";

/// The service, for one connection.
pub(super) struct Sds {
    /// What is to be sent.
    pub(super) secrets: watch::Receiver<Secrets>,
    /// Where consumers are kept.
    pub(super) consumers: Consumers,
    /// When it is.
    pub(super) clock: Clock,
}

impl Sds {
    /// The response to a call of this service.
    pub(super) fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        match request.uri().path().rsplit('/').next() {
            Some("StreamSecrets") => grpc::response(self.session::<SecretRequest>(request.into_body())),
            Some("DeltaSecrets") => grpc::response(self.session::<DeltaSecretRequest>(request.into_body())),
            other => Status::unimplemented(format!(
                "{:.64}: here are StreamSecrets and DeltaSecrets",
                other.unwrap_or_default()
            ))
            .into_http(),
        }
    }

    fn session<R: wire::Request>(&self, requests: Incoming) -> Session<R> {
        Session {
            requests: Requests::new(requests),
            news: WatchStream::new(self.secrets.clone()),
            secrets: Secrets::default(),
            subscription: Subscription::default(),
            seat: self.consumers.seat("sds"),
            clock: self.clock,
            asked: false,
            over: false,
        }
    }
}

/// One stream: its responses, made when the consumer has room for them. A consumer that does not read is sent nothing,
/// and later only the newest; nobody waits for it.
struct Session<R> {
    requests: Requests<R>,
    news: WatchStream<Secrets>,
    secrets: Secrets,
    subscription: Subscription,
    seat: Seat,
    clock: Clock,
    /// Whether the consumer has ended its side; it is sent what it still waits for.
    asked: bool,
    over: bool,
}

impl<R: wire::Request> Session<R> {
    fn hear(&mut self, request: R) -> Result<(), Status> {
        let ask = request.read()?;
        if let Some(node) = &ask.node {
            self.seat.named(node);
        }
        match self.subscription.hear(&ask) {
            None => {}
            Some(Verdict::Accepted(versions)) => {
                versions.into_iter().for_each(|(name, version)| self.seat.accepted(name.as_str(), version));
            }
            Some(Verdict::Refused(versions, why)) => {
                versions.into_iter().for_each(|(name, version)| self.seat.refused(name.as_str(), &version, &why));
            }
        }
        let names: Vec<_> = self.subscription.names().map(secrets::Name::as_str).collect();
        self.seat.wants(&names);
        Ok(())
    }
}

impl<R: wire::Request> Stream for Session<R> {
    type Item = Result<R::Response, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        while !this.asked
            && let Poll::Ready(request) = this.requests.poll_next(cx)
        {
            let heard = match request {
                Some(Ok(request)) => this.hear(request),
                Some(Err(status)) => Err(status),
                None => {
                    this.asked = true;
                    break;
                }
            };
            if let Err(status) = heard {
                this.over = true;
                this.seat.turned_away(&status);
                return Poll::Ready(Some(Err(status)));
            }
        }
        while let Poll::Ready(Some(secrets)) = Pin::new(&mut this.news).poll_next(cx) {
            this.secrets = secrets;
        }
        match this.subscription.reply(&this.secrets, this.clock.now()) {
            None if this.asked && this.subscription.has_all() => {
                this.over = true;
                Poll::Ready(None)
            }
            None => Poll::Pending,
            Some(reply) => {
                for secret in &reply.secrets {
                    this.seat.sent(secret.name.as_str(), secret.version.clone());
                }
                Poll::Ready(Some(Ok(R::write(&reply))))
            }
        }
    }
}
