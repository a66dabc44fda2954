//! All workloads of this host: each look, one at each beat, compares the directories with what runs.

use super::{
    claim::Claim,
    given::Given,
    host::Host,
    lock::Lock,
    passed,
    reconcile::{Action, State, actions},
    settings::Settings,
    unit::Unit,
};
use crate::{
    admin::Reload,
    bundle::{self, BundleDir},
    systemd::going_down,
    time::{BEAT, next_beat},
};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

/// From one look to the next until all workloads have been read.
const SOON: Duration = Duration::from_millis(300);
/// How long after the start sockets that were passed wait for the workloads that are being read.
const SETTLED: Duration = Duration::from_secs(10);
/// Bound on ending everything, besides what each workload has for itself: 5 s and the time of its connections.
const STOP: Duration = Duration::from_secs(70);

/// Lets what runs be what the files say.
pub(super) struct Reconciler {
    pub(super) host: Host,
    pub(super) settings: Settings,
    pub(super) lock: Lock,
    /// Where the credentials of the service are.
    pub(super) credentials: Option<PathBuf>,
    pub(super) reloads: mpsc::Receiver<Reload>,
}

/// A workload, and since when its directory is missed.
struct Entry {
    unit: Unit,
    missed: Option<Instant>,
}

type Units = BTreeMap<String, Entry>;

impl Reconciler {
    /// Runs until `stop`, then ends all workloads.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let (units_stop, started) = (CancellationToken::new(), Instant::now());
        let (mut units, mut tasks) = (Units::new(), JoinSet::new());
        let (mut first, mut claimed) = (true, false);
        loop {
            self.look(&mut units, &mut tasks, &units_stop, first);
            self.host.looks.send_replace(Instant::now());
            first = false;
            if !claimed && (self.is_settled() || started.elapsed() > SETTLED) {
                claimed = true;
                self.tell_unclaimed();
            }
            // Who starts is told at once; then sockets that nobody has taken are spoken of soon, too.
            let next = if claimed { next_beat(BEAT) } else { Instant::now() + SOON };
            tokio::select! {
                () = sleep_until(next) => {}
                () = stop.cancelled() => break,
                Some(reply) = self.reloads.recv() => {
                    let _ = reply.send(self.settings.reload().map_err(|error| error.to_string()));
                }
                Some(ended) = tasks.join_next() => if let Err(error) = ended {
                    tracing::error!(cause = %error, "a workload failed, which is a bug; it is started again");
                }
            }
        }
        self.host.listeners.close();
        if going_down().await {
            units.values().for_each(|entry| entry.unit.goes_down());
        }
        units_stop.cancel();
        let ended = async { while tasks.join_next().await.is_some() {} };
        if timeout(STOP, ended).await.is_err() {
            tracing::warn!("a workload did not end in time and is dropped");
        }
    }

    fn look(&mut self, units: &mut Units, tasks: &mut JoinSet<()>, stop: &CancellationToken, hasty: bool) {
        self.lock.look();
        self.settings.look();
        let (found, note) = self.find(hasty);
        let note = [self.settings.note().map(str::to_owned), note].into_iter().flatten().collect::<Vec<_>>().join("; ");
        let note = Some(note).filter(|note| !note.is_empty());
        if self.host.workloads.borrow().note != note {
            if let Some(note) = &note {
                tracing::warn!("{note}");
            }
            self.host.workloads.send_modify(|workloads| workloads.note = note);
        }
        // What cannot be listed is not gone.
        let Some(found) = found else { return };
        let now = Instant::now();
        let states: BTreeMap<_, _> = units.iter().map(|(name, entry)| (name.clone(), entry.state())).collect();
        let states = states.iter().map(|(name, state)| (name.as_str(), *state)).collect();
        for (name, action) in actions(found.keys().map(String::as_str), &states, now) {
            match (action, found.get(name)) {
                (Action::Start, Some(given)) => {
                    let unit = Unit::start(name, given.clone(), &self.host, stop, tasks);
                    units.insert(name.to_owned(), Entry { unit, missed: None });
                }
                (Action::Note { missed }, _) => {
                    if let Some(entry) = units.get_mut(name) {
                        entry.missed = missed;
                    }
                }
                (Action::Leave, _) => {
                    tracing::info!(workload = name, "its bundle was removed, so the workload leaves the mesh");
                    units.get(name).into_iter().for_each(|entry| entry.unit.leave());
                }
                (Action::Start | Action::Forget, _) => {
                    units.remove(name);
                    self.host.forget(name);
                }
            }
        }
        for (name, given) in found {
            units.get(&name).into_iter().for_each(|entry| entry.unit.give(given.clone()));
        }
    }

    /// What the directories say; none when they cannot be listed. And what is to be said of the host.
    fn find(&self, hasty: bool) -> (Option<BTreeMap<String, Given>>, Option<String>) {
        let place = self.host.root.path("/etc/we-agent");
        let found = match bundle::find(&self.host.root, self.credentials.as_deref()) {
            Ok(found) => found,
            Err(error) => return (None, Some(format!("{}: {error}", place.display()))),
        };
        let barred = found.iter().any(|(_, dir)| dir.istio).then(|| bundle::istio_agent(&self.host.root)).flatten();
        let barred = barred.map(|id| {
            format!(
                "Istio's own agent runs here (process {id}), and two agents on one entry make it leak: \
                 stop it (systemctl disable --now istio) or put a bundle of its own into {}/<workload>/",
                place.display()
            )
        });
        let config = self.settings.config();
        let lost: Vec<_> =
            config.workload_names().filter(|name| !found.iter().any(|(other, _)| other == name)).collect();
        let note = match (found.is_empty(), lost.is_empty()) {
            (true, _) => Some(format!(
                "no bundle in {0}: copy what `istioctl x workload entry configure` wrote to {0}/<workload>/",
                place.display()
            )),
            (false, false) => Some(format!(
                "we-agent.yaml names workloads without a bundle: {}; put their bundles into {}/<workload>/",
                lost.join(", "),
                place.display()
            )),
            _ => None,
        };
        let given = |(name, dir): (String, BundleDir)| {
            let barred = barred.clone().filter(|_| dir.istio);
            let given = Given { settings: config.workload(&name), dir, barred, hasty };
            (name, given)
        };
        (Some(found.into_iter().map(given).collect()), note)
    }

    /// Whether each workload has been read, or has a mistake.
    fn is_settled(&self) -> bool {
        !self.host.claims.borrow().values().any(|claim| matches!(claim, Claim::Reading { .. }))
    }

    fn tell_unclaimed(&self) {
        let workloads = self.host.workloads.borrow();
        let runs = |name: &str| workloads.list.iter().any(|status| status.name == name && status.facts.is_some());
        passed::unclaimed(&self.host.listeners, &self.host.root, self.settings.config(), runs);
    }
}

impl Entry {
    fn state(&self) -> State {
        match (self.unit.is_over(), self.unit.is_leaving()) {
            (true, _) => State::Over,
            (false, true) => State::Leaves,
            (false, false) => State::Runs { missed: self.missed },
        }
    }
}
