//! A wire tap under HTTP/2: counts bytes, and writes frames that the HTTP/2 library has no call for.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::frames::{Frames, Pings, kind};

/// What the tap knows of its connection, and what it is to do.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) received: AtomicU64,
    pub(crate) sent: AtomicU64,
    pub(crate) pings: Pings,
    heard: Mutex<Instant>,
    queue: Mutex<Queue>,
    silent_end: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    frames: Vec<u8>,
    writer: Option<Waker>,
}

impl Line {
    /// A line on which pings may come as often as that.
    pub(crate) fn new(ping_interval: Duration) -> Arc<Self> {
        Arc::new(Self {
            pings: Pings::new(ping_interval),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            heard: Mutex::new(Instant::now()),
            queue: Mutex::default(),
            silent_end: AtomicBool::new(false),
        })
    }

    /// Sends a GOAWAY between two other frames. The library underneath does not know of it and goes on.
    pub(crate) fn goaway(&self, last_stream: u32, code: u32, debug: &[u8]) {
        let mut frame = Vec::with_capacity(17 + debug.len());
        frame.extend(&((8 + debug.len()) as u32).to_be_bytes()[1..]);
        frame.extend([kind::GOAWAY, 0, 0, 0, 0, 0]);
        frame.extend(last_stream.to_be_bytes());
        frame.extend(code.to_be_bytes());
        frame.extend(debug);
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.frames.extend(frame);
        if let Some(writer) = queue.writer.take() {
            writer.wake();
        }
    }

    /// The connection is to end as a killed process ends it: without a closing alert.
    pub(crate) fn end_silently(&self) {
        self.silent_end.store(true, Ordering::Relaxed);
    }

    /// How long the peer has been silent.
    pub(crate) fn quiet(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

/// The stream between TLS and HTTP/2.
pub(crate) struct Tap<S: AsyncWrite + Unpin> {
    inner: S,
    line: Arc<Line>,
    reading: Frames,
    writing: Frames,
    injected: Bytes,
}

impl<S: AsyncWrite + Unpin> Tap<S> {
    pub(crate) fn new(inner: S, line: Arc<Line>) -> Self {
        Self { inner, line, reading: Frames::of_client(), writing: Frames::of_server(), injected: Bytes::new() }
    }

    fn poll_inject(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.writing.between() {
            return Poll::Ready(Ok(()));
        }
        if self.injected.is_empty() {
            let mut queue = self.line.queue.lock().unwrap_or_else(PoisonError::into_inner);
            self.injected = std::mem::take(&mut queue.frames).into();
            queue.writer = Some(cx.waker().clone());
        }
        while !self.injected.is_empty() {
            let n = std::task::ready!(Pin::new(&mut self.inner).poll_write(cx, &self.injected))?;
            self.line.sent.fetch_add(n as u64, Ordering::Relaxed);
            self.injected.advance(n);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tap<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        std::task::ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        let mut new = &buffer.filled()[before..];
        self.line.received.fetch_add(new.len() as u64, Ordering::Relaxed);
        let now = Instant::now();
        *self.line.heard.lock().unwrap_or_else(PoisonError::into_inner) = now;
        while !new.is_empty() {
            let (piece, rest) = new.split_at(self.reading.piece(new));
            if let Some(header) = self.reading.pass(piece) {
                self.line.pings.received(header, now);
            }
            new = rest;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tap<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        std::task::ready!(self.poll_inject(cx))?;
        let piece = self.writing.piece(buffer);
        let n = std::task::ready!(Pin::new(&mut self.inner).poll_write(cx, &buffer[..piece]))?;
        self.line.sent.fetch_add(n as u64, Ordering::Relaxed);
        if let Some(header) = self.writing.pass(&buffer[..n]) {
            self.line.pings.sent(header);
        }
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.poll_inject(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<S: AsyncWrite + Unpin> Drop for Tap<S> {
    /// Go closes a TLS connection with an alert; a socket that takes no byte more is closed without.
    fn drop(&mut self) {
        if !self.line.silent_end.load(Ordering::Relaxed) {
            _ = Pin::new(&mut self.inner).poll_shutdown(&mut Context::from_waker(Waker::noop()));
        }
    }
}
