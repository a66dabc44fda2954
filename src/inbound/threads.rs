//! The threads of the data path: one per core, each with a runtime of its own, so that a connection lives on one core and
//! what the control loops do is not felt.

use crate::host::descriptor_limit;
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};
use tokio::{
    runtime::{Builder, Handle},
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// More threads than this do not help the workloads of one host.
const MOST: usize = 16;

/// Connections may be over their bound for as long as it takes those that were told to go.
const SLACK: usize = 16;

/// How many connections of the mesh may be open under a limit of so many descriptors: each takes two, the peer's and the
/// application's, and strangers must leave what probes, control plane, store and consumers take.
fn room(limit: u64) -> usize {
    let reserve = (limit / 4).min(2048);
    usize::try_from((limit - reserve) / 2).unwrap_or(usize::MAX)
}

/// All threads. They end when the last clone is gone.
#[derive(Debug, Clone)]
pub struct Threads(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    workers: Vec<Worker>,
    /// How many connections there may be.
    room: usize,
    _stop: DropGuard,
}

#[derive(Debug)]
struct Worker {
    handle: Handle,
    /// Connections that live there.
    load: Arc<AtomicUsize>,
}

/// Counts a connection for its thread.
pub(super) struct Load(Arc<AtomicUsize>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Threads {
    /// Starts them.
    ///
    /// # Errors
    /// When the system gives no thread, or nothing to wait with.
    pub fn start() -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, usize::from).min(MOST);
        let stop = CancellationToken::new();
        let workers = (0..count).map(|number| {
            let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
            let handle = runtime.handle().clone();
            let stop = stop.clone();
            thread::Builder::new()
                .name(format!("inbound-{number}"))
                .spawn(move || runtime.block_on(stop.cancelled()))?;
            Ok(Worker { handle, load: Arc::default() })
        });
        let workers = workers.collect::<io::Result<_>>()?;
        Ok(Self(Arc::new(Pool { workers, room: room(descriptor_limit()), _stop: stop.drop_guard() })))
    }

    /// Runs what is no connection, on the thread with the fewest of them.
    pub(super) fn run(&self, work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        self.least_busy().map_or_else(|| tokio::spawn(async {}), |worker| worker.handle.spawn(work))
    }

    /// Runs a connection on the thread with the fewest.
    pub(super) fn spawn<F: Future<Output = ()> + Send + 'static>(&self, connection: impl FnOnce(Load) -> F) {
        if let Some(worker) = self.least_busy() {
            worker.load.fetch_add(1, Relaxed);
            worker.handle.spawn(connection(Load(worker.load.clone())));
        }
    }

    /// What to say to who wants more connections than there is room for.
    pub(super) fn shortage(&self, wanted: u64) -> Option<String> {
        let (room, limit) = (self.0.room, descriptor_limit());
        (wanted > room as u64).then(|| {
            format!(
                "this process may have {limit} files and sockets open, which leaves room for {room} connections of the mesh, not \
                 for {wanted} (maxConnections): raise the limit (LimitNOFILE= with systemctl edit we-agent), or lower \
                 maxConnections"
            )
        })
    }

    /// Whether there is no room for one more.
    pub(super) fn are_full(&self) -> bool {
        self.open() >= self.0.room
    }

    /// Returns when what was told to go has gone.
    pub(super) async fn vacancy(&self) {
        while self.open() >= self.0.room + SLACK {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// The connections of all listeners.
    fn open(&self) -> usize {
        self.0.workers.iter().map(|worker| worker.load.load(Relaxed)).sum()
    }

    fn least_busy(&self) -> Option<&Worker> {
        self.0.workers.iter().min_by_key(|worker| worker.load.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_quarter_of_few_descriptors_is_kept_and_enough_of_many(limit in 64u64..10_000_000) {
            let left = limit - 2 * (room(limit) as u64 + SLACK as u64);
            prop_assert!(limit < 1024 || left >= 200, "{left}");
            prop_assert!(left <= 2050);
        }
    }
}
