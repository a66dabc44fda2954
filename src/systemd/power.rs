//! Whether the machine itself goes down.

use std::time::Duration;
use tokio::{process::Command, time::timeout};

/// Bound on asking.
const ASK: Duration = Duration::from_millis(500);

/// Whether the whole machine is being shut down, as opposed to this service being stopped or restarted. Only asked where
/// a service manager has started us; no answer means no.
pub async fn going_down() -> bool {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return false;
    }
    let asked = Command::new("systemctl").arg("is-system-running").kill_on_drop(true).output();
    matches!(timeout(ASK, asked).await, Ok(Ok(said)) if said.stdout.starts_with(b"stopping"))
}
