//! Wiring, and the order of starting and stopping. The only place that knows all rooms.
//!
//! Start: configuration, then the admin sockets, then each bundle; a workload's stored certificate is published before
//! anybody is dialled. Stop: all loops are told at once; identity, health and files return, sessions close their streams
//! in order, five seconds at most; then the admin sockets go. Files and store stay: stopping is not leaving.

mod claim;
mod control;
mod facts;
mod given;
mod hooks;
mod host;
mod inbound;
mod journal;
mod lock;
mod outputs;
mod part;
mod passed;
mod read;
mod reconcile;
mod reconciler;
mod running;
mod settings;
mod still;
mod token;
mod unit;
mod work;

pub use lock::Locked;

use crate::{
    admin::{self, Admin, AdminError, Reload},
    command::Commands,
    config::Config,
    files::Root,
    status::{Status, Workloads},
    systemd::Listeners,
};
use host::Host;
use lock::Lock;
use reconciler::Reconciler;
use settings::Settings;
use std::{net::SocketAddr, path::PathBuf, time::Duration};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Who has not looked for this long is not alive: then the watchdog is not fed.
const ALIVE: Duration = Duration::from_secs(20);

/// Why the daemon cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another one does.
    #[error(transparent)]
    Locked(#[from] Locked),
    /// The admin socket cannot be had.
    #[error(transparent)]
    Admin(#[from] AdminError),
}

/// The daemon, bound but not running.
#[derive(Debug)]
pub struct Agent {
    root: Root,
    settings: Settings,
    admin: Admin,
    lock: Lock,
    status: Status,
    workloads: watch::Sender<Workloads>,
    listeners: Listeners,
    commands: Commands,
    credentials: Option<PathBuf>,
    asked: (mpsc::Sender<Reload>, mpsc::Receiver<Reload>),
}

impl Agent {
    /// Binds what is served; nothing runs yet. `config` is as it was read from its usual place below `root`.
    ///
    /// # Errors
    /// When another one uses the state directory, or the admin socket cannot be had.
    pub async fn bind(root: &Root, config: Config) -> Result<Self, BindError> {
        Self::bind_with(root, config, None).await
    }

    /// The same with a `config` that was read from `file`.
    ///
    /// # Errors
    /// As [`Agent::bind`].
    pub async fn bind_with(root: &Root, config: Config, file: Option<PathBuf>) -> Result<Self, BindError> {
        let lock = Lock::take(root)?;
        let (workloads, receiver) = watch::channel(Workloads::default());
        let status = Status::new(receiver);
        let asked = mpsc::channel(1);
        let admin = Admin::bind(root, config.admin_address, status.clone()).await?.with_reload(asked.0.clone());
        Ok(Self {
            root: root.clone(),
            settings: Settings::new(root, file, config),
            admin,
            lock,
            status,
            workloads,
            listeners: Listeners::default(),
            commands: Commands::default(),
            credentials: None,
            asked,
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

    /// Where it can be asked, while it runs, to read its configuration again.
    pub fn reload(&self) -> mpsc::Sender<Reload> {
        self.asked.0.clone()
    }

    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let Self { root, settings, admin, lock, status, workloads, listeners, commands, credentials, asked } = self;
        let (_asks, reloads) = asked;
        let stopped = CancellationToken::new();
        let host = Host::new(root, workloads, listeners, commands);
        let heart = host.looks.subscribe();
        let alive = move || heart.borrow().elapsed() < ALIVE;
        let counter = status.clone().count_failures(stop.clone());
        let supervisor = admin::supervise(status, settings.config().ready_timeout, alive, stop.clone());
        let served = admin.run(host.looks.subscribe(), stopped.clone());
        let reconciler = Reconciler { host, settings, lock, credentials, reloads };
        let units = async {
            reconciler.run(stop).await;
            stopped.cancel();
        };
        tokio::join!(counter, supervisor, served, units);
    }
}
