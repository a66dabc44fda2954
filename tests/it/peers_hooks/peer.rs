//! A client of the servers: mutual TLS with the published files, and a call over it.

use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_rustls::TlsConnector;
use we_agent::spiffe::serial_of;

use crate::support::SOON;

#[derive(Debug, Clone, Copy)]
pub(super) enum StartTls {
    Postgres,
}

#[derive(Clone)]
pub(super) struct Client {
    pub(super) port: u16,
    /// The published files: it shows the same certificate as the server.
    pub(super) dir: PathBuf,
    pub(super) start_tls: Option<StartTls>,
}

/// What callers met: the serial number of each connection that was served, and what went wrong with the others.
#[derive(Default)]
pub(super) struct Calls {
    pub(super) served: Vec<String>,
    pub(super) lost: Vec<String>,
}

pub(super) struct Calling {
    stop: watch::Sender<bool>,
    task: JoinHandle<Calls>,
}

impl Calling {
    pub(super) async fn stop(self) -> Calls {
        self.stop.send_replace(true);
        timeout(SOON, self.task).await.unwrap().unwrap()
    }
}

impl Client {
    /// Waits until the server is up.
    pub(super) async fn until_served(&self) {
        let end = Instant::now() + SOON;
        while let Err(cause) = self.call().await {
            assert!(Instant::now() < end, "the server does not come up: {cause}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// One new connection after the other, with a breath in between: other tests run on this machine, too.
    pub(super) fn call_on_and_on(&self) -> Calling {
        let (stop, stopped) = watch::channel(false);
        let client = self.clone();
        let task = tokio::spawn(async move {
            let mut calls = Calls::default();
            while !*stopped.borrow() {
                match client.call().await {
                    Ok(serial) => calls.served.push(serial),
                    Err(cause) => calls.lost.push(cause),
                }
                sleep(Duration::from_millis(10)).await;
            }
            calls
        });
        Calling { stop, task }
    }

    /// Connects, is served, and gives the serial number of the server's certificate.
    async fn call(&self) -> Result<String, String> {
        let bounded = timeout(Duration::from_secs(10), self.exchange()).await;
        bounded.map_err(|_| "no answer".to_owned())?.map_err(|error| error.to_string())
    }

    async fn exchange(&self) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
        // One generation: the link is resolved once.
        let now = tokio::fs::canonicalize(self.dir.join("..data")).await?;
        let chain = CertificateDer::pem_file_iter(now.join("cert-chain.pem"))?.collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_file(now.join("key.pem"))?;
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody))
            .with_client_auth_cert(chain, key)?;
        let mut tcp = TcpStream::connect(("127.0.0.1", self.port)).await?;
        if self.start_tls.is_some() {
            tcp.write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f]).await?;
            assert_eq!(tcp.read_u8().await?, b'S');
        }
        let name = ServerName::try_from("payments.example.com")?;
        let mut tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
        let serial = serial_of(&tls.get_ref().1.peer_certificates().ok_or("no certificate")?[0]).ok_or("no serial")?;
        match self.start_tls {
            None => {
                tls.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
                let mut answer = [0; 12];
                tls.read_exact(&mut answer).await?;
                if !answer.ends_with(b" 200") {
                    return Err(String::from_utf8_lossy(&answer).into());
                }
            }
            Some(StartTls::Postgres) => {
                let words = b"user\0t\0database\0postgres\0\0";
                tls.write_u32(8 + u32::try_from(words.len())?).await?;
                tls.write_u32(196_608).await?;
                tls.write_all(words).await?;
                // AuthenticationOk, which it says after it has checked our certificate.
                let mut answer = [0; 9];
                tls.read_exact(&mut answer).await?;
                if answer != [b'R', 0, 0, 0, 8, 0, 0, 0, 0] {
                    return Err(String::from_utf8_lossy(&answer).into());
                }
                tls.write_all(&[b'X', 0, 0, 0, 4]).await?;
            }
        }
        let _ = tls.shutdown().await;
        Ok(serial)
    }
}

/// The page of metrics.
pub(super) async fn metrics(admin: SocketAddr) -> String {
    let mut stream = TcpStream::connect(admin).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    page
}

/// Takes any certificate: which one is served is the question here.
#[derive(Debug)]
struct Anybody;

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
        let provider = aws_lc_rs::default_provider();
        verify_tls12_signature(message, cert, dss, &provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let provider = aws_lc_rs::default_provider();
        verify_tls13_signature(message, cert, dss, &provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
