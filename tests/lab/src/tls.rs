//! istiod's side of the handshake: its certificate of the moment, and which client certificates it takes.

use std::sync::{Arc, atomic::Ordering};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::{
        ClientHello, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use x509_parser::{extensions::GeneralName, prelude::X509Certificate};

use crate::{Error, ca, fault::Fault, istiod::Istiod, mesh::Identity};

/// The configuration of an instance that starts now. The roots for client certificates are those of this moment:
/// a real istiod does not take over new ones until it is restarted.
pub(crate) fn config(istiod: &Arc<Istiod>) -> Result<(ServerConfig, Arc<Gate>), Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for root in istiod.mesh.ca.roots() {
        roots.add(root)?;
    }
    let chains = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|_| Error::Key("the CA"))?;
    let gate = Arc::new(Gate { chains, istiod: Arc::clone(istiod) });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(Arc::clone(&gate) as _)
        .with_cert_resolver(Arc::new(Serving(Arc::clone(istiod))));
    // A client that speaks HTTP/1.1 alone completes the handshake, and is then cut off.
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((config, gate))
}

/// Presents the serving certificate of the moment.
struct Serving(Arc<Istiod>);

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Serving")
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let (ca, faults) = (&self.0.mesh.ca, &self.0.faults);
        if faults.has(Fault::WrongServerName) {
            return ca.serving_as(&["somebody-else.istio-system.svc".to_owned()]);
        }
        if faults.has(Fault::WrongServerRoot) {
            return ca::Ca::generate("cluster.local", ca.names().to_vec(), 1).ok().map(|other| other.serving());
        }
        Some(ca.serving())
    }
}

/// Decides about client certificates.
pub(crate) struct Gate {
    chains: Arc<dyn ClientCertVerifier>,
    istiod: Arc<Istiod>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gate")
    }
}

impl Gate {
    /// The errors are those whose alerts istiod sends: 45, 48, or 42 for names that are not one SPIFFE ID of this domain.
    pub(crate) fn check(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chains.verify_client_cert(leaf, chain, now).map_err(|error| match error {
            // An issuer of the same name and another key: to Go that is an unknown one.
            rustls::Error::InvalidCertificate(CertificateError::BadSignature) => CertificateError::UnknownIssuer.into(),
            error => error,
        })?;
        let (_, serial) = subject(leaf, &self.istiod.mesh.trust_domain).ok_or(CertificateError::BadEncoding)?;
        let newest = self.istiod.newest_accepted.load(Ordering::Relaxed);
        if self.istiod.faults.has(Fault::RefuseNewCertificate) && self.istiod.mesh.ca.sequence(&serial) > newest {
            return Err(CertificateError::UnknownIssuer.into());
        }
        Ok(verified)
    }
}

impl ClientCertVerifier for Gate {
    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if self.istiod.faults.has(Fault::LoseAlerts) {
            return Ok(ClientCertVerified::assertion());
        }
        self.check(leaf, chain, now)
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chains.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

/// Identity and serial number of a leaf with exactly one URI, a SPIFFE ID of this domain. Other kinds of names are tolerated.
pub(crate) fn subject(leaf: &CertificateDer<'_>, trust_domain: &str) -> Option<(Identity, String)> {
    let (_, certificate): (_, X509Certificate<'_>) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut uris =
        names.value.general_names.iter().filter_map(|n| if let GeneralName::URI(uri) = n { Some(*uri) } else { None });
    let (Some(uri), None) = (uris.next(), uris.next()) else { return None };
    Some((Identity::parse(trust_domain, uri)?, ca::hex(certificate.raw_serial())))
}
