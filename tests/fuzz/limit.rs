//! What a door may cost.

use crate::MEMORY;
use nix::time::{ClockId, clock_gettime};
use std::time::Duration;
use we_agent::fuzz::Door;

/// Of this thread's processor: the clock would tell what else the machine does. Unoptimised, all takes many times as long.
const TIME: Duration = Duration::from_secs(if cfg!(fuzzing) { 1 } else { 20 });
/// Allocated at once, in bytes.
const ROOM: usize = 64 << 20;

/// Gives `bytes` to a door, and says what it has cost too much.
pub(crate) fn knock(door: Door, bytes: &[u8]) -> Result<(), String> {
    let (before, begun) = (MEMORY.current_usage(), used());
    MEMORY.reset_peak_usage();
    door(bytes);
    let (room, time) = (MEMORY.peak_usage().saturating_sub(before), used().saturating_sub(begun));
    if room > ROOM {
        return Err(format!("it took {} MiB", room >> 20));
    }
    if time > TIME {
        return Err(format!("it took {time:?}"));
    }
    Ok(())
}

/// What this thread has had of a processor.
pub(crate) fn used() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}
