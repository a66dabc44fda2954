//! The real Envoy calls, as the sidecars of the mesh do: HTTP/1.1, HTTP/2 and plain TCP.

#![allow(clippy::print_stdout)]

#[path = "envoy/client.rs"]
mod client;

use super::{Pod, WEB, inbound, refused, started, vm};
use crate::{
    authority::Authority,
    peers_envoy::{issue, program},
    rotation::{ID, lab},
    support::SOON,
};
use bytes::Bytes;
use client::{BARE, Client, Papers, WAYS};
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinSet,
    time::{Instant, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use we_agent::{
    host::Local,
    inbound::{Listen, Listener, Place, Settings, Threads},
    spiffe::X509Context,
    status::{Identity, InboundCounters, InboundPlace, InboundRefusal},
    time::Clock,
};
use we_lab::Lab;

const ROTATIONS: usize = 50;

/// Answers with the version of HTTP that it was asked in: HTTP/2 where a connection begins with its preface.
async fn application() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let answer = service_fn(|request: Request<Incoming>| async move {
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(format!("{:?}", request.version())))))
                });
                let mut first = [0];
                if stream.peek(&mut first).await.is_err() {
                    return; // who only looked at our certificate
                }
                let io = TokioIo::new(stream);
                // The preface begins with P, and nobody here sends a POST.
                if first == *b"P" {
                    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(io, answer)
                        .await;
                } else {
                    let _ =
                        hyper::server::conn::http1::Builder::new().half_close(true).serve_connection(io, answer).await;
                }
            });
        }
    });
    address
}

/// What the application answers to a call in this `way`.
fn answer(way: &str) -> &'static str {
    if way == "h2" { "HTTP/2.0" } else { "HTTP/1.1" }
}

impl Papers {
    /// Of a pod that is `id` by the authority of `issuer`, and trusts `mesh`.
    fn new(issuer: &Lab, id: &str, mesh: &Lab) -> Self {
        let (key, chain) = issuer.ca().pod(&[id], SystemTime::now(), Duration::from_secs(3600)).unwrap();
        Self { key, chain, roots: mesh.root_pem() }
    }

    fn of(context: &X509Context) -> Self {
        let svid = &context.svid;
        Self { key: svid.key().pem().to_owned(), chain: svid.chain_pem(), roots: context.bundle.pem() }
    }
}

#[tokio::test]
async fn envoy_is_served_or_told_why_not() {
    let Some(program) = program() else { return };
    let (lab, other) = (lab().spawn().await.unwrap(), Lab::builder().spawn().await.unwrap());
    let (_host, mut agent, at) = started(vm(&lab, application().await, ", allow: [{namespace: shop}]")).await;
    let envoy = Client::start(&program, &Papers::new(&lab, WEB, &lab), at, ID).await;
    for way in WAYS {
        assert_eq!(envoy.get(way).await.as_deref(), Ok(answer(way)), "{way}: {:?}", inbound(&agent));
    }
    assert!(inbound(&agent).refused.is_empty());
    assert!(envoy.get(BARE).await.unwrap_err().contains("503"));
    assert!(refused(&mut agent, "no_certificate").await.contains("shows no certificate"));
    for (issuer, id, reason, said) in [
        (&other, WEB, "untrusted", "leads to none of our roots"),
        (&lab, "spiffe://elsewhere.local/ns/shop/sa/web", "trust_domain", "spiffe://elsewhere.local/ns/shop/sa/web"),
        (&lab, "spiffe://cluster.local/ns/other/sa/web", "not_allowed", "ns/other/sa/web may not call"),
    ] {
        envoy.becomes(&Papers::new(issuer, id, &lab)).await;
        let answer = envoy.get("h1").await.unwrap_err();
        assert!(answer.contains("503"), "{reason}: {answer}");
        let text = refused(&mut agent, reason).await;
        assert!(text.contains(said), "{reason}: {text}");
    }
    agent.stop().await;
}

#[tokio::test]
async fn envoy_refuses_who_is_not_whom_it_expects() {
    let Some(program) = program() else { return };
    let lab = lab().spawn().await.unwrap();
    let (_host, mut agent, at) = started(vm(&lab, application().await, "")).await;
    let wrong = "spiffe://cluster.local/ns/vms/sa/somebody-else";
    let envoy = Client::start(&program, &Papers::new(&lab, WEB, &lab), at, wrong).await;
    let refusal = envoy.get("h1").await.unwrap_err();
    assert!(refusal.contains("503"), "{refusal}");
    // TLS 1.3 with an alert, or it just leaves.
    let told = |w: &we_agent::status::WorkloadReport| !w.inbound[0].refused.is_empty();
    let told = agent.until("payments", "told", told).await;
    assert_eq!(told.inbound[0].handshakes.count, 0, "{:?}", told.inbound[0]);
    // Another client is not disturbed by it.
    let pod = Pod::new(&lab, WEB);
    assert!(pod.echo(at, b"GET / HTTP/1.0\r\n\r\n").await.starts_with(b"HTTP/1.0 200"));
    agent.stop().await;
}

/// A listener whose identity is ours to change, without waiting for an authority.
struct Ours {
    identity: watch::Sender<Identity>,
    counters: Arc<InboundCounters>,
    at: SocketAddr,
    stop: CancellationToken,
}

impl Ours {
    async fn start(first: Arc<X509Context>, forward: SocketAddr) -> Self {
        let hour = Duration::from_secs(3600);
        let settings = Settings {
            listen: Listen { ip: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), port: 0 },
            forward: Local::Tcp(forward),
            permissive: false,
            allow: Vec::new(),
            proxy_header: false,
            max_age: None,
            idle: hour,
            handshake: SOON,
            max_connections: 100,
            max_per_identity: 100,
            max_handshakes: 100,
            drain: Duration::from_secs(1),
        };
        let (fact, mut told) = watch::channel(InboundPlace::Absent);
        let (identity, identities) = watch::channel(Identity { current: Some(first), ..Identity::default() });
        let counters = Arc::new(InboundCounters::default());
        let (place, threads) = (Place::new("payments", settings.listen), Threads::start().unwrap());
        let id = ID.parse().unwrap();
        let stop = CancellationToken::new();
        let listener = Listener { place, id, settings, threads, fact, counters: counters.clone() };
        tokio::spawn(listener.run(identities, Clock::Wall, stop.clone()));
        let bound = told.wait_for(|place| matches!(place, InboundPlace::Bound(_))).await.unwrap().clone();
        let InboundPlace::Bound(at) = bound else { unreachable!() };
        Self { identity, counters, at, stop }
    }

    /// From now on it is `next`, and `caller` sees it.
    async fn is(&self, next: Arc<X509Context>, caller: &X509Context) {
        let serial = next.svid.serial().to_owned();
        self.identity.send_modify(|identity| identity.previous = identity.current.replace(next));
        let (pod, end) = (Pod::of(caller), Instant::now() + SOON);
        let mut look = interval(Duration::from_millis(5));
        while Pod::server_serial(&pod.connect(self.at).await.unwrap()) != serial {
            assert!(Instant::now() < end, "{serial} is not shown");
            look.tick().await;
        }
    }
}

/// Calls in all ways at once, again and again.
struct Load {
    tasks: JoinSet<Vec<String>>,
    done: [watch::Receiver<usize>; WAYS.len()],
    stop: CancellationToken,
}

impl Load {
    fn start(envoy: &Arc<Client>) -> Self {
        let (mut tasks, stop) = (JoinSet::new(), CancellationToken::new());
        let done = WAYS.map(|way| {
            let (good, done) = watch::channel(0);
            let (envoy, stop) = (envoy.clone(), stop.clone());
            tasks.spawn(async move {
                let mut errors = Vec::new();
                while !stop.is_cancelled() {
                    match envoy.get(way).await {
                        Ok(text) if text == answer(way) => good.send_modify(|good| *good += 1),
                        other => errors.push(format!("{way}: {other:?}")),
                    }
                }
                errors
            });
            done
        });
        Self { tasks, done, stop }
    }

    /// Waits for two more calls in each way: the second one was begun after this.
    async fn goes_on(&mut self) {
        for done in &mut self.done {
            let goal = *done.borrow() + 2;
            timeout(SOON, done.wait_for(|good| *good >= goal)).await.expect("calls do not go on").unwrap();
        }
    }

    /// How many calls were answered; fails when one was not.
    async fn stop(self) -> [usize; WAYS.len()] {
        self.stop.cancel();
        let errors = self.tasks.join_all().await.concat();
        let good = self.done.map(|done| *done.borrow());
        assert!(errors.is_empty(), "{} errors beside {good:?}: {errors:?}", errors.len());
        good
    }
}

#[tokio::test]
async fn envoy_feels_neither_rotations_nor_a_change_of_roots() {
    let Some(program) = program() else { return };
    let [old, new] = ["old", "new"].map(|name| Authority::root(name).intermediate("istiod"));
    let served = |issuer: &Authority, roots: &[&Authority]| issue(issuer, ID, roots);
    let called = |issuer: &Authority, roots: &[&Authority]| issue(issuer, WEB, roots);
    let ours = Ours::start(served(&old, &[&old]), application().await).await;
    let caller = called(&old, &[&old]);
    let envoy = Arc::new(Client::start(&program, &Papers::of(&caller), ours.at, ID).await);
    let mut load = Load::start(&envoy);
    load.goes_on().await;
    for _ in 0..ROTATIONS {
        ours.is(served(&old, &[&old]), &caller).await;
        load.goes_on().await;
    }
    // The stages in which istiod changes its roots; the pods are not told at the same moment.
    let both = [&old, &new];
    for (certificate, caller) in [
        (served(&old, &both), called(&old, &both)),
        (served(&new, &both), called(&new, &both)),
        (served(&new, &[&new]), called(&new, &[&new])),
        (served(&new, &[&new]), called(&new, &[&new])),
    ] {
        ours.is(certificate, &caller).await;
        load.goes_on().await;
        envoy.becomes(&Papers::of(&caller)).await;
        load.goes_on().await;
    }
    let good = load.stop().await;
    println!("{ROTATIONS} rotations and a change of roots; {good:?} calls by {WAYS:?}, 0 errors");
    let refused: Vec<_> = InboundRefusal::ALL.iter().filter(|kind| ours.counters.refusals(**kind) > 0).collect();
    assert!(refused.is_empty(), "{refused:?}");
    ours.stop.cancel();
}
