//! Somebody who calls: a pod of the mesh, or somebody who would like to be one.

use crate::support::SOON;
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use we_agent::spiffe::X509Context;
use we_lab::Lab;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

/// A pod of the mesh.
pub(super) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const HOUR: Duration = Duration::from_secs(3600);

/// A client with a certificate, or without.
pub(super) struct Pod {
    pub(super) config: ClientConfig,
}

impl Pod {
    /// A pod of the lab's mesh that is `id`.
    pub(super) fn new(lab: &Lab, id: &str) -> Self {
        Self::with(lab, &[id], SystemTime::now(), HOUR)
    }

    /// Its certificate names these URIs, and was issued at `now` for `life`.
    pub(super) fn with(lab: &Lab, uris: &[&str], now: SystemTime, life: Duration) -> Self {
        Self::certified(lab.ca().pod(uris, now, life).unwrap(), lab, rustls::DEFAULT_VERSIONS)
    }

    /// A pod of another mesh, that trusts this one.
    pub(super) fn foreign(other: &Lab, lab: &Lab, id: &str) -> Self {
        Self::certified(other.ca().pod(&[id], SystemTime::now(), HOUR).unwrap(), lab, rustls::DEFAULT_VERSIONS)
    }

    /// A pod that knows no newer TLS than 1.2.
    pub(super) fn tls12(lab: &Lab, id: &str) -> Self {
        Self::certified(lab.ca().pod(&[id], SystemTime::now(), HOUR).unwrap(), lab, &[&rustls::version::TLS12])
    }

    fn certified((key, chain): (String, String), lab: &Lab, versions: &[&'static SupportedProtocolVersion]) -> Self {
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        Self {
            config: without_resumption(builder(&lab.root_pem(), versions).with_client_auth_cert(chain, key).unwrap()),
        }
    }

    /// A pod that has this certificate and trusts these roots.
    pub(super) fn of(context: &X509Context) -> Self {
        let (svid, versions) = (&context.svid, rustls::DEFAULT_VERSIONS);
        let config = builder(&context.bundle.pem(), versions);
        let config = config.with_client_auth_cert(svid.chain().to_vec(), svid.key().pkcs8().clone_key()).unwrap();
        Self { config: without_resumption(config) }
    }

    /// Somebody without a certificate.
    pub(super) fn stranger(lab: &Lab) -> Self {
        Self { config: without_resumption(builder(&lab.root_pem(), rustls::DEFAULT_VERSIONS).with_no_client_auth()) }
    }

    /// Shakes hands.
    pub(super) async fn connect(&self, at: SocketAddr) -> io::Result<TlsStream<TcpStream>> {
        self.over(TcpStream::connect(at).await?).await
    }

    /// Shakes hands on a connection that is there.
    pub(super) async fn over(&self, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from("outbound_.19080_._.payments.vms.svc").unwrap();
        TlsConnector::from(Arc::new(self.config.clone())).connect(name, tcp).await
    }

    /// What comes back for `bytes` on a connection of its own.
    pub(super) async fn echo(&self, at: SocketAddr, bytes: &[u8]) -> Vec<u8> {
        timeout(SOON, self.try_echo(at, bytes)).await.expect("no answer in time").unwrap()
    }

    /// The same, when it may fail.
    pub(super) async fn try_echo(&self, at: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut stream = self.connect(at).await?;
        stream.write_all(bytes).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(answer)
    }

    /// The serial number of who answers.
    pub(super) fn server_serial(stream: &TlsStream<TcpStream>) -> String {
        let (_, cert) = X509Certificate::from_der(&stream.get_ref().1.peer_certificates().unwrap()[0]).unwrap();
        cert.raw_serial_as_string().replace(':', "")
    }

    /// Who answers.
    pub(super) fn server_id(stream: &TlsStream<TcpStream>) -> String {
        id_of(&stream.get_ref().1.peer_certificates().unwrap()[0])
    }
}

fn id_of(leaf: &CertificateDer<'_>) -> String {
    let (_, cert) = X509Certificate::from_der(leaf).unwrap();
    let names = cert.extensions().iter().find_map(|e| match e.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(san) => Some(san.general_names.clone()),
        _ => None,
    });
    match &names.unwrap()[..] {
        [GeneralName::URI(uri)] => (*uri).to_owned(),
        names => panic!("{names:?}"),
    }
}

fn without_resumption(mut config: ClientConfig) -> ClientConfig {
    config.resumption = Resumption::disabled();
    config
}

fn builder(
    roots: &str,
    versions: &[&'static SupportedProtocolVersion],
) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(root.unwrap()).unwrap();
    }
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone()).build().unwrap();
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
    builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyName { inner }))
}

/// As a sidecar does: the chain counts, and whoever asks looks at the id; there is no DNS name.
#[derive(Debug)]
struct AnyName {
    inner: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use rustls::CertificateError::{NotValidForName, NotValidForNameContext};
        match self.inner.verify_server_cert(leaf, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(ServerCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
