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

use super::{
    call::{Method, Next},
    consumers::Seat,
    grpc::Framed,
    offer::{Encoded, Offer},
};
use bytes::Bytes;
use http::HeaderMap;
use std::{sync::Arc, time::SystemTime};
use tonic::Status;

/// The name of the service; it has no package.
pub(super) const SERVICE: &str = "SpiffeWorkloadAPI";
/// The metadata that every request must have, so that somebody who can make a program on this host send a request of his
/// choice to a URL of his choice still gets nothing (SPIFFE Workload Endpoint, section 3).
const SECURITY_HEADER: &str = "workload.spiffe.io";

/// A method that is answered by a stream: one message as soon as there is a valid SVID, and one for each that says
/// something else. A slow client skips what it had no time for.
pub(super) struct Updates {
    what: What,
    seat: Seat,
    asked: bool,
    /// What the last answer was made of.
    sent: Option<[Arc<str>; 2]>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
enum What {
    /// Certificate, key and roots.
    Svid,
    /// The roots.
    Bundles,
}

impl Updates {
    /// The method of that name; what has no such answer is refused with the reason. `seat` is whoever calls.
    pub(super) fn new(name: &str, headers: &HeaderMap, seat: Seat) -> Result<Self, Status> {
        if headers.get(SECURITY_HEADER).is_none_or(|value| value != "true") {
            return Err(Status::invalid_argument(format!(
                "the request has no metadata {SECURITY_HEADER}: true; use a SPIFFE library, or add it"
            )));
        }
        let what = match name {
            "FetchX509SVID" => What::Svid,
            "FetchX509Bundles" => What::Bundles,
            "FetchJWTSVID" | "FetchJWTBundles" | "ValidateJWTSVID" => {
                return Err(Status::unimplemented(
                    "JWT-SVIDs are not offered: the mesh's certificate authority issues X.509-SVIDs only",
                ));
            }
            other => return Err(Status::unimplemented(format!("{other:.64}: the Workload API has no such method"))),
        };
        Ok(Self { what, seat, asked: false, sent: None })
    }
}

impl What {
    fn as_str(self) -> &'static str {
        match self {
            Self::Svid => "FetchX509SVID",
            Self::Bundles => "FetchX509Bundles",
        }
    }
}

impl Method for Updates {
    fn max_request(&self) -> usize {
        8 << 10
    }

    /// Of the methods that are answered, no request has anything in it.
    fn hear(&mut self, request: Option<Bytes>) -> Result<(), Status> {
        match (request, self.asked) {
            (Some(_), false) => {
                self.asked = true;
                self.seat.wants(&[self.what.as_str()]);
                Ok(())
            }
            (None, true) => Ok(()),
            (Some(_), true) | (None, false) => {
                Err(Status::unimplemented("the method takes one message, no more or less"))
            }
        }
    }

    fn next(&mut self, offer: &Offer, now: SystemTime) -> Next {
        match (offer.valid(now), &offer.refused) {
            _ if !self.asked => Next::Wait,
            (Some(Encoded { svid_version, roots_version, svid, bundles, .. }), _) => {
                let (message, version, made_of) = match self.what {
                    What::Svid => (svid, svid_version, [svid_version, roots_version]),
                    What::Bundles => (bundles, roots_version, [roots_version, roots_version]),
                };
                if self.sent.as_ref().is_some_and(|sent| sent.each_ref() == made_of) {
                    return Next::Wait;
                }
                self.sent = Some(made_of.map(Arc::clone));
                self.seat.given(self.what.as_str(), version);
                Next::Answer(Framed::new(&(), vec![message.clone()]))
            }
            (None, Some(cause)) if self.sent.is_none() => {
                Next::End(Status::permission_denied(format!("no identity is issued to this workload: {cause}")))
            }
            (None, _) => Next::Wait,
        }
    }

    fn seat(&self) -> &Seat {
        &self.seat
    }
}

#[cfg(test)]
mod tests;
