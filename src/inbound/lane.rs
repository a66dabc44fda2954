//! One direction of a connection: what is on its way, and how far each of its ends is.

use super::budget::Budget;
use std::{
    io::ErrorKind,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::io::AsyncWrite;

/// Bytes that were taken from one side, the source, and that the other, the sink, has not taken yet. While there are any, no
/// more are taken: that is all the back-pressure there is.
#[derive(Debug)]
pub(super) struct Lane {
    held: Vec<u8>,
    at: usize,
    /// Counts what is held.
    budget: Arc<Budget>,
    /// Nothing more comes.
    pub(super) ended: bool,
    /// That is no regular end, or will be none when it comes: the source has broken.
    pub(super) torn: bool,
    sink: Sink,
}

/// The far end of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sink {
    /// It takes what comes.
    Open,
    /// It was told that nothing more comes.
    Closed,
    /// It takes no more, and what comes is thrown away.
    Lost,
    /// The same, and the other end of its socket has broken: what it says will have no regular end either.
    Reset,
}

impl Lane {
    /// An empty lane.
    pub(super) fn new(budget: &Arc<Budget>) -> Self {
        let (held, budget) = (Vec::new(), budget.clone());
        Self { held, at: 0, budget, ended: false, torn: false, sink: Sink::Open }
    }

    /// Puts bytes before all that is held. To be called before any was sent.
    pub(super) fn precede(&mut self, mut bytes: Vec<u8>) {
        self.budget.hold(bytes.len());
        bytes.append(&mut self.held);
        self.held = bytes;
    }

    /// Whether all that was taken has gone.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether its sink was told the regular end.
    pub(super) fn is_closed(&self) -> bool {
        self.sink == Sink::Closed
    }

    /// Whether what comes is thrown away.
    pub(super) fn is_lost(&self) -> bool {
        matches!(self.sink, Sink::Lost | Sink::Reset)
    }

    /// Whether its sink's socket was reset.
    pub(super) fn is_reset(&self) -> bool {
        self.sink == Sink::Reset
    }

    /// Whether nothing more goes through it.
    pub(super) fn is_over(&self) -> bool {
        self.sink != Sink::Open || (self.torn && self.ended && self.is_empty())
    }

    /// The source has broken: what it has said goes on to the sink, but not the end.
    pub(super) fn tear(&mut self) {
        (self.ended, self.torn) = (true, true);
    }

    /// The sink takes no more.
    pub(super) fn lose(&mut self) {
        if self.sink == Sink::Open {
            self.sink = Sink::Lost;
        }
        self.release();
    }

    /// Sends what is held, as far as it goes. Whether any of it went: a reader that takes little at a time is slow, but it is
    /// there.
    pub(super) fn flush(&mut self, cx: &mut Context<'_>, to: &mut (impl AsyncWrite + Unpin)) -> bool {
        let before = self.at;
        while self.at < self.held.len() {
            match write(cx, to, &self.held[self.at..]) {
                Poll::Ready(Ok(sent)) => self.at += sent,
                Poll::Ready(Err(error)) => {
                    self.fail(error);
                    return true;
                }
                Poll::Pending => return self.at > before,
            }
        }
        let any = !self.is_empty();
        self.release();
        any
    }

    /// Sends `bytes` as far as they go, and holds the rest.
    pub(super) fn send(&mut self, cx: &mut Context<'_>, to: &mut (impl AsyncWrite + Unpin), mut bytes: &[u8]) {
        while self.sink == Sink::Open && self.is_empty() && !bytes.is_empty() {
            match write(cx, to, bytes) {
                Poll::Ready(Ok(sent)) => bytes = &bytes[sent..],
                Poll::Ready(Err(error)) => self.fail(error),
                Poll::Pending => break,
            }
        }
        if self.sink == Sink::Open {
            self.budget.hold(bytes.len());
            self.held.extend_from_slice(bytes);
        }
    }

    /// Tells the sink that nothing more comes; whether that is done.
    pub(super) fn close(&mut self, cx: &mut Context<'_>, to: &mut (impl AsyncWrite + Unpin)) -> bool {
        match Pin::new(to).poll_shutdown(cx) {
            Poll::Ready(Ok(())) => self.sink = Sink::Closed,
            Poll::Ready(Err(error)) => self.fail(error.kind()),
            Poll::Pending => return false,
        }
        true
    }

    /// A broken pipe is what a sink says that has ended in order before; everything else is no order.
    fn fail(&mut self, error: ErrorKind) {
        self.sink = if error == ErrorKind::BrokenPipe { Sink::Lost } else { Sink::Reset };
        self.release();
    }

    /// Given back: most connections hold nothing most of the time.
    fn release(&mut self) {
        self.budget.release(self.held.len());
        self.held = Vec::new();
        self.at = 0;
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.release();
    }
}

fn write(cx: &mut Context<'_>, to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Poll<Result<usize, ErrorKind>> {
    Pin::new(to).poll_write(cx, bytes).map(|written| match written {
        Ok(0) => Err(ErrorKind::WriteZero),
        written => written.map_err(|error| error.kind()),
    })
}
