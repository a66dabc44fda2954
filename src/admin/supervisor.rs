//! Telling the service manager how we are, and that we are alive.

use crate::{status::Status, systemd::notify};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often to look again when nothing changes and nobody watches: certificates expire without an event.
const AT_LEAST_EVERY: Duration = Duration::from_secs(60);

/// Says READY when every workload is ready, or after `ready_timeout` all the same, STATUS whenever it changes, and
/// feeds the watchdog as long as `alive` holds. Says STOPPING at `stop`, and returns.
pub async fn supervise(mut status: Status, ready_timeout: Duration, alive: impl Fn() -> bool, stop: CancellationToken) {
    let deadline = Instant::now() + ready_timeout;
    let pace = notify::watchdog_interval().unwrap_or(AT_LEAST_EVERY).min(AT_LEAST_EVERY);
    let mut feed = Instant::now();
    let mut told = Told::default();
    loop {
        let report = status.report(SystemTime::now());
        match told.next(report.ready, &report.summary(), Instant::now() >= deadline) {
            Some(Say::Ready(line)) => {
                if report.ready {
                    tracing::info!("{line}");
                } else {
                    tracing::warn!("{line}");
                }
                notify::ready(&line);
            }
            Some(Say::Status(line)) => notify::status(&line),
            None => {}
        }
        if Instant::now() >= feed && alive() {
            notify::watchdog();
            feed = Instant::now() + pace;
        }
        let wake = if told.ready { feed } else { feed.min(deadline) };
        tokio::select! {
            () = stop.cancelled() => break,
            () = status.changed() => {}
            // Were it not alive, `feed` would lie in the past.
            () = tokio::time::sleep_until(wake.max(Instant::now() + pace / 10)) => {}
        }
    }
    notify::stopping();
}

/// What has been said so far.
#[derive(Debug, Default)]
struct Told {
    ready: bool,
    line: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Say {
    Ready(String),
    Status(String),
}

impl Told {
    /// What is to be said now, if anything.
    fn next(&mut self, ready: bool, summary: &str, late: bool) -> Option<Say> {
        let up = self.ready || ready || late;
        let line = match (ready, up) {
            (true, _) => summary.to_owned(),
            (false, true) => format!("degraded: {summary}"),
            (false, false) => format!("starting: {summary}"),
        };
        if up && !self.ready {
            (self.ready, self.line) = (true, line.clone());
            return Some(Say::Ready(line));
        }
        if line == self.line {
            return None;
        }
        self.line = line.clone();
        Some(Say::Status(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_said_once_and_the_truth_always() {
        let mut told = Told::default();
        let status = |text: &str| Some(Say::Status(text.to_owned()));
        assert_eq!(told.next(false, "no bundle", false), status("starting: no bundle"));
        assert_eq!(told.next(false, "no bundle", false), None);
        assert_eq!(told.next(true, "1 of 1", false), Some(Say::Ready("1 of 1".to_owned())));
        assert_eq!(told.next(true, "1 of 1", true), None);
        assert_eq!(told.next(false, "0 of 1; refused", true), status("degraded: 0 of 1; refused"));
        assert_eq!(told.next(true, "1 of 1", true), status("1 of 1"));
    }

    #[test]
    fn a_dead_control_plane_does_not_block_the_boot() {
        let mut told = Told::default();
        assert!(told.next(false, "no answer", false).is_some());
        assert_eq!(told.next(false, "no answer", true), Some(Say::Ready("degraded: no answer".to_owned())));
        assert_eq!(told.next(false, "no answer", true), None);
    }
}
