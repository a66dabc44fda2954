//! Who may keep which WorkloadEntry. istiod keeps one for each name, so of several workloads of one name, twins, one runs.
//!
//! Each workload says what it claims, and rules about itself from what all have said: whenever something changes, again.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// How long others wait for one that does not know yet what it claims.
const PATIENCE: Duration = Duration::from_secs(2);

/// What each workload claims.
pub(super) type Claims = BTreeMap<String, Claim>;

/// What one workload claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Claim {
    /// Not known yet: its files are being read.
    Reading { since: Instant },
    /// Its address is not known yet; what would be its entry at any.
    Seeking { anywhere: String, since: Instant },
    /// This entry.
    Entry {
        name: String,
        anywhere: String,
        /// Whether it is registered, or about to be.
        holds: bool,
        /// When its certificate ends.
        valid_until: Option<SystemTime>,
    },
    /// None at all.
    Nothing,
}

/// Whether a workload may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ruling {
    Free,
    /// Until another has said what it claims, at the latest then; or has let go.
    Wait(Option<Instant>),
    /// It is this workload's.
    Taken(String),
}

/// Rules about `name`. Of twins the one with a valid certificate is preferred, then the one that holds the entry already,
/// then the first by name.
pub(super) fn ruling(name: &str, claims: &Claims, now: Instant, wall: SystemTime) -> Ruling {
    let (entry, anywhere) = match claims.get(name) {
        Some(Claim::Entry { name, anywhere, .. }) => (name, anywhere),
        Some(Claim::Seeking { since, .. }) if now < *since + PATIENCE => return Ruling::Wait(Some(*since + PATIENCE)),
        _ => return Ruling::Free,
    };
    let others = || claims.iter().filter(|(other, _)| *other != name);
    let rank = |claim: &Claim| match claim {
        Claim::Entry { holds, valid_until, .. } => (valid_until.is_some_and(|end| wall < end), *holds),
        _ => (false, false),
    };
    let holds = |claim: &Claim| matches!(claim, Claim::Entry { holds: true, .. });
    let twins = || others().filter(|(_, claim)| matches!(claim, Claim::Entry { name, .. } if name == entry));
    let own = claims.get(name).map(rank).unwrap_or_default();
    // The greatest rank; of equal ones, the first name.
    let best = twins().map(|(other, claim)| (rank(claim), std::cmp::Reverse(other))).max();
    if let Some((_, other)) = best.filter(|best| *best > (own, std::cmp::Reverse(&name.to_owned()))) {
        return Ruling::Taken(other.0.clone());
    }
    if twins().any(|(_, claim)| holds(claim)) {
        return Ruling::Wait(None);
    }
    let unknown = others().filter_map(|(_, claim)| match claim {
        Claim::Reading { since } => Some(*since + PATIENCE),
        Claim::Seeking { anywhere: other, since } if other == anywhere => Some(*since + PATIENCE),
        _ => None,
    });
    match unknown.filter(|end| now < *end).max() {
        Some(end) if !claims.get(name).is_some_and(holds) => Ruling::Wait(Some(end)),
        _ => Ruling::Free,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: SystemTime = SystemTime::UNIX_EPOCH;

    fn entry(holds: bool, valid: bool) -> Claim {
        let valid_until = valid.then(|| END + Duration::from_secs(9));
        Claim::Entry { name: "vms/a-10.0.0.1".to_owned(), anywhere: "vms/a".to_owned(), holds, valid_until }
    }

    fn rule(name: &str, claims: &[(&str, Claim)], now: Instant) -> Ruling {
        ruling(name, &claims.iter().map(|(name, claim)| ((*name).to_owned(), claim.clone())).collect(), now, END)
    }

    #[test]
    fn of_twins_the_certificate_decides_then_who_holds_it_then_the_name() {
        let now = Instant::now();
        let two = |a: Claim, b: Claim| {
            let claims = [("a", a), ("b", b)];
            [rule("a", &claims, now), rule("b", &claims, now)]
        };
        let taken = |by: &str| Ruling::Taken(by.to_owned());
        assert_eq!(two(entry(false, false), entry(false, false)), [Ruling::Free, taken("a")]);
        assert_eq!(two(entry(false, false), entry(true, false)), [taken("b"), Ruling::Free]);
        assert_eq!(two(entry(false, true), entry(true, true)), [taken("b"), Ruling::Free]);
        assert_eq!(two(entry(false, false), entry(false, true)), [taken("b"), Ruling::Free]);
        // The better one waits until the other has let go.
        assert_eq!(two(entry(true, false), entry(false, true)), [taken("b"), Ruling::Wait(None)]);
        assert_eq!(two(entry(false, false), Claim::Nothing), [Ruling::Free, Ruling::Free]);
    }

    #[test]
    fn who_is_not_known_yet_is_waited_for_but_not_for_long() {
        let now = Instant::now();
        let end = now + PATIENCE;
        let reading = [("a", entry(false, false)), ("b", Claim::Reading { since: now })];
        assert_eq!(rule("a", &reading, now), Ruling::Wait(Some(end)));
        assert_eq!(rule("a", &reading, end), Ruling::Free);
        let held = [("a", entry(true, false)), ("b", Claim::Reading { since: now })];
        assert_eq!(rule("a", &held, now), Ruling::Free, "what runs goes on");
        let seeking = |anywhere: &str| Claim::Seeking { anywhere: anywhere.to_owned(), since: now };
        assert_eq!(rule("a", &[("a", entry(false, false)), ("b", seeking("vms/a"))], now), Ruling::Wait(Some(end)));
        assert_eq!(rule("a", &[("a", entry(false, false)), ("b", seeking("vms/b"))], now), Ruling::Free);
        // A certificate can be had without an address.
        assert_eq!(rule("a", &[("a", seeking("vms/a"))], end), Ruling::Free);
    }
}
