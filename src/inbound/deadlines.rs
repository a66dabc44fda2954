//! When a connection ends that does not end by itself: pure, given the time and what it does.

use super::Settings;
use std::time::{Duration, Instant};

/// From one look whether a connection is quiet to the next, at most and at least.
const LOOK: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(10));

/// What a connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    /// Bytes are on their way that an end has not taken.
    Moves,
    /// None are, but the application owes the peer an answer.
    Owes,
    /// Neither.
    Rests,
    /// An end has broken, and the last that it has said is on its way to the other.
    Lingers,
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Both ends have said all they had to say.
    Said,
    /// Nothing was moved for as long as that may last.
    Quiet,
    /// An end is gone, or we cannot wait any longer.
    Broken,
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Look again then.
    Look(Instant),
    End(End),
}

/// The deadlines of one connection.
#[derive(Debug)]
pub(super) struct Deadlines {
    idle: Duration,
    drain: Duration,
    /// When it is too old.
    old: Option<Instant>,
    /// When it has to have ended, because the agent stops.
    pub(super) stop: Option<Instant>,
}

impl Deadlines {
    /// Of a connection that is let be for `age`.
    pub(super) fn new(settings: &Settings, age: Option<Duration>, now: Instant) -> Self {
        Self { idle: settings.idle, drain: settings.drain, old: age.map(|age| now + age), stop: None }
    }

    /// What to do at `now` with a connection on which bytes were moved last at `moved`.
    pub(super) fn next(&self, now: Instant, moved: Instant, doing: Doing) -> Next {
        let aged = self.old.filter(|old| *old <= now).map(|old| old + self.drain);
        match self.stop.into_iter().chain(aged).min() {
            // Who was asked and has not answered yet is not quiet, but busy.
            Some(until) if doing == Doing::Rests && now >= moved + quiet(until, now) => Next::End(End::Quiet),
            Some(until) if now >= until => Next::End(End::Broken),
            Some(until) => Next::Look(until.min(now + look(until - now))),
            None if now < moved + self.idle => {
                // Nothing tells when the last has arrived.
                let lingers = (doing == Doing::Lingers).then(|| now + look(now - moved));
                Next::Look(self.old.into_iter().chain(lingers).fold(moved + self.idle, Instant::min))
            }
            // What is on its way and not taken would be lost: that is no regular end.
            None if matches!(doing, Doing::Moves | Doing::Lingers) => Next::End(End::Broken),
            None => Next::End(End::Quiet),
        }
    }
}

/// For how long nothing must have been moved on a connection that is to end at `until` at the latest: a quarter of the time
/// that is left. Bytes do not tell a pause in the middle of an answer from the time between two requests. Who has not called
/// for a while does not hold up the end; and who calls all the time is ended between two calls rather than in one.
pub(super) fn quiet(until: Instant, now: Instant) -> Duration {
    until.saturating_duration_since(now) / 4
}

/// When to look again: more often when little is left, or has passed.
fn look(time: Duration) -> Duration {
    let (most, least) = LOOK;
    (time / 4).clamp(least, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Idle after 100 s, old after 50, with 8 to drain; moved last at `now`.
    fn deadlines(now: Instant) -> Deadlines {
        Deadlines { idle: 100 * SECOND, drain: 8 * SECOND, old: Some(now + 50 * SECOND), stop: None }
    }

    #[test]
    fn what_is_idle_ends_in_order_unless_it_would_lose_something() {
        let now = Instant::now();
        let young = Deadlines { old: None, ..deadlines(now) };
        let last = now + 100 * SECOND;
        for (doing, end) in [
            (Doing::Rests, End::Quiet),
            (Doing::Owes, End::Quiet),
            (Doing::Moves, End::Broken),
            (Doing::Lingers, End::Broken),
        ] {
            assert_eq!(young.next(last, now, doing), Next::End(end));
            assert!(
                matches!(young.next(last - SECOND, now, doing), Next::Look(at) if at > last - SECOND && at <= last)
            );
        }
    }

    #[test]
    fn what_is_old_ends_at_a_quiet_moment_or_when_it_has_drained() {
        let now = Instant::now();
        let (ours, old) = (deadlines(now), now + 50 * SECOND);
        assert_eq!(ours.next(now, now, Doing::Moves), Next::Look(old));
        assert_eq!(ours.next(old, now, Doing::Rests), Next::End(End::Quiet));
        assert_eq!(ours.next(old, old, Doing::Rests), Next::Look(old + LOOK.0));
        for doing in [Doing::Moves, Doing::Owes, Doing::Lingers] {
            assert_eq!(ours.next(old + 7 * SECOND, now, doing), Next::Look(old + 7 * SECOND + LOOK.0));
            assert_eq!(ours.next(old + 8 * SECOND, now, doing), Next::End(End::Broken));
        }
    }

    #[test]
    fn a_stop_is_sooner_than_age_and_less_and_less_has_to_be_quiet() {
        let now = Instant::now();
        let ours = Deadlines { stop: Some(now + 4 * SECOND), ..deadlines(now) };
        assert_eq!(ours.next(now, now, Doing::Rests), Next::Look(now + LOOK.0));
        assert_eq!(ours.next(now + SECOND, now + SECOND / 2, Doing::Rests), Next::Look(now + SECOND + LOOK.0));
        assert_eq!(ours.next(now + 2 * SECOND, now + SECOND, Doing::Rests), Next::End(End::Quiet));
        // It neither spins nor sleeps through.
        let late = now + 4 * SECOND - LOOK.1 / 2;
        assert_eq!(ours.next(late, late, Doing::Owes), Next::Look(now + 4 * SECOND));
        assert_eq!(ours.next(now + 4 * SECOND, now + 4 * SECOND, Doing::Moves), Next::End(End::Broken));
    }

    #[test]
    fn the_last_bytes_are_looked_after_often_at_first() {
        let now = Instant::now();
        let ours = deadlines(now);
        assert_eq!(ours.next(now, now, Doing::Lingers), Next::Look(now + LOOK.1));
        assert_eq!(ours.next(now + 9 * SECOND, now, Doing::Lingers), Next::Look(now + 9 * SECOND + LOOK.0));
    }
}
