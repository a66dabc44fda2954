//! The load: a client of the mesh, which shows the certificate that the agent has published.

use super::application::Exchange;
use anyhow::{Context, ensure};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, ProtocolVersion, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::either::Either;

/// For one exchange, and much more than any takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// An open connection, plain or with TLS.
pub(crate) type Connection = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Where to connect, and how.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) tls: Option<TlsConnector>,
}

impl Target {
    pub(crate) async fn connect(&self) -> anyhow::Result<Connection> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return Ok(Either::Left(stream)) };
        // Nobody looks at the name: one identity is all there is.
        let name = ServerName::try_from("payments.example.com")?;
        Ok(Either::Right(Box::new(tls.connect(name, stream).await?)))
    }

    /// Connects and asks once; what was agreed on in the handshake.
    pub(crate) async fn try_once(&self) -> anyhow::Result<String> {
        let mut connection = self.connect().await?;
        ask(&mut connection, &Exchange { request: 8, answer: 8 }.bytes(), 8).await?;
        let Either::Right(stream) = &connection else { return Ok("no TLS".to_owned()) };
        let tls = stream.get_ref().1;
        ensure!(tls.protocol_version() == Some(ProtocolVersion::TLSv1_3), "it speaks {:?}", tls.protocol_version());
        let suite = tls.negotiated_cipher_suite().context("no cipher suite")?.suite();
        let group = tls.negotiated_key_exchange_group().context("no key exchange")?.name();
        Ok(format!("{suite:?}, {group:?}"))
    }
}

/// One exchange; `answer` is how many bytes come back.
pub(crate) async fn ask(connection: &mut Connection, request: &[u8], answer: u32) -> anyhow::Result<()> {
    let exchange = async {
        connection.write_all(request).await?;
        connection.flush().await?;
        let mut buffer = [0; 1 << 14];
        let mut left = answer as usize;
        while left > 0 {
            let most = buffer.len().min(left);
            let read = connection.read(&mut buffer[..most]).await?;
            ensure!(read > 0, "closed before the answer");
            left -= read;
        }
        Ok(())
    };
    timeout(PATIENCE, exchange).await.context("no answer")?
}

/// One connection after the other, with one exchange each, until `end`; how many there were.
pub(crate) async fn reconnect(target: Target, exchange: Exchange, end: Instant) -> anyhow::Result<u64> {
    let (request, mut done) = (exchange.bytes(), 0);
    while Instant::now() < end {
        let mut connection = timeout(PATIENCE, target.connect()).await.context("no connection")??;
        ask(&mut connection, &request, exchange.answer).await?;
        connection.shutdown().await?;
        done += 1;
    }
    Ok(done)
}

/// One exchange after the other until `end`; how many there were.
pub(crate) async fn repeat(mut connection: Connection, exchange: Exchange, end: Instant) -> anyhow::Result<u64> {
    let (request, mut done) = (exchange.bytes(), 0);
    while Instant::now() < end {
        ask(&mut connection, &request, exchange.answer).await?;
        done += 1;
    }
    Ok(done)
}

/// TLS 1.3 as Envoy offers it (X25519 first, AES-128 first, nothing resumed), with the certificate in `dir` or with none.
pub(crate) fn connector(dir: Option<&Path>) -> anyhow::Result<TlsConnector> {
    use aws_lc_rs::{cipher_suite::*, kx_group::*};
    let provider = Arc::new(CryptoProvider {
        cipher_suites: vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256],
        kx_groups: vec![X25519, SECP256R1],
        ..aws_lc_rs::default_provider()
    });
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Any(provider)));
    let mut config = match dir {
        Some(dir) => {
            let chain = CertificateDer::pem_file_iter(dir.join("cert-chain.pem"))?.collect::<Result<_, _>>()?;
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(dir.join("key.pem"))?)?
        }
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config).into())
}

/// Takes any certificate: what verifying costs a client is not measured. The handshake's signature is verified.
#[derive(Debug)]
struct Any(Arc<CryptoProvider>);

impl ServerCertVerifier for Any {
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
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
