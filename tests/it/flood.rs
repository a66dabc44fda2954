//! Whoever reaches a socket makes the libraries below us warn as often as it likes. The journal does not notice.

use crate::{
    daemon::Daemon,
    rotation::{host, lab},
    support::{Host, SOON},
};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

/// What is sent on one connection, one after the other.
type Shots = fn() -> Vec<Vec<u8>>;

/// All that h2 0.4.20 warns of, what makes it do so, and how often. (hyper warns only when built to, which is not stable;
/// what hyper-util and tonic warn of is their user's doing; rustls tells the `log` crate, where nobody listens.)
const WARNINGS: [(&str, Shots, usize); 4] = [
    ("recv PING ack that we never sent", pongs, 1000),
    ("remotely-reset pending-accept streams reached limit", reset_at_once, 1),
    ("reset_on_recv_stream_err; locally-reset streams reached limit", malformed, 1),
    ("payments: locally-reset streams reached limit", its_own_parent, 1),
];
/// Connections for each.
const TIMES: usize = 5;

const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const LAST: &[u8; 8] = b"the last";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Of a client, so many.
fn streams(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|n| 2 * n + 1)
}

/// Answers to pings that nobody sent.
fn pongs() -> Vec<Vec<u8>> {
    vec![frame(PING, 1, 0, b"unasked.").repeat(1000)]
}

/// Requests (POST, http, /, x) that are taken back before anybody has seen them.
fn reset_at_once() -> Vec<Vec<u8>> {
    let request = [0x83, 0x86, 0x84, 0x41, 1, b'x'];
    let both = |n| [frame(HEADERS, 4, n, &request), frame(RST_STREAM, 0, n, &8_u32.to_be_bytes())].concat();
    vec![streams(200).flat_map(both).collect()]
}

/// Requests whose content-length is x, no more at a time than are let in.
fn malformed() -> Vec<Vec<u8>> {
    let request = [0x83, 0x86, 0x84, 0x0f, 0x0d, 1, b'x'];
    let requests: Vec<_> = streams(2000).map(|n| frame(HEADERS, 4, n, &request)).collect();
    requests.chunks(16).map(<[_]>::concat).collect()
}

/// Streams that depend on themselves.
fn its_own_parent() -> Vec<Vec<u8>> {
    vec![streams(2000).flat_map(|n| frame(PRIORITY, 0, n, &[&n.to_be_bytes()[..], &[0]].concat())).collect()]
}

/// Sends all on one connection, and waits after each until it was read or the connection is ended.
async fn shoot(host: &Host, shots: &[Vec<u8>]) {
    let mut stream = UnixStream::connect(host.path("/run/we-agent/payments/agent.sock")).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let (mut read, mut write) = stream.split();
    for shot in shots {
        let shot = [&shot[..], &frame(PING, 0, 0, LAST)].concat();
        let answered = async {
            let (mut answer, mut buffer) = (Vec::<u8>::new(), [0; 4096]);
            while let Ok(size @ 1..) = read.read(&mut buffer).await {
                answer.extend(&buffer[..size]);
                if answer.windows(LAST.len()).any(|bytes| bytes == LAST) {
                    return true;
                }
            }
            false
        };
        let both = async { tokio::join!(write.write_all(&shot), answered) };
        if !timeout(SOON, both).await.expect("it neither reads nor ends").1 {
            return;
        }
    }
}

/// What the daemon says while it is shot at.
async fn said(arguments: &[&str]) -> String {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let daemon = Daemon::start(&host, arguments, &[]);
    daemon.until("payments", |w| w.ready).await;
    for (_, shot, _) in WARNINGS {
        let shot = shot();
        for _ in 0..TIMES {
            shoot(&host, &shot).await;
        }
    }
    let log = daemon.log();
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;
    log
}

#[tokio::test]
async fn no_library_fills_the_journal() {
    let log = said(&[]).await;
    for (warning, ..) in WARNINGS {
        assert!(!log.contains(warning), "{warning}");
    }
    assert!(log.lines().count() < 50, "{log}");
}

#[tokio::test]
async fn whoever_names_a_library_hears_each_of_its_warnings() {
    let log = said(&["--log-level", "info,h2=warn"]).await;
    for (warning, _, times) in WARNINGS {
        let heard = log.lines().filter(|line| line.contains(warning)).count();
        assert_eq!(heard, times * TIMES, "{warning}");
    }
}
