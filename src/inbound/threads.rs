//! The threads of the data path: one per core, each with a runtime of its own, so that a connection lives on one core and
//! what the control loops do is not felt.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};
use tokio::{
    runtime::{Builder, Handle},
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// More threads than this do not help the workloads of one host.
const MOST: usize = 16;

/// All threads. They end when the last clone is gone.
#[derive(Debug, Clone)]
pub struct Threads(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    workers: Vec<Worker>,
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
        Ok(Self(Arc::new(Pool { workers, _stop: stop.drop_guard() })))
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

    fn least_busy(&self) -> Option<&Worker> {
        self.0.workers.iter().min_by_key(|worker| worker.load.load(Relaxed))
    }
}
