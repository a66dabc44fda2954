//! When a certificate is renewed. Pure: everything is given.

use crate::time::between;
use std::time::{Duration, SystemTime};

/// The renewal of a certificate that was received at `received` and ends at `not_after`: after half of that time,
/// ±10 % of it by `draw` (0 to 1), and never sooner than `floor` after the receipt. `NotBefore` plays no part: istiod
/// backdates it.
pub(super) fn renew_at(received: SystemTime, not_after: SystemTime, floor: Duration, draw: f64) -> SystemTime {
    let life = not_after.duration_since(received).unwrap_or_default();
    received + life.mul_f64(0.45 + 0.1 * draw.clamp(0.0, 1.0)).max(floor)
}

/// The wait after a failure: `usual`, but never more than a tenth of what is left of a certificate that is still good,
/// so that a control plane that comes back late is asked in time. Not less than half a second.
pub(super) fn retry_in(usual: Duration, left: Option<Duration>) -> Duration {
    const LEAST: Duration = Duration::from_millis(500);
    match left {
        Some(left) if !left.is_zero() => usual.min(between(left / 20, left / 10).max(LEAST)),
        _ => usual,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_day_is_renewed_around_noon() {
        let received = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let day = Duration::from_secs(86_400);
        let at = |draw| renew_at(received, received + day, Duration::from_secs(10), draw).duration_since(received).ok();
        assert_eq!(at(0.5), Some(day / 2));
        assert_eq!(at(0.0), Some(day.mul_f64(0.45)));
        assert_eq!(at(1.0), Some(day.mul_f64(0.55)));
    }

    proptest! {
        #[test]
        fn between_the_floor_and_the_end(life in 0u64..10_000_000, floor in 1u64..600, draw in 0.0f64..=1.0) {
            let received = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
            let (life, floor) = (Duration::from_secs(life), Duration::from_secs(floor));
            let at = renew_at(received, received + life, floor, draw);
            prop_assert!(at >= received + floor);
            prop_assert!(at <= received + life.mul_f64(0.56) || at == received + floor);
        }

        #[test]
        fn a_failure_never_waits_past_the_end(usual in 500u64..60_000, left in 6_000u64..100_000_000) {
            let wait = retry_in(Duration::from_millis(usual), Some(Duration::from_millis(left)));
            prop_assert!(wait >= Duration::from_millis(500).min(Duration::from_millis(usual)));
            prop_assert!(wait <= Duration::from_millis(left));
        }
    }
}
