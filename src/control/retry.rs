//! When to try again after a failure: one policy for both loops that talk to a control plane.

use super::Cost;
use crate::time::{Backoff, between};
use std::time::Duration;

/// From one look at a control plane that is not there to the next.
const LOOK: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(2)];
/// From one stream that istiod had no time for to the next, on the connection that stays: with a fleet that waits, istiod
/// has always enough to do.
const TURN: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(6)];
/// Wait before the first attempt after something that lived: a fleet shall not come back in one instant.
const PROMPT: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(200)];
/// The longest wait after something that lived: its entry has ten seconds to be taken up again, and that takes time, too.
const ENTRY: Duration = Duration::from_secs(4);

/// Waits between attempts. They grow only for what has cost the control plane something.
#[derive(Debug)]
pub struct Retry {
    backoff: Backoff,
    cap: Duration,
    /// Whether the next end of something that lived is followed by a prompt attempt.
    prompt: bool,
}

impl Retry {
    /// Waits that grow from `floor` up to `cap`.
    pub fn new(floor: Duration, cap: Duration) -> Self {
        Self { backoff: Backoff::new(floor, cap), cap, prompt: true }
    }

    /// The wait after a failure of this cost.
    pub fn after(&mut self, cost: Cost) -> Duration {
        match cost {
            Cost::Nothing => between(LOOK[0], LOOK[1]),
            Cost::Stream => between(TURN[0], TURN[1]),
            Cost::Handshake => self.backoff.next_wait(),
            Cost::PushBack | Cost::Final => self.backoff.slowest(),
        }
    }

    /// The wait after the end, of this cost, of something that has `lived`. It is resumed promptly, but again only when it
    /// has outlived the longest wait: a control plane that answers and closes is not asked all the time.
    pub fn after_life(&mut self, lived: Duration, cost: Cost) -> Duration {
        if lived >= self.cap {
            self.reset();
        }
        if std::mem::take(&mut self.prompt) { between(PROMPT[0], PROMPT[1]) } else { self.after(cost).min(ENTRY) }
    }

    /// Begins anew, after a success that costs something to have.
    pub fn reset(&mut self) {
        self.backoff.reset();
        self.prompt = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FLOOR: Duration = Duration::from_millis(500);
    const CAP: Duration = Duration::from_secs(30);

    #[test]
    fn who_is_not_there_is_looked_for_at_the_same_pace_for_ever() {
        let mut retry = Retry::new(FLOOR, CAP);
        for _ in 0..100 {
            let wait = retry.after(Cost::Nothing);
            assert!(wait >= LOOK[0] && wait <= LOOK[1], "{wait:?}");
        }
        assert!(retry.after(Cost::Handshake) <= FLOOR * 2, "looks are no reason to wait longer");
    }

    #[test]
    fn push_back_begins_at_the_slow_end() {
        let mut retry = Retry::new(FLOOR, CAP);
        for cost in [Cost::PushBack, Cost::Final] {
            assert!(retry.after(cost) >= CAP / 2);
        }
    }

    #[test]
    fn what_lived_is_resumed_promptly_but_once() {
        let mut retry = Retry::new(FLOOR, CAP);
        let short = CAP - Duration::from_secs(1);
        assert!(retry.after_life(Duration::ZERO, Cost::Handshake) <= PROMPT[1]);
        for _ in 0..20 {
            let wait = retry.after_life(short, Cost::Handshake);
            assert!(wait >= FLOOR && wait <= ENTRY, "{wait:?}");
        }
        assert!(retry.after_life(CAP, Cost::Handshake) <= PROMPT[1]);
        assert!(retry.after_life(short, Cost::Handshake) >= FLOOR);
    }

    proptest! {
        /// Whatever it answers and however short it lives: in half an hour it pays for a bounded number of handshakes.
        #[test]
        fn handshakes_are_bounded(lives in prop::collection::vec(0u64..30_000, 1..40)) {
            let mut retry = Retry::new(FLOOR, CAP);
            let (mut at, mut handshakes) = (Duration::ZERO, 0);
            for life in lives.iter().cycle().map(|ms| Duration::from_millis(*ms)) {
                at += life + retry.after_life(life, Cost::Handshake);
                if at > Duration::from_secs(1800) {
                    break;
                }
                handshakes += 1;
            }
            // Drawn evenly below ceilings that double, and cut at four seconds: every three on average.
            prop_assert!(handshakes <= 700, "{handshakes}");
        }
    }
}
