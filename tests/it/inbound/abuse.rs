//! Who wants to do harm: memory stays bounded, and honest clients are served.
#![allow(clippy::print_stdout)]

use super::{Echo, Pod, WEB, inbound, started, vm};
use crate::{
    daemon::{Daemon, may_look},
    rotation::lab,
    support::{Host, SOON},
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::{
    io::Write,
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// The beginning of a ClientHello that never ends.
const BEGINNING: &[u8] = &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];

#[tokio::test]
async fn half_open_handshakes_do_not_keep_others_out() {
    const FEW: usize = 50;
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, &format!(", maxHandshakes: {FEW}"))).await;
    let mut half = Vec::new();
    for n in 0..4 * FEW {
        let mut stream = TcpStream::connect(at).await.unwrap();
        if n % 2 == 0 {
            stream.write_all(BEGINNING).await.unwrap();
        }
        half.push(stream);
    }
    let evicted = 3 * FEW as u64;
    let w = agent.until("payments", "bounded", |w| w.inbound[0].refused.get("evicted") >= Some(&evicted)).await;
    assert!(w.inbound[0].open <= FEW as u64, "{:?}", w.inbound[0]);
    assert_eq!(Pod::new(&lab, WEB).echo(at, b"honest").await, b"honest");
    // The oldest were closed, the newest wait.
    assert!(matches!(timeout(SOON, half[0].read(&mut [0])).await.unwrap(), Ok(0) | Err(_)));
    agent.stop().await;
}

#[tokio::test]
async fn slow_hands_are_let_go() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, ", handshakeTimeout: 300ms")).await;
    let mut slow = TcpStream::connect(at).await.unwrap();
    slow.write_all(BEGINNING).await.unwrap();
    assert!(matches!(timeout(SOON, slow.read(&mut [0])).await.unwrap(), Ok(0) | Err(_)));
    agent.until("payments", "let go", |w| w.inbound[0].refused.get("timeout") == Some(&1)).await;
    agent.stop().await;
}

#[tokio::test]
async fn garbage_is_refused_wherever_it_comes() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, "")).await;
    let oversized = [&[0x16, 3, 1, 0xff, 0xff][..], &[0; 70_000]].concat();
    let no_hello = [&[0x16, 3, 1, 0, 4, 9, 0, 0, 0][..], &[0; 64]].concat();
    for garbage in [&oversized[..], &no_hello, b"\0\0\0\0", &[0x80, 0x2e, 1, 0, 2], &[0xff; 4096]] {
        let mut stream = TcpStream::connect(at).await.unwrap();
        let _ = stream.write_all(garbage).await; // it may be closed before all of it is there
        let mut answer = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut answer)).await.expect("it is held");
    }
    // In the middle of a connection that began well.
    for garbage in [&oversized[5..], &[0x17, 3, 3, 0x50, 0], &[0x17, 3, 3, 0, 32], &[0x16, 3, 3, 0, 4, 0, 0, 0, 0]] {
        let mut stream = Pod::new(&lab, WEB).connect(at).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        stream.read_exact(&mut [0]).await.unwrap();
        let (tcp, _) = stream.get_mut();
        let _ = tcp.write_all(&[garbage, &[0; 64]].concat()).await;
        let mut answer = Vec::new();
        let read = timeout(SOON, stream.read_to_end(&mut answer)).await.expect("it is held");
        // It is told, which a thread that broke would not do.
        assert!(read.is_err_and(|error| error.to_string().contains("fatal alert")) && answer.is_empty());
    }
    assert_eq!(Pod::new(&lab, WEB).echo(at, b"honest").await, b"honest");
    agent.until("payments", "closed", |w| w.inbound[0].open == 0).await;
    assert_eq!(inbound(&agent).handshakes.count, 5);
    agent.stop().await;
}

#[tokio::test]
async fn who_does_not_read_stops_who_writes() {
    let lab = lab().spawn().await.unwrap();
    // Takes connections and reads nothing.
    let stalled = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_host, agent, at) = started(vm(&lab, stalled.local_addr().unwrap(), "")).await;
    let mut stream = Pod::new(&lab, WEB).connect(at).await.unwrap();
    let (held, _) = stalled.accept().await.unwrap();
    let megabyte = vec![7; 1 << 20];
    let mut sent = 0;
    while timeout(Duration::from_millis(500), stream.write_all(&megabyte)).await.is_ok() {
        sent += 1;
        assert!(sent < 200, "it goes on for ever");
    }
    // What the kernel holds for three sockets, and one batch of ours.
    let taken = inbound(&agent).bytes_in;
    assert!(taken < 64 << 20, "{taken} bytes were taken");
    drop(held);
    // The application has gone, so the peer learns of it.
    let broken = async { while stream.write_all(&megabyte).await.is_ok() {} };
    timeout(SOON, broken).await.expect("the peer is held");
    agent.stop().await;
}

#[tokio::test]
async fn more_connections_than_allowed_are_closed_at_once() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, ", maxConnections: 2")).await;
    let pod = Pod::new(&lab, WEB);
    let mut kept = [pod.connect(at).await.unwrap(), pod.connect(at).await.unwrap()];
    for stream in &mut kept {
        // Our side of the handshake is over when bytes come back.
        stream.write_all(b"x").await.unwrap();
        stream.read_exact(&mut [0]).await.unwrap();
    }
    assert!(timeout(SOON, pod.connect(at)).await.unwrap().is_err());
    agent.until("payments", "counted", |w| w.inbound[0].refused.get("too_many") == Some(&1)).await;
    drop(kept);
    agent.until("payments", "closed", |w| w.inbound[0].open == 0).await;
    assert_eq!(pod.echo(at, b"again").await, b"again");
    agent.stop().await;
}

#[tokio::test]
async fn silent_connections_do_not_use_up_what_the_mesh_needs() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, ", maxConnections: 4")).await;
    let pod = Pod::new(&lab, WEB);
    let mut kept = pod.connect(at).await.unwrap();
    kept.write_all(b"x").await.unwrap();
    kept.read_exact(&mut [0]).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(at).await.unwrap());
        assert_eq!(pod.echo(at, b"honest").await, b"honest");
    }
    let w = agent.until("payments", "bounded", |w| w.inbound[0].open <= 4).await;
    assert!(w.inbound[0].refused.get("evicted") >= Some(&17), "{:?}", w.inbound[0]);
    assert!(!w.inbound[0].refused.contains_key("too_many"), "{:?}", w.inbound[0]);
    // Who was let in stays in.
    kept.write_all(b"y").await.unwrap();
    kept.read_exact(&mut [0]).await.unwrap();
    agent.stop().await;
}

/// Whoever is let in has a place, also when it was to give way in the same moment.
#[tokio::test]
async fn bursts_do_not_get_past_the_bound() {
    const MOST: u64 = 4;
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let more = format!(", mode: permissive, maxConnections: {MOST}");
    let (_host, mut agent, at) = started(vm(&lab, echo.address, &more)).await;
    let burst = || std::thread::spawn(move || burst(at));
    let bursts = [burst(), burst()];
    let mut held = Vec::new();
    for burst in bursts {
        held.extend(tokio::task::spawn_blocking(|| burst.join().unwrap()).await.unwrap());
    }
    // Those that gave way are gone in a moment.
    agent
        .until("payments", "bounded", |w| {
            let seen = &w.inbound[0];
            let taken = seen.connections + seen.refused.get("too_many").copied().unwrap_or_default();
            taken == held.len() as u64 && seen.open <= MOST
        })
        .await;
    agent.stop().await;
}

/// Callers that say something at once, again and again behind one that does not.
fn burst(at: SocketAddr) -> Vec<std::net::TcpStream> {
    let mut held = Vec::new();
    for n in 0..300 {
        let mut stream = std::net::TcpStream::connect(at).unwrap();
        // It may be closed already.
        let _ = stream.write_all(if n % 10 == 0 { &BEGINNING[..1] } else { b"x" });
        held.push(stream);
    }
    held
}

#[tokio::test]
async fn a_shortage_of_descriptors_is_waited_out_and_said_once() {
    if !may_look() {
        return;
    }
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let host = vm(&lab, echo.address, ", handshakeTimeout: 1s");
    let (daemon, at) = daemon(&host).await;
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap().count() as u64;
    let id = Pid::from_raw(i32::try_from(daemon.id()).unwrap());
    prlimit(id, Resource::Nofile, Rlimit { current: Some(open + 4), maximum: Some(open + 4) }).unwrap();
    let mut silent = Vec::new();
    for _ in 0..12 {
        silent.push(TcpStream::connect(at).await.unwrap());
    }
    // Each in its turn, when those before it have had their second.
    for stream in &mut silent {
        assert!(matches!(timeout(SOON, stream.read(&mut [0])).await.unwrap(), Ok(0) | Err(_)));
    }
    let log = daemon.log();
    assert_eq!(log.matches("connections cannot be taken at present").count(), 1, "{log}");
}

/// What a process has in memory that is its own, in KiB.
fn private(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let lines = status.lines().filter_map(|line| line.strip_prefix("RssAnon:").or(line.strip_prefix("VmSwap:")));
    lines.map(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap()).sum()
}

/// The daemon with one listener, which has its first certificate.
async fn daemon<'a>(host: &'a Host) -> (Daemon<'a>, SocketAddr) {
    let daemon = Daemon::start(host, &[], &[]);
    let listening = |w: &we_agent::status::WorkloadReport| w.ready && w.inbound[0].address.is_some();
    let w = daemon.until("payments", listening).await;
    (daemon, w.inbound[0].address.unwrap())
}

#[tokio::test]
async fn ten_thousand_half_open_handshakes_cost_little() {
    const MANY: usize = 10_000;
    if we_agent::host::raise_descriptor_limit().is_ok_and(|limit| limit < MANY as u64 + 1000) {
        println!("skipped: this host does not allow {MANY} descriptors; ulimit -Hn");
        return;
    }
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let host = vm(&lab, echo.address, "");
    let (daemon, at) = daemon(&host).await;
    let pod = Pod::new(&lab, WEB);
    assert_eq!(pod.echo(at, b"before").await, b"before");
    let before = private(daemon.id());
    let mut half = Vec::new();
    let mut slowest = Duration::ZERO;
    for n in 0..MANY {
        let mut stream = TcpStream::connect(at).await.unwrap();
        let _ = stream.write_all(BEGINNING).await; // it may be closed already
        half.push(stream);
        if n % 500 == 0 {
            let begin = Instant::now();
            assert_eq!(pod.echo(at, b"honest").await, b"honest");
            slowest = slowest.max(begin.elapsed());
        }
    }
    // An eviction takes effect when the evicted has its turn.
    let bounded = |w: &we_agent::status::WorkloadReport| {
        w.inbound[0].refused.get("evicted") >= Some(&(MANY as u64 - 1100)) && w.inbound[0].open <= 1024
    };
    let w = daemon.until("payments", bounded).await;
    let grown = private(daemon.id()).saturating_sub(before);
    println!(
        "{MANY} half-open handshakes: {} open, {grown} KiB more, slowest honest call {slowest:?}",
        w.inbound[0].open
    );
    assert!(grown < 64 * 1024, "{grown} KiB");
    drop(half);
}

#[tokio::test]
async fn idle_connections_are_small() {
    const MANY: u64 = 1000;
    if we_agent::host::raise_descriptor_limit().is_ok_and(|limit| limit < 4 * MANY) {
        println!("skipped: this host does not allow {} descriptors; ulimit -Hn", 4 * MANY);
        return;
    }
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let host = vm(&lab, echo.address, "");
    let (daemon, at) = daemon(&host).await;
    let pod = Pod::new(&lab, WEB);
    let mut open = Vec::new();
    let mut before = 0;
    // The first hundred warm it up.
    for n in 0..MANY + 100 {
        if n == 100 {
            before = private(daemon.id());
        }
        let mut stream = pod.connect(at).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.read_exact(&mut [0; 5]).await.unwrap();
        open.push(stream);
    }
    let after = private(daemon.id());
    let each = after.saturating_sub(before) * 1024 / MANY;
    println!("an idle connection: {each} bytes");
    assert!((1..16 * 1024).contains(&each), "{before} KiB, then {after}");
    drop(open);
}
