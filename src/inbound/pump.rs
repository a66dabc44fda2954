//! Moving bytes between a peer and the application, both ways, until both have said that no more will come.

use super::{
    lane::Lane,
    tls::{BATCH, Buffers, MOST_TAIL, Tls, with_buffers},
};
use crate::{host::LocalStream, status::InboundCounters};
use std::{
    io,
    pin::Pin,
    sync::atomic::Ordering::Relaxed,
    task::{Context, Poll},
    time::Instant,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Both ends of a connection.
#[derive(Debug)]
pub(super) struct Pump {
    peer: TcpStream,
    /// None for a plain client.
    tls: Option<Box<Tls>>,
    application: LocalStream,
    /// From the peer to the application, without TLS.
    inward: Lane,
    /// From the application to the peer, with TLS.
    outward: Lane,
    /// Our end of TLS was closed.
    said_end: bool,
    /// When bytes were moved last.
    pub(super) moved: Instant,
    /// The last bytes were the peer's, so the application may owe an answer.
    asked: bool,
}

impl Pump {
    /// Begins with what the peer has said already.
    pub(super) fn new(peer: TcpStream, tls: Option<Box<Tls>>, application: LocalStream, said: Vec<u8>) -> Self {
        let asked = !said.is_empty();
        let inward = Lane::new(said, tls.as_ref().is_some_and(|tls| tls.peer_closed));
        let (outward, moved) = (Lane::default(), Instant::now());
        Self { peer, tls, application, inward, outward, said_end: false, moved, asked }
    }

    /// What we say to the application ourselves, before the peer.
    pub(super) fn introduce(&mut self, header: Vec<u8>) {
        self.inward.precede(header);
    }

    /// Moves what can be moved. Ready when all was said, or with what broke.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, counters: &InboundCounters) -> Poll<io::Result<()>> {
        let mut any = false;
        loop {
            let inward = self.inward(cx, counters)?;
            let outward = self.outward(cx, counters)?;
            if self.inward.closed && self.outward.closed {
                return Poll::Ready(Ok(()));
            }
            if !inward && !outward {
                break;
            }
            any = true;
        }
        if any {
            self.moved = Instant::now();
        }
        Poll::Pending
    }

    /// Whether nothing is on its way: all that was taken from one end has gone to the other.
    pub(super) fn is_empty(&self) -> bool {
        self.inward.is_empty() && self.outward.is_empty()
    }

    /// Whether, besides, the application owes the peer nothing.
    pub(super) fn rests(&self) -> bool {
        self.is_empty() && !self.owes()
    }

    /// It was asked last, or the peer has said its last word and waits.
    fn owes(&self) -> bool {
        self.asked || (self.inward.ended && !self.outward.ended)
    }

    /// Ends a connection on which nothing is on its way, in order: both ends learn that no more will come.
    pub(super) fn close(mut self) {
        if let Some(tls) = self.tls.as_mut().filter(|_| !self.said_end) {
            with_buffers(|buffers| {
                if let Ok(length) = tls.seal_end(&mut buffers.sealed) {
                    let _ = self.peer.try_write(&buffers.sealed[..length]); // it is quiet, so there is room
                }
            });
        }
    }

    /// Lets both ends know that this was no regular end.
    pub(super) fn reset(self) {
        let _ = self.peer.set_zero_linger(); // it may be gone already
        if let LocalStream::Left(stream) = &self.application {
            let _ = stream.set_zero_linger();
        }
    }

    /// Whether something was moved from the peer to the application.
    fn inward(&mut self, cx: &mut Context<'_>, counters: &InboundCounters) -> io::Result<bool> {
        if self.inward.closed {
            return Ok(false);
        }
        let flushed = self.inward.flush(cx, &mut self.application)?;
        if !self.inward.is_empty() {
            return Ok(flushed);
        }
        if self.inward.ended {
            let shut = Pin::new(&mut self.application).poll_shutdown(cx)?;
            self.inward.closed = shut.is_ready();
            return Ok(self.inward.closed || flushed);
        }
        Ok(with_buffers(|buffers| self.receive(cx, buffers, counters))? || flushed)
    }

    /// Reads from the peer, if there is anything.
    fn receive(&mut self, cx: &mut Context<'_>, buffers: &mut Buffers, counters: &InboundCounters) -> io::Result<bool> {
        let Buffers { wire, plain, .. } = buffers;
        let tail = self.tls.as_ref().map_or(0, |tls| tls.tail.len());
        let Poll::Ready(n) = read(cx, &mut self.peer, &mut wire[tail..tail + BATCH])? else { return Ok(false) };
        let Some(tls) = &mut self.tls else {
            self.inward.ended = n == 0;
            self.asked |= n > 0;
            counters.bytes_in.fetch_add(n as u64, Relaxed);
            self.inward.send(cx, &mut self.application, &wire[..n])?;
            return Ok(true);
        };
        if n == 0 {
            // Whoever cuts the connection must not pass for a peer that has said all it had to say (RFC 8446, section 6.1).
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        wire[..tail].copy_from_slice(&tls.tail);
        plain.clear();
        let mut answer = Vec::new();
        let taken = tls.take_in(&mut wire[..tail + n], plain, &mut answer);
        if !answer.is_empty() {
            self.outward.send(cx, &mut self.peer, &answer)?;
        }
        let rest = &wire[taken.map_err(io::Error::other)?..tail + n];
        if rest.len() > MOST_TAIL {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // Most of the time there is none, and then nothing is kept.
        tls.tail = rest.to_vec();
        self.inward.ended = tls.peer_closed;
        self.asked |= !plain.is_empty();
        counters.bytes_in.fetch_add(plain.len() as u64, Relaxed);
        self.inward.send(cx, &mut self.application, plain)?;
        Ok(true)
    }

    /// Whether something was moved from the application to the peer.
    fn outward(&mut self, cx: &mut Context<'_>, counters: &InboundCounters) -> io::Result<bool> {
        if self.outward.closed {
            return Ok(false);
        }
        let flushed = self.outward.flush(cx, &mut self.peer)?;
        if !self.outward.is_empty() {
            return Ok(flushed);
        }
        if self.outward.ended {
            return Ok(self.end_outward(cx)? || flushed);
        }
        Ok(with_buffers(|buffers| self.answer(cx, buffers, counters))? || flushed)
    }

    /// Reads from the application, if there is anything.
    fn answer(&mut self, cx: &mut Context<'_>, buffers: &mut Buffers, counters: &InboundCounters) -> io::Result<bool> {
        let Buffers { answer, sealed, .. } = buffers;
        let Poll::Ready(n) = read(cx, &mut self.application, answer)? else { return Ok(false) };
        self.asked = false;
        if n == 0 {
            self.outward.ended = true;
            return Ok(true);
        }
        counters.bytes_out.fetch_add(n as u64, Relaxed);
        let bytes = match &mut self.tls {
            Some(tls) => {
                let length = tls.seal(&answer[..n], sealed).map_err(io::Error::other)?;
                &sealed[..length]
            }
            None => &answer[..n],
        };
        self.outward.send(cx, &mut self.peer, bytes)?;
        Ok(true)
    }

    fn end_outward(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        if let Some(tls) = self.tls.as_mut().filter(|_| !self.said_end) {
            self.said_end = true;
            with_buffers(|buffers| {
                let length = tls.seal_end(&mut buffers.sealed).map_err(io::Error::other)?;
                self.outward.send(cx, &mut self.peer, &buffers.sealed[..length])
            })?;
            return Ok(true);
        }
        let shut = Pin::new(&mut self.peer).poll_shutdown(cx)?;
        self.outward.closed = shut.is_ready();
        Ok(self.outward.closed)
    }
}

fn read(cx: &mut Context<'_>, from: &mut (impl AsyncRead + Unpin), to: &mut [u8]) -> io::Result<Poll<usize>> {
    let mut buffer = ReadBuf::new(to);
    match Pin::new(from).poll_read(cx, &mut buffer) {
        Poll::Ready(read) => read.map(|()| Poll::Ready(buffer.filled().len())),
        Poll::Pending => Ok(Poll::Pending),
    }
}

#[cfg(test)]
mod tests;
