//! TLS towards the application: unverified like a kubelet's probe, unless the configuration asks for more.

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use std::sync::{Arc, OnceLock};
use tokio_rustls::TlsConnector;

/// How a workload's probes speak TLS: set up at the first use, then kept.
pub(super) struct Tls {
    verify: bool,
    connector: OnceLock<TlsConnector>,
}

impl Tls {
    /// With `verify`, certificates must chain to the operating system's roots.
    pub(super) fn new(verify: bool) -> Self {
        Self { verify, connector: OnceLock::new() }
    }

    /// The connector; an error says that the operating system has no roots.
    pub(super) fn connector(&self) -> Result<&TlsConnector, String> {
        match self.connector.get() {
            Some(made) => Ok(made),
            None => {
                let made = connector(self.verify)?;
                Ok(self.connector.get_or_init(|| made))
            }
        }
    }
}

pub(super) fn connector(verify: bool) -> Result<TlsConnector, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let schemes = provider.signature_verification_algorithms.supported_schemes();
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("TLS cannot be set up: {e}"))?;
    let mut config = if verify {
        builder.with_root_certificates(system_roots()?).with_no_client_auth()
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(schemes))).with_no_client_auth()
    };
    config.resumption = Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn system_roots() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err("HTTPS probes shall verify certificates (`health: {verifyTls: true}`), but this host has no root \
                    certificates: install the package ca-certificates, or set `verifyTls: false` in \
                    /etc/we-agent/we-agent.yaml"
            .to_owned());
    }
    Ok(roots)
}

/// Takes any certificate. The probe asks whether the application answers, on this host; nothing secret is sent and
/// nothing that it says is believed, and such applications often show a self-signed or an odd certificate.
#[derive(Debug)]
struct Anybody(Vec<SignatureScheme>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}
