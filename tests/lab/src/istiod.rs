//! istiod's face: one port with TLS, the CA and the discovery service behind it.

mod ads;
mod discovery;
mod node;
mod registration;
mod signing;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use h2::{Ping, Reason, RecvStream, server::SendResponse};
use http::{HeaderMap, Request};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use discovery::Registry;

use crate::{
    event::{Credential, Log, What},
    fault::{Fault, Faults},
    grpc::{Reader, Status, Writer, code},
    mesh::{Identity, Mesh},
    tap::{Line, Tap},
    tls::{self, Gate},
};
use ads::{Id, Rpc};
use registration::Leases;

/// How an instance behaves when nothing is wrong.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) ttl: Option<Duration>,
    pub(crate) ttl_cap: Duration,
    pub(crate) grace: Duration,
    pub(crate) max_connection_age: Option<Duration>,
    pub(crate) age_grace: Duration,
    pub(crate) debounce: Duration,
    /// `ISTIO_MULTIROOT_MESH`: roots are pushed to who subscribes to them.
    pub(crate) multiroot: bool,
    /// New streams a second.
    pub(crate) admission: f64,
}

/// Orders to everything that is open, as counters: who sees one move obeys once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Orders {
    pub(crate) streams: u64,
    pub(crate) connections: u64,
    pub(crate) goaway: u64,
}

/// Why the port is closed, if it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Power {
    pub(crate) stopped: bool,
    pub(crate) down: bool,
}

impl Power {
    pub(crate) fn is_on(self) -> bool {
        !self.stopped && !self.down
    }
}

/// One instance.
pub(crate) struct Istiod {
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) settings: Settings,
    pub(crate) faults: Faults,
    pub(crate) log: Log,
    pub(crate) orders: watch::Sender<Orders>,
    pub(crate) power: watch::Sender<Power>,
    pub(crate) registry: watch::Sender<Arc<Registry>>,
    /// The last certificate that [`Fault::RefuseNewCertificate`] still accepts.
    pub(crate) newest_accepted: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) lines: Mutex<Vec<Arc<Line>>>,
    leases: Mutex<Leases>,
    /// When the next stream may be admitted.
    admission: Mutex<Option<Instant>>,
    tasks: Mutex<(TaskTracker, CancellationToken)>,
}

/// By what a call may be authenticated.
#[derive(Clone)]
struct Caller {
    connection: u64,
    certificate: Option<Identity>,
    headers: HeaderMap,
}

const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const DELTA: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const STATE_OF_THE_WORLD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";

impl Istiod {
    pub(crate) fn new(mesh: Arc<Mesh>, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            mesh,
            settings,
            faults: Faults::default(),
            log: Log::new(),
            orders: watch::Sender::default(),
            power: watch::Sender::default(),
            registry: watch::Sender::default(),
            newest_accepted: AtomicU64::new(u64::MAX),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            lines: Mutex::default(),
            leases: Mutex::default(),
            admission: Mutex::default(),
            tasks: Mutex::new((TaskTracker::new(), CancellationToken::new())),
        })
    }

    /// Serves the listener until `down` is cancelled, and ends everything that it began.
    pub(crate) async fn serve(
        self: &Arc<Self>,
        listener: TcpListener,
        down: CancellationToken,
    ) -> Result<(), crate::Error> {
        let (config, gate) = tls::config(self)?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let tracker = TaskTracker::new();
        *self.tasks.lock().unwrap_or_else(PoisonError::into_inner) = (tracker.clone(), down.clone());
        self.leases().clear();
        self.picture(1);
        let istiod = Arc::clone(self);
        self.spawn(async move { istiod.follow_the_store().await });
        self.log.push(What::Listening { address: listener.local_addr()? });
        loop {
            tokio::select! {
                biased;
                () = down.cancelled() => break,
                accepted = listener.accept() => if let Ok((tcp, peer)) = accepted {
                    let (istiod, acceptor, gate, down) = (Arc::clone(self), acceptor.clone(), Arc::clone(&gate), down.clone());
                    self.spawn(async move { istiod.serve_connection(tcp, peer, acceptor, &gate, down).await });
                }
            }
        }
        drop(listener);
        tracker.close();
        tracker.wait().await;
        self.log.push(What::Down);
        Ok(())
    }

    /// Runs a task that ends with this run of the instance.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let (tracker, down) = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).clone();
        tracker.spawn(async move {
            // A task that minds the end itself gets to see it first.
            tokio::pin!(task);
            tokio::select! {
                biased;
                () = &mut task => {}
                () = down.cancelled() => {}
            }
        });
    }

    /// Changes of the store are seen a debounce later, all at once.
    async fn follow_the_store(&self) {
        let (mut versions, mut ca) = (self.mesh.store.versions(), self.mesh.ca.changes());
        let mut number = 1;
        loop {
            let changed = tokio::select! {
                changed = versions.changed() => changed,
                changed = ca.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            tokio::time::sleep(self.settings.debounce).await;
            versions.borrow_and_update();
            number += 1;
            self.picture(number);
        }
    }

    fn picture(&self, number: u64) {
        let version = format!("{}/{number}", humantime::format_rfc3339_seconds(SystemTime::now()));
        let registry = Registry::new(&self.mesh.store.read(), self.mesh.ca.root_pems(), version);
        self.registry.send_replace(Arc::new(registry));
    }

    /// What a real istiod does when it meets its own bug.
    fn crash(&self, cause: String) {
        self.log.push(What::Crashed { cause });
        self.power.send_modify(|p| p.stopped = true);
    }

    async fn serve_connection(
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
        let line = Line::new();
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
        let open = Arc::new(AtomicUsize::new(0));
        let mut last_stream = 0;
        let age = self.settings.max_connection_age.map(|age| Instant::now() + age.mul_f64(0.9 + 0.2 * fastrand::f64()));
        let mut draining: Option<Instant> = None;
        let mut tick = tokio::time::interval(Duration::from_millis(50));
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
                    if draining.is_some() && open.load(Ordering::Relaxed) == 0 {
                        return;
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
                    self.dispatch(request, respond, connection, certificate.clone(), &open, &down);
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
        connection: u64,
        certificate: Option<Identity>,
        open: &Arc<AtomicUsize>,
        down: &CancellationToken,
    ) {
        let stream = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let (head, body) = request.into_parts();
        let caller = Caller { connection, certificate, headers: head.headers };
        let (istiod, reader, writer, down) = (Arc::clone(self), Reader::new(body), Writer::new(respond), down.clone());
        let held = Held::new(open);
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

    /// Rate limit, then authentication; refusals come before the first message is looked at.
    async fn admit(
        self: Arc<Self>,
        rpc: Rpc,
        id: Id,
        caller: Caller,
        reader: Reader,
        writer: Writer,
        down: CancellationToken,
    ) {
        let admitted = async {
            if let Some(wait) =
                self.faults.find(|f| if let Fault::SlowAdmission(wait) = f { Some(*wait) } else { None })
            {
                tokio::time::sleep(wait).await;
            }
            if let Some(code) =
                self.faults.find(|f| if let Fault::RefuseStreams(code) = f { Some(*code) } else { None })
            {
                return Err(Status::new(code, "refused on request"));
            }
            let turn = self.turn().ok_or_else(|| {
                Status::new(
                    code::RESOURCE_EXHAUSTED,
                    "request rate limit exceeded: rate: Wait(n=1) would exceed context deadline",
                )
            })?;
            sleep_until(turn).await;
            self.authenticate(&caller)
                .await
                .0
                .ok_or_else(|| Status::new(code::UNAUTHENTICATED, "authentication failure"))
        };
        match admitted.await {
            Ok(identity) => self.serve_stream(rpc, id, identity, reader, writer, down).await,
            Err(status) => {
                self.log.push(What::StreamRefused {
                    connection: id.connection,
                    stream: id.stream,
                    code: status.code,
                    message: status.message.clone(),
                });
                writer.finish(&status);
            }
        }
    }

    /// When the next stream may go on; `None` if that is more than a second away.
    fn turn(&self) -> Option<Instant> {
        let rate = self
            .faults
            .find(|f| if let Fault::Admission(rate) = f { Some(*rate) } else { None })
            .unwrap_or(self.settings.admission);
        let now = Instant::now();
        let mut next = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = next.map_or(now, |n| n.max(now));
        if turn - now > Duration::from_secs(1) {
            return None;
        }
        *next = Some(turn + Duration::from_secs_f64(1.0 / rate));
        Some(turn)
    }

    /// Who calls: the client certificate's identity if there was one, else the token's.
    async fn authenticate(&self, caller: &Caller) -> (Option<Identity>, Credential) {
        if let Some(identity) = &caller.certificate {
            return (Some(identity.clone()), Credential::Certificate);
        }
        let Some(token) = caller.headers.get("authorization").and_then(|h| h.to_str().ok()?.strip_prefix("Bearer "))
        else {
            return (None, Credential::None);
        };
        if let Some(wait) = self.api_is_down() {
            tokio::time::sleep(wait).await;
            return (None, Credential::None);
        }
        let mut clusters = caller.headers.get_all("clusterid").iter();
        let foreign = match (clusters.next(), clusters.next()) {
            (Some(one), None) => !one.is_empty() && one.as_bytes() != self.mesh.cluster.as_bytes(),
            _ => false,
        };
        let reviewed = self
            .mesh
            .review(token.trim_end(), SystemTime::now())
            .filter(|_| !foreign && !self.faults.has(Fault::RefuseToken));
        let credential = if reviewed.is_some() { Credential::Token } else { Credential::None };
        (reviewed, credential)
    }
}

/// Counts the open streams of a connection.
struct Held(Arc<AtomicUsize>);

impl Held {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
