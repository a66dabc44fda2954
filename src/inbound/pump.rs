//! Moving bytes between a peer and the application, both ways, until both have said that no more will come.
//!
//! The two directions fail by themselves: who listens no more may still have much to say. What comes for it is thrown away,
//! what it says goes on to its end, and only then is the other told, as it would be on a connection of its own.

use super::{
    budget::Budget,
    deadlines::{Doing, End},
    lane::Lane,
    tls::{Buffers, MOST_RECORD, Tls, with_buffers},
};
use crate::{
    host::{LocalStream, undelivered, unread},
    status::InboundCounters,
};
use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::Instant,
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
};

/// Both ends of a connection.
#[derive(Debug)]
pub(super) struct Pump {
    peer: TcpStream,
    /// None for a plain client.
    tls: Option<Box<Tls>>,
    application: LocalStream,
    budget: Arc<Budget>,
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
    /// Nothing more is moved, but as many bytes are still in the kernel.
    lingers: Option<usize>,
}

impl Pump {
    /// Begins with what the peer has said already.
    pub(super) fn new(
        peer: TcpStream,
        tls: Option<Box<Tls>>,
        application: LocalStream,
        said: Vec<u8>,
        budget: Arc<Budget>,
    ) -> Self {
        let asked = !said.is_empty();
        let (mut inward, outward) = (Lane::new(&budget), Lane::new(&budget));
        inward.precede(said);
        inward.ended = tls.as_ref().is_some_and(|tls| tls.peer_closed);
        let moved = Instant::now();
        Self { peer, tls, application, budget, inward, outward, said_end: false, moved, asked, lingers: None }
    }

    /// What we say to the application ourselves, before the peer.
    pub(super) fn introduce(&mut self, header: Vec<u8>) {
        self.inward.precede(header);
    }

    /// Moves what can be moved. Ready at the end; also, once, when an end has broken and only time tells whether the other has
    /// got the last that it has said.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, counters: &InboundCounters) -> Poll<Option<End>> {
        let mut any = false;
        while self.inward(cx, counters) | self.outward(cx, counters) {
            self.inward.torn |= self.outward.is_reset();
            self.outward.torn |= self.inward.is_reset();
            any = true;
            if self.inward.is_over() && self.outward.is_over() {
                break;
            }
        }
        if self.inward.is_closed() && self.outward.is_closed() {
            return Poll::Ready(Some(End::Said));
        }
        if self.inward.is_over() && self.outward.is_over() {
            return self.linger();
        }
        if any {
            self.moved = Instant::now();
        }
        Poll::Pending
    }

    /// A reset takes away what the far end's kernel has not got yet.
    fn linger(&mut self) -> Poll<Option<End>> {
        let mut left = undelivered(&self.peer);
        if let LocalStream::Left(application) = &self.application {
            left += undelivered(application);
        }
        if left == 0 {
            return Poll::Ready(Some(End::Broken));
        }
        let before = self.lingers.replace(left);
        if before != Some(left) {
            self.moved = Instant::now();
        }
        if before.is_none() { Poll::Ready(None) } else { Poll::Pending }
    }

    /// What it does.
    pub(super) fn doing(&self) -> Doing {
        match () {
            () if self.lingers.is_some() => Doing::Lingers,
            () if !self.inward.is_empty() || !self.outward.is_empty() => Doing::Moves,
            // It was asked last, or the peer has said its last word and waits.
            () if self.asked || (self.inward.ended && !self.outward.ended) => Doing::Owes,
            () => Doing::Rests,
        }
    }

    /// Whether the peer has said something that nobody has heard yet.
    pub(super) fn is_called(&self) -> bool {
        !self.inward.ended && unread(&self.peer)
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
    fn inward(&mut self, cx: &mut Context<'_>, counters: &InboundCounters) -> bool {
        let flushed = self.inward.flush(cx, &mut self.application);
        if !self.inward.is_empty() {
            return flushed;
        }
        if self.inward.ended {
            return flushed | (!self.inward.is_over() && self.inward.close(cx, &mut self.application));
        }
        match with_buffers(|buffers| self.receive(cx, buffers, counters)) {
            Ok(moved) => moved | flushed,
            Err(_) => {
                self.inward.tear();
                self.outward.lose();
                true
            }
        }
    }

    /// Reads from the peer, if there is anything.
    fn receive(&mut self, cx: &mut Context<'_>, buffers: &mut Buffers, counters: &InboundCounters) -> io::Result<bool> {
        let Buffers { wire, plain, .. } = buffers;
        let tail = self.tls.as_ref().map_or(0, |tls| tls.tail.len());
        let most = tail + self.budget.batch();
        let Poll::Ready(n) = read(cx, &mut self.peer, &mut wire[tail..most])? else { return Ok(false) };
        let bytes = match &mut self.tls {
            None => {
                self.inward.ended = n == 0;
                &wire[..n]
            }
            // Whoever cuts the connection must not pass for a peer that has said all it had to say (RFC 8446, section 6.1).
            Some(_) if n == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(tls) => {
                wire[..tail].copy_from_slice(&tls.tail);
                plain.clear();
                let mut answer = Vec::new();
                let taken = tls.take_in(&mut wire[..tail + n], plain, &mut answer);
                self.outward.send(cx, &mut self.peer, &answer);
                let rest = &wire[taken.map_err(io::Error::other)?..tail + n];
                if rest.len() > MOST_RECORD {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                // Most of the time there is none, and then nothing is kept.
                tls.tail = rest.to_vec();
                self.inward.ended = tls.peer_closed;
                plain.as_slice()
            }
        };
        if !self.inward.is_lost() {
            self.asked |= !bytes.is_empty();
            counters.bytes_in.fetch_add(bytes.len() as u64, Relaxed);
        }
        self.inward.send(cx, &mut self.application, bytes);
        Ok(true)
    }

    /// Whether something was moved from the application to the peer.
    fn outward(&mut self, cx: &mut Context<'_>, counters: &InboundCounters) -> bool {
        let flushed = self.outward.flush(cx, &mut self.peer);
        if !self.outward.is_empty() {
            return flushed;
        }
        if self.outward.ended {
            return flushed | (!self.outward.is_over() && self.end_outward(cx));
        }
        match with_buffers(|buffers| self.answer(cx, buffers, counters)) {
            Ok(moved) => moved | flushed,
            Err(_) => {
                self.outward.tear();
                self.inward.lose();
                true
            }
        }
    }

    /// Reads from the application, if there is anything.
    fn answer(&mut self, cx: &mut Context<'_>, buffers: &mut Buffers, counters: &InboundCounters) -> io::Result<bool> {
        let Buffers { answer, sealed, .. } = buffers;
        let most = self.budget.batch();
        let Poll::Ready(n) = read(cx, &mut self.application, &mut answer[..most])? else { return Ok(false) };
        self.asked = false;
        self.outward.ended = n == 0;
        if n == 0 || self.outward.is_lost() {
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
        self.outward.send(cx, &mut self.peer, bytes);
        Ok(true)
    }

    fn end_outward(&mut self, cx: &mut Context<'_>) -> bool {
        if let Some(tls) = self.tls.as_mut().filter(|_| !self.said_end) {
            self.said_end = true;
            with_buffers(|buffers| match tls.seal_end(&mut buffers.sealed) {
                Ok(length) => self.outward.send(cx, &mut self.peer, &buffers.sealed[..length]),
                Err(_) => self.outward.tear(),
            });
            return true;
        }
        self.outward.close(cx, &mut self.peer)
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
