//! One direction of a connection: what is on its way, and whether it has ended.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::AsyncWrite;

/// Bytes that were taken from one side and that the other has not taken yet. While there are any, no more are taken: that is
/// all the back-pressure there is.
#[derive(Debug, Default)]
pub(super) struct Lane {
    held: Vec<u8>,
    at: usize,
    /// Nothing more comes.
    pub(super) ended: bool,
    /// The other side was told so.
    pub(super) closed: bool,
}

impl Lane {
    /// A lane that begins with `bytes`, and may be at its end already.
    pub(super) fn new(bytes: Vec<u8>, ended: bool) -> Self {
        Self { held: bytes, ended, ..Self::default() }
    }

    /// Puts bytes before all that is held. To be called before any was sent.
    pub(super) fn precede(&mut self, mut bytes: Vec<u8>) {
        bytes.append(&mut self.held);
        self.held = bytes;
    }

    /// Whether all that was taken has gone.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Sends what is held, as far as it goes. Whether any of it went: a reader that takes little at a time is slow, but it is
    /// there.
    pub(super) fn flush(&mut self, cx: &mut Context<'_>, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<bool> {
        if self.held.is_empty() {
            return Ok(false);
        }
        let before = self.at;
        while self.at < self.held.len() {
            match write(cx, to, &self.held[self.at..]) {
                Poll::Ready(sent) => self.at += sent?,
                Poll::Pending => return Ok(self.at > before),
            }
        }
        // Given back: most connections hold nothing most of the time.
        self.held = Vec::new();
        self.at = 0;
        Ok(true)
    }

    /// Sends `bytes` as far as they go, and holds the rest.
    pub(super) fn send(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut (impl AsyncWrite + Unpin),
        mut bytes: &[u8],
    ) -> io::Result<()> {
        while self.is_empty() && !bytes.is_empty() {
            match write(cx, to, bytes) {
                Poll::Ready(sent) => bytes = &bytes[sent?..],
                Poll::Pending => break,
            }
        }
        self.held.extend_from_slice(bytes);
        Ok(())
    }
}

fn write(cx: &mut Context<'_>, to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Poll<io::Result<usize>> {
    match ready!(Pin::new(to).poll_write(cx, bytes))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        sent => Poll::Ready(Ok(sent)),
    }
}
