//! Whether the mesh sends anybody to us, asked of istiod with the workload's own credential.
//!
//! An observer stream (our node without the group: it registers nothing and disturbs nothing) tells the names of all
//! clusters, and then their endpoints. The clusters that list our address are the services that select us; their names
//! live on the session's own stream from then on, where each change arrives by itself.

use super::{
    Istiod, MembershipSettings,
    ads::{Answer, Stream},
};
use crate::{
    control::{Error, link::Link},
    proto::envoy::config::{
        core::v3::address,
        endpoint::v3::{ClusterLoadAssignment, LbEndpoint, lb_endpoint::HostIdentifier},
    },
    status::{Addresses, Health, Membership, Selection},
    time::Backoff,
};
use prost_types::value::Kind;
use rustls::ClientConnection;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};

/// istiod debounces a change of endpoints by 100 ms.
const SETTLED: Duration = Duration::from_millis(400);
/// From being left out of the endpoints to the next look.
const WITHHELD: Duration = Duration::from_secs(5);
/// Bound on a whole look.
const LOOK: Duration = Duration::from_secs(30);
/// Bound on finding out what a port speaks.
const PEEK: Duration = Duration::from_secs(2);
/// Key of the endpoint metadata by which a sidecar picks plain text or mutual TLS.
const TRANSPORT: &str = "envoy.transport_socket_match";

/// One endpoint of ours as the mesh has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    port: u16,
    tls: bool,
}

/// What is known of the services that select us: cluster name → our endpoints in it.
#[derive(Debug, Clone, Default)]
struct Known {
    clusters: BTreeMap<String, Vec<Place>>,
}

impl Known {
    /// The names to watch.
    fn names(&self) -> BTreeSet<String> {
        self.clusters.keys().cloned().collect()
    }

    /// Takes in what the mesh says of clusters; tells whether one of those we watch was among them.
    fn update(&mut self, assignments: &[ClusterLoadAssignment], ours: &[IpAddr]) -> bool {
        let mut ours_too = false;
        for assignment in assignments {
            if let Some(places) = self.clusters.get_mut(&assignment.cluster_name) {
                *places = places_of(assignment, ours);
                ours_too = true;
            }
        }
        ours_too
    }

    /// The fact.
    fn membership(&self) -> Membership {
        if self.clusters.is_empty() {
            return Membership::NotSelected;
        }
        let places: Vec<&Place> = self.clusters.values().flatten().collect();
        let ports: BTreeSet<u16> = places.iter().map(|place| place.port).collect();
        let selection = Selection {
            services: self.clusters.keys().map(|name| service(name)).collect(),
            ports: ports.into_iter().collect(),
            tls: (!places.is_empty()).then(|| places.iter().any(|place| place.tls)),
            mismatch: None,
        };
        if places.is_empty() { Membership::Withheld(selection) } else { Membership::Listed(selection) }
    }
}

/// `outbound|80||host` as people write it: `host:80`.
fn service(cluster: &str) -> String {
    let mut parts = cluster.splitn(4, '|');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some("outbound"), Some(port), Some(_), Some(host)) => format!("{host}:{port}"),
        _ => cluster.to_owned(),
    }
}

fn places_of(assignment: &ClusterLoadAssignment, ours: &[IpAddr]) -> Vec<Place> {
    let endpoints = assignment.endpoints.iter().flat_map(|locality| &locality.lb_endpoints);
    endpoints.filter_map(|endpoint| place_of(endpoint, ours)).collect()
}

fn place_of(endpoint: &LbEndpoint, ours: &[IpAddr]) -> Option<Place> {
    let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else { return None };
    let Some(address::Address::SocketAddress(socket)) = host.address.as_ref()?.address.as_ref() else { return None };
    let ip: IpAddr = socket.address.parse().ok()?;
    let port = match socket.port_specifier {
        Some(crate::proto::envoy::config::core::v3::socket_address::PortSpecifier::PortValue(port)) => port,
        None => 0,
    };
    let mode = endpoint.metadata.as_ref().and_then(|m| m.filter_metadata.get(TRANSPORT)?.fields.get("tlsMode"));
    let tls = matches!(mode.and_then(|v| v.kind.as_ref()), Some(Kind::StringValue(mode)) if mode == "istio");
    ours.contains(&ip).then(|| Place { port: u16::try_from(port).unwrap_or(0), tls })
}

/// What the observer wants of the session, or tells it.
pub(super) enum Turn {
    /// A look is due.
    Due,
    /// The services that select us: their endpoints are to be watched.
    Names(BTreeSet<String>),
    /// The fact.
    Told(Membership),
}

type Work<'a> = Pin<Box<dyn Future<Output = Done> + Send + 'a>>;

/// What a piece of work in the background has brought.
enum Done {
    Looked(Result<Known, &'static str>),
    Peeked(Membership),
}

/// Keeps membership while a session lives.
pub(super) struct Observer<'a> {
    istiod: &'a Istiod,
    known: Known,
    look_at: Option<Instant>,
    waits: Backoff,
    looking: Option<Work<'a>>,
    peeking: Option<Work<'a>>,
    /// What to say next.
    turns: VecDeque<Turn>,
}

impl<'a> Observer<'a> {
    pub(super) fn new(istiod: &'a Istiod) -> Self {
        let waits = Backoff::new(Duration::from_secs(2), Duration::from_secs(300));
        Self {
            istiod,
            known: Known::default(),
            look_at: None,
            waits,
            looking: None,
            peeking: None,
            turns: VecDeque::new(),
        }
    }

    /// The clusters of the services that select us.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.known.names()
    }

    /// Looks `after` the mesh has settled.
    pub(super) fn look_after(&mut self, after: Duration) {
        match self.istiod.membership {
            Some(_) => self.look_at = Some(Instant::now() + SETTLED + after),
            None => self.turns.push_back(Turn::Told(Membership::Unknown { cause: "turned off (membership.enabled)" })),
        }
    }

    /// A verdict was reported: a healthy one makes us visible, so a look may find more than the last.
    pub(super) fn health(&mut self, health: &Health) {
        if *health == Health::Healthy && self.known.names().is_empty() {
            self.waits.reset();
            self.look_after(Duration::ZERO);
        }
    }

    /// Takes in what arrived on the session's stream.
    pub(super) fn heard(&mut self, assignments: &[ClusterLoadAssignment], addresses: &Addresses) {
        if self.known.update(assignments, &addresses.all) {
            self.peek(addresses.primary);
            if matches!(self.known.membership(), Membership::Withheld(_)) {
                // Unhealthy, or not selected any more: a look tells, once we are healthy.
                self.look_after(WITHHELD);
            }
        }
    }

    /// Begins a look, on a connection that is open anyway.
    pub(super) fn look(&mut self, link: Arc<Link>, addresses: Addresses) {
        let Some(settings) = self.istiod.membership else { return };
        let istiod = self.istiod;
        self.looking = Some(Box::pin(async move {
            Done::Looked(match timeout(LOOK, ask(istiod, link, &addresses, settings)).await {
                Ok(Ok(known)) => Ok(known),
                Ok(Err(Error::Refused { code: 8 | 11, .. })) => {
                    Err("the mesh's configuration is larger than membership.maxBytes")
                }
                Ok(Err(error)) => {
                    tracing::debug!(cause = %error, "membership could not be asked for");
                    Err("istiod did not answer the question")
                }
                Err(_) => Err("istiod did not answer the question in time"),
            })
        }));
    }

    /// Finds out whether the listed ports speak what the mesh will speak, then tells the fact.
    fn peek(&mut self, ip: Option<IpAddr>) {
        let workload = self.istiod.workload.name.clone();
        let mut fact = self.known.membership();
        self.peeking = Some(Box::pin(async move {
            if let (Membership::Listed(selection), Some(ip)) = (&mut fact, ip) {
                selection.mismatch = mismatch(&workload, ip, selection).await;
            }
            Done::Peeked(fact)
        }));
    }

    /// The next turn. Safe to cancel.
    pub(super) async fn next(&mut self) -> Turn {
        if let Some(turn) = self.turns.pop_front() {
            return turn;
        }
        let done = tokio::select! {
            done = finished(&mut self.peeking) => done,
            done = finished(&mut self.looking) => done,
            () = at(self.look_at), if self.looking.is_none() => {
                self.look_at = None;
                return Turn::Due;
            }
        };
        match done {
            Done::Peeked(fact) => Turn::Told(fact),
            Done::Looked(Ok(known)) => {
                self.known = known;
                if self.known.names().is_empty() {
                    // A service may be made later.
                    self.look_at = Some(Instant::now() + self.waits.next_wait());
                    return Turn::Told(Membership::NotSelected);
                }
                self.waits.reset();
                // Their endpoints arrive on the session's stream, and the fact follows from them.
                Turn::Names(self.known.names())
            }
            Done::Looked(Err(cause)) => {
                self.look_at = Some(Instant::now() + self.waits.slowest());
                // What is known already stays known.
                match self.known.names() {
                    names if names.is_empty() => Turn::Told(Membership::Unknown { cause }),
                    names => Turn::Names(names),
                }
            }
        }
    }
}

/// Waits for the work, if there is any, and puts it away.
async fn finished(slot: &mut Option<Work<'_>>) -> Done {
    let Some(work) = slot else { return std::future::pending().await };
    let done = work.await;
    *slot = None;
    done
}

/// Waits until a moment; for ever when there is none.
pub(super) async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

async fn ask(
    istiod: &Istiod,
    link: Arc<Link>,
    addresses: &Addresses,
    settings: MembershipSettings,
) -> Result<Known, Error> {
    let node = istiod.node(addresses, false);
    let mut stream = Stream::new(istiod, link, node, istiod.xds, settings.max_bytes)?;
    stream.watch_clusters();
    let mut known = Known::default();
    loop {
        match stream.next(istiod).await? {
            Answer::Clusters(names) => {
                let outbound: BTreeSet<_> = names.into_iter().filter(|name| name.starts_with("outbound|")).collect();
                if outbound.is_empty() {
                    break;
                }
                stream.watch_endpoints(outbound);
            }
            Answer::Endpoints(assignments) => {
                for assignment in assignments {
                    let places = places_of(&assignment, &addresses.all);
                    if !places.is_empty() {
                        known.clusters.insert(assignment.cluster_name, places);
                    }
                }
                break;
            }
        }
    }
    stream.close(Duration::from_secs(1)).await;
    Ok(known)
}

/// What to say when the mesh will speak TLS to a port where nothing answers a handshake; none when all is well, or
/// nobody listens (the probe says that).
async fn mismatch(workload: &str, ip: IpAddr, selection: &Selection) -> Option<String> {
    if selection.tls != Some(true) {
        return None;
    }
    for port in &selection.ports {
        if speaks_tls(SocketAddr::new(ip, *port)).await == Some(false) {
            return Some(format!(
                "the mesh speaks mutual TLS to port {port}, but what listens there answers no TLS handshake, so calls from the mesh fail; \
                 let the application serve TLS with the files in /run/we-agent/{workload}, or label the WorkloadGroup's template \
                 security.istio.io/tlsMode: disabled and register anew"
            ));
        }
    }
    None
}

/// Sends a ClientHello and looks at the first byte that comes back: a handshake or an alert (RFC 8446, section 5.1), or
/// something else. None when nobody listens.
async fn speaks_tls(at: SocketAddr) -> Option<bool> {
    let name = rustls::pki_types::ServerName::IpAddress(at.ip().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().ok()?;
    // No root is trusted and nothing but the hello is ever sent: the connection is dropped after the first byte.
    let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), name).ok()?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello).ok()?;
    let peek = async {
        let mut tcp = TcpStream::connect(at).await.ok()?;
        tcp.write_all(&hello).await.ok()?;
        let mut first = [0];
        Some(matches!(tcp.read(&mut first).await, Ok(1)) && matches!(first[0], 0x15 | 0x16))
    };
    timeout(PEEK, peek).await.unwrap_or(Some(false))
}
