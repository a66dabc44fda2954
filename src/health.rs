//! The loop that owns the verdict on the application: it runs the readiness probe, counts, and says what changed.
//!
//! Times and thresholds are istio-agent's: the initial delay counts from the start of the agent, the first probe runs
//! at once after it, and the ticks of the period begin when that first probe has ended. A tick that a slow probe
//! overran fires when the probe ends; further missed ones are dropped.

mod dial;
mod exec;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod grpc;
mod http;
mod prober;
mod threshold;
mod tls;

pub use dial::Detour;

use crate::{
    command::Commands,
    status::{Addresses, Health, InboundPlace, any_news},
    workload::ReadinessProbe,
};
use prober::Prober;
use std::{future::Future, time::SystemTime};
use threshold::Threshold;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval_at, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// The longest text of a failure, in characters: it ends in the status of a WorkloadEntry, and parts of it come from
/// what was probed.
const LONGEST_TEXT: usize = 1024;

/// What this host decides about probes; the rest is the WorkloadGroup's.
#[derive(Debug, Clone, Default)]
pub struct ProbeSettings {
    /// Commands may be run. Without this consent an exec probe parks the verdict: who administers the mesh must not
    /// thereby get a shell on the host.
    pub allow_exec: bool,
    /// Who runs them.
    pub commands: Commands,
    /// HTTPS probes verify the certificate against the roots of the operating system (`SSL_CERT_FILE` is obeyed).
    pub verify_tls: bool,
    /// Probe `localhost` rather than the workload's address (`REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION`, which
    /// istioctl sets for an external address: that one is not on this host).
    pub localhost: bool,
    /// Ports at which we listen ourselves, in front of the application.
    pub detours: Vec<Detour>,
}

/// Why one probe failed, in words that operators of Istio know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Unhealthy(String);

impl Unhealthy {
    fn new(text: impl AsRef<str>) -> Self {
        Self(text.as_ref().chars().take(LONGEST_TEXT).collect())
    }
}

/// Probes the application until `shutdown`, and writes `fact`, whose only writer it is. Without a probe the verdict
/// stays [`Health::Unknown`]; before its first probe it is [`Health::Delayed`], if the group says so; a probe that this host does not allow is [`Health::Parked`].
pub async fn run(
    probe: Option<ReadinessProbe>,
    settings: ProbeSettings,
    addresses: watch::Receiver<Addresses>,
    fact: watch::Sender<Health>,
    shutdown: CancellationToken,
) {
    let Some(probe) = probe else { return shutdown.cancelled().await };
    let places: Vec<_> = settings.detours.iter().map(|detour| detour.place.clone()).collect();
    match Prober::new(&probe, settings) {
        Ok(prober) => {
            let (prober, addresses, listeners) = (&prober, &addresses, &places);
            let attempt = || async move {
                // Our listener stands in front of the application: who cannot serve is not well.
                let unserved = |place: &watch::Receiver<InboundPlace>| place.borrow().unserved().map(Unhealthy::new);
                if let Some(cause) = listeners.iter().find_map(unserved) {
                    return Err(cause);
                }
                let primary = addresses.borrow().primary;
                prober.probe(primary).await
            };
            shutdown.run_until_cancelled(keep_verdict(&probe, attempt, places.clone(), &fact)).await;
        }
        Err(cause) => {
            warn!(%cause, "health cannot be probed");
            fact.send_replace(Health::Parked { cause });
            shutdown.cancelled().await;
        }
    }
}

/// The loop itself; `attempt` is one probe. A change of the `places` does not wait for the next tick.
async fn keep_verdict<A, F>(
    probe: &ReadinessProbe,
    mut attempt: A,
    mut places: Vec<watch::Receiver<InboundPlace>>,
    fact: &watch::Sender<Health>,
) where
    A: FnMut() -> F,
    F: Future<Output = Result<(), Unhealthy>>,
{
    let mut threshold = Threshold::new(probe);
    if !probe.initial_delay.is_zero() {
        fact.send_replace(Health::Delayed { until: SystemTime::now() + probe.initial_delay });
        sleep(probe.initial_delay).await;
        fact.send_replace(Health::Unknown);
    }
    let mut outcome = attempt().await;
    let mut ticks = interval_at(Instant::now() + probe.period, probe.period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        if let Some(verdict) = threshold.count(outcome) {
            say(&verdict);
            fact.send_replace(verdict);
        }
        tokio::select! {
            _ = ticks.tick() => {}
            () = any_news(&mut places) => {}
        }
        outcome = attempt().await;
    }
}

fn say(verdict: &Health) {
    match verdict {
        Health::Healthy => info!("the application is healthy"),
        Health::Unhealthy { message } => warn!(cause = %message, "the application is unhealthy"),
        Health::Unknown | Health::Delayed { .. } | Health::Parked { .. } => {}
    }
}

#[cfg(test)]
mod tests;
