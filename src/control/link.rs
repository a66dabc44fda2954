//! One HTTP/2 connection to the control plane: dialled with one credential, which it keeps.

use super::{
    Error,
    credential::Rung,
    dial::{Dialled, dial},
    error::text,
    tap::Tap,
    trust::{Roots, Trust},
};
use crate::{host::Resolver, workload::Endpoint};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// istiod punishes pings more frequent than every 15 s, and any without an open stream (grpc-go keepalive enforcement).
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Flow-control windows, as Istio's agent has them.
const WINDOW: u32 = 1 << 20;

/// From the withdrawal of a root to the end of what relies on it: whoever can move does so before.
const HANDOVER: Duration = Duration::from_secs(5);

/// How a connection ended, as far as its own task knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// It lives.
    Open,
    /// Closed in order.
    Closed,
    /// Broke, and what the transport said.
    Broken(String),
    /// Closed by us: a root that it relies on is trusted no more.
    Withdrawn,
}

/// A live connection. It carries the roots of its dial and serves while they are those of now. It ends when the last holder
/// lets go of it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) endpoint: Endpoint,
    pub(crate) rung: Rung,
    /// What was trusted when it was dialled.
    pub(crate) roots: Roots,
    /// The address that was reached.
    pub(crate) peer: SocketAddr,
    sender: http2::SendRequest<tonic::body::Body>,
    leave: watch::Receiver<bool>,
    end: watch::Receiver<End>,
}

impl Link {
    /// Dials with `roots`, which `trust` follows from then on, an address that was `good` before others.
    pub(crate) async fn dial(
        endpoint: &Endpoint,
        rung: Rung,
        roots: Roots,
        trust: &Trust,
        resolver: &Resolver,
        good: Option<SocketAddr>,
    ) -> Result<Arc<Self>, Error> {
        let Dialled { stream, peer } = dial(endpoint, &rung, &roots.all, resolver, good).await?;
        let ((go, leave), cut) = (watch::channel(false), CancellationToken::new());
        let stream = Tap::new(stream, go.clone(), cut.clone());
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(false)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| broke(endpoint, &rung, text(&e)))?;
        let (told, end) = watch::channel(End::Open);
        let outdated = outdated(trust.clone(), endpoint.roots.clone(), roots.clone(), go);
        tokio::spawn(async move {
            told.send_replace(tokio::select! {
                ended = connection => match ended {
                    Ok(()) => End::Closed,
                    Err(e) => End::Broken(text(&e)),
                },
                () = outdated => {
                    cut.cancel();
                    End::Withdrawn
                }
            });
        });
        Ok(Arc::new(Self { endpoint: endpoint.clone(), rung, roots, peer, sender, leave, end }))
    }

    /// `host:port`, for messages.
    pub(crate) fn address(&self) -> String {
        self.endpoint.authority.to_string()
    }

    /// Whether new calls can be made on it.
    pub(crate) fn is_open(&self) -> bool {
        !*self.leave.borrow() && *self.end.borrow() == End::Open && !self.sender.is_closed()
    }

    /// Returns when the server has asked us to go, what is trusted is no more what it was, or the connection has ended.
    pub(crate) async fn told_to_go(&self) {
        let (mut leave, mut end) = (self.leave.clone(), self.end.clone());
        tokio::select! {
            _ = leave.wait_for(|told| *told) => {}
            _ = end.wait_for(|end| *end != End::Open) => {}
        }
    }

    /// What a call that the transport broke off is: `said` is what the call knows of it. The alert about a refused
    /// certificate arrives at the connection, often a moment after the call has failed.
    pub(crate) async fn broke(&self, said: String) -> Error {
        let mut end = self.end.clone();
        let ended = timeout(Duration::from_millis(200), end.wait_for(|end| *end != End::Open)).await;
        let ended = ended.ok().and_then(Result::ok).map_or(End::Open, |end| end.clone());
        let cause = match ended {
            End::Broken(cause) => cause,
            End::Closed => "closed by the server".to_owned(),
            End::Open => said,
            End::Withdrawn => {
                let cause = "a root certificate that it relies on is trusted no more".to_owned();
                return Error::Ended { address: self.address(), cause };
            }
        };
        broke(&self.endpoint, &self.rung, cause)
    }

    /// The connection as the service that the generated stubs call.
    pub(crate) fn channel(&self) -> Channel {
        Channel(self.sender.clone())
    }
}

/// A connection that broke before the first answer: on a certificate of ours that may be what istiod does when it does not
/// accept it, as protocols go; on a token it is never.
fn broke(endpoint: &Endpoint, rung: &Rung, cause: String) -> Error {
    let address = endpoint.authority.to_string();
    match rung {
        Rung::Pair(_) => Error::Dropped { address, credential: rung.describe(), cause },
        Rung::Token => Error::Broken { address, cause },
    }
}

/// Follows what is trusted for a connection of these `roots`: says when it should be left, and returns when it must end.
async fn outdated(mut trust: Trust, file: PathBuf, roots: Roots, leave: watch::Sender<bool>) {
    let mut known = roots.clone();
    loop {
        known = trust.differ(&file, &known).await;
        leave.send_replace(true);
        if !known.all.includes(&roots.all) {
            break;
        }
    }
    sleep(HANDOVER).await;
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
