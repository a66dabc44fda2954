//! One connection: the handshake, its streams, its ageing and its end.

use std::{
    net::SocketAddr,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use h2::{Ping, Reason, RecvStream, server::SendResponse};
use http::{HeaderMap, Request};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{Istiod, admission::Caller, ads::Id, subscription::Rpc};
use crate::{
    event::What,
    grpc::{Reader, Status, Writer, code},
    mesh::Identity,
    tap::{Line, Tap},
    tls::{self, Gate},
};

const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const DELTA: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const STATE_OF_THE_WORLD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";

impl Istiod {
    pub(super) async fn serve_connection(
        self: Arc<Self>,
        tcp: TcpStream,
        peer: SocketAddr,
        acceptor: TlsAcceptor,
        gate: &Gate,
        down: CancellationToken,
    ) {
        _ = tcp.set_nodelay(true);
        let refused = |cause: String| self.log.push(What::HandshakeRefused { peer, cause });
        let mut tls = match timeout(Duration::from_secs(10), acceptor.accept(tcp)).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return refused(error.to_string()),
            Err(_) => return refused("no handshake within 10 s".to_owned()),
        };
        let connection = tls.get_ref().1;
        let certificate = connection.peer_certificates().and_then(|chain| chain.split_first());
        if let Some((leaf, chain)) = certificate
            && let Err(error) = gate.check(leaf, chain, rustls::pki_types::UnixTime::now())
        {
            // Only when alerts are to be lost: the handshake itself has refused it otherwise.
            return refused(error.to_string());
        }
        let certificate = certificate.and_then(|(leaf, _)| tls::subject(leaf, &self.mesh.trust_domain));
        if connection.alpn_protocol() != Some(b"h2") {
            _ = tokio::io::AsyncWriteExt::shutdown(&mut tls).await;
            return refused("the client does not speak h2".to_owned());
        }
        let connection = self.connections.fetch_add(1, Ordering::Relaxed) + 1;
        let (identity, serial) = certificate.unzip();
        self.log.push(What::ConnectionOpened { connection, peer, certificate: serial });
        let line = Line::new(self.settings.ping_interval);
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&line));
        self.serve_http2(Tap::new(tls, Arc::clone(&line)), connection, identity, &line, down).await;
        let (received, sent) = (line.received.load(Ordering::Relaxed), line.sent.load(Ordering::Relaxed));
        self.log.push(What::ConnectionClosed { connection, received, sent });
    }

    async fn serve_http2<S>(
        self: &Arc<Self>,
        tap: Tap<S>,
        connection: u64,
        certificate: Option<Identity>,
        line: &Arc<Line>,
        down: CancellationToken,
    ) where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let mut orders = self.orders.subscribe();
        let before = *orders.borrow_and_update();
        let Ok(mut http2) =
            h2::server::Builder::new().max_frame_size(16_384).max_concurrent_streams(100_000).handshake(tap).await
        else {
            return;
        };
        let mut pings = http2.ping_pong();
        let mut last_stream = 0;
        let age = self.settings.max_connection_age.map(|age| Instant::now() + age.mul_f64(0.9 + 0.2 * fastrand::f64()));
        let mut draining: Option<Instant> = None;
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        let mut pinged = false;
        loop {
            let mut goaway = false;
            tokio::select! {
                biased;
                () = down.cancelled() => return line.end_silently(),
                changed = orders.changed() => {
                    let now = *orders.borrow_and_update();
                    if changed.is_err() || now.connections != before.connections {
                        return line.end_silently();
                    }
                    goaway = now.goaway != before.goaway;
                }
                () = until(age), if draining.is_none() => goaway = true,
                () = until(draining), if draining.is_some() => return,
                _ = tick.tick() => {
                    if draining.is_some() && line.pings.streams.load(Ordering::Relaxed) == 0 {
                        return;
                    }
                    if line.pings.too_many() && draining.is_none() {
                        self.log.push(What::Goaway { connection, reason: "too_many_pings".to_owned() });
                        line.goaway(last_stream, 11, b"too_many_pings");
                        draining = Some(Instant::now() + Duration::from_secs(1));
                    }
                    // grpc-go's keepalive: a ping after 30 s of silence, the end 10 s later.
                    match line.quiet().as_secs() {
                        40.. => return,
                        30.. if !pinged => {
                            pinged = pings.as_mut().is_some_and(|p| p.send_ping(Ping::opaque()).is_ok());
                        }
                        0..30 => pinged = false,
                        _ => {}
                    }
                }
                request = http2.accept() => {
                    let Some(Ok((request, mut respond))) = request else { return };
                    let id = respond.stream_id().as_u32();
                    if draining.is_some() && id > last_stream {
                        respond.send_reset(Reason::REFUSED_STREAM);
                        continue;
                    }
                    last_stream = last_stream.max(id);
                    let caller = Caller { connection, certificate: certificate.clone(), headers: HeaderMap::new() };
                    self.dispatch(request, respond, caller, line, &down);
                }
            }
            if goaway && draining.is_none() {
                self.log.push(What::Goaway { connection, reason: "max_age".to_owned() });
                line.goaway(0x7fff_ffff, 0, b"max_age");
                line.goaway(last_stream, 0, b"max_age");
                draining = Some(Instant::now() + self.settings.age_grace);
            }
        }
    }

    fn dispatch(
        self: &Arc<Self>,
        request: Request<RecvStream>,
        respond: SendResponse<bytes::Bytes>,
        caller: Caller,
        line: &Arc<Line>,
        down: &CancellationToken,
    ) {
        let stream = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let (head, body) = request.into_parts();
        let caller = Caller { headers: head.headers, ..caller };
        let connection = caller.connection;
        let (istiod, reader, writer, down) = (Arc::clone(self), Reader::new(body), Writer::new(respond), down.clone());
        let held = Held::new(line);
        self.spawn(async move {
            let _held = held;
            let id = Id { connection, stream };
            match head.uri.path() {
                CREATE_CERTIFICATE => istiod.create_certificate(caller, reader, writer).await,
                DELTA => istiod.admit(Rpc::Delta, id, caller, reader, writer, down).await,
                STATE_OF_THE_WORLD => istiod.admit(Rpc::StateOfTheWorld, id, caller, reader, writer, down).await,
                path => {
                    let service = path.trim_start_matches('/').split('/').next().unwrap_or_default();
                    writer.finish(&Status::new(code::UNIMPLEMENTED, format!("unknown service {service}")));
                }
            }
        });
    }
}

/// Counts the open streams of a connection.
struct Held(Arc<Line>);

impl Held {
    fn new(line: &Arc<Line>) -> Self {
        line.pings.streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(line))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.pings.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
