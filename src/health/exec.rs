//! The exec probe: a command without a shell, which leaves nothing behind.

use super::Unhealthy;
use crate::command::Commands;
use std::time::Duration;

/// Has `command` (never empty) run; healthy on exit status 0.
pub(super) async fn probe(commands: &Commands, command: &[String], bound: Duration) -> Result<(), Unhealthy> {
    // What it said stays on this host: the message goes to the control plane.
    commands.run(command, bound).await.map_err(|error| Unhealthy::new(error.to_string()))
}
