//! What every workload finds on this host.

use super::claim::Claims;
use crate::{
    command::Commands,
    files::Root,
    inbound::Threads,
    status::{WorkloadStatus, Workloads},
    systemd::Listeners,
};
use std::{
    io,
    sync::{Arc, OnceLock},
};
use tokio::{sync::watch, time::Instant};

/// The host, as it is given to each workload. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Host {
    pub(super) root: Root,
    pub(super) listeners: Listeners,
    pub(super) commands: Commands,
    /// Tells each look at the directories: the process is awake then.
    pub(super) looks: watch::Sender<Instant>,
    /// What each workload claims; each writes its own.
    pub(super) claims: watch::Sender<Claims>,
    /// What each workload tells; each writes its own.
    pub(super) workloads: watch::Sender<Workloads>,
    threads: Arc<OnceLock<Threads>>,
}

impl Host {
    pub(super) fn new(
        root: Root,
        workloads: watch::Sender<Workloads>,
        listeners: Listeners,
        commands: Commands,
    ) -> Self {
        Self {
            root,
            listeners,
            commands,
            looks: watch::Sender::new(Instant::now()),
            claims: watch::Sender::default(),
            workloads,
            threads: Arc::default(),
        }
    }

    /// Of the inbound data path, from the first workload on that has one.
    ///
    /// # Errors
    /// When the system gives none.
    pub(super) fn threads(&self) -> io::Result<Threads> {
        match self.threads.get() {
            Some(threads) => Ok(threads.clone()),
            None => Threads::start().map(|threads| self.threads.get_or_init(|| threads).clone()),
        }
    }

    /// Puts what a workload tells in its place.
    pub(super) fn tell(&self, status: WorkloadStatus) {
        self.workloads.send_modify(|workloads| {
            match workloads.list.binary_search_by(|other| other.name.cmp(&status.name)) {
                Ok(at) => workloads.list[at] = status,
                Err(at) => workloads.list.insert(at, status),
            }
        });
    }

    /// Forgets a workload that has left.
    pub(super) fn forget(&self, name: &str) {
        self.claims.send_modify(|claims| drop(claims.remove(name)));
        self.workloads.send_modify(|workloads| workloads.list.retain(|status| status.name != name));
    }
}
