//! What must hold whatever happens, in whatever order; and the courses that went wrong once.
#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use std::time::Duration;

const ALL: [Reason; 4] = [Reason::Goaway, Reason::Renewed, Reason::Address, Reason::Disowned];

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// The world around a machine: streams by their number, and what everybody was told.
struct World {
    machine: Machine,
    now: Instant,
    opening: Option<Reasons>,
    streams: u32,
    live: Option<u32>,
    older: Option<u32>,
    /// Since when no stream lives; none while one does.
    bare: Option<Instant>,
    registered: bool,
    /// Reasons that stand, by our own book, and those raised since the present opening began.
    stand: Reasons,
    raised: Reasons,
    over: bool,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            machine: Machine::new(),
            now,
            opening: Some(Reasons::new()),
            streams: 0,
            live: None,
            older: None,
            bare: Some(now),
            registered: false,
            stand: Reasons::new(),
            raised: Reasons::new(),
            over: false,
        }
    }

    /// Lets time pass, and everything happen that falls due.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.machine.next().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            let before = self.machine.next();
            self.happens(Event::Time);
            assert_ne!((before, self.over), (self.machine.next(), false), "a moment that has come is over");
        }
        self.now = end;
    }

    /// An event, if the world allows it.
    fn happens(&mut self, event: Event) {
        match event {
            _ if self.over => return,
            Event::Reason(reason, _) => {
                self.stand.insert(reason);
                self.raised.insert(reason);
            }
            Event::Moot(reason) => {
                self.stand.remove(&reason);
                self.raised.remove(&reason);
            }
            Event::Answered(_) | Event::Failed(_) if self.opening.is_none() => return,
            Event::Failed(_) => self.opening = None,
            Event::Ended if self.live.is_none() => return,
            Event::Ended => (self.live, self.bare) = (None, Some(self.now)),
            _ => {}
        }
        let actions = self.machine.on(event, self.now);
        for action in actions {
            self.does(action);
        }
        if let Event::Answered(Some(_)) = event {
            self.stand.insert(Reason::Renewed);
        }
        self.holds();
    }

    fn does(&mut self, action: Action) {
        assert!(!self.over, "{action:?} after the end");
        match action {
            Action::Open(reasons) => {
                assert!(self.live.is_some() && !reasons.is_empty());
                assert!(self.opening.replace(reasons).is_none(), "one at a time");
                self.raised.clear();
            }
            Action::Adopt => {
                let answered = self.opening.take().unwrap();
                self.stand.retain(|reason| !answered.contains(reason) || self.raised.contains(reason));
                self.streams += 1;
                if let Some(before) = self.live.replace(self.streams) {
                    assert!(self.older.replace(before).is_none(), "three streams at once");
                }
                (self.bare, self.registered) = (None, true);
            }
            Action::Retire => assert!(self.older.take().is_some(), "there is none"),
            Action::Lose => {
                assert!(self.live.is_none() && self.registered, "it lives, or was told already");
                self.registered = false;
            }
            Action::Withdraw => assert!(self.live.is_some()),
            Action::Close => {
                assert!(self.older.is_none(), "the older stream first");
                assert!(self.live.take().is_some());
            }
            Action::End | Action::Fail => {
                assert!(self.older.is_none(), "a stream has leaked");
                (self.over, self.registered) = (true, false);
            }
        }
    }

    /// What must hold at any time.
    fn holds(&self) {
        if let (true, Some(bare)) = (self.registered, self.bare) {
            assert!(self.now - bare <= GRACE, "registered, and no stream for {:?}", self.now - bare);
        }
        if self.over {
            return;
        }
        for reason in &self.stand {
            assert!(self.machine.has(*reason) || self.machine.is_leaving(), "{reason:?} is forgotten");
        }
        let idle = self.live.is_some() && self.opening.is_none() && !self.machine.is_leaving();
        assert!(!idle || self.stand.is_empty() || self.machine.next().is_some(), "nothing will happen");
    }
}

/// What may happen, and how long after the thing before.
fn story() -> impl Strategy<Value = Vec<(u64, u8, u8, u64)>> {
    prop::collection::vec((0u64..7_000, 0u8..32, 0u8..4, 0u64..30_000), 1..60)
}

proptest! {
    #[test]
    fn whatever_happens(story in story()) {
        let mut world = World::new();
        for (pause, what, which, wait) in story {
            // Half of all things happen at once.
            world.pass(if pause < 3_500 { Duration::ZERO } else { ms(pause - 3_500) });
            let (reason, at) = (ALL[usize::from(which)], world.now + ms(wait));
            world.happens(match what {
                0..8 => Event::Reason(reason, if wait < 15_000 { world.now } else { at }),
                8..10 => Event::Moot(reason),
                10..18 => Event::Answered(None),
                18..20 => Event::Answered(Some(at)),
                20..25 => Event::Failed(at),
                25..29 => Event::Ended,
                29..31 => Event::Time,
                _ => Event::Stop { for_good: which > 1 },
            });
        }
        // In the end everything that is opened is answered, and nothing is left to be done.
        for _ in 0..3 {
            world.pass(ms(60_000));
            world.happens(Event::Answered(None));
        }
        prop_assert!(world.over || world.stand.is_empty(), "{:?} is never acted on", world.stand);
        world.happens(Event::Stop { for_good: true });
        world.pass(ms(1_000));
        prop_assert!(world.over);
    }
}

/// A machine whose first stream was answered.
fn held() -> (Machine, Instant) {
    let (mut machine, now) = (Machine::new(), Instant::now());
    assert_eq!(machine.on(Event::Answered(None), now), [Action::Adopt]);
    (machine, now)
}

#[test]
fn a_silent_successor_does_not_keep_it_registered() {
    let (mut machine, now) = held();
    assert_eq!(machine.on(Event::Reason(Reason::Goaway, now), now), [Action::Open([Reason::Goaway].into())]);
    assert_eq!(machine.on(Event::Ended, now + ms(500)), []);
    assert_eq!(machine.next(), Some(now + ms(500) + GRACE));
    assert_eq!(machine.on(Event::Time, now + ms(500) + GRACE), [Action::Lose]);
    assert_eq!(machine.on(Event::Answered(None), now + ms(40_000)), [Action::Adopt], "late is better than never");
}

#[test]
fn a_renewal_does_not_make_an_address_forgotten() {
    let (mut machine, now) = held();
    machine.on(Event::Reason(Reason::Address, now), now);
    machine.on(Event::Failed(now + ms(20_000)), now);
    let both = Reasons::from([Reason::Renewed, Reason::Address]);
    assert_eq!(machine.on(Event::Reason(Reason::Renewed, now + ms(1)), now + ms(1)), [Action::Open(both.clone())]);
    machine.on(Event::Failed(now + ms(9_000)), now + ms(2));
    assert_eq!(machine.next(), Some(now + ms(9_000)));
    assert_eq!(machine.on(Event::Time, now + ms(9_000)), [Action::Open(both)]);
    // What is wanted while a stream is being opened is not what it is opened for.
    machine.on(Event::Reason(Reason::Address, now + ms(9_001)), now + ms(9_001));
    assert_eq!(machine.on(Event::Answered(None), now + ms(9_002)), [Action::Adopt]);
    assert_eq!(machine.next(), Some(now + ms(9_001)), "at once");
    assert_eq!(machine.on(Event::Time, now + ms(9_002)), [Action::Open([Reason::Address].into())]);
}

#[test]
fn a_move_waits_for_its_turn_unless_another_is_due() {
    let (mut machine, now) = held();
    assert_eq!(machine.on(Event::Reason(Reason::Goaway, now + ms(1_500)), now), []);
    assert_eq!((machine.has(Reason::Goaway), machine.next()), (true, Some(now + ms(1_500))));
    let both = Reasons::from([Reason::Goaway, Reason::Address]);
    assert_eq!(machine.on(Event::Reason(Reason::Address, now), now), [Action::Open(both)]);
    // What was fulfilled otherwise is not moved for.
    let (mut machine, now) = held();
    machine.on(Event::Reason(Reason::Disowned, now + ms(1_500)), now);
    assert_eq!(machine.on(Event::Moot(Reason::Disowned), now + ms(500)), []);
    assert_eq!(machine.next(), None);
}

#[test]
fn streams_are_closed_in_the_order_in_which_they_were_opened() {
    let (mut machine, now) = held();
    machine.on(Event::Reason(Reason::Goaway, now), now);
    assert_eq!(machine.on(Event::Answered(None), now), [Action::Adopt]);
    assert_eq!(machine.on(Event::Stop { for_good: true }, now), [Action::Withdraw]);
    assert_eq!(machine.on(Event::Time, now + OVERLAP), [Action::Retire]);
    assert_eq!(machine.next(), Some(now + REPORTED));
    assert_eq!(machine.on(Event::Time, now + REPORTED), [Action::Close, Action::End]);

    let (mut machine, now) = held();
    machine.on(Event::Reason(Reason::Goaway, now), now);
    machine.on(Event::Answered(None), now);
    assert_eq!(machine.on(Event::Stop { for_good: false }, now), [Action::Retire]);
    assert_eq!(machine.next(), Some(now + OVERLAP));
    assert_eq!(machine.on(Event::Time, now + OVERLAP), [Action::Close, Action::End]);
}
