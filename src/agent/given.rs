//! What a workload is given, at its start and while it runs.

use crate::{bundle::BundleDir, config::WorkloadConfig};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What a workload is made of: where its files are, and what our configuration says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Given {
    pub(super) dir: BundleDir,
    pub(super) settings: WorkloadConfig,
    /// Why it must not run at present.
    pub(super) barred: Option<String>,
    /// Its files are read as they are, without waiting until they rest: at the start of the daemon.
    pub(super) hasty: bool,
}

/// What a workload is told while it runs.
pub(super) struct Ends {
    pub(super) given: watch::Receiver<Given>,
    /// Whether it is taken out of service before it ends.
    pub(super) leaving: watch::Receiver<bool>,
    /// Its directory is gone.
    pub(super) removed: CancellationToken,
    pub(super) stop: CancellationToken,
}
