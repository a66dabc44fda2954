//! What is said again and again is said a few times and then counted, so that nobody who makes us repeat ourselves fills
//! the journal.

use super::{queue::Queue, record::Record};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// How long lines are counted before it begins anew.
const PERIOD: Duration = Duration::from_secs(60);
/// The same line is written so often in it: who falls ill and recovers now and then is to be seen doing so.
const OFTEN: u64 = 10;
/// Lines that are told apart; of those beyond, only the place in the source.
const MOST: usize = 1024;
/// Of the thread that tells.
const STACK: usize = 64 * 1024;

/// What makes a line the same as another, each as a hash.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    /// Its place in the source.
    pub(super) site: u64,
    /// The same with its fields; for a library the place is all.
    pub(super) line: u64,
}

pub(super) struct Throttle(Mutex<Period>);

struct Period {
    since: Instant,
    lines: HashMap<u64, Seen>,
    /// There is a thread that will tell.
    awake: bool,
}

#[derive(Default)]
struct Seen {
    times: u64,
    /// The first that was left out.
    kept: Option<Box<Record>>,
}

impl Throttle {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Period { since: Instant::now(), lines: HashMap::new(), awake: false }))
    }

    /// Writes a line, or counts it. A thread lives to the end of the period to tell what was left out; if there can be
    /// none, the next line does.
    pub(super) fn put(&'static self, key: Key, record: impl FnOnce() -> Record, queue: &'static Queue) {
        let mut period = self.lock();
        period.tell(Instant::now(), queue);
        match period.hear(key, record) {
            Some(record) => queue.put(record),
            None if period.awake => {}
            None => {
                let rest = PERIOD.saturating_sub(period.since.elapsed());
                let wake = move || {
                    thread::sleep(rest);
                    let mut period = self.lock();
                    period.awake = false;
                    period.tell(Instant::now(), queue);
                };
                let thread = thread::Builder::new().name("log-repeats".to_owned()).stack_size(STACK);
                period.awake = thread.spawn(wake).is_ok();
            }
        }
    }

    /// Tells now what would be told at the end of the period.
    pub(super) fn flush(&self, queue: &'static Queue) {
        self.lock().end(Instant::now()).for_each(|record| queue.put(record));
    }

    fn lock(&self) -> MutexGuard<'_, Period> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Period {
    /// Counts a line; gives it back when it is to be written.
    fn hear(&mut self, key: Key, record: impl FnOnce() -> Record) -> Option<Record> {
        let full = self.lines.len() >= MOST && !self.lines.contains_key(&key.line);
        let seen = self.lines.entry(if full { key.site } else { key.line }).or_default();
        seen.times += 1;
        if seen.times <= OFTEN {
            return Some(record());
        }
        seen.kept.get_or_insert_with(|| Box::new(record()));
        None
    }

    /// Says what was left out, if the period is over.
    fn tell(&mut self, now: Instant, queue: &'static Queue) {
        if now.saturating_duration_since(self.since) >= PERIOD {
            self.end(now).for_each(|record| queue.put(record));
        }
    }

    /// Begins anew; what was left out until now.
    fn end(&mut self, now: Instant) -> impl Iterator<Item = Record> + use<> {
        self.since = now;
        let lines = std::mem::take(&mut self.lines).into_values();
        lines.filter_map(|seen| Some(seen.kept?.again(seen.times - OFTEN)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `lines` are said, each a site and its fields.
    fn said(period: &mut Period, lines: impl IntoIterator<Item = (u64, u64)>) -> usize {
        let hear = |(site, line)| period.hear(Key { site, line }, || Record::note(format!("{site} {line}")));
        lines.into_iter().filter_map(hear).count()
    }

    fn told(period: &mut Period) -> Vec<String> {
        let mut told: Vec<_> = period.end(Instant::now()).map(|record| record.words()).collect();
        told.sort();
        told
    }

    fn period() -> Period {
        Period { since: Instant::now(), lines: HashMap::new(), awake: false }
    }

    #[test]
    fn a_line_is_said_a_few_times_and_then_counted() {
        let mut period = period();
        assert_eq!(said(&mut period, [(1, 1); 25]), 10);
        assert_eq!(said(&mut period, [(1, 2); 10]), 10);
        assert_eq!(told(&mut period), ["1 1; 15 times more in the minute before  before=15"]);
        assert_eq!(said(&mut period, [(1, 1)]), 1);
        assert_eq!(told(&mut period), [""; 0]);
    }

    #[test]
    fn lines_without_end_that_differ_share_what_their_place_has() {
        let mut period = period();
        let heard = said(&mut period, (0..1_000_000).map(|n| (n % 2, 100 + n)));
        assert_eq!((heard, period.lines.len()), (MOST + 2 * 10, MOST + 2));
        assert_eq!(told(&mut period).len(), 2);
    }
}
