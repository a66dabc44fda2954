//! istiod's face: one port with TLS, the CA and the discovery service behind it.

mod admission;
mod ads;
mod connection;
mod discovery;
mod node;
mod registration;
mod signing;
mod subscription;

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::{Duration, SystemTime},
};

use tokio::{net::TcpListener, sync::watch, time::Instant};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use discovery::Registry;

use crate::{
    event::{Log, What},
    fault::Faults,
    mesh::Mesh,
    tap::Line,
    tls,
};
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
    /// Clients may ping this often.
    pub(crate) ping_interval: Duration,
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
    /// The last certificate that [`crate::Fault::RefuseNewCertificate`] still accepts.
    pub(crate) newest_accepted: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) lines: Mutex<Vec<Arc<Line>>>,
    leases: Mutex<Leases>,
    /// When the next stream may be admitted.
    admission: Mutex<Option<Instant>>,
    tasks: Mutex<(TaskTracker, CancellationToken)>,
}

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
}
