//! Records on their way out. Who speaks never waits for who listens: a reader that has stopped (a pipe, a journal that
//! hangs) fills the queue, and what then finds no room is counted, and told when there is room again.

use super::record::Record;
use std::{
    collections::VecDeque,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Records that wait, at most: minutes of a bad day, or what a trace says in a moment.
const MOST: usize = 512;

/// Records dropped since the start.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// How many lines of the log were dropped because nobody took them.
pub fn dropped() -> u64 {
    DROPPED.load(Relaxed)
}

/// What the writer finds.
pub(super) enum Next {
    Record(Record),
    /// So many are missing here.
    Gap(u64),
}

#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    news: Condvar,
    written: Condvar,
}

#[derive(Debug)]
struct State {
    records: VecDeque<Record>,
    /// Dropped, and not told yet.
    missing: u64,
    /// The writer has one in its hands.
    busy: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.records.is_empty() && self.missing == 0 && !self.busy
    }
}

impl Queue {
    pub(super) const fn new() -> Self {
        let state = State { records: VecDeque::new(), missing: 0, busy: false };
        Self { state: Mutex::new(state), news: Condvar::new(), written: Condvar::new() }
    }

    /// Never waits. Once one was dropped, so is every one until the gap is told: what is written stays in order.
    pub(super) fn put(&self, record: Record) {
        let mut state = self.lock();
        if state.missing > 0 || state.records.len() >= MOST {
            state.missing += 1;
            DROPPED.fetch_add(1, Relaxed);
        } else {
            state.records.push_back(record);
        }
        self.news.notify_one();
    }

    /// Waits for the next; the one before it is written.
    pub(super) fn next(&self) -> Next {
        let mut state = self.lock();
        state.busy = false;
        if state.is_idle() {
            self.written.notify_all();
        }
        let waits = |state: &mut State| state.is_idle();
        let mut state = self.news.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
        state.busy = true;
        match state.records.pop_front() {
            Some(record) => Next::Record(record),
            None => Next::Gap(std::mem::take(&mut state.missing)),
        }
    }

    /// Waits until all is written, but no longer than this.
    pub(super) fn flush(&self, patience: Duration) {
        let _ = self.written.wait_timeout_while(self.lock(), patience, |state| !state.is_idle());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::{Arc, mpsc},
        thread,
        time::Instant,
    };

    fn said(queue: &Queue) -> String {
        match queue.next() {
            Next::Record(record) => record.sentence(),
            Next::Gap(missing) => format!("{missing} missing"),
        }
    }

    #[test]
    fn what_finds_no_room_is_counted_and_told_in_its_place() {
        let (queue, before) = (Queue::new(), dropped());
        for n in 0..MOST + 3 {
            queue.put(Record::note(n.to_string()));
        }
        assert!(dropped() - before >= 3);
        assert_eq!(said(&queue), "0");
        // There is room again, but what is missing was said before this.
        queue.put(Record::note("late".to_owned()));
        for n in 1..MOST {
            assert_eq!(said(&queue), n.to_string());
        }
        assert_eq!(said(&queue), "4 missing");
        queue.put(Record::note("again".to_owned()));
        assert_eq!(said(&queue), "again");
    }

    #[test]
    fn the_end_waits_for_the_last_line_and_not_for_a_reader_that_has_stopped() {
        let queue = Arc::new(Queue::new());
        let (lines, written) = mpsc::channel();
        let writer = queue.clone();
        thread::spawn(move || {
            while let Next::Record(record) = writer.next() {
                if record.sentence() == "stuck" {
                    thread::park_timeout(Duration::from_secs(600));
                }
                let _ = lines.send(record.sentence());
            }
        });
        for n in 0..100 {
            queue.put(Record::note(n.to_string()));
        }
        queue.flush(Duration::from_secs(60));
        assert_eq!(written.try_iter().count(), 100);
        queue.put(Record::note("stuck".to_owned()));
        let begun = Instant::now();
        queue.flush(Duration::from_millis(50));
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}
