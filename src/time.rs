//! The wall clock, and waiting by it.
//!
//! A VM is suspended, migrated, and has its clock set. A timer of the runtime counts none of that, so nothing here
//! sleeps for long: it sleeps in strides and looks at the wall again.

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// The longest sleep between two looks at the wall clock.
const STRIDE: Duration = Duration::from_secs(10);

/// Where the time of day comes from.
#[derive(Debug, Clone, Copy, Default)]
pub enum Clock {
    /// The system's wall clock.
    #[default]
    Wall,
    /// A wall clock that started at the given time at the given moment of the runtime's clock: under paused time it
    /// moves with it.
    Simulated(SystemTime, Instant),
}

impl Clock {
    /// A clock that shows `start` now and moves with the runtime.
    pub fn simulated(start: SystemTime) -> Self {
        Self::Simulated(start, Instant::now())
    }

    /// The time of day.
    pub fn now(&self) -> SystemTime {
        match self {
            Self::Wall => SystemTime::now(),
            Self::Simulated(start, since) => *start + since.elapsed(),
        }
    }

    /// Waits until the wall clock shows `deadline`: at most one stride late after a suspend or a step of the clock.
    pub async fn sleep_until(&self, deadline: SystemTime) {
        while let Ok(left) = deadline.duration_since(self.now()) {
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(STRIDE)).await;
        }
    }
}

/// Growing waits with full jitter: each is drawn between `floor` and a ceiling that doubles up to `cap`.
#[derive(Debug)]
pub struct Backoff {
    floor: Duration,
    cap: Duration,
    ceilings: ExponentialBackoff,
}

impl Backoff {
    /// Waits from `floor` up to `cap`.
    pub fn new(floor: Duration, cap: Duration) -> Self {
        Self { floor, cap, ceilings: Self::ceilings(floor, cap) }
    }

    fn ceilings(floor: Duration, cap: Duration) -> ExponentialBackoff {
        ExponentialBuilder::new().with_min_delay(floor * 2).with_max_delay(cap).without_max_times().build()
    }

    /// The next wait.
    pub fn next_wait(&mut self) -> Duration {
        let ceiling = self.ceilings.next().unwrap_or(self.cap).min(self.cap);
        between(self.floor, ceiling)
    }

    /// A wait at the slow end, for refusals that will not change by themselves.
    pub fn slowest(&self) -> Duration {
        between(self.cap / 2, self.cap)
    }

    /// Begins anew, after a success.
    pub fn reset(&mut self) {
        self.ceilings = Self::ceilings(self.floor, self.cap);
    }
}

/// A wait drawn evenly between two durations.
pub fn between(low: Duration, high: Duration) -> Duration {
    low + high.saturating_sub(low).mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test(start_paused = true)]
    async fn sleeping_follows_the_wall() {
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH);
        let hour = SystemTime::UNIX_EPOCH + Duration::from_secs(3600);
        clock.sleep_until(hour).await;
        assert!(clock.now() >= hour && clock.now() < hour + Duration::from_secs(1));
        clock.sleep_until(SystemTime::UNIX_EPOCH).await; // already past: at once
        assert!(clock.now() < hour + Duration::from_secs(1));
    }

    proptest! {
        #[test]
        fn waits_stay_between_floor_and_cap(floor in 1u64..2_000, factor in 2u64..200, rounds in 1usize..40) {
            let (floor, cap) = (Duration::from_millis(floor), Duration::from_millis(floor * factor));
            let mut backoff = Backoff::new(floor, cap);
            for _ in 0..rounds {
                let wait = backoff.next_wait();
                prop_assert!(wait >= floor && wait <= cap, "{wait:?}");
            }
            prop_assert!(backoff.slowest() >= cap / 2 && backoff.slowest() <= cap);
            backoff.reset();
            prop_assert!(backoff.next_wait() <= (floor * 2).min(cap));
        }
    }
}
