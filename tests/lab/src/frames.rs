//! Where one HTTP/2 frame ends and the next begins, and whether a client pings too much.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// The kinds of frames that matter here (RFC 9113, section 6).
pub(crate) mod kind {
    pub(crate) const DATA: u8 = 0;
    pub(crate) const HEADERS: u8 = 1;
    pub(crate) const PING: u8 = 6;
    pub(crate) const GOAWAY: u8 = 7;
}

/// Follows one direction of a connection.
#[derive(Debug)]
pub(crate) struct Frames {
    /// Bytes to come of the payload, or of the client's preface.
    left: usize,
    header: Vec<u8>,
}

/// The header of a frame that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
}

impl Frames {
    /// A server's bytes are frames from the first.
    pub(crate) fn of_server() -> Self {
        Self { left: 0, header: Vec::with_capacity(9) }
    }

    /// A client's begin with a preface of 24 bytes.
    pub(crate) fn of_client() -> Self {
        Self { left: 24, header: Vec::with_capacity(9) }
    }

    pub(crate) fn between(&self) -> bool {
        self.left == 0 && self.header.is_empty()
    }

    /// How much of `bytes` belongs to the present payload, or to the next header.
    pub(crate) fn piece(&self, bytes: &[u8]) -> usize {
        let wanted = if self.left > 0 { self.left } else { 9 - self.header.len() };
        wanted.min(bytes.len())
    }

    /// Goes on by a piece, and tells of the header that it completed.
    pub(crate) fn pass(&mut self, piece: &[u8]) -> Option<Header> {
        if self.left > 0 {
            self.left -= piece.len();
            return None;
        }
        self.header.extend(piece);
        let [a, b, c, kind, flags, ..] = self.header[..] else { return None };
        if self.header.len() < 9 {
            return None;
        }
        self.left = u32::from_be_bytes([0, a, b, c]) as usize;
        self.header.clear();
        Some(Header { kind, flags })
    }
}

/// grpc-go's policy on pings: with a stream open not more often than the interval, without one hardly ever;
/// what the server sends in between makes up for one; the third offence is one too many.
#[derive(Debug)]
pub(crate) struct Pings {
    interval: Duration,
    pub(crate) streams: AtomicUsize,
    forgiven: AtomicBool,
    offences: Mutex<(Option<Instant>, u32)>,
    too_many: AtomicBool,
}

impl Pings {
    pub(crate) fn new(interval: Duration) -> Self {
        Self {
            interval,
            streams: AtomicUsize::new(0),
            forgiven: AtomicBool::new(false),
            offences: Mutex::default(),
            too_many: AtomicBool::new(false),
        }
    }

    /// The server sent a frame.
    pub(crate) fn sent(&self, header: Header) {
        if matches!(header.kind, kind::DATA | kind::HEADERS) {
            self.forgiven.store(true, Ordering::Relaxed);
        }
    }

    /// The client sent a frame.
    pub(crate) fn received(&self, header: Header, now: Instant) {
        if header.kind != kind::PING || header.flags & 1 != 0 {
            return;
        }
        let mut offences = self.offences.lock().unwrap_or_else(PoisonError::into_inner);
        let before = offences.0.replace(now);
        if self.forgiven.swap(false, Ordering::Relaxed) {
            offences.1 = 0;
            return;
        }
        let idle = self.streams.load(Ordering::Relaxed) == 0;
        let least = if idle { Duration::from_secs(7200) } else { self.interval };
        offences.1 += u32::from(before.is_some_and(|before| now - before < least));
        self.too_many.fetch_or(offences.1 > 2, Ordering::Relaxed);
    }

    pub(crate) fn too_many(&self) -> bool {
        self.too_many.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PING: Header = Header { kind: kind::PING, flags: 0 };

    #[test]
    fn frames_are_followed_in_any_pieces() {
        let bytes =
            [&[0u8, 0, 3, kind::DATA, 1, 0, 0, 0, 1, 9, 9, 9][..], &[0, 0, 0, kind::PING, 1, 0, 0, 0, 0]].concat();
        for size in 1..bytes.len() {
            let (mut frames, mut seen) = (Frames::of_server(), Vec::new());
            for mut chunk in bytes.chunks(size) {
                while !chunk.is_empty() {
                    let n = frames.piece(chunk);
                    seen.extend(frames.pass(&chunk[..n]).map(|h| h.kind));
                    chunk = &chunk[n..];
                }
            }
            assert_eq!(seen, [kind::DATA, kind::PING]);
            assert!(frames.between());
        }
    }

    #[test]
    fn the_fourth_early_ping_is_too_many() {
        let start = Instant::now();
        let after = |streams, gap: u64, pings: u32| {
            let policy = Pings::new(Duration::from_secs(15));
            policy.streams.store(streams, Ordering::Relaxed);
            (0..pings).for_each(|n| policy.received(PING, start + Duration::from_secs(gap) * n));
            policy.too_many()
        };
        assert!(!after(1, 14, 3) && after(1, 14, 4));
        assert!(!after(1, 16, 7));
        assert!(after(0, 30, 4));
        let policy = Pings::new(Duration::from_secs(15));
        for _ in 0..10 {
            policy.sent(Header { kind: kind::DATA, flags: 0 });
            policy.received(PING, start);
        }
        assert!(!policy.too_many());
    }
}
