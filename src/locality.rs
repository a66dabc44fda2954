//! Where this host stands, as its cloud's metadata server says. (A label of the workload's own, or our configuration,
//! says it better: see [`Locality::from_labels`](crate::workload::Locality::from_labels). Who knows nothing says nothing, so that the template of the
//! WorkloadGroup keeps its word.)
//!
//! The firmware names the cloud, so a host elsewhere sends nothing and waits for nothing, and nobody on its network can
//! pretend to be a cloud. (Istio's agent asks all clouds over the network and waits up to five seconds.)

mod metadata;

use crate::{
    files::{MAX_FILE, Root, read_text},
    status::{Addresses, Located},
    time::Backoff,
};
use metadata::discover;
use std::{net::SocketAddr, time::Duration};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

/// How often is asked, in all: for about eight minutes. A network comes up in parts, and a metadata server may be late.
const TRIES: u32 = 14;
/// After so many without an answer nobody waits for one any more.
const HOPEFUL: u32 = 2;
/// From one try to the next: at first, and in the end.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Which cloud is asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Platform {
    /// The one that the firmware names, if any.
    #[default]
    Auto,
    /// None.
    Off,
    /// Amazon EC2.
    Aws,
    /// Google Compute Engine.
    Gcp,
    /// Microsoft Azure.
    Azure,
}

/// Asks the platform, as soon as this host has an address and until it answers (or was asked often enough), and writes
/// `fact`, whose only writer it is. Until `stop`.
pub async fn run(
    platform: Platform,
    root: Root,
    addresses: watch::Receiver<Addresses>,
    fact: watch::Sender<Located>,
    stop: CancellationToken,
) {
    stop.run_until_cancelled(locate(of_this_host(platform, &root), None, addresses, &fact)).await;
    stop.cancelled().await;
}

/// `server` stands in for the clouds' own addresses in tests.
async fn locate(
    platform: Platform,
    server: Option<SocketAddr>,
    mut addresses: watch::Receiver<Addresses>,
    fact: &watch::Sender<Located>,
) {
    let mut backoff = Backoff::new(WAIT.0, WAIT.1);
    let tries = if platform == Platform::Off { 0 } else { TRIES };
    for tried in 1..=tries {
        if addresses.wait_for(|addresses| addresses.primary.is_some()).await.is_err() {
            break;
        }
        if let Some(locality) = discover(platform, server).await {
            tracing::info!(%locality, "the platform has said where this host stands");
            fact.send_replace(Located::Known(locality));
            return;
        }
        if tried >= HOPEFUL {
            fact.send_replace(Located::Unknown);
        }
        sleep(if tried < HOPEFUL { WAIT.0 } else { backoff.next_wait() }).await;
    }
    fact.send_replace(Located::Unknown);
}

/// The platform to ask: the firmware's, unless one was chosen.
fn of_this_host(platform: Platform, root: &Root) -> Platform {
    match platform {
        Platform::Auto => named_by_firmware(root),
        chosen => chosen,
    }
}

/// The cloud by the names in the firmware's tables, which every user may read. Old EC2 instances run on Xen and name
/// Amazon only in the version.
fn named_by_firmware(root: &Root) -> Platform {
    let table = |name| {
        let file = root.path(format!("/sys/class/dmi/id/{name}"));
        read_text(&file, MAX_FILE).map(|text| text.to_string()).unwrap_or_default()
    };
    match table("sys_vendor").trim() {
        "Amazon EC2" => Platform::Aws,
        "Google" => Platform::Gcp,
        "Microsoft Corporation" => Platform::Azure,
        _ if table("bios_version").contains("amazon") => Platform::Aws,
        _ => Platform::Off,
    }
}

#[cfg(test)]
mod tests;
