//! Who is at the other end: a chain that a peer has shown becomes a SPIFFE id, or a refusal that names the rule.

use super::{
    SpiffeId, SpiffeIdError, TrustDomain, X509Bundle,
    svid::{may_sign, uris},
};
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use std::time::{Duration, UNIX_EPOCH};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Why the certificate of a peer is not accepted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PeerError {
    /// It is no X.509 certificate.
    #[error("its certificate cannot be read")]
    Unreadable,
    /// No path to the roots.
    #[error(
        "its certificate ({id}, issued by \"{issuer}\", {sent} more sent with it) leads to none of our roots: it is of another \
         mesh, or its intermediates are not sent"
    )]
    Issuer {
        /// What it says of itself, which nobody vouches for.
        id: String,
        /// Who it says to have issued it.
        issuer: String,
        /// How many certificates the peer has sent besides.
        sent: usize,
    },
    /// Wrong usage, or outside its validity.
    #[error("its certificate ({id}) does not verify: {}", check(cause))]
    Chain {
        /// What it says of itself, which nobody vouches for.
        id: String,
        /// Which check failed.
        cause: webpki::Error,
    },
    /// Not exactly one URI among its names (X.509-SVID standard, section 2).
    #[error("its certificate names {0} URIs [{1}], not exactly one SPIFFE id")]
    Names(usize, String),
    /// The one URI is no SPIFFE id.
    #[error("its certificate names no SPIFFE id: {0}")]
    Id(#[from] SpiffeIdError),
    /// It may sign certificates (X.509-SVID standard, section 4.1 and 4.3).
    #[error("its certificate ({0}) is of a certificate authority")]
    Authority(SpiffeId),
}

/// The roots that peers must chain to, ready for use.
#[derive(Debug)]
pub struct PeerRoots(Vec<TrustAnchor<'static>>);

impl PeerRoots {
    /// All roots of `bundle`.
    pub fn new(bundle: &X509Bundle) -> Self {
        Self(
            bundle
                .roots()
                .filter_map(|der| anchor_from_trusted_cert(&der).ok().map(|anchor| anchor.to_owned()))
                .collect(),
        )
    }

    /// The id of a client that shows `leaf`, with what it sent besides, at `now`.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn client(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<SpiffeId, PeerError> {
        let (_, cert) = X509Certificate::from_der(leaf).map_err(|_| PeerError::Unreadable)?;
        let uris = uris(&cert);
        let chain = |cause| {
            let id = shown(&uris.join(", "));
            match cause {
                // The second: another mesh whose root has the name of ours, as the roots that istiod makes have.
                webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
                    PeerError::Issuer { id, issuer: shown(&cert.issuer().to_string()), sent: intermediates.len() }
                }
                cause => PeerError::Chain { id, cause },
            }
        };
        let entity = EndEntityCert::try_from(leaf).map_err(chain)?;
        let usage = KeyUsage::client_auth();
        entity
            .verify_for_usage(ALL_VERIFICATION_ALGS, &self.0, intermediates, now, usage, None, None)
            .map_err(chain)?;
        let [uri] = uris[..] else { return Err(PeerError::Names(uris.len(), shown(&uris.join(", ")))) };
        let id: SpiffeId = uri.parse()?;
        if cert.is_ca() || may_sign(&cert) {
            return Err(PeerError::Authority(id));
        }
        Ok(id)
    }
}

fn check(cause: &webpki::Error) -> String {
    let utc = |at: &UnixTime| humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(at.as_secs()));
    match cause {
        webpki::Error::CertExpired { time, not_after } => {
            format!("it expired at {}, and it is {} here", utc(not_after), utc(time))
        }
        webpki::Error::CertNotValidYet { time, not_before } => {
            format!("it is valid from {}, but it is {} here: check the clocks", utc(not_before), utc(time))
        }
        other => other.to_string(),
    }
}

/// The id in the leaf of a chain that was verified.
pub fn id_of(leaf: &CertificateDer<'_>) -> Option<SpiffeId> {
    let (_, cert) = X509Certificate::from_der(leaf).ok()?;
    uris(&cert).first()?.parse().ok()
}

/// What strangers write is shown in part.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// Which ids are meant: one, or all that have these parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdPattern {
    /// This id alone.
    Exact(SpiffeId),
    /// Every id with all of the parts that are given.
    Parts {
        /// Its trust domain; none stands for our own.
        trust_domain: Option<TrustDomain>,
        /// Its namespace, by Istio's form of an id.
        namespace: Option<String>,
        /// Its service account, by Istio's form of an id.
        service_account: Option<String>,
    },
}

impl IdPattern {
    /// Whether `id` is meant, seen from the trust domain `ours`.
    pub fn matches(&self, id: &SpiffeId, ours: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == id,
            Self::Parts { trust_domain, namespace, service_account } => {
                let parts = id.workload_parts();
                let is =
                    |wanted: &Option<String>, part: Option<&str>| wanted.as_deref().is_none_or(|w| part == Some(w));
                id.trust_domain() == trust_domain.as_ref().map_or(ours, TrustDomain::as_str)
                    && is(namespace, parts.map(|(namespace, _)| namespace))
                    && is(service_account, parts.map(|(_, account)| account))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parts(td: Option<&str>, namespace: Option<&str>, account: Option<&str>) -> IdPattern {
        IdPattern::Parts {
            trust_domain: td.map(|td| td.parse().unwrap()),
            namespace: namespace.map(str::to_owned),
            service_account: account.map(str::to_owned),
        }
    }

    #[test]
    fn a_pattern_means_what_it_names_and_our_own_trust_domain() {
        let id: SpiffeId = "spiffe://td/ns/web/sa/front".parse().unwrap();
        for (pattern, yes) in [
            (parts(None, None, None), true),
            (parts(Some("td"), None, None), true),
            (parts(Some("other"), None, None), false),
            (parts(None, Some("web"), None), true),
            (parts(None, Some("front"), None), false),
            (parts(None, None, Some("front")), true),
            (parts(None, Some("web"), Some("back")), false),
            (parts(Some("other"), Some("web"), Some("front")), false),
            (IdPattern::Exact(id.clone()), true),
            (IdPattern::Exact("spiffe://td/ns/web/sa/fron".parse().unwrap()), false),
        ] {
            assert_eq!(pattern.matches(&id, "td"), yes, "{pattern:?}");
        }
        assert!(!parts(None, None, None).matches(&id, "elsewhere"));
    }

    #[test]
    fn an_id_of_another_form_has_no_namespace() {
        let id: SpiffeId = "spiffe://td/web/front".parse().unwrap();
        assert!(!parts(None, Some("web"), None).matches(&id, "td"));
        assert!(parts(None, None, None).matches(&id, "td"));
    }
}
