//! Wiring, and the order of starting and stopping. The only place that knows all rooms.
//!
//! Start: configuration, then the admin sockets, then each bundle; a workload's stored certificate is published before
//! anybody is dialled. Stop: all loops are told at once; identity, health and files return, sessions close their streams
//! in order, five seconds at most; then the admin sockets go. Files and store stay: stopping is not leaving.

mod hooks;
mod inbound;
mod journal;
mod outputs;
mod passed;
mod token;
mod unit;

use crate::{
    admin::{self, Admin, AdminError},
    bundle::{self, Bundle, BundleDir},
    command::Commands,
    config::Config,
    files::{FileWatch, Root, is_denied},
    inbound::Threads,
    status::{Status, WorkloadStatus, Workloads},
    systemd::{Listeners, going_down},
    workload::{HostFacts, Workload},
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};
use token::TokenLook;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use unit::{Ground, Unit};

/// From one look for new or mended bundles to the next.
const LOOK: Duration = Duration::from_secs(5);
/// Who has not looked for this long is not alive: then the watchdog is not fed.
const ALIVE: Duration = Duration::from_secs(20);
/// Bound on ending everything, besides the time that inbound connections have to end by themselves.
const STOP: Duration = Duration::from_secs(5);

/// The daemon, bound but not running.
#[derive(Debug)]
pub struct Agent {
    root: Root,
    config: Config,
    admin: Admin,
    status: Status,
    workloads: watch::Sender<Workloads>,
    listeners: Listeners,
    commands: Commands,
    credentials: Option<PathBuf>,
}

impl Agent {
    /// Binds what is served; nothing runs yet.
    ///
    /// # Errors
    /// When the admin socket cannot be had.
    pub async fn bind(root: &Root, config: Config) -> Result<Self, AdminError> {
        let (workloads, receiver) = watch::channel(Workloads::default());
        let status = Status::new(receiver);
        let admin = Admin::bind(root, config.admin_address, status.clone()).await?;
        Ok(Self {
            root: root.clone(),
            config,
            admin,
            status,
            workloads,
            listeners: Listeners::default(),
            commands: Commands::default(),
            credentials: None,
        })
    }

    /// Serves on what the service manager has passed, instead of sockets of its own.
    #[must_use]
    pub fn with_listeners(self, listeners: Listeners) -> Self {
        Self { listeners, ..self }
    }

    /// Has probes and hooks run their commands there, instead of by itself.
    #[must_use]
    pub fn with_commands(self, commands: Commands) -> Self {
        Self { commands, ..self }
    }

    /// Takes files of bundles from this directory, too: the credentials of the service (`$CREDENTIALS_DIRECTORY`). It is
    /// not looked up below the root.
    #[must_use]
    pub fn with_credentials(self, credentials: Option<PathBuf>) -> Self {
        Self { credentials, ..self }
    }

    /// The loopback address that is served.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.address()
    }

    /// All facts, to read while it runs.
    pub fn status(&self) -> Status {
        self.status.clone()
    }

    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let Self { root, config, admin, status, workloads, listeners, commands, credentials } = self;
        let stopped = CancellationToken::new();
        let (beat, heart) = watch::channel(Instant::now());
        let alive = move || heart.borrow().elapsed() < ALIVE;
        let counter = status.clone().count_failures(stop.clone());
        let supervisor = admin::supervise(status, config.ready_timeout, alive, stop.clone());
        let served = admin.run(stopped.clone());
        let mut floor = Floor {
            root,
            config,
            workloads,
            beat,
            listeners,
            commands,
            credentials,
            threads: None,
            slots: BTreeMap::new(),
        };
        let units = async {
            floor.run(stop).await;
            stopped.cancel();
        };
        tokio::join!(counter, supervisor, served, units);
    }
}

/// A workload's place: it runs, or waits until its bundle is mended.
#[derive(Debug)]
enum Slot {
    Running { unit: Box<Unit>, token: TokenLook, key: Option<Key> },
    Broken { files: FileWatch, mistakes: Vec<String> },
}

/// What makes istiod's WorkloadEntry: two workloads with the same would fight over one object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    namespace: String,
    group: String,
    network: String,
    given: Vec<IpAddr>,
}

impl Key {
    /// None for a workload that is not registered.
    fn of(workload: &Workload) -> Option<Self> {
        Some(Self {
            namespace: workload.namespace.clone(),
            group: workload.group.clone().or_else(|| workload.existing_entry.clone())?,
            network: workload.network.clone(),
            given: workload.given.clone(),
        })
    }
}

/// All workloads of this host.
struct Floor {
    root: Root,
    config: Config,
    workloads: watch::Sender<Workloads>,
    /// When the floor was last looked over: what the watchdog goes by, and when sockets are looked after.
    beat: watch::Sender<Instant>,
    listeners: Listeners,
    commands: Commands,
    /// Where the credentials of the service are.
    credentials: Option<PathBuf>,
    /// Of the inbound data path, from the first workload on that has one.
    threads: Option<Threads>,
    slots: BTreeMap<String, Slot>,
}

impl Floor {
    async fn run(&mut self, stop: CancellationToken) {
        let (leaving, told) = watch::channel(false);
        let units = CancellationToken::new();
        let mut first = true;
        loop {
            self.look(&units, &told);
            self.beat.send_replace(Instant::now());
            if std::mem::take(&mut first) {
                let runs = |name: &str| matches!(self.slots.get(name), Some(Slot::Running { .. }));
                passed::unclaimed(&self.listeners, &self.root, &self.config, runs);
            }
            let next = Instant::now() + LOOK;
            tokio::select! {
                () = sleep_until(next) => {}
                () = stop.cancelled() => break,
            }
        }
        if going_down().await {
            leaving.send_replace(true);
        }
        units.cancel();
        let drain = self.slots.values().map(Slot::drain).max().unwrap_or_default();
        let ended = async {
            for slot in std::mem::take(&mut self.slots).into_values() {
                if let Slot::Running { unit, .. } = slot {
                    unit.ended().await;
                }
            }
        };
        if timeout(STOP + drain, ended).await.is_err() {
            tracing::warn!("a session did not end in time and is dropped");
        }
    }

    /// Starts what is new, reads again what was broken and has changed, starts again what ended by a bug.
    fn look(&mut self, stop: &CancellationToken, leaving: &watch::Receiver<bool>) {
        let (found, note) = self.find();
        let mut news = false;
        for (name, dir) in found {
            let due = match self.slots.get_mut(&name) {
                None => true,
                Some(Slot::Running { unit, token, .. }) => {
                    token.look(&name, &self.root);
                    unit.has_failed()
                }
                Some(Slot::Broken { files, .. }) => files.has_changed(),
            };
            if due {
                let slot = self.open(&name, &dir, stop, leaving);
                self.slots.insert(name, slot);
                news = true;
            }
        }
        if news || self.workloads.borrow().note != note {
            let list = self.slots.iter().map(|(name, slot)| slot.status(name)).collect();
            if let Some(note) = note.as_ref().filter(|_| self.workloads.borrow().note != note) {
                tracing::warn!("{note}");
            }
            self.workloads.send_replace(Workloads { list, note });
        }
    }

    /// The bundles of this host, and what is to be said when there is none.
    fn find(&self) -> (Vec<(String, BundleDir)>, Option<String>) {
        let place = self.root.path("/etc/we-agent");
        let found = match bundle::find(&self.root, self.credentials.as_deref()) {
            Ok(found) => found,
            Err(error) => return (Vec::new(), Some(format!("{}: {error}", place.display()))),
        };
        if found.iter().any(|(_, dir)| dir.istio)
            && let Some(id) = bundle::istio_agent(&self.root)
        {
            let note = format!(
                "Istio's own agent runs here (process {id}), and two agents on one entry make it leak: \
                 stop it (systemctl disable --now istio) or put a bundle of its own into {}/<workload>/",
                place.display()
            );
            return (Vec::new(), Some(note));
        }
        let named: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        let lost: Vec<_> = self.config.workload_names().filter(|name| !named.contains(name)).collect();
        let note = match (found.is_empty(), lost.is_empty()) {
            (true, _) => Some(format!(
                "no bundle in {0}: copy what `istioctl x workload entry configure` wrote to {0}/<workload>/",
                place.display()
            )),
            (false, false) => Some(format!(
                "we-agent.yaml names workloads without a bundle: {}; put their bundles into {}/<workload>/",
                lost.join(", "),
                place.display()
            )),
            _ => None,
        };
        (found, note)
    }

    fn open(&mut self, name: &str, dir: &BundleDir, stop: &CancellationToken, leaving: &watch::Receiver<bool>) -> Slot {
        for credential in &dir.hidden {
            tracing::warn!(
                workload = name,
                "the credential {} is not used, for the bundle's directory has this file, too: remove one of them",
                credential.display()
            );
        }
        // Stamped before the reading: a change in between is seen at the next look.
        let files = FileWatch::new(dir.files().map(ToOwned::to_owned));
        let settings = self.config.workload(name);
        let workload = match self.read(name, dir) {
            Ok(workload) => workload,
            Err(mistakes) => {
                for mistake in &mistakes {
                    tracing::error!(workload = name, "the bundle cannot be used: {mistake}");
                }
                if dir.files().any(is_denied) {
                    token::ask_for_permission(&self.root);
                }
                return Slot::Broken { files, mistakes };
            }
        };
        let key = Key::of(&workload);
        let mut token = TokenLook::new(&workload.token);
        token.look(name, &self.root);
        if !settings.inbound.is_empty() && self.threads.is_none() {
            match Threads::start() {
                Ok(threads) => self.threads = Some(threads),
                Err(error) => tracing::error!(cause = %error, "no threads for inbound connections, so nobody listens"),
            }
        }
        let ground = Ground {
            root: &self.root,
            listeners: &self.listeners,
            commands: &self.commands,
            threads: self.threads.as_ref(),
            looks: &self.beat,
        };
        let unit = Unit::start(workload, settings, &ground, stop, leaving);
        Slot::Running { unit: Box::new(unit), token, key }
    }

    fn read(&self, name: &str, dir: &BundleDir) -> Result<Workload, Vec<String>> {
        let texts = |errors: bundle::BundleErrors| errors.0.iter().map(ToString::to_string).collect::<Vec<_>>();
        let bundle = Bundle::read(&self.root, dir).map_err(texts)?;
        let host = HostFacts { host_name: host_name() };
        let overrides = unit::overrides(&self.config.workload(name));
        let workload = bundle.workload(name, &overrides, &host).map_err(texts)?;
        let key = Key::of(&workload);
        let same = |slot: &Slot| matches!(slot, Slot::Running { key: other, .. } if key.is_some() && *other == key);
        let twin = self.slots.iter().find(|(other, slot)| *other != name && same(slot));
        match twin {
            Some((other, _)) => Err(vec![format!(
                "the same WorkloadGroup, network and address as workload {other}: istiod would keep one WorkloadEntry for \
                 both; remove one of the two directories, or give each an address of its own"
            )]),
            None => Ok(workload),
        }
    }
}

impl Slot {
    /// How long its open connections may take to end.
    fn drain(&self) -> Duration {
        match self {
            Self::Running { unit, .. } => unit.drain(),
            Self::Broken { .. } => Duration::ZERO,
        }
    }

    fn status(&self, name: &str) -> WorkloadStatus {
        match self {
            Self::Running { unit, .. } => unit.status(name),
            Self::Broken { mistakes, .. } => WorkloadStatus {
                name: name.to_owned(),
                spiffe_id: None,
                registers: true,
                broken: mistakes.clone(),
                ignored: Vec::new(),
                facts: None,
            },
        }
    }
}

fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "localhost".to_owned())
}
