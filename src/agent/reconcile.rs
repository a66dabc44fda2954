//! What is to be done so that what runs is what the files say: decided purely, given the time.

use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;

/// A directory is gone when it was missed for this long: one that is replaced is away for a moment, too.
const GONE: Duration = Duration::from_secs(10);

/// What there is of one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It runs; `missed` says since when its directory is not seen.
    Runs { missed: Option<Instant> },
    /// It was told to leave.
    Leaves,
    /// Its task is over: it has left, or a bug has ended it.
    Over,
}

/// What is to be done about one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Start,
    /// Its directory is there, or is missed since then.
    Note {
        missed: Option<Instant>,
    },
    Leave,
    Forget,
}

/// Compares the workloads that the files describe `now` with those that there are. What needs nothing is left out.
pub(super) fn actions<'a>(
    wanted: impl IntoIterator<Item = &'a str>,
    running: &BTreeMap<&'a str, State>,
    now: Instant,
) -> Vec<(&'a str, Action)> {
    let mut all: BTreeMap<&str, (bool, Option<State>)> =
        running.iter().map(|(name, state)| (*name, (false, Some(*state)))).collect();
    for name in wanted {
        all.entry(name).or_default().0 = true;
    }
    all.into_iter().filter_map(|(name, (wanted, state))| Some((name, action(wanted, state, now)?))).collect()
}

fn action(wanted: bool, state: Option<State>, now: Instant) -> Option<Action> {
    match (wanted, state) {
        (true, None | Some(State::Over)) => Some(Action::Start),
        (false, Some(State::Over)) => Some(Action::Forget),
        // Whoever comes back meanwhile is started when the one before it is gone.
        (_, Some(State::Leaves)) | (false, None) => None,
        (true, Some(State::Runs { missed: None })) => None,
        (true, Some(State::Runs { .. })) => Some(Action::Note { missed: None }),
        (false, Some(State::Runs { missed: None })) => Some(Action::Note { missed: Some(now) }),
        (false, Some(State::Runs { missed: Some(since) })) => (now - since >= GONE).then_some(Action::Leave),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_started_or_leaves_and_nothing_else_is_touched() {
        let now = Instant::now();
        let (runs, missed) = (State::Runs { missed: None }, |since| State::Runs { missed: Some(since) });
        let running = BTreeMap::from([
            ("stays", runs),
            ("back", missed(now)),
            ("missed", runs),
            ("copied", missed(now - GONE / 2)),
            ("gone", missed(now - GONE)),
            ("leaves", State::Leaves),
            ("returns", State::Leaves),
            ("left", State::Over),
            ("failed", State::Over),
        ]);
        let wanted = ["new", "stays", "back", "returns", "failed"];
        let expected = [
            ("back", Action::Note { missed: None }),
            ("failed", Action::Start),
            ("gone", Action::Leave),
            ("left", Action::Forget),
            ("missed", Action::Note { missed: Some(now) }),
            ("new", Action::Start),
        ];
        assert_eq!(actions(wanted, &running, now), expected);
    }

    #[test]
    fn a_directory_is_gone_only_when_it_was_missed_twice() {
        let (now, mut state) = (Instant::now(), State::Runs { missed: None });
        let mut look = |wanted: bool, after: u64| {
            let done = action(wanted, Some(state), now + Duration::from_secs(after));
            if let Some(Action::Note { missed }) = done {
                state = State::Runs { missed };
            }
            done == Some(Action::Leave)
        };
        // Missed once, after a long time without a look; there again; and then for good.
        assert_eq!([look(false, 100), look(true, 105), look(false, 110), look(false, 119)], [false; 4]);
        assert!(look(false, 120));
    }
}
