//! What the connections of a listener hold for ends that do not take it.

use super::tls::BATCH;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// From here on little is read at once, in bytes: as much as 128 slow readers hold.
const ENOUGH: usize = 32 << 20;
/// What is read at once then, in each direction.
const LITTLE: usize = 4 << 10;

/// Counts what is held in memory by all connections of a listener. Nobody waits for room, so nobody who holds it can keep
/// others from going on: with none left, all read little at a time, and hold [`LITTLE`] for each end that does not take it,
/// or one record of TLS. When the others have taken what was held for them, more is read again.
///
/// So a listener holds [`ENOUGH`], a [`BATCH`] for each thread that has looked in the same moment, and at most 24 KiB for each
/// connection: 270 MiB for 10,000 of which no end reads.
#[derive(Debug)]
pub(super) struct Budget {
    enough: usize,
    held: AtomicUsize,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(ENOUGH)
    }
}

impl Budget {
    pub(super) fn new(enough: usize) -> Self {
        Self { enough, held: AtomicUsize::default() }
    }

    /// The most that may be read now.
    pub(super) fn batch(&self) -> usize {
        if self.held() < self.enough { BATCH } else { LITTLE }
    }

    /// How much is held.
    pub(super) fn held(&self) -> usize {
        self.held.load(Relaxed)
    }

    pub(super) fn hold(&self, bytes: usize) {
        self.held.fetch_add(bytes, Relaxed);
    }

    pub(super) fn release(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Relaxed);
    }
}
