//! Hooks: after a switch of the files, the program that reads them is told, and then looked at.
//!
//! Most servers read their certificate once. A hook is a command or a systemd unit to reload; it runs after the switch,
//! so the program meets a whole pair. Not every program says whether it took the new files (stunnel and PostgreSQL write
//! a line to their log and go on with the old ones), so the hook's own word can be checked: see [`Verify`].

mod look;
mod switches;

pub use look::{StartTls, Verify};
pub use switches::Switches;

use crate::{
    command::{Commands, Why},
    files::Root,
    spiffe::X509Context,
    status::{Reload, Trouble},
    systemd::reload_unit,
    time::{Backoff, Clock},
};
use look::Stale;
use std::{sync::Arc, time::Duration};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// From a failure to the next attempt: at first, and at most. The cause is usually a person's to mend.
const RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// What is done after a switch, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// `command`: program and arguments, never a shell.
    Command(Vec<String>),
    /// `unit`: a systemd unit to reload, say `nginx.service`, which the host must have agreed to (see [`reload_unit`]).
    Unit(String),
}

/// One hook, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookSettings {
    /// `command` or `unit`.
    pub action: Action,
    /// `deadline`: how long the action may take (30 s).
    pub deadline: Duration,
    /// `verify`: how to see that it helped; none believes the action.
    pub verify: Option<Verify>,
}

impl HookSettings {
    /// The name of the hook in status and metrics: the unit, or the program.
    pub fn name(&self) -> &str {
        match &self.action {
            Action::Unit(unit) => unit,
            Action::Command(command) => {
                command.first().and_then(|program| program.rsplit('/').next()).unwrap_or_default()
            }
        }
    }
}

/// One hook of one workload.
#[derive(Debug, Clone)]
pub struct Hook {
    /// Names it in status, metrics and journal.
    pub name: String,
    /// What it does.
    pub settings: HookSettings,
    /// Who runs its command.
    pub commands: Commands,
    /// Where the host's files are.
    pub root: Root,
}

/// What came of one attempt.
#[derive(Debug)]
enum Outcome {
    Reloaded {
        verified: bool,
    },
    Failed {
        cause: String,
    },
    Stale(Stale),
    /// The files were switched again before the program was seen with these.
    Overtaken,
}

impl Hook {
    /// Acts after each switch until `shutdown`, and writes `fact`, whose only writer it is. Switches that come while the
    /// action runs count as one. Of the hooks that share `turn`, one acts at a time.
    ///
    /// It also acts once at the start, for the agent may have been killed between a switch and its hook; and again from
    /// time to time after a failure. Both only if a look does not show that the newest certificate is served already.
    pub async fn run(
        self,
        mut switches: Switches,
        turn: Arc<Mutex<()>>,
        fact: watch::Sender<Reload>,
        clock: Clock,
        shutdown: CancellationToken,
    ) {
        shutdown.run_until_cancelled(self.follow(&mut switches, &turn, &fact, clock)).await;
    }

    async fn follow(&self, switches: &mut Switches, turn: &Mutex<()>, fact: &watch::Sender<Reload>, clock: Clock) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut retry: Option<Duration> = None;
        loop {
            let first = switches.taken().is_none();
            let repeated = tokio::select! {
                () = switches.news() => false,
                () = clock.sleep(retry.unwrap_or_default()), if retry.is_some() => true,
            };
            let held = turn.lock().await;
            // Waiting for the turn, more may have happened: what is taken now is covered by what is done now.
            retry = None;
            let Some(context) = switches.take() else { continue };
            let serial = context.svid.serial().to_owned();
            let served = (first || repeated) && self.is_served(&context).await;
            let outcome = if served {
                Outcome::Reloaded { verified: true }
            } else {
                if !repeated {
                    fact.send_replace(Reload::Running { serial: serial.clone() });
                }
                let acted = self.act().await;
                drop(held);
                self.outcome(acted, &context, switches).await
            };
            match &outcome {
                Outcome::Reloaded { .. } => backoff.reset(),
                Outcome::Failed { .. } | Outcome::Stale(_) => retry = Some(backoff.next_wait()),
                Outcome::Overtaken => {}
            }
            self.tell(fact, serial, outcome, clock);
        }
    }

    async fn is_served(&self, context: &X509Context) -> bool {
        match &self.settings.verify {
            Some(verify) => verify.sees(context).await.is_ok(),
            None => false,
        }
    }

    async fn act(&self) -> Result<(), String> {
        let (Self { commands, root, .. }, deadline) = (self, self.settings.deadline);
        match &self.settings.action {
            Action::Command(command) => {
                commands.run(command, deadline).await.map_err(|error| match (&error.why, error.said.as_str()) {
                    (Why::Runner(_), _) => error.to_string(),
                    (_, "") => format!("{error}; run the hook by hand, as {}, to see why", commands.user()),
                    (_, said) => format!("{error}, after it said: {said}; it was run as {}", commands.user()),
                })
            }
            Action::Unit(unit) => reload_unit(root, unit, deadline).await.map_err(|e| e.to_string()),
        }
    }

    async fn outcome(&self, acted: Result<(), String>, context: &X509Context, switches: &mut Switches) -> Outcome {
        match (acted, &self.settings.verify) {
            (Err(cause), _) => Outcome::Failed { cause },
            (Ok(()), None) => Outcome::Reloaded { verified: false },
            (Ok(()), Some(verify)) => tokio::select! {
                seen = verify.waits_for(context) => match seen {
                    Ok(()) => Outcome::Reloaded { verified: true },
                    Err(stale) => Outcome::Stale(stale),
                },
                () = switches.news() => Outcome::Overtaken,
            },
        }
    }

    fn tell(&self, fact: &watch::Sender<Reload>, serial: String, outcome: Outcome, clock: Clock) {
        let before = match &*fact.borrow() {
            Reload::Failed { trouble, .. } | Reload::Stale { trouble, .. } => Some(trouble.clone()),
            _ => None,
        };
        let trouble = |kind: &'static str, cause: String| {
            let trouble = Trouble::met(before.as_ref(), kind, cause, clock.now());
            let cause = &trouble.cause;
            match trouble.times {
                1 => warn!(hook = self.name, serial, cause, kind, "the new certificate is not in use"),
                _ => debug!(hook = self.name, serial, cause, kind, "the new certificate is still not in use"),
            }
            trouble
        };
        let news = match outcome {
            Outcome::Overtaken => return,
            Outcome::Reloaded { verified } => {
                info!(hook = self.name, serial, verified, "reloaded");
                Reload::Reloaded { serial, verified }
            }
            Outcome::Failed { cause } => {
                let trouble = trouble("reload_failed", cause);
                Reload::Failed { serial, trouble }
            }
            Outcome::Stale(Stale { served, cause }) => {
                let trouble = trouble("reload_stale", cause);
                Reload::Stale { serial, served, trouble }
            }
        };
        fact.send_replace(news);
    }
}

#[cfg(test)]
mod tests;
