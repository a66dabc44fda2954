//! How a lab is made, and kept running while its power is on.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    Error, Group, Lab, Service,
    ca::Ca,
    istiod::{Istiod, Settings},
    mesh::Mesh,
    store::Store,
    token::TokenKey,
};

/// How a lab is to be.
pub struct LabBuilder {
    groups: Vec<Group>,
    services: Vec<Service>,
    trust_domain: String,
    cluster: String,
    listen: SocketAddr,
    settings: Settings,
    names: Vec<String>,
    intermediates: usize,
    shared: Option<Arc<Mesh>>,
    kept: Option<PathBuf>,
}

impl Default for LabBuilder {
    /// istiod's defaults, on a free port of loopback.
    fn default() -> Self {
        Self {
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
                ping_interval: Duration::from_secs(15),
                multiroot: false,
                admission: 100.0,
            },
            names: ["istiod", "istiod-remote", "istio-pilot"].iter().map(|n| format!("{n}.istio-system.svc")).collect(),
            intermediates: 1,
            shared: None,
            kept: None,
        }
    }
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

    /// Clients that ping more often are sent away; default 15 s, as istiod.
    pub fn ping_interval(mut self, interval: Duration) -> Self {
        self.settings.ping_interval = interval;
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

    /// How many intermediates are between root and leaf; default one, none as with istiod's self-signed CA.
    pub fn intermediates(mut self, number: usize) -> Self {
        self.intermediates = number;
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
                let ca = Ca::generate(&self.trust_domain, self.names, self.intermediates)?;
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
