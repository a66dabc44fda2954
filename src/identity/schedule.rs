//! When a certificate is renewed. Pure: everything is given.

use crate::time::between;
use std::time::{Duration, SystemTime};

/// A certificate that lives shorter cannot be renewed in time, whatever we do.
pub(super) const SHORTEST: Duration = Duration::from_secs(1);

/// The renewal of a certificate that was received at `received` and ends at `not_after`: after half of that time,
/// ±10 % of it by `draw` (0 to 1). `NotBefore` plays no part: istiod backdates it.
pub(super) fn renew_at(received: SystemTime, not_after: SystemTime, draw: f64) -> SystemTime {
    received + life(received, not_after).mul_f64(0.45 + 0.1 * draw.clamp(0.0, 1.0))
}

/// What is left of a certificate when it is received.
pub(super) fn life(received: SystemTime, not_after: SystemTime) -> Duration {
    not_after.duration_since(received).unwrap_or_default()
}

/// The least time between two renewals, whatever the clock does: as configured, but never so long that a certificate with
/// this `life` would end before it.
pub(super) fn distance(configured: Duration, life: Duration) -> Duration {
    configured.min(life / 5)
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
        let at = |draw| renew_at(received, received + day, draw).duration_since(received).ok();
        assert_eq!(at(0.5), Some(day / 2));
        assert_eq!(at(0.0), Some(day.mul_f64(0.45)));
        assert_eq!(at(1.0), Some(day.mul_f64(0.55)));
    }

    proptest! {
        #[test]
        fn a_certificate_is_renewed_before_its_end_whatever_distance_is_configured(
            life in 1_000u64..10_000_000_000, configured in 0..=u64::MAX, draw in 0.0f64..=1.0
        ) {
            let received = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
            let life = Duration::from_millis(life);
            let at = renew_at(received, received + life, draw);
            prop_assert!(at >= received + life.mul_f64(0.44) && at <= received + life.mul_f64(0.56));
            let distance = distance(Duration::from_secs(configured), life);
            prop_assert!(distance <= Duration::from_secs(configured));
            // One renewal that the clock brought too early, and the next is still in time.
            prop_assert!(received + 2 * distance < received + life);
        }

        #[test]
        fn a_failure_never_waits_past_the_end(usual in 500u64..60_000, left in 6_000u64..100_000_000) {
            let wait = retry_in(Duration::from_millis(usual), Some(Duration::from_millis(left)));
            prop_assert!(wait >= Duration::from_millis(500).min(Duration::from_millis(usual)));
            prop_assert!(wait <= Duration::from_millis(left));
        }
    }
}
