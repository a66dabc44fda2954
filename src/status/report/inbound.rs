//! What inbound listeners do, as data.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::SocketAddr};

words! {
    /// Why an inbound connection was refused.
    InboundRefusal {
        /// We have no certificate, or it has expired.
        #[default]
        NoIdentity = "no_identity",
        /// The peer spoke, but no TLS.
        NotTls = "not_tls",
        /// The handshake failed.
        Handshake = "handshake",
        /// The peer showed no certificate.
        NoCertificate = "no_certificate",
        /// Its certificate does not chain to the mesh's roots, or is not valid now.
        Untrusted = "untrusted",
        /// Its certificate does not name exactly one SPIFFE id.
        NoSpiffeId = "no_spiffe_id",
        /// Its trust domain is not ours, and no rule lets it in.
        TrustDomain = "trust_domain",
        /// No rule lets it in.
        NotAllowed = "not_allowed",
        /// The handshake did not end in time.
        Timeout = "timeout",
        /// Too many handshakes were in flight, or connections open, and this was the oldest handshake of the busiest address.
        Evicted = "evicted",
        /// Too many connections were open, or too many of one identity.
        TooMany = "too_many",
        /// The application does not take connections.
        Application = "application",
        /// The peer left before the end of the handshake.
        Aborted = "aborted",
    }
}

/// One inbound listener.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct InboundReport {
    /// Where it shall listen, as configured.
    pub listen: String,
    /// Where it listens; null while it does not.
    pub address: Option<SocketAddr>,
    /// Where it forwards to.
    pub forward: String,
    /// `strict` or `permissive`.
    pub mode: String,
    /// Connections that are open now.
    pub open: u64,
    /// Connections taken in.
    pub connections: u64,
    /// Connections without TLS that were let through.
    pub plain: u64,
    /// Bytes of the peers that were forwarded.
    pub bytes_in: u64,
    /// Bytes of the application that were sent.
    pub bytes_out: u64,
    /// Handshakes that have succeeded, and how long they took.
    pub handshakes: LatencyReport,
    /// How many were refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// What the last refusal said.
    pub last_refusal: Option<String>,
    /// Why it does not listen, and the fix.
    pub cause: Option<String>,
    /// What may not be as it was meant: ports that do not match those of the WorkloadGroup.
    pub notes: Vec<String>,
}

/// How long something took.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyReport {
    /// How often it was done.
    pub count: u64,
    /// The sum of the times, in seconds.
    pub seconds: f64,
    /// Upper bound in seconds, and how many were above the bound before and not above this; the rest took longer.
    pub classes: Vec<(f64, u64)>,
}
