//! Certificates are renewed, roots change, the agent is restarted or killed: there is always one pair that matches.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    published::{self, Reader},
    support::{Host, SOON},
};
use std::{fs, time::Duration};
use we_agent::status::{IdentityState, RegistrationState, WorkloadReport};
use we_lab::{Credential, Event, Group, Lab, LabBuilder, Outcome, What};

pub(crate) const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments-sa";
pub(crate) const TOKEN: &str = "/etc/we-agent/payments/istio-token";
pub(crate) const ENTRY: &str = "payments-127.0.0.1";

/// A lab with one group.
pub(crate) fn lab() -> LabBuilder {
    Lab::builder().group(Group::new("vms", "payments").service_account("payments-sa"))
}

/// A VM with that group's bundle, whose agent renews as often as it likes.
pub(crate) fn host(lab: &Lab) -> Host {
    Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
        .config("defaults: {renewal: {minInterval: 100ms}}\n")
}

/// The serial number of an issued certificate, if `event` is one.
pub(crate) fn issued(event: &Event) -> Option<&str> {
    match &event.what {
        What::Csr { outcome: Outcome::Issued { serial, .. }, .. } => Some(serial),
        _ => None,
    }
}

/// Waits for the next certificate after `mark`: its serial number.
pub(crate) async fn next_issue(lab: &Lab, mark: usize) -> String {
    let event = lab.until_since(mark, SOON, |e| issued(e).is_some()).await.expect("no certificate in time");
    issued(&event).unwrap().to_owned()
}

pub(crate) fn uid(lab: &Lab) -> String {
    lab.entry("vms", ENTRY).expect("no entry").uid
}

/// That the registration was never interrupted.
pub(crate) fn assert_held(lab: &Lab, mark: usize) {
    let lost = |e: &Event| matches!(e.what, What::EntryDisconnected { .. } | What::EntryDeleted { .. });
    let lost: Vec<_> = lab.events_since(mark).into_iter().filter(lost).collect();
    assert!(lost.is_empty(), "the registration was interrupted: {lost:?}");
}

#[tokio::test]
async fn the_session_moves_with_the_certificate() {
    const RENEWALS: u64 = 3;
    let lab = lab().ttl(Duration::from_secs(5)).spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let first = agent.until("payments", "published", |w| w.files[0].serial.is_some()).await;
    fs::remove_file(host.path(TOKEN)).unwrap();
    let (uid, mark) = (uid(&lab), lab.mark());
    let reader = Reader::start(published::dir(&host, "payments"), ID);

    let mut serial = first.identity.serial.unwrap();
    for _ in 0..RENEWALS {
        let old = serial.clone();
        let new = agent
            .until("payments", "renewed", |w| {
                w.identity.serial.as_ref() != Some(&old) && w.files[0].serial == w.identity.serial
            })
            .await;
        serial = new.files[0].serial.clone().unwrap();
        let opened = |e: &Event| matches!(&e.what, What::ConnectionOpened { certificate: Some(c), .. } if *c == serial);
        let opened = lab.until_since(mark, SOON, opened).await.expect("no connection with the new certificate").what;
        let What::ConnectionOpened { connection: ours, .. } = opened else { unreachable!() };
        let moved = |e: &Event| matches!(e.what, What::StreamOpened { connection, .. } if connection == ours);
        assert!(lab.until_since(mark, SOON, moved).await.is_some(), "the session stays where it was");
    }
    let since = lab.events_since(mark);
    let last = since.iter().rev().find_map(|e| match &e.what {
        What::ConnectionOpened { connection, certificate: Some(c), .. } if *c == serial => Some(*connection),
        _ => None,
    });
    // Old connections go: the newest is alone in the end.
    for old in 1..last.unwrap() {
        let closed = |e: &Event| matches!(e.what, What::ConnectionClosed { connection, .. } if connection == old);
        assert!(lab.until(SOON, closed).await.is_some(), "connection {old} was left open");
    }
    let seen = reader.stop();
    assert!(seen.contains(&serial) && seen.len() > RENEWALS as usize, "{seen:?}");
    let by = |e: &Event| match &e.what {
        What::Csr { credential, .. } => Some(*credential),
        _ => None,
    };
    assert!(since.iter().filter_map(by).all(|credential| credential == Credential::Certificate));
    // One for the token's registration, one for the first request by certificate, then one for each renewal.
    assert!(lab.counters().connections <= 2 + RENEWALS + 1, "{:?}", lab.counters());
    assert_eq!(agent.workload("payments").unwrap().registration.state, RegistrationState::Registered);
    assert_eq!(self::uid(&lab), uid);
    assert_held(&lab, mark);
    agent.stop().await;
}

#[tokio::test]
async fn a_restart_needs_neither_token_nor_request() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    let before = agent.ready("payments").await;
    let uid = uid(&lab);
    agent.stop().await;
    fs::remove_file(host.path(TOKEN)).unwrap();

    let mark = lab.mark();
    let mut agent = host.start().await;
    let after = agent.ready("payments").await;
    assert_eq!(after.identity.serial, before.identity.serial);
    assert_eq!(self::uid(&lab), uid);
    agent.stop().await;
    let csr = |e: &Event| matches!(e.what, What::Csr { .. });
    assert_eq!(lab.events_since(mark).into_iter().filter(csr).count(), 0);
}

#[tokio::test]
async fn roots_change_online() {
    let lab = lab().ttl(Duration::from_secs(6)).spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let dir = published::dir(&host, "payments");
    // The session is on a certificate: its connection will do for the next request.
    let with_certificate = |e: &Event| match e.what {
        What::StreamOpened { connection: ours, observer: false, .. } => lab.events().iter().any(
            |e| matches!(e.what, What::ConnectionOpened { connection, certificate: Some(_), .. } if connection == ours),
        ),
        _ => false,
    };
    assert!(lab.until(SOON, with_certificate).await.is_some());

    // The operator's file knows the old root only. istiod signs with the new one at once, but goes on to accept
    // certificates of the old one only, until it is restarted.
    lab.ca().rotate_root(true).unwrap();
    let refused =
        |w: &WorkloadReport| w.identity.state == IdentityState::Refused && w.files[0].serial == w.identity.serial;
    agent.until("payments", "refused, and published all the same", refused).await;
    let roots = |pair: std::sync::Arc<we_agent::spiffe::X509Context>| pair.bundle.roots().count();
    assert!(published::is_good(&dir, ID));
    assert_eq!(published::pair(&dir, ID).map(roots), Some(2), "consumers trust both roots");

    // From now on it shows a certificate of the new root, which is known from the renewal alone.
    let mark = lab.mark();
    lab.restart().await;
    agent.until("payments", "accepted", |w| w.ready && w.identity.state == IdentityState::Valid).await;
    let accepted = |e: &Event| matches!(e.what, What::ConnectionOpened { certificate: Some(_), .. });
    assert!(lab.until_since(mark, SOON, accepted).await.is_some());
    agent.stop().await;
}

#[tokio::test]
async fn the_operators_new_root_beats_the_cached_one() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    agent.stop().await;

    // The operator trusts another mesh now: this one is not spoken to, whatever was cached.
    let other = self::lab().spawn().await.unwrap();
    let bundle = lab.bundle("vms", "payments").internal_ip("127.0.0.1");
    let host = host.bundle("payments", &bundle.clone().root_pem(&other.root_pem()));
    let mark = lab.mark();
    let mut agent = host.start().await;
    let untrusted = |cause: &Option<String>| cause.as_ref().is_some_and(|c| c.contains("is not trusted"));
    let w = agent.until("payments", "distrustful", |w| untrusted(&w.registration.cause)).await;
    assert_eq!(w.identity.state, IdentityState::Valid, "what is stored stays in use");
    let opened = |e: &Event| matches!(e.what, What::ConnectionOpened { .. });
    assert_eq!(lab.events_since(mark).into_iter().filter(opened).count(), 0);
    agent.stop().await;

    // The mesh has a new root while we are away: its file is all it takes.
    lab.ca().rotate_root(false).unwrap();
    lab.restart().await;
    let host = host.bundle("payments", &bundle.root_pem(&lab.root_pem()));
    let mut agent = host.start().await;
    agent.ready("payments").await;
    agent.stop().await;
}
