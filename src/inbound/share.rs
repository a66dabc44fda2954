//! How many connections each caller has.

use crate::spiffe::SpiffeId;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Who calls; none stands for all who do not say, for they speak no TLS.
pub(super) type Caller = Option<SpiffeId>;

/// The open connections of each caller, of whom none may have them all.
#[derive(Debug, Clone, Default)]
pub(super) struct Shares(Arc<Mutex<HashMap<Caller, u64>>>);

/// A connection that counts for its caller until it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    shares: Shares,
    caller: Caller,
}

impl Shares {
    /// One more connection of `caller`, who may have `most`.
    pub(super) fn take(&self, caller: &Caller, most: u64) -> Option<Share> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.get(caller).copied().unwrap_or_default();
        if count >= most {
            return None;
        }
        open.insert(caller.clone(), count + 1);
        Some(Share { shares: self.clone(), caller: caller.clone() })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut open = self.shares.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.caller).filter(|count| **count > 1) {
            *count -= 1;
        } else {
            open.remove(&self.caller);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_caller_has_a_share_of_its_own_and_leaves_nothing_behind() {
        let shares = Shares::default();
        let callers = [None, Some("spiffe://td/ns/a/sa/b".parse().unwrap()), Some("spiffe://td/c".parse().unwrap())];
        let mut held: Vec<_> =
            callers.iter().flat_map(|caller| [shares.take(caller, 2), shares.take(caller, 2)]).collect();
        assert!(held.iter().all(Option::is_some) && callers.iter().all(|caller| shares.take(caller, 2).is_none()));
        held.swap_remove(0);
        held.push(shares.take(&None, 2));
        assert!(held.iter().all(Option::is_some) && shares.take(&None, 2).is_none());
        drop(held);
        assert!(shares.0.lock().unwrap().is_empty());
    }
}
