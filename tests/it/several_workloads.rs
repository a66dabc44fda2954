//! Many workloads in one daemon, and nothing that one of them can do to another.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::support::{Host, SOON};
use std::{collections::BTreeSet, io::Write, net::SocketAddr};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use we_agent::status::{IdentityState, RegistrationState};
use we_lab::{Event, Group, Lab, What};

pub(crate) async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn twenty_share_a_host_and_two_of_them_are_in_trouble() {
    const BROKEN: &str = "w18";
    const DEAD: &str = "w19";
    let names: Vec<String> = (0..20).map(|i| format!("w{i:02}")).collect();
    let mut lab = Lab::builder();
    for name in &names {
        lab = lab.group(Group::new("vms", name).service_account(&format!("{name}-sa")));
    }
    let lab = lab.spawn().await.unwrap();
    // Nobody listens where the last one's control plane should be: the port is taken, but closed.
    let closed = TcpSocket::new_v4().unwrap();
    closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let closed_port = closed.local_addr().unwrap().port();
    let mut host = Host::new();
    for name in &names {
        let bundle = lab.bundle("vms", name).internal_ip("127.0.0.1");
        let bundle = if name == DEAD { bundle.address(closed.local_addr().unwrap()) } else { bundle };
        host = host.bundle(name, &bundle);
    }
    let env = host.path("/etc/we-agent").join(BROKEN).join("cluster.env");
    let good = std::fs::read_to_string(&env).unwrap();
    std::fs::OpenOptions::new().append(true).open(&env).unwrap().write_all(b"this is no assignment\n").unwrap();

    let mut agent = host.start().await;
    for name in names.iter().filter(|name| ![BROKEN, DEAD].contains(&name.as_str())) {
        let w = agent.ready(name).await;
        let id = format!("spiffe://cluster.local/ns/vms/sa/{name}-sa");
        assert_eq!(w.spiffe_id, Some(id));
        assert_eq!(w.registration.entry, Some(format!("vms/{name}-127.0.0.1")));
        let published = |w: &we_agent::status::WorkloadReport| w.files.iter().all(|f| f.serial == w.identity.serial);
        agent.until(name, "published", published).await;
        assert!(host.path("/run/we-agent").join(name).join("key.pem").exists());
    }
    // Each has a certificate of its own.
    let serials: BTreeSet<_> = agent.report().workloads.into_iter().filter_map(|w| w.identity.serial).collect();
    assert_eq!(serials.len(), 18);

    let broken = agent.until(BROKEN, "refused", |w| !w.broken.is_empty()).await;
    let line = good.lines().count() + 1;
    let place = format!("cluster.env:{line}");
    assert!(broken.broken.iter().any(|mistake| mistake.contains(&place)), "{place} not in {:?}", broken.broken);
    assert_eq!(broken.registration.state, RegistrationState::Absent);
    let told = |w: &we_agent::status::WorkloadReport| w.identity.cause.is_some() && w.registration.cause.is_some();
    let dead = agent.until(DEAD, "told", told).await;
    assert_eq!((dead.identity.state, dead.registration.state), (IdentityState::None, RegistrationState::Asked));
    let cause = dead.registration.cause.unwrap();
    assert!(cause.contains("cannot be reached") && cause.contains(&closed_port.to_string()), "{cause}");
    let report = agent.report();
    let (ready, metrics) = (get(agent.admin, "/healthz/ready").await, get(agent.admin, "/metrics").await);
    assert!(ready.starts_with("HTTP/1.1 503 "), "{ready}");
    for name in &names {
        assert!(metrics.contains(&format!("workload=\"{name}\"")), "{name} not in {metrics}");
    }
    for what in ["identity", "registration"] {
        let counter = format!("we_agent_failures_total{{workload=\"{DEAD}\",what=\"{what}\",kind=\"connect\"}} ");
        assert!(metrics.contains(&counter), "{counter} not in {metrics}");
        assert_eq!(metrics.matches(&format!("what=\"{what}\"")).count(), 1, "nobody else failed: {metrics}");
    }
    assert!(!report.ready && report.summary().starts_with("18 of 20 workloads ready; w18: "), "{}", report.summary());

    // The file is mended; nothing is restarted, and nobody else takes notice.
    let mark = lab.mark();
    std::fs::write(&env, good).unwrap();
    agent.ready(BROKEN).await;
    for event in lab.events_since(mark) {
        let other = |entry: &str| !entry.contains(BROKEN);
        let disturbed = match &event.what {
            What::EntryDisconnected { entry, .. } | What::EntryConnected { entry, .. } => other(entry),
            What::StreamOpened { observer: false, identity, .. } => other(identity),
            _ => false,
        };
        assert!(!disturbed, "{event:?}");
    }
    assert!(agent.report().summary().starts_with("19 of 20 workloads ready; w19: "));

    // All leave in order.
    let mark = lab.mark();
    agent.stop().await;
    let mut left: BTreeSet<_> = names.iter().filter(|n| *n != DEAD).map(|n| format!("vms/{n}-127.0.0.1")).collect();
    let all = lab.until_since(mark, SOON, |e: &Event| {
        if let What::EntryDisconnected { entry, .. } = &e.what {
            left.remove(entry);
        }
        left.is_empty()
    });
    assert!(all.await.is_some(), "not marked: {left:?}");
}

#[tokio::test]
async fn two_of_one_group_and_address_are_not_both_started() {
    let lab = Lab::builder().group(Group::new("vms", "payments")).spawn().await.unwrap();
    let bundle = lab.bundle("vms", "payments").internal_ip("127.0.0.1");
    let host = Host::new().bundle("first", &bundle).bundle("second", &bundle);
    let mut agent = host.start().await;
    agent.ready("first").await;
    let second = agent.until("second", "refused", |w| !w.broken.is_empty()).await;
    let mistake = second.broken.join("\n");
    assert!(mistake.contains("same WorkloadGroup, network and address as workload first"), "{mistake}");
    assert!(mistake.contains("remove one of the two directories"), "{mistake}");
    assert!(!second.ready && second.spiffe_id.is_none());
    assert_eq!(lab.entries().len(), 1);

    // Given an address of its own it is welcome.
    let _host = host.bundle("second", &lab.bundle("vms", "payments").internal_ip("127.0.0.2"));
    let second = agent.ready("second").await;
    assert_eq!(second.registration.entry.as_deref(), Some("vms/payments-127.0.0.2"));
    assert!(agent.workload("first").unwrap().ready);
    agent.stop().await;
}
