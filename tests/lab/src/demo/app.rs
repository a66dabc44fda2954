//! The application on the VM: `/healthz` on one port, and mutual TLS with the agent's files on another.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use rustls::{ServerConfig, crypto::aws_lc_rs, sign::SingleCertAndKey};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

use super::pair;

/// The application. Dropping it ends it.
pub(super) struct App {
    /// Port of `/healthz`, plain HTTP.
    pub(super) health: u16,
    /// Port that the mesh is told.
    pub(super) port: u16,
    healthy: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl App {
    /// Starts it, healthy; the files are looked for in `dir` at each connection, so that a rotation needs no restart.
    pub(super) async fn start(dir: PathBuf, trust_domain: &'static str) -> std::io::Result<Self> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (health, service) = (TcpListener::bind(any).await?, TcpListener::bind(any).await?);
        let ports = (health.local_addr()?.port(), service.local_addr()?.port());
        let (healthy, state) = watch::channel(true);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Ok((stream, _)) = health.accept().await {
                tokio::spawn(healthz(stream, *state.borrow()));
            }
        });
        tasks.spawn(async move {
            while let Ok((stream, _)) = service.accept().await {
                tokio::spawn(serve(stream, dir.clone(), trust_domain));
            }
        });
        Ok(Self { health: ports.0, port: ports.1, healthy, _tasks: tasks })
    }

    pub(super) fn set_healthy(&self, healthy: bool) {
        self.healthy.send_replace(healthy);
    }
}

async fn healthz(mut stream: TcpStream, healthy: bool) {
    let mut request = [0; 2048];
    _ = stream.read(&mut request).await;
    let status = if healthy { "200 OK" } else { "503 Service Unavailable" };
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    _ = stream.write_all(answer.as_bytes()).await;
}

/// Whoever has a certificate of the mesh is greeted.
async fn serve(stream: TcpStream, dir: PathBuf, trust_domain: &str) -> Option<()> {
    let pair = pair::load(&dir, trust_domain).ok()??;
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .ok()?
        .with_client_cert_verifier(pair.verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(pair.key)));
    let mut stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await.ok()?;
    stream.write_all(b"hello from the VM\n").await.ok()?;
    stream.shutdown().await.ok()
}
