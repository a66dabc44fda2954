//! What is trusted is what the operator's files say now.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    rotation::{assert_held, host, lab, next_issue, uid},
    support::{Host, SOON},
};
use std::{fs, io::Write, time::Duration};
use we_agent::status::IdentityState;
use we_lab::{Event, Lab, What};

const ROOTS: &str = "/etc/we-agent/payments/root-cert.pem";

/// Puts roots in place as an operator does: complete or not at all.
fn put(host: &Host, pem: &str) {
    let (file, new) = (host.path(ROOTS), host.path(ROOTS).with_extension("new"));
    fs::write(&new, pem).unwrap();
    fs::rename(new, file).unwrap();
}

fn opened(lab: &Lab, mark: usize) -> usize {
    let opened = |e: &Event| matches!(e.what, What::ConnectionOpened { .. });
    lab.events_since(mark).into_iter().filter(opened).count()
}

/// The old connection would do for the session and for renewals, and the CA vouches for its own root.
#[tokio::test]
async fn a_root_that_is_withdrawn_is_used_no_more_and_never_again() {
    let lab = lab().ttl(Duration::from_secs(8)).spawn().await.unwrap();
    let other = self::lab().spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let mark = lab.mark();
    put(&host, &other.root_pem());
    let untrusted = |cause: &Option<String>| cause.as_ref().is_some_and(|c| c.contains("is not trusted"));
    agent.until("payments", "distrustful", |w| !w.ready && untrusted(&w.registration.cause)).await;
    let left = |e: &Event| matches!(e.what, What::EntryDisconnected { .. });
    assert!(lab.until_since(mark, SOON, left).await.is_some(), "the session goes on");
    let mark = lab.mark();
    agent.until("payments", "expired", |w| w.identity.state != IdentityState::Valid).await;
    assert_eq!(opened(&lab, mark), 0);
    let csr = |e: &Event| matches!(e.what, What::Csr { .. });
    assert!(!lab.events_since(mark).iter().any(csr), "its certificates are still asked for");
    agent.stop().await;

    let mut agent = host.start().await;
    agent.until("payments", "distrustful", |w| untrusted(&w.registration.cause) && untrusted(&w.identity.cause)).await;
    assert_eq!(opened(&lab, mark), 0, "what was stored vouches for it");
    put(&host, &lab.root_pem());
    agent.ready("payments").await;
    agent.stop().await;
}

#[tokio::test]
async fn a_root_that_is_added_moves_the_session_without_a_gap() {
    let lab = lab().spawn().await.unwrap();
    let other = self::lab().spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let (uid, mark) = (uid(&lab), lab.mark());
    put(&host, &(lab.root_pem() + &other.root_pem()));
    let moved = |e: &Event| matches!(e.what, What::StreamOpened { observer: false, .. });
    assert!(lab.until_since(mark, SOON, moved).await.is_some(), "the connection trusts what was trusted once");
    let closed = |e: &Event| matches!(e.what, What::ConnectionClosed { .. });
    assert!(lab.until_since(mark, SOON, closed).await.is_some());
    assert_held(&lab, mark);
    assert_eq!(self::uid(&lab), uid);
    assert!(agent.workload("payments").unwrap().ready);
    // A file that cannot be read says nothing.
    let mark = lab.mark();
    put(&host, "cut off");
    put(&host, &(lab.root_pem() + &other.root_pem()));
    assert_held(&lab, mark);
    agent.stop().await;
}

/// The mesh has a new root, which is known from a renewal alone; discovery has an operator's file of its own.
#[tokio::test]
async fn what_the_ca_sent_holds_for_discovery_too() {
    let lab = lab().ttl(Duration::from_secs(6)).spawn().await.unwrap();
    let other = self::lab().spawn().await.unwrap();
    let host = host(&lab);
    fs::write(host.path("/etc/xds-root.pem"), lab.root_pem() + &other.root_pem()).unwrap();
    let mut env = fs::OpenOptions::new().append(true).open(host.path("/etc/we-agent/payments/cluster.env")).unwrap();
    writeln!(env, "XDS_ROOT_CA=/etc/xds-root.pem").unwrap();
    let mut agent = host.start().await;
    agent.ready("payments").await;
    lab.ca().add_root().unwrap();
    let mark = lab.mark();
    let serial = next_issue(&lab, mark).await;
    agent.until("payments", "told of it", |w| w.identity.serial.as_ref() == Some(&serial)).await;
    lab.ca().rotate_root(true).unwrap();
    let mark = lab.mark();
    lab.restart().await;
    let registered = |e: &Event| matches!(e.what, What::StreamOpened { observer: false, .. });
    assert!(lab.until_since(mark, SOON, registered).await.is_some(), "{:#?}", agent.workload("payments"));
    agent.until("payments", "accepted", |w| w.ready && w.identity.state == IdentityState::Valid).await;
    agent.stop().await;
}
