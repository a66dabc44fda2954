//! Records on their way out. Who speaks never waits for who listens: a line that is not taken at once waits here for a
//! thread that is there only as long as there is something to write. A reader that has stopped (a pipe, a journal that
//! hangs) fills the queue, and what then finds no room is counted, and told when there is room again.

use super::{
    record::Record,
    sink::{Line, Sink},
    stderr::Patience,
};
use std::{
    collections::VecDeque,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

/// Records that wait, at most: minutes of a bad day, or what a trace says in a moment.
const MOST: usize = 512;
/// Of the thread that writes: it renders one record at a time.
const STACK: usize = 128 * 1024;

pub(super) struct Queue {
    sink: Sink,
    state: Mutex<State>,
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Default)]
struct State {
    lines: VecDeque<Line>,
    /// Dropped, and not told yet.
    missing: u64,
    /// There is a thread that writes; nobody else does.
    busy: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.lines.is_empty() && self.missing == 0 && !self.busy
    }

    /// The next to be written.
    fn next(&mut self) -> Option<Line> {
        let gap = |missing| {
            let note = format!("{missing} lines of the log are missing here, for whoever reads it did not keep up");
            Line::New(Box::new(Record::note(note)))
        };
        self.lines.pop_front().or_else(|| (self.missing > 0).then(|| gap(std::mem::take(&mut self.missing))))
    }
}

impl Queue {
    pub(super) fn new(sink: Sink) -> Self {
        Self { sink, state: Mutex::default(), written: Condvar::new(), dropped: AtomicU64::new(0) }
    }

    /// Never waits. Once one was dropped, so is every one until the gap is told: what is written stays in order.
    pub(super) fn put(&'static self, record: Record) {
        let mut state = self.lock();
        if state.missing > 0 || state.lines.len() >= MOST {
            state.missing += 1;
            self.dropped.fetch_add(1, Relaxed);
        } else {
            state.lines.push_back(Line::New(Box::new(record)));
        }
        if state.busy {
            return;
        }
        while let Some(mut line) = state.next() {
            if !self.sink.write(&mut line, Patience::None) {
                state.lines.push_front(line);
                // If there can be no thread now, the next record finds these before it.
                let thread = thread::Builder::new().name("log".to_owned()).stack_size(STACK);
                state.busy = thread.spawn(|| self.drain()).is_ok();
                return;
            }
        }
    }

    /// The life of the thread that writes.
    fn drain(&self) {
        loop {
            let mut state = self.lock();
            let Some(mut line) = state.next() else {
                state.busy = false;
                self.written.notify_all();
                return;
            };
            drop(state);
            self.sink.write(&mut line, Patience::Endless);
        }
    }

    /// Waits until all is written, but no longer than this.
    pub(super) fn flush(&self, patience: Duration) {
        let _ = self.written.wait_timeout_while(self.lock(), patience, |state| !state.is_idle());
    }

    /// How many were dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
