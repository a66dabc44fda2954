//! What we ask of a control plane, three verbs: have a certificate request signed, accept a certificate, and hold a session
//! that keeps the workload registered.
//!
//! A session is a future: while it runs the workload is registered, or has asked; when it returns it is not. A
//! connection carries the roots and the client certificate of its dial, and serves while they are those of now.

mod credential;
mod dial;
mod error;
mod istiod;
mod link;
mod links;
mod retry;
mod tap;
mod tls;
mod trust;

#[cfg(feature = "fuzz")]
pub(crate) use istiod::fuzz;

pub use credential::Credential;
pub use error::{Cost, Disposition, Error};
pub use istiod::{Istiod, MembershipSettings};
pub use retry::Retry;

use crate::{
    spiffe::{Csr, X509Bundle, X509Context},
    status::{Addresses, Health, Membership, Registration},
};
use std::{future::Future, sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A signed request.
#[derive(Debug)]
pub struct Signed {
    /// PEM elements, leaf first, root bundle last.
    pub chain: Vec<String>,
    /// The certificate that was accepted as the credential for this request; none when it was the token.
    pub accepted: Option<Arc<X509Context>>,
    /// The operator's roots that vouched for the server, as they were when it was dialled: roots in the chain hold while the
    /// operator's are these.
    pub vouched: X509Bundle,
}

/// A control plane.
pub trait ControlPlane: Send + Sync + 'static {
    /// Has a request signed for `ttl`.
    fn sign(&self, csr: &Csr, ttl: Duration) -> impl Future<Output = Result<Signed, Error>> + Send;

    /// Whether a certificate of ours is accepted, wherever one is needed: shown in a handshake, and a call answered on it.
    fn accepts(&self, certificate: &Arc<X509Context>) -> impl Future<Output = Result<(), Error>> + Send;

    /// Asks for the registration and holds it while this future runs. `Ok` when told to stop, `Err` when it was lost or
    /// refused.
    fn session(&self, post: &mut Post) -> impl Future<Output = Result<(), Error>> + Send;
}

/// The ends of the wires that a session holds.
#[derive(Debug)]
pub struct Post {
    /// The verdict to report.
    pub health: watch::Receiver<Health>,
    /// The addresses to register.
    pub addresses: watch::Receiver<Addresses>,
    /// The fact that a session tells.
    pub registration: watch::Sender<Registration>,
    /// The other fact that a session tells.
    pub membership: watch::Sender<Membership>,
    /// Cancelled when the session shall end in order.
    pub stop: CancellationToken,
    /// Whether the workload shall be taken out of service before the session ends: the machine itself goes down.
    pub leaving: watch::Receiver<bool>,
}
