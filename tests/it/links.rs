//! Connections on wires that are slow, silent or cut, to names with many addresses, and to strangers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    published,
    relay::{Relay, Wire},
    rotation::{ID, assert_held, issued, lab, uid},
    support::{Host, SOON},
};
use std::{
    fs,
    io::Write,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::atomic::Ordering,
    time::Duration,
};
use we_agent::status::{IdentityState, RegistrationState};
use we_lab::{Credential, Event, Fault, Lab, What};

const DIR: &str = "/etc/we-agent/payments";

/// A VM that reaches the lab through a relay.
async fn far(lab: &Lab) -> (Relay, Host) {
    let relay = Relay::start(lab.address()).await;
    let bundle = lab.bundle("vms", "payments").internal_ip("127.0.0.1").address(relay.address);
    let host = Host::new().bundle("payments", &bundle).config("defaults: {renewal: {minInterval: 100ms}}\n");
    (relay, host)
}

/// What passes on a wire before a handshake is over says nothing about a certificate: no token goes out instead.
#[tokio::test]
async fn a_handshake_that_is_cut_off_is_no_refusal() {
    let lab = lab().spawn().await.unwrap();
    let (relay, host) = far(&lab).await;
    let mut agent = host.start().await;
    agent.ready("payments").await;
    // The session is on the token's connection still; from the next on it shows the certificate.
    let uid = uid(&lab);
    for bytes in [0, 50, 200, 900] {
        relay.set(Wire { cut: Some(bytes), ..Wire::default() });
        let (mark, taken) = (lab.mark(), relay.taken.load(Ordering::Relaxed));
        lab.inject(Fault::DropConnections);
        let w = agent
            .until("payments", "cut off", |w| {
                w.registration.state == RegistrationState::Lost
                    && relay.taken.load(Ordering::Relaxed) > taken
                    && w.registration.cause.as_ref().is_some_and(|cause| !cause.contains("the session with"))
            })
            .await;
        let cause = w.registration.cause.unwrap();
        assert!(cause.contains("cannot be reached") || cause.contains("broke"), "{bytes}: {cause}");
        assert_eq!(w.identity.state, IdentityState::Valid, "{bytes}: {:?}", w.identity.cause);
        relay.set(Wire::default());
        agent.ready("payments").await;
        for event in lab.events_since(mark) {
            let bare = matches!(event.what, What::ConnectionOpened { certificate: None, .. });
            assert!(!bare, "{bytes}: the token went out");
        }
    }
    assert_eq!(self::uid(&lab), uid);
    agent.stop().await;
}

/// A stream whose connection is alive on one end alone: a ping is sent after 30 s, and its answer awaited for 10 s.
#[tokio::test]
async fn a_connection_that_has_fallen_silent_is_given_up() {
    let lab = lab().spawn().await.unwrap();
    let (relay, host) = far(&lab).await;
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let (uid, mark) = (uid(&lab), lab.mark());
    relay.set(Wire { silent: relay.taken.load(Ordering::Relaxed), ..Wire::default() });
    let opened = |e: &Event| matches!(e.what, What::StreamOpened { .. });
    assert!(lab.until_since(mark, Duration::from_secs(40) + SOON, opened).await.is_some(), "it is still believed");
    agent.ready("payments").await;
    assert_eq!(self::uid(&lab), uid);
    agent.stop().await;
}

/// Addresses of loopback, all with one port, that nobody answers: their queues are full.
struct BlackHoles(Vec<TcpListener>, Vec<TcpStream>);

impl BlackHoles {
    fn new(last: std::ops::Range<u8>) -> Self {
        use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, socket};
        let (mut port, mut listeners, mut full) = (0, Vec::new(), Vec::new());
        for last in last {
            let hole = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
            bind(std::os::fd::AsRawFd::as_raw_fd(&hole), &SockaddrIn::new(127, 0, 0, last, port)).unwrap();
            listen(&hole, Backlog::new(0).unwrap()).unwrap();
            let hole = TcpListener::from(hole);
            let address = hole.local_addr().unwrap();
            while let Ok(tcp) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
                full.push(tcp);
            }
            port = address.port();
            listeners.push(hole);
        }
        Self(listeners, full)
    }

    fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        assert!(!self.1.is_empty());
        self.0.iter().map(|hole| hole.local_addr().unwrap())
    }
}

fn append(host: &Host, file: &str, text: &str) {
    let mut file = fs::OpenOptions::new().append(true).open(host.path(DIR).join(file)).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[tokio::test]
async fn a_dead_ca_of_many_addresses_does_not_cost_the_entry() {
    let lab = lab().spawn().await.unwrap();
    let holes = BlackHoles::new(2..5);
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"));
    let port = holes.addresses().next().unwrap().port();
    append(&host, "cluster.env", &format!("CA_ADDR=ca.example:{port}\n"));
    let lines: String = holes.addresses().map(|at| format!("{} ca.example\n", at.ip())).collect();
    append(&host, "hosts", &lines);
    let mut agent = host.start().await;
    let registered = |w: &we_agent::status::WorkloadReport| w.registration.state == RegistrationState::Registered;
    agent.until("payments", "registered", registered).await;
    let uid = uid(&lab);
    for _ in 0..2 {
        let mark = lab.mark();
        lab.inject(Fault::DropConnections);
        let back = |e: &Event| matches!(e.what, What::EntryConnected { .. });
        assert!(lab.until_since(mark, Duration::from_secs(9), back).await.is_some(), "the session waits for the CA");
    }
    assert_eq!(self::uid(&lab), uid);
    let unreachable = |w: &we_agent::status::WorkloadReport| {
        w.identity.cause.as_ref().is_some_and(|c| c.contains(&format!("ca.example:{port}")) && c.contains("no answer"))
    };
    agent.until("payments", "told of it", unreachable).await;
    agent.stop().await;
}

/// A name with many addresses: all but one refuse, one does not answer, and one is a stranger's.
#[tokio::test]
async fn a_name_with_many_addresses_is_tried_until_one_is_ours() {
    let lab = lab().spawn().await.unwrap();
    let port = lab.address().port();
    let stranger: IpAddr = "127.0.0.9".parse().unwrap();
    let other = self::lab().listen((stranger, port).into()).spawn().await.unwrap();
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"));
    let hosts = fs::read_to_string(host.path(DIR).join("hosts")).unwrap();
    let name = hosts.split_whitespace().nth(1).unwrap();
    let mut lines = format!("{stranger} {name}\n");
    lines.extend((1..=200).map(|last| format!("127.0.1.{last} {name}\n")));
    fs::write(host.path(DIR).join("hosts"), lines + &hosts).unwrap();
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let seen = other.events();
    assert!(!seen.iter().any(|e| matches!(e.what, What::ConnectionOpened { .. })), "a stranger was trusted");
    agent.stop().await;
}

#[tokio::test]
async fn a_slow_wire_costs_patience_not_attempts() {
    let lab = lab().spawn().await.unwrap();
    let (relay, host) = far(&lab).await;
    relay.set(Wire { delay: Duration::from_secs(1), ..Wire::default() });
    let mut agent = host.start().await;
    agent.ready("payments").await;
    assert!(relay.taken.load(Ordering::Relaxed) <= 3, "{:?}", relay.taken);
    assert_eq!(lab.events().iter().filter(|e| issued(e).is_some()).count(), 1);
    agent.stop().await;
}

#[tokio::test]
async fn an_answer_of_the_ca_that_is_lost_is_asked_for_once_more() {
    let lab = lab().spawn().await.unwrap();
    let (relay, host) = far(&lab).await;
    relay.set(Wire { delay: Duration::from_millis(400), ..Wire::default() });
    let mut agent = host.start().await;
    let first = lab.until(SOON, |e| issued(e).is_some()).await.unwrap();
    // It is on its way back.
    relay.set(Wire {
        delay: Duration::from_millis(400),
        silent: relay.taken.load(Ordering::Relaxed),
        ..Wire::default()
    });
    lab.inject(Fault::DropConnections);
    relay.wire.send_modify(|wire| wire.delay = Duration::ZERO);
    let w = agent.until("payments", "published", |w| w.ready && w.files[0].serial.is_some()).await;
    let events = lab.events();
    let serials: Vec<_> = events.iter().filter_map(issued).collect();
    assert_eq!(serials.len(), 2, "{serials:?}");
    assert_eq!((issued(&first), w.files[0].serial.as_deref()), (Some(serials[0]), Some(serials[1])));
    assert!(published::is_good(&published::dir(&host, "payments"), ID));
    agent.stop().await;
}

/// A server that is not ours gets a handshake and nothing else.
#[tokio::test]
async fn no_impostor_sees_a_token() {
    for fault in [Fault::WrongServerName, Fault::WrongServerRoot] {
        let lab = lab().spawn().await.unwrap();
        lab.inject(fault.clone());
        let bundle = lab.bundle("vms", "payments").internal_ip("127.0.0.1");
        let host = Host::new().bundle("payments", &bundle);
        let mut agent = host.start().await;
        let untrusted = |cause: &Option<String>| cause.as_ref().is_some_and(|c| c.contains("is not trusted"));
        agent
            .until("payments", "distrustful", |w| untrusted(&w.registration.cause) && untrusted(&w.identity.cause))
            .await;
        assert_eq!(lab.counters().connections, 0, "{fault:?}");
        lab.heal_all();
        agent.ready("payments").await;
        let by = |e: &Event| matches!(e.what, What::Csr { credential: Credential::Token, .. });
        assert!(lab.events().iter().any(by));
        assert_held(&lab, 0);
        agent.stop().await;
    }
}
