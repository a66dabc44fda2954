//! The parts of a workload that run, and ending them in order.

use super::part::{Loop, Part};
use crate::status::InboundPlace;
use std::time::Duration;
use tokio::{
    sync::watch,
    task::{AbortHandle, JoinError, JoinSet},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// Bound on the end of a part.
const STOP: Duration = Duration::from_secs(5);

/// What the last connections may be late.
const LATE: Duration = Duration::from_secs(1);

/// One part that runs.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) part: Part,
    stop: CancellationToken,
    task: AbortHandle,
    /// Of a listener: its open connections may go on when it does not listen any more.
    listens: Option<watch::Receiver<InboundPlace>>,
}

impl Running {
    fn is_over(&self) -> bool {
        self.task.is_finished()
            || self
                .listens
                .as_ref()
                .is_some_and(|place| !matches!(*place.borrow(), InboundPlace::Bound(_) | InboundPlace::Deaf { .. }))
    }
}

/// All parts of one workload. Dropping them ends them at once.
#[derive(Debug, Default)]
pub(super) struct Parts {
    running: Vec<Running>,
    tasks: JoinSet<()>,
}

impl Parts {
    pub(super) fn of(&self) -> impl Iterator<Item = &Part> {
        self.running.iter().map(|running| &running.part)
    }

    pub(super) fn has(&self, part: &Part) -> bool {
        self.of().any(|other| other == part)
    }

    /// Runs a part until `stop`.
    pub(super) fn start(
        &mut self,
        part: Part,
        run: Loop,
        stop: CancellationToken,
        listens: Option<watch::Receiver<InboundPlace>>,
        span: tracing::Span,
    ) {
        let task = self.tasks.spawn(run.instrument(span));
        self.running.push(Running { part, stop, task, listens });
    }

    /// Returns when a task has ended; which, [`Parts::lose_failed`] tells. Safe to cancel.
    pub(super) async fn changed(&mut self) {
        match self.tasks.join_next().await {
            Some(ended) => say(ended),
            None => std::future::pending().await,
        }
    }

    /// Forgets the parts that have ended although nobody told them to: a bug.
    pub(super) fn lose_failed(&mut self) -> bool {
        let before = self.running.len();
        self.running.retain(|running| {
            // All are told at once when the daemon stops, and we may hear of the first end before we are told ourselves.
            let failed = running.task.is_finished() && !running.stop.is_cancelled();
            if failed {
                tracing::error!(
                    part = running.part.word(),
                    "a part ended by itself, which is a bug; it is started again"
                );
            }
            !failed
        });
        self.running.len() < before
    }

    /// Ends those that `stays` does not hold for, all at once, and waits until they have; none of them longer than is
    /// bearable. Which they were.
    pub(super) async fn end(&mut self, stays: impl Fn(&Part) -> bool) -> Vec<Part> {
        let (stay, go): (Vec<_>, Vec<_>) = std::mem::take(&mut self.running).into_iter().partition(|r| stays(&r.part));
        self.running = stay;
        go.iter().for_each(|running| running.stop.cancel());
        let tasks = &mut self.tasks;
        let ended = async {
            for running in &go {
                let mut listens = running.listens.clone();
                while !running.is_over() {
                    tokio::select! {
                        ended = tasks.join_next() => ended.into_iter().for_each(say),
                        () = news(listens.as_mut()) => {}
                    }
                }
            }
        };
        if timeout(STOP, ended).await.is_err() {
            for running in go.iter().filter(|running| !running.is_over()) {
                tracing::warn!(part = running.part.word(), "it did not end in time and is dropped");
                running.task.abort();
            }
        }
        go.into_iter().map(|running| running.part).collect()
    }

    /// Ends all, and waits for the last open connection for as long as it may take.
    pub(super) async fn end_all(&mut self) -> Vec<Part> {
        let drain = self.of().map(Part::drain).max().unwrap_or_default();
        let ended = self.end(|_| false).await;
        let drained = async {
            while let Some(ended) = self.tasks.join_next().await {
                say(ended);
            }
        };
        if timeout(LATE + drain, drained).await.is_err() {
            tracing::warn!("connections did not end in time and are dropped");
        }
        self.tasks.shutdown().await;
        ended
    }
}

fn say(ended: Result<(), JoinError>) {
    if let Some(error) = ended.err().filter(JoinError::is_panic) {
        tracing::error!(cause = %error, "a loop failed, which is a bug");
    }
}

async fn news(place: Option<&mut watch::Receiver<InboundPlace>>) {
    let changed = match place {
        Some(place) => place.changed().await.is_ok(),
        None => false,
    };
    if !changed {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locality::Platform;
    use tracing::Span;

    /// What is lost here is missing, and what is missing is started.
    #[tokio::test]
    async fn one_that_panics_is_lost_and_the_others_run_on() {
        let (mut parts, stop) = (Parts::default(), CancellationToken::new());
        let faulty = Part::Locality { platform: Platform::Off };
        let told = stop.clone();
        parts.start(Part::Journal, Box::pin(async move { told.cancelled().await }), stop.clone(), None, Span::none());
        parts.start(faulty.clone(), Box::pin(async { panic!("on purpose") }), stop.clone(), None, Span::none());
        parts.changed().await;
        assert!(parts.lose_failed());
        assert!(parts.has(&Part::Journal) && !parts.has(&faulty));
        assert!(!parts.lose_failed(), "the other one runs on");
        assert_eq!(parts.end_all().await, [Part::Journal]);
    }

    #[tokio::test]
    async fn one_that_was_told_to_end_has_not_failed() {
        let (mut parts, stop) = (Parts::default(), CancellationToken::new());
        let told = stop.clone();
        parts.start(Part::Journal, Box::pin(async move { told.cancelled().await }), stop.clone(), None, Span::none());
        stop.cancel();
        parts.changed().await;
        assert!(!parts.lose_failed());
        assert_eq!(parts.end_all().await, [Part::Journal]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_hangs_is_dropped() {
        let (mut parts, begun) = (Parts::default(), tokio::time::Instant::now());
        parts.start(Part::Journal, Box::pin(std::future::pending()), CancellationToken::new(), None, Span::none());
        assert_eq!(parts.end_all().await, [Part::Journal]);
        assert!(begun.elapsed() <= STOP + LATE);
    }
}
