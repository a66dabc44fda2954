//! What is shown to peers and what they must show: one set of TLS configurations for each identity.

use super::refusal::Refusal;
use crate::{
    host::LARGE,
    spiffe::{IdPattern, PeerError, PeerRoots, SpiffeId, X509Context},
    status::InboundRefusal,
};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, UnixTime},
    server::{
        NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::SingleCertAndKey,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The application protocols that we agree to when they are offered, the best first. Clients of the mesh offer names of
/// Istio's own beside the usual ones, and the usual ones say more of what follows. Who offers both versions of HTTP can speak
/// both, and a plain application is more likely to speak the older one: bytes are forwarded as they are. `istio-peer-exchange`
/// is not among ours, for who agrees to it must speak first, and not the application's protocol.
const PROTOCOLS: [&[u8]; 7] =
    [b"http/1.1", b"h2", b"http/1.0", b"istio-http/1.1", b"istio-h2", b"istio-http/1.0", b"istio"];

/// What TLS and the allocator add to the bytes of a record that we send, with room to spare.
const ROOM: usize = 128;

/// Who may call.
#[derive(Debug)]
pub(super) struct Guard {
    ours: SpiffeId,
    allow: Vec<IdPattern>,
}

impl Guard {
    pub(super) fn new(ours: &SpiffeId, allow: &[IdPattern]) -> Self {
        Self { ours: ours.clone(), allow: allow.to_vec() }
    }

    /// Whether a peer whose certificate was verified may call.
    fn admit(&self, peer: &SpiffeId) -> Result<(), Refusal> {
        let ours = self.ours.trust_domain();
        let foreign = peer.trust_domain() != ours;
        if self.allow.iter().any(|pattern| pattern.matches(peer, ours)) || (self.allow.is_empty() && !foreign) {
            return Ok(());
        }
        let (kind, rule) = match (self.allow.is_empty(), foreign) {
            (true, _) => (InboundRefusal::TrustDomain, format!("it is not of our trust domain {ours}")),
            (false, true) => (InboundRefusal::TrustDomain, "no entry of `allow` names its trust domain".to_owned()),
            (false, false) => (InboundRefusal::NotAllowed, "no entry of `allow` lets it in".to_owned()),
        };
        Err(Refusal::new(kind, format!("{peer} may not call: {rule}")))
    }
}

/// Everything that a handshake needs, made once for an identity.
#[derive(Debug)]
pub(super) struct Keys {
    not_after: SystemTime,
    /// One for each of [`PROTOCOLS`], and one that agrees to none.
    configs: Vec<Arc<ServerConfig>>,
}

impl Keys {
    /// Serves `context`. Peers must chain to its roots, or to those that came with the certificate before it as long as
    /// that one is valid: while roots are changed, not everybody has a new certificate yet.
    pub(super) fn new(
        context: &X509Context,
        previous: Option<&X509Context>,
        guard: &Arc<Guard>,
        now: SystemTime,
    ) -> Result<Self, Error> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let caller = Caller::new(context, previous, guard, now, provider.signature_verification_algorithms);
        let base = config(provider, Arc::new(caller), context)?;
        let with = |protocol: Option<&[u8]>| {
            let mut config = base.clone();
            config.alpn_protocols = protocol.into_iter().map(<[u8]>::to_vec).collect();
            Arc::new(config)
        };
        let configs = PROTOCOLS.iter().map(|protocol| with(Some(protocol))).chain([with(None)]).collect();
        Ok(Self { not_after: context.svid.not_after(), configs })
    }

    /// Whether the certificate has not expired at `now`.
    pub(super) fn is_valid(&self, now: SystemTime) -> bool {
        now < self.not_after
    }

    /// The configuration for a client that offers these protocols.
    pub(super) fn config<'a>(&self, offered: impl Iterator<Item = &'a [u8]>) -> Option<Arc<ServerConfig>> {
        self.configs.get(choose(offered).unwrap_or(PROTOCOLS.len())).cloned()
    }
}

/// The best of those that we agree to. Where there is none, nothing is agreed, and no client of the mesh minds.
fn choose<'a>(offered: impl Iterator<Item = &'a [u8]>) -> Option<usize> {
    offered.filter_map(|protocol| PROTOCOLS.iter().position(|ours| *ours == protocol)).min()
}

fn config(provider: Arc<CryptoProvider>, caller: Arc<Caller>, context: &X509Context) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(caller)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(context.svid.pair())));
    // The library makes each record in memory of its own. Of full size, the kernel clears five pages for it and takes them back,
    // which cost up to a half of what was moved.
    config.max_fragment_size = Some(LARGE - ROOM);
    // A resumed session would carry what was verified by older roots and rules.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Verifies who calls.
#[derive(Debug)]
struct Caller {
    roots: PeerRoots,
    /// These together with those that came before, and until when they count: looked at in each handshake, for without a
    /// renewal nobody makes this anew.
    wider: Option<(PeerRoots, SystemTime)>,
    guard: Arc<Guard>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Caller {
    fn new(
        context: &X509Context,
        previous: Option<&X509Context>,
        guard: &Arc<Guard>,
        now: SystemTime,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Self {
        let wider = previous
            .filter(|previous| previous.svid.is_valid(now))
            .map(|previous| (PeerRoots::new(&context.bundle.union(&previous.bundle)), previous.svid.not_after()));
        Self { roots: PeerRoots::new(&context.bundle), wider, guard: guard.clone(), algorithms }
    }

    /// The roots that count at `now`.
    fn roots(&self, now: UnixTime) -> &PeerRoots {
        let now = UNIX_EPOCH + Duration::from_secs(now.as_secs());
        match &self.wider {
            Some((wider, until)) if now < *until => wider,
            _ => &self.roots,
        }
    }
}

impl ClientCertVerifier for Caller {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[] // every client of the mesh has one certificate
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let refused = |refusal| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))));
        let peer = self.roots(now).client(leaf, intermediates, now).map_err(|error| {
            let kind = match error {
                PeerError::Unreadable | PeerError::Issuer { .. } | PeerError::Chain { .. } => InboundRefusal::Untrusted,
                PeerError::Names(..) | PeerError::Id(_) | PeerError::Authority(_) => InboundRefusal::NoSpiffeId,
            };
            refused(Refusal::new(kind, error.to_string()))
        })?;
        self.guard.admit(&peer).map_err(refused)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        authority::{Authority, Leaf},
        spiffe::{KeyKind, PrivateKey},
    };
    use rustls::pki_types::pem::PemObject;

    #[test]
    fn roots_of_before_count_as_long_as_the_certificate_that_came_with_them() {
        const MINUTE: Duration = Duration::from_secs(60);
        let now = SystemTime::now();
        let (id, uris) = ("spiffe://td/ns/a/sa/b", ["spiffe://td/ns/a/sa/b"]);
        let issue = |authority: &Authority, life: u32| {
            let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
            let leaf = Leaf { not_after: now + life * MINUTE, ..Leaf::new(&uris, now) };
            let answer = authority.issue(key.pem(), &leaf);
            (X509Context::from_answer(&id.parse().unwrap(), key, &answer, now).unwrap(), answer)
        };
        let (old, new) = (Authority::root("old"), Authority::root("new"));
        let (previous, (current, _)) = (issue(&old, 10).0, issue(&new, 60));
        let guard = Arc::new(Guard { ours: id.parse().unwrap(), allow: Vec::new() });
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        let caller = Caller::new(&current, Some(&previous), &guard, now, algorithms);
        let verdict = |peer: &[String], minutes: u32| {
            let leaf = CertificateDer::from_pem_slice(peer[0].as_bytes()).unwrap();
            let at = (now + minutes * MINUTE).duration_since(UNIX_EPOCH).unwrap();
            caller.verify_client_cert(&leaf, &[], UnixTime::since_unix_epoch(at)).is_ok()
        };
        let (of_old, of_new) = (issue(&old, 60).1, issue(&new, 60).1);
        assert!(verdict(&of_old, 9) && verdict(&of_new, 9));
        assert!(!verdict(&of_old, 11) && verdict(&of_new, 11));
    }

    fn chosen(offered: &[&str]) -> Option<&'static str> {
        choose(offered.iter().map(|p| p.as_bytes())).map(|at| std::str::from_utf8(PROTOCOLS[at]).unwrap())
    }

    #[test]
    fn a_protocol_is_agreed_to_that_a_plain_application_speaks() {
        assert_eq!(chosen(&["istio-http/1.1", "istio", "http/1.1"]), Some("http/1.1"));
        assert_eq!(chosen(&["istio-h2", "istio", "h2"]), Some("h2"));
        assert_eq!(chosen(&["istio-peer-exchange", "istio"]), Some("istio"));
        assert_eq!(chosen(&["istio"]), Some("istio"));
        assert_eq!(chosen(&["istio-peer-exchange"]), None);
        assert_eq!(chosen(&["h2", "http/1.1"]), Some("http/1.1"));
        assert_eq!(chosen(&["h2"]), Some("h2"));
        assert_eq!(chosen(&["mqtt"]), None);
        assert_eq!(chosen(&[]), None);
    }

    #[test]
    fn a_refusal_names_the_rule_and_the_peer() {
        let guard = |allow: &[&str]| Guard {
            ours: "spiffe://td/ns/vms/sa/app".parse().unwrap(),
            allow: allow.iter().map(|id| IdPattern::Exact(id.parse().unwrap())).collect(),
        };
        let peer = |id: &str| id.parse::<SpiffeId>().unwrap();
        assert!(guard(&[]).admit(&peer("spiffe://td/ns/a/sa/b")).is_ok());
        let refusal = guard(&[]).admit(&peer("spiffe://other/ns/a/sa/b")).unwrap_err();
        assert_eq!(refusal.kind, InboundRefusal::TrustDomain);
        assert_eq!(refusal.to_string(), "spiffe://other/ns/a/sa/b may not call: it is not of our trust domain td");
        let refusal = guard(&["spiffe://td/ns/a/sa/c"]).admit(&peer("spiffe://td/ns/a/sa/b")).unwrap_err();
        assert_eq!(refusal.kind, InboundRefusal::NotAllowed);
        // Our own trust domain has no way in of its own once somebody is named.
        assert!(guard(&["spiffe://other/x"]).admit(&peer("spiffe://other/x")).is_ok());
    }
}
