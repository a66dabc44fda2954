//! Control planes that refuse, or say nothing: what is told, and how it ends.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::support::{Host, Running, SOON};
use std::time::{Duration, SystemTime};
use we_agent::status::{IdentityState, RegistrationState};
use we_lab::{Event, Fault, Group, Lab, LabBuilder, What};

fn group() -> Group {
    Group::new("vms", "payments").service_account("payments-sa")
}

fn lab() -> LabBuilder {
    Lab::builder().group(group())
}

fn host(lab: &Lab) -> Host {
    Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
}

#[tokio::test]
async fn a_silent_control_plane_leaves_the_workload_asking() {
    let lab = lab().spawn().await.unwrap();
    lab.inject(Fault::Silent);
    let before = SystemTime::now() - Duration::from_secs(1);
    let host = host(&lab);
    let mut agent = host.start().await;
    let asked = |w: &we_agent::status::WorkloadReport| {
        w.registration.state == RegistrationState::Asked && w.identity.state == IdentityState::Valid
    };
    let w = agent.until("payments", "asked", asked).await;
    assert_eq!(w.registration.entry.as_deref(), Some("vms/payments-127.0.0.1"));
    let since = w.registration.since.expect("its age is told").0;
    assert!(before <= since && since <= SystemTime::now(), "{since:?}");
    assert!(!w.ready && w.cause.as_deref().unwrap().contains("no answer yet"), "{w:#?}");
    // An unanswered question does not delay the end, and one that is broken off is asked again.
    lab.heal_all();
    lab.inject(Fault::DropStreams);
    agent.ready("payments").await;
    agent.stop().await;
}

/// Waits for a refusal of this kind, and gives its text.
async fn refused(agent: &mut Running, state: RegistrationState) -> String {
    let told = |w: &we_agent::status::WorkloadReport| w.registration.state == state && w.registration.cause.is_some();
    let w = agent.until("payments", state.as_str(), told).await;
    assert!(!w.ready);
    w.registration.cause.expect("a refusal has a cause")
}

/// Puts a token of the group's account in place, as an operator would.
fn new_token(lab: &Lab, host: &Host) {
    let token = lab.token("vms", "payments-sa", Duration::from_secs(3600)).unwrap();
    std::fs::write(host.path("/etc/we-agent/payments/istio-token"), token).unwrap();
}

#[tokio::test]
async fn a_missing_group_parks_until_it_is_there() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    lab.remove_group("vms", "payments");
    let mut agent = host.start().await;
    let cause = refused(&mut agent, RegistrationState::Parked).await;
    assert!(cause.contains("cannot find WorkloadGroup vms/payments") && cause.contains("create it"), "{cause}");
    agent.until("payments", "certified", |w| w.identity.state == IdentityState::Valid).await;
    assert_eq!(lab.entries(), []);
    lab.add_group(group());
    new_token(&lab, &host);
    agent.ready("payments").await;
    agent.stop().await;
}

#[tokio::test]
async fn the_token_of_another_account_is_told_with_the_fix() {
    let lab = lab().spawn().await.unwrap();
    let token = lab.token("vms", "intruder", Duration::from_secs(3600)).unwrap();
    let bundle = lab.bundle("vms", "payments").internal_ip("127.0.0.1").token(&token);
    let host = Host::new().bundle("payments", &bundle);
    let mut agent = host.start().await;
    let cause = refused(&mut agent, RegistrationState::Parked).await;
    assert!(cause.contains("no identities") && cause.contains("group's own serviceAccount"), "{cause}");
    let w = agent.until("payments", "without certificate", |w| w.identity.cause.is_some()).await;
    assert_eq!(w.identity.state, IdentityState::None, "{w:#?}");
    assert!(!host.path("/run/we-agent/payments/key.pem").exists(), "another's certificate is not published");
    new_token(&lab, &host);
    agent.ready("payments").await;
    agent.stop().await;
}

#[tokio::test]
async fn an_istiod_that_admits_no_more_is_told_and_waited_for() {
    let lab = lab().spawn().await.unwrap();
    lab.inject(Fault::RefuseStreams(8));
    let host = host(&lab);
    let mut agent = host.start().await;
    let cause = refused(&mut agent, RegistrationState::Asked).await;
    assert!(cause.contains("admits no more streams") && cause.contains("PILOT_MAX_REQUESTS_PER_SECOND"), "{cause}");
    lab.heal_all();
    new_token(&lab, &host);
    agent.ready("payments").await;
    agent.stop().await;
}

#[tokio::test]
async fn a_refused_certificate_does_not_keep_the_session_on_a_connection_that_ages() {
    let lab = lab().ttl(Duration::from_secs(10)).age_grace(Duration::from_secs(1)).spawn().await.unwrap();
    let host = host(&lab).config("defaults: {renewal: {minInterval: 1s}}");
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let mark = lab.mark();
    lab.inject(Fault::RefuseNewCertificate);
    agent.until("payments", "refused", |w| w.identity.state == IdentityState::Refused).await;
    lab.inject(Fault::Goaway);
    let opened = |e: &Event| matches!(e.what, What::StreamOpened { observer: false, .. });
    assert!(lab.until_since(mark, SOON, opened).await.is_some());
    let closed = |e: &Event| matches!(e.what, What::StreamClosed { .. });
    assert!(lab.until_since(mark, SOON, closed).await.is_some());
    let events = lab.events_since(mark);
    assert!(!events.iter().any(|e| matches!(e.what, What::EntryDisconnected { .. })), "{events:#?}");
    assert_eq!(agent.workload("payments").unwrap().registration.state, RegistrationState::Registered);
    agent.stop().await;
}
