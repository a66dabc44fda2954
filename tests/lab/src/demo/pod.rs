//! A pod of the mesh, which calls the VM by mutual TLS as its sidecar would: with a certificate of the same CA, looking
//! at the SPIFFE ID of who answers and not at any DNS name.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use rcgen::KeyPair;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use super::stage::TRUST_DOMAIN;
use crate::{Lab, ca::Leaf, tls};

const LIMIT: Duration = Duration::from_secs(10);

/// Holds a certificate of the mesh.
pub(super) struct Pod {
    config: Arc<ClientConfig>,
}

impl Pod {
    /// Calls only who is `callee`, a SPIFFE ID.
    pub(super) fn new(lab: &Lab, callee: &'static str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let identity = format!("spiffe://{TRUST_DOMAIN}/ns/shop/sa/shop");
        let leaf = Leaf { identity: &identity, named: false, life: Duration::from_secs(3600) };
        let pem = lab.ca().sign(&key, &leaf, SystemTime::now())?.pem + &lab.ca().issuers().concat();
        let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;

        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        for root in lab.ca().roots() {
            roots.add(root)?;
        }
        let chains = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Peer { chains, callee }))
            .with_client_auth_cert(chain, key)?;
        Ok(Self { config: Arc::new(config) })
    }

    /// One call, on a connection of its own; what was answered.
    pub(super) async fn call(&self, at: SocketAddr) -> anyhow::Result<String> {
        let call = async {
            let tcp = TcpStream::connect(at).await?;
            let mut stream = TlsConnector::from(Arc::clone(&self.config)).connect(at.ip().into(), tcp).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        let answer = timeout(LIMIT, call).await.context("no answer in time")?;
        Ok(answer.with_context(|| format!("the pod's call to {at} failed"))?.trim().to_owned())
    }
}

/// Verifies as a sidecar does. Certificates of the mesh are for both ends, so the verifier of clients serves here.
#[derive(Debug)]
struct Peer {
    chains: Arc<dyn ClientCertVerifier>,
    callee: &'static str,
}

impl ServerCertVerifier for Peer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.chains.verify_client_cert(leaf, chain, now)?;
        let (identity, _) = tls::subject(leaf, TRUST_DOMAIN).ok_or(CertificateError::BadEncoding)?;
        if identity.uri == self.callee {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}
