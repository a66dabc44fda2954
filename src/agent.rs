//! Wiring, and the order of starting and stopping. The only place that knows all rooms.

use crate::{
    admin::{self, Admin, AdminError},
    config::Config,
    status::{Status, Workloads},
    system::Root,
};
use std::net::SocketAddr;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The daemon, bound but not running.
#[derive(Debug)]
pub struct Agent {
    admin: Admin,
    config: Config,
    status: Status,
    /// Every workload, as found.
    _workloads: watch::Sender<Workloads>,
}

impl Agent {
    /// Binds what is served; nothing runs yet.
    ///
    /// # Errors
    /// When the admin socket cannot be had.
    pub async fn bind(root: &Root, config: Config) -> Result<Self, AdminError> {
        let note = Some("no bundle in /etc/we-agent".to_owned());
        let (workloads, receiver) = watch::channel(Workloads { list: Vec::new(), note });
        let status = Status::new(receiver);
        let admin = Admin::bind(root, config.admin_address, status.clone()).await?;
        Ok(Self { admin, config, status, _workloads: workloads })
    }

    /// The loopback address that is served.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.address()
    }

    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let supervisor = admin::supervise(self.status, self.config.ready_timeout, || true, stop.clone());
        tokio::join!(self.admin.run(stop), supervisor);
    }
}
