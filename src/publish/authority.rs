//! gRPC clients whose `:authority` is a path.
//!
//! Over a Unix socket there is no host to name. What a client then sends as `:authority` is its own choice: Envoy the
//! name of its cluster, Go and tonic `localhost`, but everything that stands on the C core of gRPC (Python, C++, Ruby,
//! PHP, and by its own choice Swift) the percent-encoded path: `run%2Fwe-agent%2Fpayments%2Fagent.sock`. RFC 3986
//! section 3.2.2 allows that. The `http` crate does not, and `h2` resets the stream with `PROTOCOL_ERROR` before
//! anybody is asked: there is no setting for it (h2 0.4.20; hyperium/h2 pull request 487, grpc/grpc issue 38142).
//!
//! Nobody here reads the authority: who connects is known from the socket. So [`Adapter`] stands between the socket and
//! `h2` and writes `.` for each `%` in an `:authority`, on the way in: `run.2Fwe-agent.2Fpayments.2Fagent.sock`. That,
//! and not a nicer name, because `.` is as long as `%` as a byte, and in the Huffman code of HPACK, too. No length
//! changes: not that of a string, a header block or a frame. And no entry of HPACK's dynamic table changes its size, so
//! what a client inserts, refers to and evicts later is the same at both ends. Hence no header is ever decoded or
//! encoded, no table is kept, nothing is buffered, and no byte waits for a later one: a bit is changed where it passes,
//! or never. All state is a few numbers, whatever the peer sends.
//!
//! A percent sign elsewhere passes, as every other byte. What is no HTTP/2 passes, too, and `h2` judges it.
//!
//! Left alone, and refused by `h2` as before: an `:authority` that is named by way of the dynamic table (no encoder
//! does, for the static one has it) or that is wrong for another reason.

mod fields;

use fields::Fields;
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The bytes before the first frame (RFC 9113 section 3.4).
const PREFACE: usize = 24;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// A stream of which the reading half shows an `:authority` that `h2` takes. Writing passes as it is.
#[derive(Debug)]
pub(super) struct Adapter<S> {
    stream: S,
    frames: Frames,
}

impl<S> Adapter<S> {
    /// Around a connection of which nothing has been read yet.
    pub(super) fn new(stream: S) -> Self {
        Self { stream, frames: Frames::new() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Adapter<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if let Some(fresh) = buf.filled_mut().get_mut(before..) {
            this.frames.pass(fresh);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Adapter<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Finds the header blocks in what a client sends (RFC 9113 sections 4.1, 6.2 and 6.10).
///
/// The payload of a frame is taken apart in this order, and what a frame does not have is zero: length of the padding,
/// priority, fragment of a header block, the rest.
#[derive(Debug)]
struct Frames {
    head: [u8; 9],
    /// How much of `head` is there.
    seen: usize,
    /// Whether the next byte of the payload says how long the padding is.
    padded: bool,
    priority: usize,
    fragment: usize,
    /// Padding, the payload of other frames, the preface, or everything from now on.
    rest: usize,
    /// Header blocks follow each other without a seam: who ends one within a field is cut off by `h2`.
    fields: Fields,
}

impl Frames {
    fn new() -> Self {
        Self {
            head: [0; 9],
            seen: 0,
            padded: false,
            priority: 0,
            fragment: 0,
            rest: PREFACE,
            fields: Fields::default(),
        }
    }

    /// Looks at the next bytes of the connection and mends them in place.
    fn pass(&mut self, mut bytes: &mut [u8]) {
        while let Some(&first) = bytes.first() {
            let n = if self.padded {
                self.padded = false;
                self.pad(first);
                1
            } else if self.priority > 0 {
                take(&mut self.priority, bytes)
            } else if self.fragment > 0 {
                let n = take(&mut self.fragment, bytes);
                if !bytes.iter_mut().take(n).all(|byte| self.fields.pass(byte)) {
                    self.give_up();
                }
                n
            } else if self.rest > 0 {
                take(&mut self.rest, bytes)
            } else {
                self.head(first);
                1
            };
            bytes = bytes.get_mut(n..).unwrap_or_default();
        }
    }

    /// The next byte of a frame's head; with the last one the payload begins.
    fn head(&mut self, byte: u8) {
        if let Some(place) = self.head.get_mut(self.seen) {
            *place = byte;
        }
        self.seen += 1;
        if self.seen < self.head.len() {
            return;
        }
        self.seen = 0;
        let [a, b, c, kind, flags, ..] = self.head;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        match kind {
            HEADERS => {
                self.padded = flags & PADDED != 0;
                self.priority = if flags & PRIORITY != 0 { 5 } else { 0 };
                match length.checked_sub(usize::from(self.padded) + self.priority) {
                    Some(fragment) => self.fragment = fragment,
                    None => self.give_up(),
                }
            }
            CONTINUATION => self.fragment = length,
            _ => self.rest = length,
        }
    }

    fn pad(&mut self, length: u8) {
        self.rest = usize::from(length);
        match self.fragment.checked_sub(self.rest) {
            Some(fragment) => self.fragment = fragment,
            None => self.give_up(),
        }
    }

    /// This is no HTTP/2: everything else passes. `h2` will end the connection when it gets here.
    fn give_up(&mut self) {
        *self = Self { rest: usize::MAX, ..Self::new() };
    }
}

/// As many bytes as are there and wanted; less are wanted then.
fn take(wanted: &mut usize, bytes: &[u8]) -> usize {
    let n = bytes.len().min(*wanted);
    *wanted -= n;
    n
}

#[cfg(test)]
mod tests;
