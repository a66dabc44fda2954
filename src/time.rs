//! The wall clock, waiting by it, and the beat at which everything is looked at that changes without a word.
//!
//! A VM is suspended, migrated, and has its clock set. A timer of the runtime counts none of that, so nothing here
//! sleeps for long: it sleeps in strides and looks at the wall again.
//!
//! Strides end on the beat, and so do all looks of this daemon, at files, at the store, at addresses: none has a period of
//! its own. A process that rests wakes once for all of them.

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use std::{
    sync::{
        LazyLock,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};
use tokio::time::{Instant, sleep_until};

/// From one look to the next. What is changed is to be followed within five seconds, and may have to rest for two.
pub const BEAT: Duration = Duration::from_secs(3);

/// The longest sleep between two looks at the wall clock: some beats.
const STRIDE: Duration = Duration::from_secs(3 * BEAT.as_secs());

/// What a wall clock may gain or lose on the runtime's by being slewed. More is a step, or a suspended VM.
const DRIFT: Duration = Duration::from_secs(2);

/// The next of the moments that lie `every` apart, which is a beat or several. They are the same for everybody.
pub fn next_beat(every: Duration) -> Instant {
    static FIRST: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);
    let first = Instant::from_std(*FIRST);
    let passed = Instant::now().saturating_duration_since(first).as_nanos() / every.as_nanos().max(1);
    first + every * u32::try_from(passed + 1).unwrap_or(u32::MAX)
}

/// Where the time of day comes from.
#[derive(Debug, Clone, Copy, Default)]
pub enum Clock {
    /// The system's wall clock.
    #[default]
    Wall,
    /// A wall clock that moves with the runtime's, and can be set.
    Simulated(Simulated),
}

/// A wall clock for tests: under paused time it moves with the runtime.
#[derive(Debug, Clone, Copy)]
pub struct Simulated {
    start: SystemTime,
    since: Instant,
    /// Seconds by which it was set forward or back. It is shared by all copies, and lives as long as the test.
    stepped: &'static AtomicI64,
}

impl Clock {
    /// A clock that shows `start` now and moves with the runtime.
    pub fn simulated(start: SystemTime) -> Self {
        Self::Simulated(Simulated { start, since: Instant::now(), stepped: Box::leak(Box::default()) })
    }

    /// The time of day.
    pub fn now(&self) -> SystemTime {
        match self {
            Self::Wall => SystemTime::now(),
            Self::Simulated(clock) => {
                let shown = clock.start + clock.since.elapsed();
                let stepped = clock.stepped.load(Relaxed);
                let by = Duration::from_secs(stepped.unsigned_abs());
                if stepped < 0 { shown - by } else { shown + by }
            }
        }
    }

    /// Sets a simulated clock forward or back by so many seconds, for all who have it.
    pub fn step(&self, seconds: i64) {
        if let Self::Simulated(clock) = self {
            clock.stepped.fetch_add(seconds, Relaxed);
        }
    }

    /// Waits until the wall clock shows `deadline`: at most one stride late after a suspend or a step of the clock.
    pub async fn sleep_until(&self, deadline: SystemTime) {
        self.until(|_| deadline).await;
    }

    /// Waits until what `due` says of the present time is not in the future. It is asked again at each stride: a clock that
    /// was set makes other things due.
    pub async fn until(&self, due: impl Fn(SystemTime) -> SystemTime) {
        loop {
            let now = self.now();
            match due(now).duration_since(now) {
                Ok(left) if !left.is_zero() => stride(left).await,
                _ => return,
            }
        }
    }

    /// Waits so long. A suspend or a step of the clock ends the wait, at most one stride late: what it was for has to be
    /// decided anew.
    pub async fn sleep(&self, wait: Duration) {
        let (begun, shown) = (Instant::now(), self.now());
        loop {
            let waited = begun.elapsed();
            let left = wait.saturating_sub(waited);
            if left.is_zero() || steps(shown, self.now(), waited) {
                return;
            }
            stride(left).await;
        }
    }
}

/// Waits until a moment; for ever when there is none.
pub async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Sleeps for what is `left` of a wait, or until the wall clock is to be looked at again.
async fn stride(left: Duration) {
    sleep_until(next_beat(STRIDE).min(Instant::now() + left.min(STRIDE))).await;
}

/// Whether a wall clock that has gone from `before` to `now` did not go as the runtime's, which went by `waited`.
fn steps(before: SystemTime, now: SystemTime, waited: Duration) -> bool {
    match now.duration_since(before) {
        Ok(shown) => shown.abs_diff(waited) > DRIFT,
        Err(back) => back.duration() + waited > DRIFT,
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

    #[tokio::test(start_paused = true)]
    async fn whoever_looks_looks_at_the_same_moments() {
        let minute = Instant::now() + Duration::from_secs(60);
        let look = async |from: u64, every: Duration| {
            tokio::time::sleep(Duration::from_millis(from)).await;
            let mut seen = Vec::new();
            while Instant::now() < minute {
                sleep_until(next_beat(every)).await;
                seen.push(Instant::now());
            }
            seen
        };
        let (one, other, stride) = tokio::join!(look(0, BEAT), look(1234, BEAT), look(7777, STRIDE));
        assert!((19..=21).contains(&one.len()), "{}", one.len());
        let mut seen = other.iter().chain(&stride).filter(|moment| **moment < minute);
        assert!(seen.all(|moment| one.contains(moment)), "{one:?} {other:?} {stride:?}");
        assert!(one.windows(2).all(|pair| (pair[1] - pair[0]).abs_diff(BEAT) <= Duration::from_millis(2)), "{one:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_of_the_clock_ends_a_wait_within_a_stride() {
        let minute = Duration::from_secs(60);
        for by in [86_400, -86_400, 0, 1, -1] {
            let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000));
            let begun = Instant::now();
            let step = async {
                tokio::time::sleep(Duration::from_secs(5)).await;
                clock.step(by);
            };
            tokio::join!(clock.sleep(minute), step);
            match by.abs() {
                0 | 1 => assert_eq!(begun.elapsed(), minute, "{by}: that is no step"),
                _ => assert!(begun.elapsed() <= Duration::from_secs(15), "{by}: {:?}", begun.elapsed()),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_due_is_asked_again_at_each_stride() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000);
        let (clock, begun) = (Clock::simulated(start), Instant::now());
        // Due in a day, or at once when the clock shows less than the start.
        let due = |now| if now < start { now } else { start + Duration::from_secs(86_400) };
        let step = async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            clock.step(-3600);
        };
        tokio::join!(clock.until(due), step);
        assert!(begun.elapsed() <= Duration::from_secs(70), "{:?}", begun.elapsed());
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
