//! When the verdict is reported again though nothing has changed: nothing acknowledges a report, and where no service
//! selects us, no list shows that one was lost.

use crate::time::between;
use std::time::Duration;
use tokio::time::Instant;

/// After a stream that followed a failure: whatever has failed may fail once more.
const SOON: [u64; 3] = [5, 20, 80];
/// And always.
const ALWAYS: u64 = 300;

/// The next report, and how many there were on this stream.
#[derive(Debug)]
pub(super) struct Repeat {
    begin: Instant,
    after_failure: bool,
    count: usize,
    pub(super) at: Instant,
}

impl Repeat {
    /// On a stream that was answered `now`.
    pub(super) fn new(now: Instant, after_failure: bool) -> Self {
        let mut repeat = Self { begin: now, after_failure, count: 0, at: now };
        repeat.plan(now);
        repeat
    }

    /// It was reported `now`.
    pub(super) fn done(&mut self, now: Instant) {
        self.count += 1;
        self.plan(now);
    }

    fn plan(&mut self, now: Instant) {
        let soon = SOON.get(self.count).filter(|_| self.after_failure);
        let (from, seconds) = soon.map_or((now, ALWAYS), |seconds| (self.begin, *seconds));
        let wait = Duration::from_secs(seconds);
        self.at = from + between(wait.mul_f64(0.9), wait.mul_f64(1.1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soon_after_a_failure_and_every_five_minutes_always() {
        let now = Instant::now();
        for (after_failure, nominal) in [(true, vec![5, 20, 80, 380, 680]), (false, vec![300, 600, 900])] {
            let mut repeat = Repeat::new(now, after_failure);
            for seconds in nominal {
                let at = (repeat.at - now).as_secs_f64();
                let nominal = f64::from(seconds);
                assert!((nominal * 0.89..=nominal * 1.11).contains(&at), "{at} is not about {nominal}");
                repeat.done(repeat.at);
            }
        }
    }
}
