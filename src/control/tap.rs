//! A tap on the plain side of a TLS connection that hears HTTP/2's GOAWAY.
//!
//! istiod ends each connection after half an hour: first GOAWAY, the close follows some seconds later. The HTTP/2
//! library stops using such a connection but tells nobody, and a session that only notices the close leaves a gap. So
//! the frames' headers (RFC 9113, section 4.1: 24 bits of length, 8 of type) are read as they pass; nothing is changed.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

const HEADER: usize = 9;
const GOAWAY: u8 = 0x7;

/// Follows frames through a stream of bytes.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; HEADER],
    have: usize,
    /// Payload bytes of the current frame that are still to come.
    left: usize,
}

impl Frames {
    /// Whether a GOAWAY begins in `bytes`.
    fn pass(&mut self, mut bytes: &[u8]) -> bool {
        let mut heard = false;
        while !bytes.is_empty() {
            if self.left > 0 {
                let skip = self.left.min(bytes.len());
                self.left -= skip;
                bytes = &bytes[skip..];
                continue;
            }
            let take = (HEADER - self.have).min(bytes.len());
            self.header[self.have..self.have + take].copy_from_slice(&bytes[..take]);
            self.have += take;
            bytes = &bytes[take..];
            if self.have == HEADER {
                let [a, b, c, kind, ..] = self.header;
                self.left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                self.have = 0;
                heard |= kind == GOAWAY;
            }
        }
        heard
    }
}

/// The tapped connection.
#[derive(Debug)]
pub(crate) struct Tap<S> {
    inner: S,
    frames: Frames,
    goaway: watch::Sender<bool>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Tap<S> {
    /// Taps `inner`; `goaway` turns true at the first GOAWAY. It can be read until `cut`: the HTTP/2 library goes on with
    /// open streams, whoever lets go of the connection.
    pub(crate) fn new(inner: S, goaway: watch::Sender<bool>, cut: CancellationToken) -> Self {
        Self { inner, frames: Frames::default(), goaway, cut: Box::pin(cut.cancelled_owned()) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Tap<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        if polled.is_ready() && self.frames.pass(&buf.filled()[before..]) {
            self.goaway.send_replace(true);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tap<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let n = payload.len();
        let mut bytes = vec![(n >> 16) as u8, (n >> 8) as u8, n as u8, kind, 0, 0, 0, 0, 1];
        bytes.extend_from_slice(payload);
        bytes
    }

    proptest! {
        /// However the bytes are cut: heard exactly when there is such a frame, never for a payload that looks like one.
        #[test]
        fn goaway_is_heard_through_any_cut(
            frames in prop::collection::vec((0u8..10, prop::collection::vec(Just(GOAWAY), 0..40)), 0..12),
            cut in 1usize..20,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
            let mut tap = Frames::default();
            let mut heard = false;
            for piece in bytes.chunks(cut) {
                heard |= tap.pass(piece);
            }
            prop_assert_eq!(heard, frames.iter().any(|(kind, _)| *kind == GOAWAY));
        }
    }
}
