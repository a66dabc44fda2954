//! Room for what a peer sends (RFC 9113 section 5.2), as the peer counts it.
use super::*;
use tokio::io::AsyncWriteExt as _;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
/// What every peer begins with.
const INITIAL: i64 = 65_535;

/// A peer that writes frames, and what it may still send on stream 1.
struct Peer {
    stream: UnixStream,
    window: i64,
}

impl Peer {
    async fn write(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let head = [&length[1..], &[kind, flags], &id.to_be_bytes()].concat();
        self.stream.write_all(&[&head, payload].concat()).await.unwrap();
        self.window -= if kind == DATA { payload.len() as i64 } else { 0 };
    }

    /// Reads up to a frame of that kind.
    async fn read(&mut self, wanted: u8) {
        loop {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            self.stream.read_exact(&mut payload).await.unwrap();
            match (head[3], head[8]) {
                (WINDOW_UPDATE, 1) => self.window += i64::from(u32::from_be_bytes(payload[..].try_into().unwrap())),
                (SETTINGS, _) => {
                    for setting in payload.chunks(6).filter(|setting| setting[1] == 4) {
                        let initial = u32::from_be_bytes(setting[2..].try_into().unwrap());
                        self.window += i64::from(initial) - INITIAL;
                    }
                }
                _ => {}
            }
            if head[3] == wanted {
                return;
            }
        }
    }

    /// Returns when all that was written has been read, and what was read been taken.
    async fn taken(&mut self) {
        for _ in 0..3 {
            self.write(PING, 0, 0, &[0; 8]).await;
            self.read(PING).await;
        }
    }
}

/// As Envoy does it: a first message of some 50 kB before our settings have reached it, here read in two parts.
#[tokio::test]
async fn a_large_first_message_leaves_room_for_the_next() {
    let host = Host::serve();
    let mut peer = Peer { stream: host.stream().await, window: INITIAL };
    let path = format!("{SERVICE}/StreamSecrets");
    let fields =
        [(":method", "POST"), (":scheme", "http"), (":path", path.as_str()), ("content-type", "application/grpc")];
    let mut headers = Vec::new();
    for text in fields.iter().flat_map(|(name, value)| ["", name, value]) {
        // A literal that is not indexed begins with a zero (RFC 7541 section 6.2.2), as an empty text does.
        headers.push(u8::try_from(text.len()).unwrap());
        headers.extend(text.as_bytes());
    }
    timeout(SOON, async {
        peer.stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        peer.write(SETTINGS, 0, 0, &[]).await;
        peer.write(HEADERS, 4, 1, &headers).await;
        // The beginning of a message of 60,000 bytes.
        peer.write(DATA, 0, 1, &[&[0, 0, 0, 0xea, 0x60][..], &[0; 16_379]].concat()).await;
        peer.write(DATA, 0, 1, &[0; 16_384]).await;
        peer.taken().await;
        peer.write(DATA, 0, 1, &[0; 16_384]).await;
        peer.write(DATA, 0, 1, &[0; 848]).await;
        peer.taken().await;
        // From now on our settings are in force.
        peer.write(SETTINGS, 1, 0, &[]).await;
        peer.taken().await;
    })
    .await
    .unwrap();
    assert!(peer.window > 0, "{} bytes: the peer waits for room that nobody gives", peer.window);
}
