//! What the network may send to a listener.

use super::{
    hello::{self, First},
    keys::{Guard, Keys},
    tls::{BATCH, MOST_TAIL, Tls},
};
use crate::spiffe::X509Context;
use rustls::{
    ClientConfig, ClientConnection, ServerConfig, client::Resumption, pki_types::ServerName, sign::SingleCertAndKey,
};
use std::{
    io::{Read as _, Write as _},
    sync::{Arc, OnceLock},
    time::SystemTime,
};

/// Makes a client that takes any server.
type Anybody = fn() -> Option<ClientConfig>;

/// Both ends of the connections here.
struct Ends {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Ends {
    /// Those of `context`, made once: both ends show the same certificate, and the client is one that takes `anybody`.
    fn of(context: &X509Context, anybody: Anybody) -> Option<&'static Self> {
        static ENDS: OnceLock<Option<Ends>> = OnceLock::new();
        ENDS.get_or_init(|| Self::new(context, anybody()?)).as_ref()
    }

    fn new(context: &X509Context, mut client: ClientConfig) -> Option<Self> {
        let guard = Arc::new(Guard::new(context.svid.id(), &[]));
        let keys = Keys::new(context, None, &guard, SystemTime::now()).ok()?;
        client.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(context.svid.pair()));
        client.resumption = Resumption::default();
        client.alpn_protocols = vec![b"istio".to_vec(), b"h2".to_vec()];
        Some(Self { server: keys.config([&b"h2"[..]].into_iter())?, client: Arc::new(client) })
    }
}

/// The first bytes of a connection. What is said of them once does not change when more comes.
pub(crate) fn hello(bytes: &[u8]) {
    let whole = hello::first(bytes);
    let half = hello::first(&bytes[..bytes.len() / 2]);
    match (half, &whole) {
        (First::Short, _) => {}
        (First::Other(one), First::Other(other)) => assert_eq!(one, *other),
        (First::Hello(one), First::Hello(other)) => assert_eq!(one.server_name, other.server_name),
        (half, whole) => panic!("{half:?}, and then {whole:?}"),
    }
    assert!(!matches!(whole, First::Hello(_)) || hello::may_be_tls(bytes));
}

/// One end, and what has arrived at it.
struct Server {
    tls: Tls,
    wire: Vec<u8>,
    plain: Vec<u8>,
    out: Vec<u8>,
}

impl Server {
    fn new(config: &Arc<ServerConfig>) -> Option<Self> {
        let tls = Tls::new(config.clone()).ok()?;
        Some(Self { tls, wire: Vec::new(), plain: Vec::new(), out: Vec::new() })
    }

    /// Takes in what has come; false when that ends the connection.
    fn take(&mut self, bytes: &[u8]) -> bool {
        self.wire.extend_from_slice(bytes);
        let Ok(done) = self.tls.take_in(&mut self.wire, &mut self.plain, &mut self.out) else { return false };
        self.wire.drain(..done);
        self.wire.len() <= MOST_TAIL
    }
}

/// A connection from its first byte, in pieces of the first byte in fours.
pub(crate) fn records(context: &X509Context, anybody: Anybody, bytes: &[u8]) {
    let Some(mut server) = Ends::of(context, anybody).and_then(|ends| Server::new(&ends.server)) else { return };
    let Some((&piece, wire)) = bytes.split_first() else { return };
    let _ = wire.chunks(usize::from(piece).max(1) * 4).all(|piece| server.take(piece));
    assert!(server.plain.is_empty(), "nobody was let in");
}

/// A connection after its handshake, as a list of what happens on it: each a byte that says what, and one that says how
/// much. While nobody meddles with the wire, what is sent is what arrives.
pub(crate) fn session(context: &X509Context, anybody: Anybody, mut bytes: &[u8]) {
    let Some((mut client, mut server)) = Ends::of(context, anybody).and_then(shaken) else { return };
    let (mut sent, mut meddled, mut ended) = (Vec::new(), false, false);
    let mut wire = Vec::new();
    let mut sealed = vec![0; BATCH + 64 * 64];
    while let Some((&[what, amount], rest)) = bytes.split_first_chunk() {
        bytes = rest;
        let amount = usize::from(amount);
        // Who has ended has nothing more to say.
        meddled |= ended;
        match what % 8 {
            0 | 1 => {
                let said = vec![what; amount * if what % 8 == 0 { 1 } else { 256 }];
                sent.extend_from_slice(&said[..client.writer().write(&said).unwrap_or_default()]);
            }
            2 => drop(client.refresh_traffic_keys()),
            3 => {
                client.send_close_notify();
                ended = true;
            }
            4 => {
                let (raw, rest) = bytes.split_at(bytes.len().min(amount));
                (bytes, meddled) = (rest, true);
                wire.extend_from_slice(raw);
            }
            5 => {
                if let Some(byte) = wire.get_mut(amount) {
                    *byte ^= what;
                    meddled = true;
                }
            }
            6 => {
                let Ok(length) = server.tls.seal(&vec![what; amount * 512], &mut sealed) else { break };
                server.out.extend_from_slice(&sealed[..length]);
            }
            _ => {}
        }
        if what % 8 != 5 {
            let _ = client.write_tls(&mut wire);
        }
        // What happens is seen at once, or later together with more.
        if what & 0x80 == 0 {
            let part = if what & 0x40 == 0 { wire.len() } else { wire.len().min(amount) };
            if !server.take(&wire[..part]) {
                assert!(meddled, "an honest client is heard");
                break;
            }
            wire.drain(..part);
            if !heard(&mut client, &mut server) {
                break;
            }
        }
    }
    assert!(meddled || sent.starts_with(&server.plain), "what arrives is what was sent");
}

/// A client and a server that have shaken hands.
fn shaken(ends: &'static Ends) -> Option<(ClientConnection, Server)> {
    let name = ServerName::try_from("app.example.com").ok()?;
    let mut client = ClientConnection::new(ends.client.clone(), name).ok()?;
    let mut server = Server::new(&ends.server)?;
    while client.is_handshaking() || server.tls.state().is_handshaking() {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).ok()?;
        assert!(server.take(&wire) && heard(&mut client, &mut server), "they agree");
    }
    Some((client, server))
}

/// The client hears what the server has said; false when it does not like it.
fn heard(client: &mut ClientConnection, server: &mut Server) -> bool {
    let mut out = &server.out[..];
    while !out.is_empty() && client.read_tls(&mut out).is_ok_and(|read| read > 0) {
        if client.process_new_packets().is_err() {
            return false;
        }
        let _ = client.reader().read_to_end(&mut Vec::new());
    }
    server.out.clear();
    true
}
