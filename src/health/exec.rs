//! The exec probe: a command without a shell, which leaves nothing behind.

use super::Unhealthy;
use crate::system::run_command;
use std::time::Duration;

/// Runs `command` (never empty) as the agent's user; healthy on exit status 0.
pub(super) async fn probe(command: &[String], bound: Duration) -> Result<(), Unhealthy> {
    run_command(command, bound).await.map_err(|error| Unhealthy::new(error.to_string()))
}
