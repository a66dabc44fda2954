//! What keeps a peer that tries again and again from filling the journal.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// One line in the journal for each refused user and this time.
const SAY_EVERY: Duration = Duration::from_secs(60);
/// Users whose refusals are counted one by one; those beyond share a line.
const MAX_COUNTED: usize = 64;

/// Who was refused, and when that was said last.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<Counted>);

impl Refusals {
    /// Counts a refusal of `uid` (none when the user is not known); how many went unsaid before it, when it is to be said.
    pub(super) fn due(&self, uid: impl Into<Option<u32>>) -> Option<u64> {
        let uid = uid.into();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).count(uid, Instant::now())
    }
}

#[derive(Debug, Default)]
struct Counted(BTreeMap<Option<u32>, (Instant, u64)>);

impl Counted {
    fn count(&mut self, uid: Option<u32>, now: Instant) -> Option<u64> {
        let full = self.0.len() >= MAX_COUNTED && !self.0.contains_key(&uid);
        let who = uid.filter(|_| !full);
        match self.0.get_mut(&who) {
            Some((said, unsaid)) if now.duration_since(*said) < SAY_EVERY => {
                *unsaid += 1;
                None
            }
            entry => {
                let unsaid = entry.map_or(0, |(_, unsaid)| *unsaid);
                self.0.retain(|_, (said, _)| now.duration_since(*said) < SAY_EVERY);
                self.0.insert(who, (now, 0));
                Some(unsaid)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_said_once_a_minute_for_each_user() {
        let (mut refusals, start) = (Counted::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(refusals.count(Some(1000), at(0)), Some(0));
        assert_eq!(refusals.count(Some(1000), at(1)), None);
        assert_eq!(refusals.count(Some(1000), at(59)), None);
        assert_eq!(refusals.count(Some(1001), at(59)), Some(0));
        assert_eq!(refusals.count(Some(1000), at(60)), Some(2));
        assert_eq!(refusals.count(Some(1000), at(61)), None);
    }

    #[test]
    fn many_users_share_a_line_and_no_memory() {
        let (mut refusals, start) = (Counted::default(), Instant::now());
        let said = (0..10_000).filter(|uid| refusals.count(Some(*uid), start).is_some()).count();
        assert_eq!((said, refusals.0.len()), (MAX_COUNTED + 1, MAX_COUNTED + 1));
        // Those that are old make room.
        assert_eq!(refusals.count(Some(20_000), start + SAY_EVERY), Some(10_000 - MAX_COUNTED as u64 - 1));
        assert_eq!(refusals.count(Some(20_001), start + SAY_EVERY), Some(0));
    }
}
