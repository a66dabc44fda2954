//! One HTTP/2 connection to the control plane: dialled with one credential, which it keeps.

use super::{Error, credential::Rung, tap::Tap, tls};
use crate::{host::Resolver, spiffe::X509Bundle, workload::Endpoint};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{net::TcpStream, sync::watch, time::timeout};
use tokio_rustls::TlsConnector;

/// Bound on resolving, connecting and the TLS handshake, each.
const DIAL: Duration = Duration::from_secs(5);
/// istiod punishes pings more frequent than every 15 s, and any without an open stream (grpc-go keepalive enforcement).
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Flow-control windows, as Istio's agent has them.
const WINDOW: u32 = 1 << 20;

/// How a connection ended, as far as its own task knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// It lives.
    Open,
    /// Closed in order.
    Closed,
    /// Broke, and what the transport said.
    Broken(String),
}

/// A live connection. It ends when the last holder lets go of it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) endpoint: Endpoint,
    pub(crate) rung: Rung,
    /// The address that was reached.
    pub(crate) peer: SocketAddr,
    sender: http2::SendRequest<tonic::body::Body>,
    goaway: watch::Receiver<bool>,
    end: watch::Receiver<End>,
}

impl Link {
    /// Resolves, connects, shakes hands. Nothing of a credential is sent before the server is verified.
    pub(crate) async fn dial(
        endpoint: &Endpoint,
        rung: Rung,
        roots: &X509Bundle,
        resolver: &Resolver,
    ) -> Result<Arc<Self>, Error> {
        let (host, port) = (&endpoint.authority.host, endpoint.authority.port);
        let address = endpoint.authority.to_string();
        let resolve = |cause: String| Error::Resolve { host: host.clone(), cause };
        let found = timeout(DIAL, resolver.lookup(host, port)).await;
        let found = found.map_err(|_| resolve("no answer in time".to_owned()))?.map_err(|e| resolve(e.to_string()))?;
        let tcp = connect(&address, &found).await?;
        let peer = tcp.peer_addr().map_err(|e| Error::Connect { address: address.clone(), cause: e.to_string() })?;

        let untrusted =
            |e: &rustls::Error| Error::Untrusted { address: address.clone(), cause: e.to_string(), fix: fix(e) };
        let config = tls::client_config(roots, &rung).map_err(|e| untrusted(&e))?;
        let name = ServerName::try_from(endpoint.server_name.clone())
            .map_err(|e| Error::Invalid(format!("server name {:?}: {e}", endpoint.server_name)))?;
        let dropped = |cause: String| Error::Dropped { address: address.clone(), credential: rung.describe(), cause };
        let shaken = timeout(DIAL, TlsConnector::from(Arc::new(config)).connect(name, tcp)).await;
        let stream =
            shaken.map_err(|_| Error::Timeout { call: "TLS handshake", address: address.clone(), within: DIAL })?;
        let stream = stream.map_err(|e| match tls_error(&e) {
            Some(tls @ (rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented)) => {
                untrusted(tls)
            }
            _ => dropped(text(&e)),
        })?;

        let (stream, goaway) = Tap::new(stream);
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(false)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| dropped(text(&e)))?;
        let (told, end) = watch::channel(End::Open);
        tokio::spawn(async move {
            told.send_replace(match connection.await {
                Ok(()) => End::Closed,
                Err(e) => End::Broken(text(&e)),
            });
        });
        Ok(Arc::new(Self { endpoint: endpoint.clone(), rung, peer, sender, goaway, end }))
    }

    /// `host:port`, for messages.
    pub(crate) fn address(&self) -> String {
        self.endpoint.authority.to_string()
    }

    /// Whether new calls can be made on it.
    pub(crate) fn is_open(&self) -> bool {
        !*self.goaway.borrow() && *self.end.borrow() == End::Open && !self.sender.is_closed()
    }

    /// Returns when the server has asked us to go, or the connection has ended.
    pub(crate) async fn told_to_go(&self) {
        let (mut goaway, mut end) = (self.goaway.clone(), self.end.clone());
        tokio::select! {
            _ = goaway.wait_for(|heard| *heard) => {}
            _ = end.wait_for(|end| *end != End::Open) => {}
        }
    }

    /// Why the connection ended, if it does within a moment: the alert about a refused certificate arrives here, often
    /// after the call has failed.
    pub(crate) async fn end(&self) -> Option<String> {
        let mut end = self.end.clone();
        let ended = timeout(Duration::from_millis(200), end.wait_for(|end| *end != End::Open)).await;
        match ended.ok()?.ok()?.clone() {
            End::Broken(cause) => Some(cause),
            End::Closed => Some("closed by the server".to_owned()),
            End::Open => None,
        }
    }

    /// The connection as the service that the generated stubs call.
    pub(crate) fn channel(&self) -> Channel {
        Channel(self.sender.clone())
    }
}

async fn connect(address: &str, found: &[SocketAddr]) -> Result<TcpStream, Error> {
    let error = |at: Option<&SocketAddr>, cause: String| Error::Connect {
        address: at.map_or(address.to_owned(), |at| {
            if at.to_string() == address { address.to_owned() } else { format!("{address} ({at})") }
        }),
        cause,
    };
    let mut last = error(None, "the name has no address".to_owned());
    for at in found {
        match timeout(DIAL, TcpStream::connect(at)).await {
            Ok(Ok(tcp)) => {
                // Without it a call waits for a delayed acknowledgement: 43 ms instead of 83 µs on loopback.
                return tcp.set_nodelay(true).map(|()| tcp).map_err(|e| error(Some(at), e.to_string()));
            }
            Ok(Err(e)) => last = error(Some(at), e.to_string()),
            Err(_) => last = error(Some(at), format!("no answer within {}", humantime::format_duration(DIAL))),
        }
    }
    Err(last)
}

/// The TLS library's own error inside an I/O error.
fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn fix(error: &rustls::Error) -> &'static str {
    use rustls::CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext,
    };
    match error {
        rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }) => {
            "set ISTIOD_SAN (or controlPlane.serverName) to a name in its certificate"
        }
        rustls::Error::InvalidCertificate(
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. },
        ) => "check the clocks of this host and of the control plane",
        _ => "if the mesh has a new root, put its root-cert.pem (and a new istio-token) in place",
    }
}

/// An error with its causes on one line, without the pointers to documentation that the TLS library adds.
pub(crate) fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    // rustls ends some of its texts with a link for programmers.
    if let Some(at) = text.find(": https://docs.rs/") {
        text.truncate(at);
    }
    text
}

/// One connection as a service. It never dials again by itself.
#[derive(Debug, Clone)]
pub(crate) struct Channel(http2::SendRequest<tonic::body::Body>);

impl tower::Service<http::Request<tonic::body::Body>> for Channel {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_for_operators() {
        let eof = "peer closed connection without sending TLS close_notify";
        let error = io::Error::new(io::ErrorKind::UnexpectedEof, format!("{eof}: https://docs.rs/rustls/latest/x#eof"));
        assert_eq!(text(&error), eof);
        assert_eq!(text(&io::Error::other("no such thing")), "no such thing");
    }
}
