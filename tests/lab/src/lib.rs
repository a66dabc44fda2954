//! A miniature Istio control plane on loopback: one store, one CA, istiod's face over real TLS, faults on request,
//! and a log of what happened that a test can await.
//!
//! It shares no code with the agent that it is there to try: each protocol is read twice. What it answers is what a
//! real istiod was seen to answer; the texts of its refusals are the real ones.
//!
//! ```no_run
//! # async fn example() -> Result<(), we_lab::Error> {
//! use std::time::Duration;
//! use we_lab::{Fault, Group, Lab, Service, What};
//!
//! let lab = Lab::builder().group(Group::new("vms", "payments").service_account("payments-sa").port("http", 8080)).spawn().await?;
//! lab.service(Service::new("payments.example.com").port(80, 8080).selector([("app", "payments")]));
//! lab.bundle("vms", "payments").internal_ip("127.0.0.1").write("/tmp/bundle")?;
//! let mark = lab.mark();
//! lab.inject(Fault::CaDown);
//! lab.until_since(mark, Duration::from_secs(5), |e| matches!(e.what, What::Csr { .. })).await;
//! lab.heal_all();
//! # Ok(()) }
//! ```

mod bundle;
mod ca;
mod csr;
mod demo;
mod event;
mod fault;
mod grpc;
mod istiod;
mod mesh;
mod proto;
mod store;
mod tap;
mod tls;
mod token;
mod yaml;

use std::{
    mem::discriminant,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, SystemTime},
};

use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use bundle::{BundleOptions, Files};
pub use ca::Ca;
pub use demo::{DemoError, demo};
pub use event::{Credential, Event, Outcome, What};
pub use fault::{Fault, UnknownFault};
pub use store::{Condition, Group, GroupError, Service, Spec, WorkloadEntry};

use istiod::{Istiod, Registry, Settings};
use mesh::Mesh;
use store::Store;
use token::{AUDIENCE, TokenKey};

/// Why a lab could not be made, or a bundle not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or a socket.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A certificate could not be made.
    #[error("a certificate could not be made")]
    Certificate(#[from] rcgen::Error),
    /// TLS could not be set up.
    #[error("TLS could not be set up")]
    Tls(#[from] rustls::Error),
    /// A key could not be made or read.
    #[error("the key of {0} could not be made or read")]
    Key(&'static str),
    /// A bundle was asked for of a group that is not there.
    #[error("there is no WorkloadGroup {0}: add it to the lab first")]
    NoGroup(String),
    /// The annotation `proxy.istio.io/config` of a group.
    #[error("the annotation proxy.istio.io/config is no YAML mapping")]
    Annotation,
}

/// How a lab is to be.
pub struct LabBuilder {
    groups: Vec<Group>,
    services: Vec<Service>,
    trust_domain: String,
    cluster: String,
    listen: SocketAddr,
    settings: Settings,
    names: Vec<String>,
    intermediate: bool,
    shared: Option<Arc<Mesh>>,
    kept: Option<PathBuf>,
}

impl LabBuilder {
    /// Adds a WorkloadGroup.
    pub fn group(mut self, group: Group) -> Self {
        self.groups.push(group);
        self
    }

    /// Adds a Service or ServiceEntry.
    pub fn service(mut self, service: Service) -> Self {
        self.services.push(service);
        self
    }

    /// The cluster's id; default `Kubernetes`.
    pub fn cluster(mut self, id: &str) -> Self {
        self.cluster = id.to_owned();
        self
    }

    /// The trust domain; default `cluster.local`.
    pub fn trust_domain(mut self, domain: &str) -> Self {
        self.trust_domain = domain.to_owned();
        self
    }

    /// Certificates live at most this long; the client is not told, as when the CA itself is about to expire.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.settings.ttl = Some(ttl);
        self
    }

    /// More than this is refused; default 90 days.
    pub fn ttl_cap(mut self, cap: Duration) -> Self {
        self.settings.ttl_cap = cap;
        self
    }

    /// How long an entry outlives its last stream; default 10 s.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// Connections are told to go away at this age, give or take a tenth; by default never.
    pub fn max_connection_age(mut self, age: Duration) -> Self {
        self.settings.max_connection_age = Some(age);
        self
    }

    /// How long a connection lives after it was told to go away; default 11 s.
    pub fn age_grace(mut self, grace: Duration) -> Self {
        self.settings.age_grace = grace;
        self
    }

    /// How long changes are collected before they are pushed; default 100 ms.
    pub fn debounce(mut self, debounce: Duration) -> Self {
        self.settings.debounce = debounce;
        self
    }

    /// `ISTIO_MULTIROOT_MESH`: roots are pushed to who subscribes to proxy configuration. Off by default: then silence.
    pub fn multiroot(mut self, on: bool) -> Self {
        self.settings.multiroot = on;
        self
    }

    /// New ADS streams a second; default 100.
    pub fn admission(mut self, streams: f64) -> Self {
        self.settings.admission = streams;
        self
    }

    /// The instance's name: the entries' `workloadController`. Default `istiod-0`.
    pub fn name(mut self, name: &str) -> Self {
        self.settings.name = name.to_owned();
        self
    }

    /// The serving certificate carries `istiod-REV` too.
    pub fn revision(mut self, revision: &str) -> Self {
        self.names.push(format!("istiod-{revision}.istio-system.svc"));
        self
    }

    /// Whether the CA signs with an intermediate (the default) or with its root.
    pub fn intermediate(mut self, yes: bool) -> Self {
        self.intermediate = yes;
        self
    }

    /// Where to listen; default a free port of 127.0.0.1.
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// A second instance on the store, the CA and the tokens of another lab; trust domain and cluster are that one's.
    pub fn store(mut self, other: &Lab) -> Self {
        self.shared = Some(Arc::clone(&other.istiod.mesh));
        self
    }

    /// Keys and certificates are kept in this folder, and taken from it if they are there.
    pub fn keep(mut self, dir: impl Into<PathBuf>) -> Self {
        self.kept = Some(dir.into());
        self
    }

    /// Opens the port and starts. Everything ends when the [`Lab`] is dropped.
    pub async fn spawn(self) -> Result<Lab, Error> {
        let mesh = match (&self.shared, &self.kept) {
            (Some(mesh), _) => Arc::clone(mesh),
            (None, Some(dir)) if dir.join("mesh.json").exists() => Arc::new(Mesh::load(dir)?),
            (None, kept) => {
                let ca = Ca::generate(&self.trust_domain, self.names, self.intermediate)?;
                let mesh = Mesh {
                    trust_domain: self.trust_domain,
                    cluster: self.cluster,
                    store: Store::new(),
                    ca,
                    tokens: TokenKey::generate()?,
                };
                if let Some(dir) = kept {
                    mesh.save(dir)?;
                }
                Arc::new(mesh)
            }
        };
        mesh.store.write(|s| {
            s.groups.extend(self.groups.into_iter().map(|g| ((g.namespace.clone(), g.name.clone()), g)));
            s.services.extend(self.services.into_iter().map(|s| (s.host.clone(), s)));
        });
        let listener = TcpListener::bind(self.listen).await?;
        let address = listener.local_addr()?;
        let istiod = Istiod::new(mesh, self.settings);
        let end = CancellationToken::new();
        let (up, mut is_up) = watch::channel(false);
        tokio::spawn(supervise(Arc::clone(&istiod), listener, address, end.clone(), up));
        _ = is_up.wait_for(|up| *up).await;
        Ok(Lab { istiod, address, up: is_up, _end: end.drop_guard() })
    }
}

/// Serves while the power is on, closes the port while it is off, and is over when the lab is.
async fn supervise(
    istiod: Arc<Istiod>,
    listener: TcpListener,
    address: SocketAddr,
    end: CancellationToken,
    up: watch::Sender<bool>,
) {
    let mut power = istiod.power.subscribe();
    let mut first = Some(listener);
    let run = async {
        loop {
            if power.wait_for(|p| p.is_on()).await.is_err() {
                return;
            }
            let listener = match first.take() {
                Some(listener) => listener,
                None => rebind(address).await,
            };
            let down = end.child_token();
            let serve = istiod.serve(listener, down.clone());
            let watch = async {
                up.send_replace(true);
                _ = power.wait_for(|p| !p.is_on()).await;
                down.cancel();
            };
            _ = tokio::join!(serve, watch);
            up.send_replace(false);
        }
    };
    tokio::select! {
        () = end.cancelled() => {}
        () = run => {}
    }
}

/// The port was ours a moment ago; whoever has it now must let go first.
async fn rebind(address: SocketAddr) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// How much went over the wires of a lab since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Connections with a completed handshake.
    pub connections: u64,
    /// Calls and streams.
    pub requests: u64,
    /// Bytes from clients, inside TLS.
    pub received: u64,
    /// Bytes to clients, inside TLS.
    pub sent: u64,
}

/// A running control plane (instance). Dropping it ends everything that it began.
pub struct Lab {
    istiod: Arc<Istiod>,
    address: SocketAddr,
    up: watch::Receiver<bool>,
    _end: DropGuard,
}

impl Lab {
    /// A lab with istiod's defaults on a free port of loopback.
    pub fn builder() -> LabBuilder {
        LabBuilder {
            groups: Vec::new(),
            services: Vec::new(),
            trust_domain: "cluster.local".to_owned(),
            cluster: "Kubernetes".to_owned(),
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            settings: Settings {
                name: "istiod-0".to_owned(),
                ttl: None,
                ttl_cap: Duration::from_secs(90 * 86_400),
                grace: Duration::from_secs(10),
                max_connection_age: None,
                age_grace: Duration::from_secs(11),
                debounce: Duration::from_millis(100),
                multiroot: false,
                admission: 100.0,
            },
            names: ["istiod", "istiod-remote", "istio-pilot"].iter().map(|n| format!("{n}.istio-system.svc")).collect(),
            intermediate: true,
            shared: None,
            kept: None,
        }
    }

    /// Where it listens; the same after a restart.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The CA's bundle of roots.
    pub fn root_pem(&self) -> String {
        self.ca().root_pem()
    }

    /// The CA, to rotate it.
    pub fn ca(&self) -> &Ca {
        &self.istiod.mesh.ca
    }

    /// A bundle for a group, as istioctl would write it with `--autoregister`.
    pub fn bundle(&self, namespace: &str, group: &str) -> BundleOptions {
        BundleOptions::new(Arc::clone(&self.istiod.mesh), namespace, group, self.address)
    }

    /// A token for istiod of a service account.
    pub fn token(&self, namespace: &str, account: &str, ttl: Duration) -> Result<String, Error> {
        self.token_for(namespace, account, AUDIENCE, i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX / 4))
    }

    /// A token for any audience, for `seconds` from now; a negative number gives one that expired that long ago.
    pub fn token_for(&self, namespace: &str, account: &str, audience: &str, seconds: i64) -> Result<String, Error> {
        self.istiod.mesh.tokens.mint(namespace, account, audience, seconds, SystemTime::now())
    }

    /// A token with these very claims.
    pub fn token_of(&self, claims: &serde_json::Value) -> Result<String, Error> {
        self.istiod.mesh.tokens.sign(claims)
    }

    /// From now on tokens of this service account are refused.
    pub fn delete_service_account(&self, namespace: &str, account: &str) {
        self.istiod.mesh.store.write(|s| s.deleted_accounts.insert((namespace.to_owned(), account.to_owned())));
    }

    /// Adds or replaces a Service or ServiceEntry.
    pub fn service(&self, service: Service) {
        self.istiod.mesh.store.write(|s| s.services.insert(service.host.clone(), service));
    }

    /// Removes a service by its host.
    pub fn remove_service(&self, host: &str) {
        self.istiod.mesh.store.write(|s| s.services.remove(host));
    }

    /// Adds or replaces a WorkloadGroup; proxies of it that are connected without an entry get one at once.
    pub fn add_group(&self, group: Group) {
        self.istiod.mesh.store.write(|s| s.groups.insert((group.namespace.clone(), group.name.clone()), group));
        self.istiod.group_added();
    }

    /// Deletes a WorkloadGroup, and the entries that it owns.
    pub fn remove_group(&self, namespace: &str, name: &str) {
        let orphans = self.istiod.mesh.store.write(|s| {
            let uid = s.groups.remove(&(namespace.to_owned(), name.to_owned())).map(|g| g.uid);
            let owned = |e: &WorkloadEntry| uid.is_some() && e.owner.as_ref().map(|(_, u)| u) == uid.as_ref();
            let orphans: Vec<WorkloadEntry> = s.entries.values().filter(|e| owned(e)).cloned().collect();
            s.entries.retain(|_, e| !owned(e));
            orphans
        });
        for entry in orphans {
            self.istiod.log.push(What::EntryDeleted { entry: entry.key(), uid: entry.uid });
        }
    }

    /// Creates or replaces an entry, as somebody with kubectl would.
    pub fn put_entry(&self, entry: WorkloadEntry) {
        self.istiod.mesh.store.write(|s| s.entries.insert((entry.namespace.clone(), entry.name.clone()), entry));
    }

    /// Deletes an entry, as somebody with kubectl would: while its stream lives it stays deleted.
    pub fn delete_entry(&self, namespace: &str, name: &str) -> Option<WorkloadEntry> {
        self.istiod.mesh.store.write(|s| s.entries.remove(&(namespace.to_owned(), name.to_owned())))
    }

    /// An entry as it is now.
    pub fn entry(&self, namespace: &str, name: &str) -> Option<WorkloadEntry> {
        self.istiod.mesh.store.read().entries.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All entries as they are now.
    pub fn entries(&self) -> Vec<WorkloadEntry> {
        self.istiod.mesh.store.read().entries.values().cloned().collect()
    }

    /// Where the mesh sends calls to a host now: what EDS says, or will say within the debounce.
    pub fn listed(&self, host: &str) -> Vec<SocketAddr> {
        Registry::new(&self.istiod.mesh.store.read(), Vec::new(), String::new()).listed(host)
    }

    /// Something goes wrong from now on; faults that happen once happen now.
    pub fn inject(&self, fault: Fault) {
        let orders = &self.istiod.orders;
        match fault {
            Fault::DropStreams => orders.send_modify(|o| o.streams += 1),
            Fault::DropConnections => orders.send_modify(|o| o.connections += 1),
            Fault::Goaway => orders.send_modify(|o| o.goaway += 1),
            Fault::Down => self.istiod.power.send_modify(|p| p.down = true),
            fault => {
                if fault == Fault::RefuseNewCertificate {
                    self.istiod.newest_accepted.store(self.ca().issued(), Ordering::Relaxed);
                }
                self.istiod.faults.inject(fault);
            }
        }
    }

    /// Ends a fault; the value that it was injected with does not matter.
    pub fn heal(&self, fault: Fault) {
        if fault == Fault::Down {
            self.istiod.power.send_modify(|p| p.down = false);
        }
        self.istiod.faults.heal(discriminant(&fault));
    }

    /// Ends every fault.
    pub fn heal_all(&self) {
        self.istiod.power.send_modify(|p| p.down = false);
        self.istiod.faults.clear();
    }

    /// Everything that happened so far.
    pub fn events(&self) -> Vec<Event> {
        self.istiod.log.since(0)
    }

    /// What happened since a mark.
    pub fn events_since(&self, mark: usize) -> Vec<Event> {
        self.istiod.log.since(mark)
    }

    /// A mark: this moment in the log.
    pub fn mark(&self) -> usize {
        self.istiod.log.len()
    }

    /// Waits for an event, of the past or to come; `None` if there was none within the limit.
    pub async fn until(&self, limit: Duration, wanted: impl FnMut(&Event) -> bool) -> Option<Event> {
        self.until_since(0, limit, wanted).await
    }

    /// Waits for an event after a mark.
    pub async fn until_since(&self, mark: usize, limit: Duration, wanted: impl FnMut(&Event) -> bool) -> Option<Event> {
        self.istiod.log.until(mark, limit, wanted).await
    }

    /// Wakes whoever prints the log: the number of events there are.
    pub fn lengths(&self) -> watch::Receiver<usize> {
        self.istiod.log.lengths()
    }

    /// Connections, calls and bytes so far.
    pub fn counters(&self) -> Counters {
        let lines = self.istiod.lines.lock().unwrap_or_else(PoisonError::into_inner);
        Counters {
            connections: self.istiod.connections.load(Ordering::Relaxed),
            requests: self.istiod.requests.load(Ordering::Relaxed),
            received: lines.iter().map(|l| l.received.load(Ordering::Relaxed)).sum(),
            sent: lines.iter().map(|l| l.sent.load(Ordering::Relaxed)).sum(),
        }
    }

    /// Stops as istiod does on SIGTERM: everything is closed at once, without GOAWAY or trailers, and entries keep
    /// their `connectedAt`. Returns when the port is closed.
    pub async fn stop(&self) {
        self.istiod.power.send_modify(|p| p.stopped = true);
        _ = self.up.clone().wait_for(|up| !up).await;
    }

    /// Starts again on the same port, with the roots of now. Returns when the port is open.
    pub async fn restart(&self) {
        self.stop().await;
        self.istiod.power.send_modify(|p| *p = istiod::Power::default());
        _ = self.up.clone().wait_for(|up| *up).await;
    }
}

/// What `we-lab bundle` needs of a lab that runs elsewhere: its keys, from the folder that it keeps them in.
pub fn bundle_of(dir: &Path, group: Group, address: SocketAddr) -> Result<BundleOptions, Error> {
    let mesh = Arc::new(Mesh::load(dir)?);
    let (namespace, name) = (group.namespace.clone(), group.name.clone());
    mesh.store.write(|s| s.groups.insert((namespace.clone(), name.clone()), group));
    Ok(BundleOptions::new(mesh, &namespace, &name, address))
}
