//! How a row of probes becomes a verdict.

use super::Unhealthy;
use crate::{status::Health, workload::ReadinessProbe};

/// Counts outcomes; a verdict changes after enough of one kind in a row, as in istio-agent. Nothing is said before the
/// first verdict, and a failing application is reported once, with the text of the probe that tipped it.
#[derive(Debug)]
pub(super) struct Threshold {
    needed_successes: u32,
    needed_failures: u32,
    successes: u32,
    failures: u32,
    healthy: Option<bool>,
}

impl Threshold {
    pub(super) fn new(probe: &ReadinessProbe) -> Self {
        Self {
            needed_successes: probe.success_threshold,
            needed_failures: probe.failure_threshold,
            successes: 0,
            failures: 0,
            healthy: None,
        }
    }

    /// Takes one outcome in; gives the new verdict if this one changes it.
    pub(super) fn count(&mut self, outcome: Result<(), Unhealthy>) -> Option<Health> {
        match outcome {
            Ok(()) => {
                self.failures = 0;
                self.successes = self.successes.saturating_add(1);
                (self.successes >= self.needed_successes && self.turn(true)).then_some(Health::Healthy)
            }
            Err(cause) => {
                self.successes = 0;
                self.failures = self.failures.saturating_add(1);
                (self.failures >= self.needed_failures && self.turn(false))
                    .then(|| Health::Unhealthy { message: cause.to_string() })
            }
        }
    }

    fn turn(&mut self, healthy: bool) -> bool {
        self.healthy.replace(healthy) != Some(healthy)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::workload::ProbeMethod;
    use proptest::prelude::*;
    use std::time::Duration;

    fn threshold(successes: u32, failures: u32) -> Threshold {
        Threshold::new(&ReadinessProbe {
            initial_delay: Duration::ZERO,
            timeout: Duration::from_secs(1),
            period: Duration::from_secs(10),
            success_threshold: successes,
            failure_threshold: failures,
            method: ProbeMethod::Tcp { host: None, port: 1 },
        })
    }

    fn outcome(good: bool, i: usize) -> Result<(), Unhealthy> {
        if good { Ok(()) } else { Err(Unhealthy::new(format!("probe {i}"))) }
    }

    proptest! {
        /// A verdict is given exactly when the last `n` outcomes are alike and the opposite (or nothing) was said.
        #[test]
        fn a_verdict_needs_a_whole_row(
            row in proptest::collection::vec(any::<bool>(), 0..60), successes in 1u32..5, failures in 1u32..5,
        ) {
            let mut threshold = threshold(successes, failures);
            let mut said = None;
            for i in 0..row.len() {
                let verdict = threshold.count(outcome(row[i], i));
                let needed = if row[i] { successes } else { failures } as usize;
                let whole = i + 1 >= needed && row[i + 1 - needed..=i].iter().all(|&good| good == row[i]);
                if whole && said != Some(row[i]) {
                    said = Some(row[i]);
                    let message = format!("probe {i}");
                    let expected = if row[i] { Health::Healthy } else { Health::Unhealthy { message } };
                    prop_assert_eq!(verdict, Some(expected));
                } else {
                    prop_assert_eq!(verdict, None);
                }
            }
        }
    }

    #[test]
    fn the_first_verdict_may_be_bad() {
        let mut threshold = threshold(1, 1);
        assert_eq!(threshold.count(outcome(false, 0)), Some(Health::Unhealthy { message: "probe 0".to_owned() }));
        assert_eq!(threshold.count(outcome(false, 1)), None, "said once");
        assert_eq!(threshold.count(Ok(())), Some(Health::Healthy));
    }
}
