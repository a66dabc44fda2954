//! What the service manager is told (sd_notify(3)). Without `NOTIFY_SOCKET` all of this does nothing.

use crate::text::one_line;
use sd_notify::NotifyState;
use std::time::Duration;

/// Of a status, in characters of four bytes at most.
const LONGEST: usize = 512;

/// The service is up. To be said once.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(&line(status))]);
}

/// One line for `systemctl status`.
pub fn status(status: &str) {
    send(&[NotifyState::Status(&line(status))]);
}

/// The service is going down.
pub fn stopping() {
    send(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

/// The service is alive.
pub fn watchdog() {
    send(&[NotifyState::Watchdog]);
}

/// How often [`watchdog`] should be called: half of the time after which we would be killed (`WATCHDOG_USEC`, as
/// sd_watchdog_enabled(3) recommends). None when nobody watches.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2).filter(|interval| !interval.is_zero())
}

/// A line feed would begin another assignment, and of more than 4 KiB systemd takes nothing, READY included.
fn line(text: &str) -> String {
    one_line(text, LONGEST)
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(cause = %error, "the service manager was not told");
    }
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn a_status_is_one_line_that_systemd_takes() {
        assert_eq!(line("0 of 1\nREADY=1"), "0 of 1 READY=1");
        assert_eq!(line(&"🔑".repeat(10_000)).len(), 2048);
    }
}
