//! Consumers: what they may send on the socket.

use super::connection::{Connection, Services};
use crate::{
    files::Root,
    host::Peer,
    publish::{
        authority::Adapter,
        budget::{self, Budget},
        consumers::Consumers,
        offer::Offer,
        policy::Policy,
    },
    spiffe::X509Context,
    status::{self, Identity},
    systemd::Units,
    time::Clock,
};
use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::watch,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Longer than any connection is open that has no call.
const PATIENCE: Duration = Duration::from_secs(60);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// An empty SETTINGS frame.
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// What is asked for by [`calls`].
const PATHS: [&str; 7] = [
    "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets",
    "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets",
    "/SpiffeWorkloadAPI/FetchX509SVID",
    "/SpiffeWorkloadAPI/FetchX509Bundles",
    "/SpiffeWorkloadAPI/FetchJWTSVID",
    "/SpiffeWorkloadAPI/ValidateJWTSVID",
    "/grpc.health.v1.Health/Check",
];

/// The frames of a whole connection after its preface, from a consumer that reads all and is let in.
pub(crate) async fn frames(context: &Arc<X509Context>, frames: &[u8]) -> io::Result<()> {
    let mut offer = Offer::default();
    offer.follow(&Identity { current: Some(context.clone()), ..Identity::default() }, SystemTime::now());
    let offers = watch::Sender::new(offer);
    let services = Services {
        policy: Arc::new(Policy::new("payments", Vec::new(), Units::new(&Root::new("/nowhere")))),
        offers: offers.subscribe(),
        consumers: Consumers::new(watch::Sender::new(status::Consumers::default())),
        clock: Clock::Wall,
        shutdown: CancellationToken::new(),
    };
    let (ours, mut theirs) = UnixStream::pair()?;
    let peer = Peer::of(&ours)?;
    let consumer = async {
        theirs.write_all(PREFACE).await?;
        theirs.write_all(frames).await?;
        theirs.shutdown().await?;
        theirs.read_to_end(&mut Vec::new()).await
    };
    let connection = Connection::new(ours, peer, Budget::new(budget::OF_USER), &services);
    let _ = timeout(PATIENCE, async { tokio::join!(connection.run(), consumer) }).await;
    Ok(())
}

/// Calls, each behind what it asks for (a byte), and how much of its input there is (another, in fours): that makes well
/// formed frames of it.
pub(crate) async fn calls(context: &Arc<X509Context>, mut bytes: &[u8]) -> io::Result<()> {
    let mut sent = SETTINGS.to_vec();
    let mut stream = 1u32;
    while let Some((&[asked, length], rest)) = bytes.split_first_chunk() {
        let (input, rest) = rest.split_at(rest.len().min(usize::from(length) * 4));
        bytes = rest;
        let path = PATHS[usize::from(asked) % PATHS.len()];
        let (ends, framed, knows) = (asked & 0x80 == 0, asked & 0x40 != 0, asked & 0x20 == 0);
        let mut headers = vec![0x83, 0x86, 0x41, 9];
        headers.extend(b"localhost");
        headers.extend([0x04, path.len() as u8]);
        headers.extend(path.bytes());
        headers.extend(b"\x0f\x10\x10application/grpc");
        if knows {
            headers.extend(b"\x00\x12workload.spiffe.io\x04true");
        }
        frame(&mut sent, 1, 4, stream, &headers);
        let head = (input.len() as u32).to_be_bytes();
        let head = if framed { [&[0][..], &head].concat() } else { Vec::new() };
        frame(&mut sent, 0, u8::from(ends), stream, &[&head, input].concat());
        stream += 2;
    }
    frames(context, &sent).await
}

fn frame(to: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    to.extend(&(payload.len() as u32).to_be_bytes()[1..]);
    to.extend([kind, flags]);
    to.extend(stream.to_be_bytes());
    to.extend(payload);
}

/// Any bytes below the adapter, read in pieces of the first one: nothing but a percent sign is another byte then, and the
/// pieces make no difference.
pub(crate) async fn authority(bytes: &[u8]) -> io::Result<()> {
    let Some((&piece, frames)) = bytes.split_first() else { return Ok(()) };
    let sent = [PREFACE, frames].concat();
    let (mut whole, mut pieces) = (Vec::new(), Vec::new());
    Adapter::new(&sent[..]).read_to_end(&mut whole).await?;
    let mut adapter = Adapter::new(&sent[..]);
    let mut room = vec![0; usize::from(piece).max(1)];
    loop {
        match adapter.read(&mut room).await? {
            0 => break,
            n => pieces.extend_from_slice(&room[..n]),
        }
    }
    assert!(whole == pieces, "however it comes");
    assert!(whole.len() == sent.len(), "no length changes");
    Ok(())
}
