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

mod builder;
mod bundle;
mod ca;
mod csr;
mod demo;
mod event;
mod fault;
mod frames;
mod group;
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
    net::SocketAddr,
    path::Path,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, SystemTime},
};

use tokio::sync::watch;
use tokio_util::sync::DropGuard;

pub use builder::LabBuilder;
pub use bundle::{BundleOptions, Files};
pub use ca::Ca;
pub use demo::{DemoError, demo};
pub use event::{Credential, Event, Outcome, What};
pub use fault::{Fault, Shape, UnknownFault};
pub use group::{Group, GroupError, Service, Spec};
pub use store::{Condition, WorkloadEntry};

use istiod::{Istiod, Registry};
use mesh::Mesh;
use token::AUDIENCE;

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
        LabBuilder::default()
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
