//! From the first byte of a connection to a peer that may call.

use super::{
    Shared,
    hello::{self, First, Hello},
    refusal::Refusal,
    share::Caller,
    tls::{MOST_TAIL, Tls},
};
use crate::{spiffe::id_of, status::InboundRefusal};
use bytes::BufMut;
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How long a permissive listener waits for the first byte: some protocols begin with the server's word. Every TLS client
/// speaks at once.
const SILENCE: Duration = Duration::from_secs(1);
/// Room for one read. A ClientHello has 200 to 1,800 bytes.
const READ: usize = 2048;

/// A peer that may call.
pub(super) struct Welcome {
    /// Who it is.
    pub(super) caller: Caller,
    /// None for a plain client of a permissive listener.
    pub(super) tls: Option<Box<Tls>>,
    /// What it has said already.
    pub(super) said: Vec<u8>,
    /// The name that it has asked for.
    pub(super) server_name: Option<String>,
}

impl Welcome {
    fn plain(said: Vec<u8>) -> Self {
        Self { caller: None, tls: None, said, server_name: None }
    }
}

/// Lets the peer in, or says why not.
pub(super) async fn shake(peer: &mut TcpStream, shared: &Arc<Shared>) -> Result<Welcome, Refusal> {
    let mut inbox = Vec::new();
    if shared.settings.permissive {
        let silent = timeout(SILENCE, read(peer, &mut inbox)).await;
        match silent {
            Ok(read) => read?,
            Err(_) => return Ok(Welcome::plain(inbox)),
        }
    }
    let hello = loop {
        match hello::first(&inbox) {
            First::Short => read(peer, &mut inbox).await?,
            First::Hello(hello) => break hello,
            First::Other(_) if shared.settings.permissive && !hello::may_be_tls(&inbox) => {
                return Ok(Welcome::plain(inbox));
            }
            First::Other(what) => return Err(Refusal::new(InboundRefusal::NotTls, what)),
        }
    };
    let begin = Instant::now();
    let (tls, said) = negotiate(peer, shared, &hello, inbox).await?;
    shared.counters.handshake(begin.elapsed());
    let caller = tls.state().peer_certificates().and_then(|chain| id_of(chain.first()?));
    Ok(Welcome { caller, tls: Some(tls), said, server_name: hello.server_name })
}

async fn negotiate(
    peer: &mut TcpStream,
    shared: &Arc<Shared>,
    hello: &Hello,
    mut inbox: Vec<u8>,
) -> Result<(Box<Tls>, Vec<u8>), Refusal> {
    let keys = shared.keys.borrow().clone().filter(|keys| keys.is_valid(SystemTime::now()));
    let offered = hello.protocols.iter().map(Vec::as_slice);
    let config = keys.and_then(|keys| keys.config(offered)).ok_or_else(|| {
        Refusal::new(InboundRefusal::NoIdentity, "we have no valid certificate; `we-agent status` says why")
    })?;
    let mut tls = Box::new(Tls::new(config).map_err(|error| Refusal::of_tls(&error))?);
    let (mut said, mut out) = (Vec::new(), Vec::new());
    loop {
        let taken = tls.take_in(&mut inbox, &mut said, &mut out);
        if !out.is_empty() {
            let sent = peer.write_all(&out).await;
            if taken.is_ok() {
                sent.map_err(|error| aborted(&error.to_string()))?;
            }
            out.clear();
        }
        inbox.drain(..taken.map_err(|error| Refusal::of_tls(&error))?);
        // Also of what follows the handshake: the pump has room for so much.
        if inbox.len() > MOST_TAIL {
            return Err(Refusal::new(InboundRefusal::Handshake, "a message of its handshake is too long"));
        }
        if !tls.state().is_handshaking() {
            inbox.shrink_to_fit();
            tls.tail = inbox;
            return Ok((tls, said));
        }
        read(peer, &mut inbox).await?;
    }
}

/// Reads once, and not more than [`READ`], however much room `inbox` has from before: what it holds is bounded between two
/// reads.
async fn read(peer: &mut TcpStream, inbox: &mut Vec<u8>) -> Result<(), Refusal> {
    inbox.reserve(READ);
    match peer.read_buf(&mut inbox.limit(READ)).await {
        Ok(0) => Err(aborted("it closed the connection")),
        Ok(_) => Ok(()),
        Err(error) => Err(aborted(&error.to_string())),
    }
}

fn aborted(cause: &str) -> Refusal {
    Refusal::new(InboundRefusal::Aborted, format!("the peer left before the end of the handshake: {cause}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn room_from_before_does_not_make_a_read_larger() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut taken = listener.accept().await.unwrap().0;
        peer.write_all(&[7; 4 * READ]).await.unwrap();
        let mut inbox = Vec::with_capacity(8 * READ);
        while inbox.len() < 4 * READ {
            let before = inbox.len();
            read(&mut taken, &mut inbox).await.unwrap();
            assert!((1..=READ).contains(&(inbox.len() - before)));
        }
        drop(peer);
        assert_eq!(read(&mut taken, &mut inbox).await.unwrap_err().kind, InboundRefusal::Aborted);
    }
}
