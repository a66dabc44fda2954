//! Verified reload: a connection is made, and the certificate that the program shows is compared with the published one.

use crate::{
    command::words,
    host::Resolver,
    spiffe::{X509Context, serial_of},
};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    sign::SingleCertAndKey,
};
use std::{io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsConnector;

/// Bound on one look.
const LOOK: Duration = Duration::from_secs(5);
/// Between two looks: at first, and at most. nginx needs 0.1 s for a reload, haproxy nearly 1 s.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What is said before the TLS handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartTls {
    /// `postgres`: `SSLRequest` (PostgreSQL, Frontend/Backend Protocol, "SSL Session Encryption").
    Postgres,
}

/// How to see which certificate a program serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verify {
    /// `address`: where it listens, `host:port`.
    pub address: String,
    /// `sni`: the name to ask for (server name indication); none asks for the host of `address`, if that is a name.
    pub sni: Option<String>,
    /// `startTls`: what is said first, for protocols that begin without TLS.
    pub start_tls: Option<StartTls>,
    /// `within`: how long the program may go on to show another certificate after the action (15 s).
    pub within: Duration,
}

/// What was seen instead of the published certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stale {
    pub(super) served: Option<String>,
    pub(super) cause: String,
}

impl Verify {
    /// Looks until the program serves the certificate of `context`, at most [`Verify::within`].
    pub(super) async fn waits_for(&self, context: &X509Context) -> Result<(), Stale> {
        let end = Instant::now() + self.within;
        let mut pause = PAUSE.0;
        loop {
            let seen = self.sees(context).await;
            if seen.is_ok() || Instant::now() + pause > end {
                return seen;
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Looks once.
    pub(super) async fn sees(&self, context: &X509Context) -> Result<(), Stale> {
        let (address, wanted) = (&self.address, context.svid.serial());
        let seen = timeout(LOOK, self.look(context)).await;
        match seen.unwrap_or_else(|_| Err("no TLS handshake within 5 s".to_owned())) {
            Ok(leaf) if Some(&leaf) == context.svid.chain().first() => Ok(()),
            Ok(leaf) => {
                let served = serial_of(&leaf).unwrap_or_else(|| "unreadable".to_owned());
                let cause = format!(
                    "{address} serves serial {served}, not {wanted}; look at the log of the program, and check that it \
                     reads the files of this workload and that `verify` has its address"
                );
                Err(Stale { served: Some(served), cause })
            }
            Err(cause) => {
                let cause = format!(
                    "{address} cannot be asked for its certificate: {cause}; check that the program runs and that \
                     `verify` has its address"
                );
                Err(Stale { served: None, cause })
            }
        }
    }

    /// The certificate that is shown to somebody who has ours.
    async fn look(&self, context: &X509Context) -> Result<CertificateDer<'static>, String> {
        let failed = |doing: &'static str| move |error: io::Error| format!("{doing}: {}", words(&error));
        let (host, port) = self.host_port();
        let found = Resolver::default().lookup(host, port).await.map_err(failed("lookup"))?;
        let mut tcp = TcpStream::connect(&found[..]).await.map_err(failed("connect"))?;
        if self.start_tls == Some(StartTls::Postgres) {
            // Length and request code, then one byte: S for yes.
            tcp.write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f]).await.map_err(failed("write"))?;
            if tcp.read_u8().await.map_err(failed("read"))? != b'S' {
                return Err("it offers no TLS".to_owned());
            }
        }
        let connector = connector(context).map_err(|error| error.to_string())?;
        let name = self.server_name()?;
        let mut tls = connector.connect(name, tcp).await.map_err(failed("TLS handshake"))?;
        let leaf = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
        let _ = tls.shutdown().await; // what was to be seen has been seen
        leaf.map(CertificateDer::into_owned).ok_or_else(|| "it shows no certificate".to_owned())
    }

    fn host_port(&self) -> (&str, u16) {
        let (host, port) = self.address.rsplit_once(':').unwrap_or((&self.address, ""));
        (host.trim_matches(['[', ']']), port.parse().unwrap_or_default())
    }

    fn server_name(&self) -> Result<ServerName<'static>, String> {
        let name = self.sni.as_deref().unwrap_or(self.host_port().0);
        ServerName::try_from(name.to_owned()).map_err(|_| format!("{name} is no name to ask for"))
    }
}

/// Shows our certificate, takes any, but only from who has its key. Nothing is sent over the connection.
fn connector(context: &X509Context) -> Result<TlsConnector, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let anybody = Anybody(provider.signature_verification_algorithms);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(anybody))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(context.svid.pair())));
    // A resumed session would show the certificate of an older handshake.
    config.resumption = Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Takes any certificate: the question is which one it is, and an old one may have expired.
#[derive(Debug)]
struct Anybody(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
