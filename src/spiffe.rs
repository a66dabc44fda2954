//! SPIFFE as types: a trust domain, an id, a key, a request for a certificate, an SVID and the roots it chains to.
//! What exists is valid: each type has one door, and the door checks.

#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod id;
mod key;
mod peer;
mod roots;
mod svid;

pub use id::{SpiffeId, SpiffeIdError, TrustDomain};
pub use key::{Csr, KeyError, KeyKind, PrivateKey};
pub use peer::{IdPattern, PeerError, PeerRoots, id_of};
pub use roots::{BundleError, X509Bundle};
pub use svid::{SvidError, X509Context, X509Svid, serial_of};
