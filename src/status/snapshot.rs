//! All facts of all workloads, to be read at once or waited for.

use super::{Facts, Report, WorkloadReport, failures::Failures};
use std::{future::Future, sync::Arc, task::Poll, time::SystemTime};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What is known of one workload before any loop runs, and the reading ends of its facts.
#[derive(Debug, Clone)]
pub struct WorkloadStatus {
    /// The name of its directory.
    pub name: String,
    /// Who it is; none while it does not run.
    pub spiffe_id: Option<String>,
    /// Whether it shall be registered: its bundle names a WorkloadGroup.
    pub registers: bool,
    /// The mistakes of its bundle, each with cause and fix. What ran before they were made goes on as it was.
    pub broken: Vec<String>,
    /// The keys of its bundle that we do not obey.
    pub ignored: Vec<String>,
    /// Its facts; none while it does not run.
    pub facts: Option<Facts>,
}

/// Every workload of this host; written by the agent.
#[derive(Debug, Clone, Default)]
pub struct Workloads {
    /// In the order of their names.
    pub list: Vec<WorkloadStatus>,
    /// What concerns the host as a whole, with cause and fix, say that there is no bundle.
    pub note: Option<String>,
}

/// All facts. Cheap to clone; each clone notices changes for itself.
#[derive(Debug, Clone)]
pub struct Status {
    workloads: watch::Receiver<Workloads>,
    /// The facts that [`Status::changed`] waits for.
    watched: Vec<Facts>,
    /// Written by [`Status::count_failures`].
    failures: Arc<watch::Sender<Failures>>,
}

impl Status {
    /// Reads what the agent writes into `workloads`.
    pub fn new(mut workloads: watch::Receiver<Workloads>) -> Self {
        let watched = watched(&workloads.borrow_and_update());
        Self { workloads, watched, failures: Arc::default() }
    }

    /// Everything as it is at `now`.
    pub fn report(&self, now: SystemTime) -> Report {
        let workloads = self.workloads.borrow();
        let failures = self.failures.borrow();
        let report = |workload: &WorkloadStatus| WorkloadReport {
            failures: failures.of(&workload.name),
            ..WorkloadReport::of(workload, now)
        };
        let list: Vec<_> = workloads.list.iter().map(report).collect();
        Report::new(list, workloads.note.clone(), now)
    }

    /// Waits until a fact has changed since the last call. Dropping the future loses nothing.
    pub async fn changed(&mut self) {
        let listed = {
            let facts = any(self.watched.iter_mut().map(Facts::changed));
            tokio::select! {
                biased;
                () = news(&mut self.workloads) => true,
                () = facts => false,
            }
        };
        if listed {
            self.watched = watched(&self.workloads.borrow());
        }
    }
}

impl Status {
    /// Counts what fails, until `stop`. One of all clones is to do it.
    pub async fn count_failures(mut self, stop: CancellationToken) {
        loop {
            // Seen before they are counted: what changes in between is looked at again.
            self.watched = watched(&self.workloads.borrow_and_update());
            self.failures.send_modify(|failures| failures.look(&self.workloads.borrow()));
            tokio::select! {
                () = stop.cancelled() => return,
                () = news(&mut self.workloads) => {}
                () = any(self.watched.iter_mut().map(Facts::failed)) => {}
            }
        }
    }
}

/// Their facts, as seen: whoever learns of a new list reads it all anyway.
fn watched(workloads: &Workloads) -> Vec<Facts> {
    let mut watched: Vec<_> = workloads.list.iter().filter_map(|workload| workload.facts.clone()).collect();
    for facts in &mut watched {
        facts.identity.mark_unchanged();
        facts.durable.mark_unchanged();
        facts.token.mark_unchanged();
        facts.registration.mark_unchanged();
        facts.membership.mark_unchanged();
        facts.health.mark_unchanged();
        facts.addresses.mark_unchanged();
        facts.inbounds.iter_mut().for_each(|inbound| inbound.place.mark_unchanged());
        facts.publications.iter_mut().for_each(|published| published.fact.mark_unchanged());
        facts.reloads.iter_mut().for_each(|(_, fact)| fact.mark_unchanged());
    }
    watched
}

impl Facts {
    /// Waits until one of the facts that decide about readiness, or store, token, membership, health or address, has
    /// changed.
    pub async fn changed(&mut self) {
        tokio::select! {
            () = news(&mut self.identity) => {}
            () = news(&mut self.durable) => {}
            () = news(&mut self.token) => {}
            () = news(&mut self.registration) => {}
            () = news(&mut self.membership) => {}
            () = news(&mut self.health) => {}
            () = news(&mut self.addresses) => {}
            () = any(self.inbounds.iter_mut().map(|inbound| news(&mut inbound.place))) => {}
        }
    }
}

impl Facts {
    /// Waits until one of the facts that can be in trouble has changed.
    async fn failed(&mut self) {
        tokio::select! {
            () = news(&mut self.identity) => {}
            () = news(&mut self.durable) => {}
            () = news(&mut self.registration) => {}
            () = any(self.publications.iter_mut().map(|published| news(&mut published.fact))) => {}
            () = any(self.reloads.iter_mut().map(|(_, fact)| news(fact))) => {}
        }
    }
}

/// Waits until one of these facts has changed.
pub(crate) async fn any_news<T>(facts: &mut [watch::Receiver<T>]) {
    any(facts.iter_mut().map(news)).await;
}

/// Waits for one of them; for ever when there is none.
async fn any<F: Future<Output = ()>>(all: impl Iterator<Item = F>) {
    let mut all: Vec<_> = all.map(Box::pin).collect();
    std::future::poll_fn(|context| match all.iter_mut().any(|one| one.as_mut().poll(context).is_ready()) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await;
}

/// A fact whose writer is gone does not change any more.
async fn news<T>(fact: &mut watch::Receiver<T>) {
    if fact.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
