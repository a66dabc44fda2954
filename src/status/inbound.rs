//! What an inbound listener counts. The threads of the data path write it without a lock; whoever asks adds it up.

use super::InboundRefusal;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::sync::watch;

/// The upper bounds of the histogram of handshakes, in microseconds; there is one more class above them.
pub const HANDSHAKE_BOUNDS: [u64; 9] = [500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 1_000_000, 10_000_000];
const CLASSES: usize = HANDSHAKE_BOUNDS.len() + 1;
const KINDS: usize = InboundRefusal::ALL.len();

/// One inbound listener, as far as others may know.
#[derive(Debug, Clone)]
pub struct Inbound {
    /// Where it shall listen, as configured.
    pub listen: String,
    /// Where it forwards to.
    pub forward: String,
    /// Whether plain clients are let through.
    pub permissive: bool,
    /// What may not be as it was meant.
    pub notes: Vec<String>,
    /// Where it listens, or why not; written by the listener.
    pub place: watch::Receiver<InboundPlace>,
    /// Written by the listener's connections.
    pub counters: Arc<InboundCounters>,
}

/// Where an inbound listener is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum InboundPlace {
    /// Not there yet.
    #[default]
    Absent,
    /// It listens.
    Bound(SocketAddr),
    /// It listens, but can serve nobody at present.
    Deaf {
        /// Where.
        at: SocketAddr,
        /// Why.
        cause: String,
    },
    /// It cannot listen; tried again. Cause and fix.
    Failed(String),
}

impl InboundPlace {
    /// Why nobody who calls there is served: then nobody shall be sent there.
    pub fn unserved(&self) -> Option<&str> {
        match self {
            Self::Absent | Self::Bound(_) => None,
            Self::Deaf { cause, .. } | Self::Failed(cause) => Some(cause),
        }
    }
}

/// Everything that is counted for one listener.
#[derive(Debug, Default)]
pub struct InboundCounters {
    /// Connections taken in.
    pub accepted: AtomicU64,
    /// Connections that are open now.
    pub open: AtomicU64,
    /// Handshakes that have succeeded.
    pub handshakes: AtomicU64,
    /// Connections without TLS that were let through.
    pub plain: AtomicU64,
    /// Bytes of the peers that were forwarded.
    pub bytes_in: AtomicU64,
    /// Bytes of the application that were sent.
    pub bytes_out: AtomicU64,
    refused: [AtomicU64; KINDS],
    latency: [AtomicU64; CLASSES],
    latency_micros: AtomicU64,
    last: Mutex<Option<String>>,
}

impl InboundCounters {
    /// Counts a refusal, and keeps its text as the last one: not of those who left by themselves, for that tells nothing.
    pub fn refused(&self, kind: InboundRefusal, text: &str) {
        self.refused[kind as usize].fetch_add(1, Relaxed);
        if kind == InboundRefusal::Aborted {
            return;
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.to_owned());
    }

    /// Counts a handshake that took this long.
    pub fn handshake(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let class = HANDSHAKE_BOUNDS.iter().position(|bound| micros <= *bound).unwrap_or(CLASSES - 1);
        self.handshakes.fetch_add(1, Relaxed);
        self.latency[class].fetch_add(1, Relaxed);
        self.latency_micros.fetch_add(micros, Relaxed);
    }

    /// How many were refused for this reason.
    pub fn refusals(&self, kind: InboundRefusal) -> u64 {
        self.refused[kind as usize].load(Relaxed)
    }

    /// The text of the last refusal.
    pub fn last_refusal(&self) -> Option<String> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Handshakes by class of [`HANDSHAKE_BOUNDS`], and the sum of their times in microseconds.
    pub fn latency(&self) -> (Vec<u64>, u64) {
        (self.latency.iter().map(|class| class.load(Relaxed)).collect(), self.latency_micros.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_falls_into_its_class() {
        let counters = InboundCounters::default();
        for micros in [1, 500, 501, 20_000_000] {
            counters.handshake(Duration::from_micros(micros));
        }
        assert_eq!(counters.latency(), (vec![2, 1, 0, 0, 0, 0, 0, 0, 0, 1], 20_001_002));
        counters.refused(InboundRefusal::NotAllowed, "x");
        assert_eq!(counters.refusals(InboundRefusal::NotAllowed), 1);
        assert_eq!(counters.refusals(InboundRefusal::NotTls), 0);
        counters.refused(InboundRefusal::Aborted, "y");
        assert_eq!(counters.last_refusal().as_deref(), Some("x"));
    }
}
