//! Envoy's secret discovery service: the certificate with its key as `default`, the roots as `ROOTCA`, the names that
//! istiod writes into every Envoy's configuration. Both forms of the protocol are served, `StreamSecrets` and
//! `DeltaSecrets`.
//!
//! Envoy takes and serves whatever BoringSSL can load: expired, not valid yet, without intermediates. So nothing is
//! sent but what was verified when it was made and is valid now.
//!
//! A name that is not known here is answered in the incremental form as one that has been removed: Envoy goes on without
//! it, and so do the other names. The state of the world has no word for it, so that the stream ends with the reason, as
//! SPIRE's does: Envoy tells it and asks again, and its other names are on other streams.

mod subscription;
mod wire;

use super::{
    call::{Method, Next},
    consumers::Seat,
    offer::{Name, Offer},
};
use bytes::Bytes;
use std::{marker::PhantomData, time::SystemTime};
use subscription::{Subscription, Verdict};
use tonic::Status;
pub(super) use wire::Request;

/// The name of the service.
pub(super) const SERVICE: &str = "envoy.service.secret.v3.SecretDiscoveryService";

/// One stream, in the form of `R`.
pub(super) struct Sds<R> {
    subscription: Subscription,
    seat: Seat,
    /// Whether it asks no more: it is sent what it still waits for.
    asked: bool,
    kind: PhantomData<fn() -> R>,
}

impl<R> Sds<R> {
    /// A stream on which nothing was asked yet.
    pub(super) fn new(seat: Seat) -> Self {
        Self { subscription: Subscription::default(), seat, asked: false, kind: PhantomData }
    }
}

impl<R: Request> Method for Sds<R> {
    /// Envoy's first message is some 60 kB, for it lists its extensions; the most is four times that.
    fn max_request(&self) -> usize {
        256 << 10
    }

    fn hear(&mut self, request: Option<Bytes>) -> Result<(), Status> {
        let Some(request) = request else {
            self.asked = true;
            return Ok(());
        };
        let request = R::decode(request).map_err(|error| Status::invalid_argument(format!("no request: {error}")))?;
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
        if self.subscription.unknown() > wire::MAX_NAMES {
            return Err(Status::invalid_argument("too many names that are not here; there are default and ROOTCA"));
        }
        for name in &ask.unknown {
            Name::parse(name).err().iter().for_each(|why| self.seat.turned_away(why));
        }
        let names: Vec<_> = self.subscription.names().map(Name::as_str).collect();
        self.seat.wants(&names);
        Ok(())
    }

    fn next(&mut self, offer: &Offer, now: SystemTime) -> Next {
        match self.subscription.reply(offer, now) {
            Some(reply) => {
                for secret in &reply.secrets {
                    self.seat.sent(secret.name.as_str(), secret.version.clone());
                }
                Next::Answer(R::write(reply))
            }
            None if self.asked && self.subscription.has_all() => Next::End(Status::ok("")),
            None => Next::Wait,
        }
    }

    fn seat(&self) -> &Seat {
        &self.seat
    }
}
