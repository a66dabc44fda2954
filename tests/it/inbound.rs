//! A plain application is called by the mesh through our listener: who may call, what arrives, and what stays standing.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod abuse;
mod bounds;
mod callers;
mod client;
mod ends;
mod envoy;
mod lacking;
mod mesh;
mod renegotiation;
mod restart;

use crate::{
    daemon::Daemon,
    rotation::{ID, lab},
    support::{Host, Running, SOON},
};
use client::{Pod, WEB};
use nix::sys::signal::Signal;
use std::{
    fmt::Display,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::io::InspectReader;
use we_agent::status::{IdentityState, InboundReport};
use we_lab::Lab;

/// An application without TLS.
struct Echo {
    address: SocketAddr,
    /// How many bytes it has got.
    heard: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Echo {
    /// Sends back what it gets, until the end; then it ends, too.
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let heard = Arc::new(AtomicUsize::new(0));
        let counter = heard.clone();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let heard = counter.clone();
                tokio::spawn(async move {
                    let (read, mut write) = stream.into_split();
                    let mut read = InspectReader::new(read, move |bytes| {
                        heard.fetch_add(bytes.len(), Relaxed);
                    });
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        Self { address, heard, task }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A VM whose one listener takes any free port and forwards to `forward`; `more` are further keys.
fn vm(lab: &Lab, forward: impl Display, more: &str) -> Host {
    let inbound = format!("inbound: [{{listen: '127.0.0.1:0', forward: '{forward}'{more}}}]");
    Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
        .config(&format!("workloads: {{payments: {{renewal: {{minInterval: 100ms}}, {inbound}}}}}\n"))
}

/// The one listener of the workload.
fn inbound(agent: &Running) -> InboundReport {
    agent.workload("payments").unwrap().inbound.remove(0)
}

/// Starts it; where it listens.
async fn started(host: Host) -> (Host, Running, SocketAddr) {
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let listens = |w: &we_agent::status::WorkloadReport| w.inbound[0].address.is_some();
    let at = agent.until("payments", "listening", listens).await.inbound[0].address.unwrap();
    (host, agent, at)
}

#[tokio::test]
async fn a_pod_reaches_a_plain_application() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, "")).await;
    let pod = Pod::new(&lab, WEB);
    let mut stream = pod.connect(at).await.unwrap();
    assert_eq!(Pod::server_id(&stream), ID);
    stream.write_all(b"hello").await.unwrap();
    let mut answer = [0; 5];
    timeout(SOON, stream.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"hello");
    assert_eq!(inbound(&agent).open, 1);
    // Half-close: the application learns of it, and answers to the end.
    stream.write_all(b" and goodbye").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    timeout(SOON, stream.read_to_string(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, " and goodbye");
    agent.until("payments", "closed", |w| w.inbound[0].open == 0).await;
    let seen = inbound(&agent);
    assert_eq!((seen.connections, seen.handshakes.count, seen.bytes_in, seen.bytes_out), (1, 1, 17, 17));
    assert!(seen.refused.is_empty(), "{seen:?}");
    agent.stop().await;
}

/// What a client sees that is not let in: the handshake fails, or (TLS 1.3 tells a client only after it is done) the first
/// read does.
async fn is_refused(pod: &Pod, at: SocketAddr) {
    let Ok(mut stream) = pod.connect(at).await else { return };
    let _ = stream.write_all(b"x").await;
    let mut answer = Vec::new();
    let read = timeout(SOON, stream.read_to_end(&mut answer)).await.expect("it is held");
    assert!(read.is_err() && answer.is_empty(), "it was let in: {answer:?}");
}

/// Waits until refusals are counted for this reason, and says what the last one said.
async fn refused(agent: &mut Running, reason: &str) -> String {
    let w = agent.until("payments", reason, |w| w.inbound[0].refused.contains_key(reason)).await;
    w.inbound[0].last_refusal.clone().unwrap()
}

#[tokio::test]
async fn much_goes_both_ways_at_once_and_arrives_as_it_was() {
    const SIZE: usize = 20 << 20;
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, agent, at) = started(vm(&lab, echo.address, "")).await;
    for pod in [Pod::new(&lab, WEB), Pod::tls12(&lab, WEB)] {
        let bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(SIZE).collect();
        let (mut read, mut write) = tokio::io::split(pod.connect(at).await.unwrap());
        let sent = bytes.clone();
        let sending = tokio::spawn(async move {
            let mut rest = &sent[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(fastrand::usize(1..100_000).min(rest.len()));
                write.write_all(now).await.unwrap();
                rest = later;
            }
            write.shutdown().await.unwrap();
        });
        let mut echoed = Vec::with_capacity(SIZE);
        timeout(SOON * 3, read.read_to_end(&mut echoed)).await.unwrap().unwrap();
        sending.await.unwrap();
        assert!(echoed == bytes, "{} of {SIZE} bytes came back, or others", echoed.len());
    }
    assert_eq!(inbound(&agent).bytes_in, 2 * SIZE as u64);
    agent.stop().await;
}

/// Calls again and again until told to end; how often, and what went wrong.
fn load(pods: Vec<Pod>, at: SocketAddr) -> (tokio::sync::oneshot::Sender<()>, JoinHandle<(usize, Vec<String>)>) {
    let (end, mut ended) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(async move {
        let (mut calls, mut errors) = (0, Vec::new());
        // One connection lives through everything, the others are new.
        let mut old = pods[0].connect(at).await.unwrap();
        while ended.try_recv().is_err() {
            let pod = &pods[calls % pods.len()];
            match timeout(SOON, pod.try_echo(at, b"ping")).await {
                Ok(Ok(answer)) if answer == b"ping" => {}
                other => errors.push(format!("{other:?}")),
            }
            old.write_all(b"on").await.unwrap();
            old.read_exact(&mut [0; 2]).await.unwrap();
            calls += 1;
        }
        (calls, errors)
    });
    (end, task)
}

#[tokio::test]
async fn rotations_and_a_change_of_roots_are_not_felt() {
    let lab = lab().ttl(Duration::from_secs(2)).spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, "")).await;
    let renewed = async |agent: &mut Running, times: usize| {
        for _ in 0..times {
            let serial = agent.workload("payments").unwrap().identity.serial;
            agent.until("payments", "renewed", |w| w.identity.serial != serial).await;
        }
    };
    // One pod trusts both roots from the beginning, as those do that have their certificate renewed in between.
    lab.ca().add_root().unwrap();
    let old = Pod::new(&lab, WEB);
    let (end, calls) = load(vec![old], at);
    renewed(&mut agent, 4).await;
    lab.ca().rotate_root(true).unwrap();
    // istiod accepts certificates of its new root when it has been restarted.
    agent.until("payments", "refused", |w| w.identity.state == IdentityState::Refused).await;
    lab.restart().await;
    agent.until("payments", "accepted", |w| w.ready && w.identity.state == IdentityState::Valid).await;
    let new = Pod::new(&lab, WEB);
    assert_eq!(new.echo(at, b"new").await, b"new");
    lab.ca().drop_old_roots();
    renewed(&mut agent, 1).await;
    end.send(()).unwrap();
    let (count, errors) = calls.await.unwrap();
    assert!(count > 20 && errors.is_empty(), "{} of {count}: {errors:?}", errors.len());
    assert_eq!(new.echo(at, b"new").await, b"new");
    agent.stop().await;
}

#[tokio::test]
async fn nobody_is_held_when_the_application_is_down() {
    let lab = lab().spawn().await.unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (_host, mut agent, at) = started(vm(&lab, closed, "")).await;
    is_refused(&Pod::new(&lab, WEB), at).await;
    let text = refused(&mut agent, "application").await;
    assert!(text.contains(&format!("the application at {closed} takes no connection")), "{text}");
    agent.stop().await;
}

#[tokio::test]
async fn what_is_idle_or_old_is_ended() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    for more in [", idleTimeout: 300ms", ", maxConnectionAge: 300ms, drainTimeout: 1s"] {
        let (_host, mut agent, at) = started(vm(&lab, echo.address, more)).await;
        let mut stream = Pod::new(&lab, WEB).connect(at).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        let mut answer = Vec::new();
        let read = timeout(SOON, stream.read_to_end(&mut answer)).await.expect("it is not ended");
        assert!(read.is_ok() && answer == b"x", "{more}: {read:?}");
        agent.until("payments", "closed", |w| w.inbound[0].open == 0).await;
        agent.stop().await;
    }
}

#[tokio::test]
async fn what_is_held_when_the_time_is_over_is_no_regular_end() {
    const SIZE: usize = 40 << 20;
    let lab = lab().spawn().await.unwrap();
    let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let more = ", mode: permissive, idleTimeout: 500ms";
    let (_host, mut agent, at) = started(vm(&lab, application.local_addr().unwrap(), more)).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(b"?").await.unwrap();
    let (mut answers, _) = application.accept().await.unwrap();
    let writing = tokio::spawn(async move { answers.write_all(&vec![7; SIZE]).await });
    // The caller does not read, so it is ended; and it must not take the beginning for the whole.
    agent.until("payments", "ended", |w| w.inbound[0].bytes_out > 0 && w.inbound[0].open == 0).await;
    let mut answer = Vec::new();
    let read = timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap();
    assert!(read.is_err() && answer.len() < SIZE, "{read:?}, {} bytes", answer.len());
    assert!(writing.await.unwrap().is_err());
    agent.stop().await;
}

#[tokio::test]
async fn a_stop_lets_open_connections_end_and_takes_no_new_ones() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, agent, at) = started(vm(&lab, echo.address, ", drainTimeout: 1m")).await;
    let mut stream = Pod::new(&lab, WEB).connect(at).await.unwrap();
    let stopping = tokio::spawn(agent.stop());
    // What moves all the time goes on; a new one is not taken.
    let mut moved = 0;
    while moved < 20 {
        stream.write_all(b"on").await.unwrap();
        stream.read_exact(&mut [0; 2]).await.unwrap();
        moved += 1;
        if moved == 10 {
            let refused = async {
                while TcpStream::connect(at).await.is_ok() {
                    tokio::task::yield_now().await;
                }
            };
            // It goes on in between.
            tokio::pin!(refused);
            loop {
                tokio::select! {
                    () = &mut refused => break,
                    echoed = async {
                        stream.write_all(b"on").await.unwrap();
                        stream.read_exact(&mut [0; 2]).await
                    } => echoed.unwrap(),
                };
            }
        }
    }
    assert!(!stopping.is_finished());
    // Quiet, it is ended long before the deadline.
    let mut rest = Vec::new();
    timeout(SOON, stream.read_to_end(&mut rest)).await.expect("it is not ended").expect("it is cut");
    timeout(SOON, stopping).await.expect("the stop waits for the deadline").unwrap();
}

#[tokio::test]
async fn who_says_nothing_does_not_hold_up_a_stop() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, ", drainTimeout: 1m, handshakeTimeout: 1m")).await;
    let mut silent = TcpStream::connect(at).await.unwrap();
    agent.until("payments", "taken", |w| w.inbound[0].open == 1).await;
    let stopping = tokio::spawn(agent.stop());
    assert_eq!(timeout(SOON, silent.read(&mut [0])).await.unwrap().unwrap(), 0);
    timeout(SOON, stopping).await.expect("the stop waits for it").unwrap();
}

#[tokio::test]
async fn a_stop_waits_for_an_answer_that_is_owed() {
    let lab = lab().spawn().await.unwrap();
    let slow = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_host, agent, at) = started(vm(&lab, slow.local_addr().unwrap(), ", drainTimeout: 8s")).await;
    let mut stream = Pod::new(&lab, WEB).connect(at).await.unwrap();
    stream.write_all(b"?").await.unwrap();
    let (mut application, _) = slow.accept().await.unwrap();
    application.read_exact(&mut [0]).await.unwrap();
    let stopping = tokio::spawn(agent.stop());
    // Longer than what counts as quiet.
    let early = timeout(Duration::from_millis(700), stream.read(&mut [0])).await;
    assert!(early.is_err() && !stopping.is_finished(), "{early:?}");
    application.write_all(b"!").await.unwrap();
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, b"!");
    stopping.await.unwrap();
}

#[tokio::test]
async fn a_stop_waits_for_the_rest_of_an_answer() {
    const SIZE: usize = 20 << 20;
    /// Longer than it takes to look for quiet connections.
    const PAUSE: Duration = Duration::from_millis(700);
    let lab = lab().spawn().await.unwrap();
    let slow = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_host, agent, at) = started(vm(&lab, slow.local_addr().unwrap(), ", drainTimeout: 30s")).await;
    let pod = Pod::new(&lab, WEB);
    // One application pauses in the middle of its answer, one caller in the middle of reading it.
    let mut paused = pod.connect(at).await.unwrap();
    let (mut pauses, _) = slow.accept().await.unwrap();
    pauses.write_all(b"the beginning").await.unwrap();
    paused.read_exact(&mut [0; 13]).await.unwrap();
    let mut read = pod.connect(at).await.unwrap();
    let (mut large, _) = slow.accept().await.unwrap();
    let writing = tokio::spawn(async move { large.write_all(&vec![7; SIZE]).await.unwrap() });
    read.read_exact(&mut [0; 1]).await.unwrap();
    let stopping = tokio::spawn(agent.stop());
    let early = timeout(PAUSE, paused.read(&mut [0])).await;
    assert!(early.is_err() && !stopping.is_finished(), "{early:?}");
    let mut rest = Vec::with_capacity(SIZE);
    timeout(SOON, read.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest.len(), SIZE - 1);
    drop(read);
    writing.await.unwrap();
    pauses.write_all(b" and the end").await.unwrap();
    drop(pauses);
    let mut rest = String::new();
    timeout(SOON, paused.read_to_string(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, " and the end");
    drop(paused);
    stopping.await.unwrap();
}

/// The names of the threads of a process.
pub(crate) fn threads(id: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{id}/task")).unwrap();
    tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok()).collect()
}

#[tokio::test]
async fn only_who_listens_has_threads_for_it() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let without = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"));
    for (host, listens) in [(without.config("admin: {address: 'off'}\n"), false), (vm(&lab, echo.address, ""), true)] {
        let daemon = Daemon::start(&host, &["--log-level", "info"], &[]);
        daemon.until("payments", |w| w.ready && w.inbound.len() == usize::from(listens)).await;
        let threads = threads(daemon.id());
        assert_eq!(threads.iter().any(|name| name.starts_with("inbound-")), listens, "{threads:?}");
        daemon.signal(Signal::SIGTERM);
        daemon.ended().await;
    }
}
