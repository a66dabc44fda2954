//! The SPIFFE Workload API: the SVID and the roots as streams, on the workload's own socket. Any library that is called
//! `spiffe` speaks it; `SPIFFE_ENDPOINT_SOCKET=unix:///run/we-agent/NAME/agent.sock` is all that it must be told.
//!
//! # Held, refused, ended
//!
//! A call is held while there is no valid certificate yet. The standard has two answers for that moment, `UNAVAILABLE`
//! (still starting) and `PERMISSION_DENIED` (no identity is defined for the caller; see the endpoint's standard, section
//! 6 and appendix A), and clients retry after both, at the pace of a back-off that nobody here can end. Held, they have
//! the certificate in the moment in which it exists, "as soon as possible" (Workload API, section 4.3); who does not
//! want to wait sets a deadline. And `PERMISSION_DENIED` says more than is true: on it, a client should cease to use
//! what it has (section 5.2.1), while a certificate of ours lives on through a restart of the agent.
//!
//! So it is kept for the one case in which it is the truth: neither certificate nor token is accepted any more, and no
//! valid certificate is left. An open stream is never ended for that, nor when the last certificate expires: a client
//! sees the end of validity itself. When the agent stops, streams end with `UNAVAILABLE`, for which it waits a second at
//! most; when it is killed, they end with their connection.
//!
//! # Not offered
//!
//! The JWT profile: Istio's certificate authority issues no JWT-SVIDs. `UNIMPLEMENTED` tells a client not to ask again
//! (endpoint, appendix A). There are no federated bundles and no revocation lists for the same reason.

use crate::{
    proto::{
        JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
        ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse,
        spiffe_workload_api_server::SpiffeWorkloadApi,
    },
    publish::consumers::{Consumers, Seat, version_of_roots, version_of_svid},
    spiffe::X509Context,
    status::Identity,
    time::Clock,
};
use rustls::pki_types::CertificateDer;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::sync::watch;
use tokio_stream::{Stream, wrappers::WatchStream};
use tonic::{Request, Response, Status};

/// The metadata that every request must have, so that somebody who can make a program on this host send a request of his
/// choice to a URL of his choice still gets nothing (SPIFFE Workload Endpoint, section 3).
pub(super) const SECURITY_HEADER: &str = "workload.spiffe.io";

/// Answers the calls of one workload's consumers. Who may connect was decided before.
#[derive(Debug, Clone)]
pub(super) struct WorkloadApi {
    identity: watch::Receiver<Identity>,
    consumers: Consumers,
    clock: Clock,
}

/// A call that is answered by a stream.
struct Call<M> {
    /// The name of the method.
    name: &'static str,
    message: fn(&X509Context) -> M,
    version: fn(&X509Context) -> Arc<str>,
    /// Whether two contexts make the same message.
    same: fn(&X509Context, &X509Context) -> bool,
}

impl WorkloadApi {
    /// Serves what `identity` says, and tells `consumers` who takes it.
    pub(super) fn new(identity: watch::Receiver<Identity>, consumers: Consumers, clock: Clock) -> Self {
        Self { identity, consumers, clock }
    }

    fn stream<T, M>(&self, request: &Request<T>, call: Call<M>) -> Result<Response<Updates<M>>, Status> {
        let mut seat = self.consumers.seat("workload_api");
        demand_security_header(request).inspect_err(|status| seat.turned_away(status))?;
        seat.wants(&[call.name]);
        let identity = WatchStream::new(self.identity.clone());
        Ok(Response::new(Updates { identity, clock: self.clock, call, seat, sent: None, ended: false }))
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadApi {
    type FetchX509SVIDStream = Updates<X509svidResponse>;
    type FetchX509BundlesStream = Updates<X509BundlesResponse>;
    type FetchJWTBundlesStream = tokio_stream::Empty<Result<JwtBundlesResponse, Status>>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let call = Call {
            name: "FetchX509SVID",
            message: svids,
            version: |context| version_of_svid(&context.svid),
            same: |a, b| a.svid.chain() == b.svid.chain() && a.bundle == b.bundle,
        };
        self.stream(&request, call)
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        let call = Call {
            name: "FetchX509Bundles",
            message: bundles,
            version: |context| version_of_roots(&context.bundle),
            same: |a, b| a.bundle == b.bundle,
        };
        self.stream(&request, call)
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Result<Response<JwtsvidResponse>, Status> {
        demand_security_header(&request)?;
        Err(no_jwt())
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        demand_security_header(&request)?;
        Err(no_jwt())
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        demand_security_header(&request)?;
        Err(no_jwt())
    }
}

fn demand_security_header<T>(request: &Request<T>) -> Result<(), Status> {
    match request.metadata().get(SECURITY_HEADER) {
        Some(value) if value == "true" => Ok(()),
        _ => Err(Status::invalid_argument(format!(
            "the request has no metadata {SECURITY_HEADER}: true; use a SPIFFE library, or add it"
        ))),
    }
}

fn no_jwt() -> Status {
    Status::unimplemented("JWT-SVIDs are not offered: the mesh's certificate authority issues X.509-SVIDs only")
}

fn svids(context: &X509Context) -> X509svidResponse {
    let svid = &context.svid;
    let svid = X509svid {
        spiffe_id: svid.id().to_string(),
        x509_svid: der(svid.chain().iter().cloned()),
        x509_svid_key: svid.key().pkcs8().secret_der().to_vec(),
        bundle: der(context.bundle.roots()),
        hint: String::new(),
    };
    X509svidResponse { svids: vec![svid], ..Default::default() }
}

fn bundles(context: &X509Context) -> X509BundlesResponse {
    let trust_domain = format!("spiffe://{}", context.svid.id().trust_domain());
    X509BundlesResponse { bundles: [(trust_domain, der(context.bundle.roots()))].into(), ..Default::default() }
}

/// One certificate after the other.
fn der<'a>(certificates: impl Iterator<Item = CertificateDer<'a>>) -> Vec<u8> {
    certificates.flat_map(|der| der.to_vec()).collect()
}

/// One message as soon as there is a valid SVID, and one for each that says something else. A slow client skips what it
/// had no time for; a stream holds no more than the last SVID that it sent.
pub(super) struct Updates<M> {
    identity: WatchStream<Identity>,
    clock: Clock,
    call: Call<M>,
    seat: Seat,
    sent: Option<Arc<X509Context>>,
    ended: bool,
}

impl<M> Stream for Updates<M> {
    type Item = Result<M, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let end = loop {
            let Some(identity) = ready!(Pin::new(&mut this.identity).poll_next(cx)) else {
                break Status::unavailable("the agent is stopping; call again");
            };
            let news =
                |context: &&Arc<X509Context>| !this.sent.as_ref().is_some_and(|sent| (this.call.same)(sent, context));
            match identity.valid(this.clock.now()) {
                Some(context) if news(&context) => {
                    this.sent = Some(Arc::clone(context));
                    this.seat.given(this.call.name, &(this.call.version)(context));
                    return Poll::Ready(Some(Ok((this.call.message)(context))));
                }
                None if this.sent.is_none() && identity.credentials_dead => break no_identity(&identity),
                _ => {}
            }
        };
        this.ended = true;
        Poll::Ready(Some(Err(end)))
    }
}

fn no_identity(identity: &Identity) -> Status {
    let cause = identity.trouble.as_ref().map_or("the token is not accepted", |trouble| &trouble.cause);
    Status::permission_denied(format!("no identity is issued to this workload: {cause}"))
}

#[cfg(test)]
mod tests;
