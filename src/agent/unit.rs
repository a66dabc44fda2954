//! One workload, as the reconciler has it: what it is given, and how it is told to end.

use super::{
    given::{Ends, Given},
    host::Host,
    work::Work,
};
use crate::status;
use tokio::{
    sync::watch,
    task::{AbortHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// A workload.
#[derive(Debug)]
pub(super) struct Unit {
    given: watch::Sender<Given>,
    leaving: watch::Sender<bool>,
    removed: CancellationToken,
    stop: CancellationToken,
    task: AbortHandle,
}

impl Unit {
    /// Starts it, in `tasks`. It ends when `stop` is cancelled.
    pub(super) fn start(
        name: &str,
        given: Given,
        host: &Host,
        stop: &CancellationToken,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (given, receiver) = watch::channel(given);
        let (leaving, told) = watch::channel(false);
        let (stop, removed) = (stop.child_token(), CancellationToken::new());
        let told = Ends { given: receiver, leaving: told, removed: removed.clone(), stop: stop.clone() };
        let work = Work::new(name, host, told);
        let span = tracing::info_span!("workload", workload = %name);
        let task = tasks.spawn(work.run().instrument(span));
        Self { given, leaving, removed, stop, task }
    }

    /// What it is made of by now.
    pub(super) fn give(&self, given: Given) {
        status::tell(&self.given, given);
    }

    /// Has it leave the mesh: it is taken out of service first, and what it has below `/run/we-agent` goes.
    pub(super) fn leave(&self) {
        self.removed.cancel();
        self.leaving.send_replace(true);
        self.stop.cancel();
    }

    /// The machine goes down: when it is stopped, it is taken out of service first.
    pub(super) fn goes_down(&self) {
        self.leaving.send_replace(true);
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.stop.is_cancelled()
    }

    pub(super) fn is_over(&self) -> bool {
        self.task.is_finished()
    }
}
