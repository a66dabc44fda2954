//! Many consumers on one socket: each a connection with two streams of secret discovery, as an Envoy has. The messages
//! are so few and so simple that they are written and read by hand.

use anyhow::{Context, ensure};
use bytes::Bytes;
use h2::{RecvStream, SendStream, client};
use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{net::UnixStream, sync::watch, time::timeout};

const PATH: &str = "http://localhost/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
/// Envoy's first message has some 60 kB of what it can do.
const NODE: usize = 50_000;
/// For anything that should happen at once, a thousand times.
const SOON: Duration = Duration::from_secs(60);

/// Consumers that are connected and have got everything.
pub(crate) struct Consumers {
    runtime: tokio::runtime::Runtime,
    /// When each stream of `default` got which certificate, one round after the other.
    seen: Arc<Mutex<Vec<Instant>>>,
    told: watch::Receiver<usize>,
    count: usize,
}

impl Consumers {
    /// Connects `count` of them, one after the other, to `socket`.
    pub(crate) fn connect(socket: &Path, count: usize) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (seen, (tell, told)) = (Arc::default(), watch::channel(0));
        let tell = Arc::new(tell);
        runtime.block_on(async {
            for _ in 0..count {
                let stream = UnixStream::connect(socket).await.with_context(|| socket.display().to_string())?;
                let (mut sender, connection) = client::handshake(stream).await?;
                tokio::spawn(connection);
                for name in ["default", "ROOTCA"] {
                    let request = http::Request::post(PATH).header("content-type", "application/grpc");
                    let request = request.header("te", "trailers").body(())?;
                    sender = sender.ready().await?;
                    let (response, mut body) = sender.send_request(request, false)?;
                    send(&mut body, name, "").await?;
                    let answers = timeout(SOON, response).await??.into_body();
                    let kept = (name == "default").then(|| (Arc::clone(&seen), Arc::clone(&tell)));
                    tokio::spawn(follow(answers, body, name, kept));
                }
                // The connection lives as long as somebody holds its sender or a stream; the streams do.
            }
            anyhow::Ok(())
        })?;
        let consumers = Self { runtime, seen, told, count };
        consumers.until(count)?;
        Ok(consumers)
    }

    /// Waits for the next certificate to reach all: the time from the first to the last of them.
    pub(crate) fn spread(&self) -> anyhow::Result<Duration> {
        let before = *self.told.borrow();
        ensure!(before.is_multiple_of(self.count), "a push is on its way already");
        self.until(before + self.count)?;
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let round = seen.get(before..before + self.count).context("a push to all")?;
        let (first, last) = (round.iter().min().context("first")?, round.iter().max().context("last")?);
        Ok(*last - *first)
    }

    fn until(&self, total: usize) -> anyhow::Result<()> {
        let mut told = self.told.clone();
        self.runtime.block_on(async { timeout(SOON, told.wait_for(|n| *n >= total)).await })??;
        Ok(())
    }
}

type Kept = (Arc<Mutex<Vec<Instant>>>, Arc<watch::Sender<usize>>);

/// Reads answers and says yes to each.
async fn follow(mut answers: RecvStream, mut body: SendStream<Bytes>, name: &str, kept: Option<Kept>) -> Option<()> {
    let mut buffer = Vec::new();
    loop {
        while let Some(length) = buffer.get(1..5).and_then(|bytes| Some(u32::from_be_bytes(bytes.try_into().ok()?))) {
            let end = 5 + length as usize;
            let Some(message) = buffer.get(5..end) else { break };
            let nonce = nonce(message)?;
            if let Some((seen, tell)) = &kept {
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
                tell.send_modify(|n| *n += 1);
            }
            send(&mut body, name, &nonce).await.ok()?;
            buffer.drain(..end);
        }
        let data = answers.data().await?.ok()?;
        answers.flow_control().release_capacity(data.len()).ok()?;
        buffer.extend_from_slice(&data);
    }
}

/// A request for `name`; a first one without a nonce, and with a node.
async fn send(body: &mut SendStream<Bytes>, name: &str, nonce: &str) -> anyhow::Result<()> {
    let mut message = Vec::new();
    if nonce.is_empty() {
        let mut node = Vec::new();
        // An unknown field of a node, as most of Envoy's are here.
        field(&mut node, 15, &vec![b'x'; NODE]);
        field(&mut message, 2, &node);
    }
    field(&mut message, 3, name.as_bytes());
    field(&mut message, 5, nonce.as_bytes());
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len())?.to_be_bytes());
    frame.extend(message);
    let mut left = Bytes::from(frame);
    while !left.is_empty() {
        body.reserve_capacity(left.len());
        let room = std::future::poll_fn(|cx| body.poll_capacity(cx)).await.context("closed")??;
        body.send_data(left.split_to(room.min(left.len())), false)?;
    }
    Ok(())
}

fn field(to: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    to.push(number << 3 | 2);
    varint(to, bytes.len());
    to.extend_from_slice(bytes);
}

fn varint(to: &mut Vec<u8>, mut number: usize) {
    while number >= 128 {
        to.push((number % 128) as u8 | 128);
        number /= 128;
    }
    to.push(number as u8);
}

/// Field 5 of a response, in which every field has a length.
fn nonce(mut message: &[u8]) -> Option<String> {
    loop {
        let (tag, rest) = message.split_first()?;
        let (mut length, mut shift, mut rest) = (0, 0, rest);
        loop {
            let (byte, more) = rest.split_first()?;
            length |= usize::from(byte & 127) << shift;
            (shift, rest) = (shift + 7, more);
            if byte & 128 == 0 {
                break;
            }
        }
        let value = rest.get(..length)?;
        if tag >> 3 == 5 {
            return String::from_utf8(value.to_vec()).ok();
        }
        message = rest.get(length..)?;
    }
}
