//! The mesh's own list is the acknowledgement: what it contradicts is reported again, or registered anew.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::support::{App, Host, Running, SOON};
use serde_json::json;
use std::time::Duration;
use we_agent::status::{HealthState, MembershipState, RegistrationState, WorkloadReport};
use we_lab::{Event, Fault, Group, Lab, LabBuilder, Service, What};

const SERVICE: &str = "payments.example.com";
const NAME: &str = "payments-127.0.0.1";

/// An application, its mesh, and the agent between them; listed already.
struct Story {
    app: App,
    lab: Lab,
    agent: Running,
    host: Host,
}

fn group(port: u16) -> Group {
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": port}});
    Group::new("vms", "payments").service_account("payments-sa").label("app", "payments").probe(probe)
}

impl Story {
    async fn begin(shape: impl FnOnce(LabBuilder) -> LabBuilder) -> Self {
        let app = App::start().await;
        let service = Service::new(SERVICE).port(80, app.port).selector([("app", "payments")]);
        let lab = shape(Lab::builder().group(group(app.port)).service(service)).spawn().await.unwrap();
        let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"));
        let agent = host.start().await;
        let mut story = Self { app, lab, agent, host };
        story.member(MembershipState::Listed).await;
        story
    }

    async fn until(&mut self, what: &str, wanted: impl Fn(&WorkloadReport) -> bool) -> WorkloadReport {
        self.agent.until("payments", what, wanted).await
    }

    async fn member(&mut self, state: MembershipState) {
        self.until(state.as_str(), |w| w.membership.state == state).await;
    }

    /// Waits until the application's state has reached the list.
    async fn turns(&mut self, healthy: bool) {
        self.app.healthy.send_replace(healthy);
        self.member(if healthy { MembershipState::Listed } else { MembershipState::Withheld }).await;
    }

    fn healthy(&self) -> Option<bool> {
        self.lab.entry("vms", NAME).and_then(|entry| entry.healthy())
    }

    async fn report(&self, mark: usize, lost_one: bool) {
        let report = |e: &Event| matches!(e.what, What::Health { lost, .. } if lost == lost_one);
        assert!(self.lab.until_since(mark, SOON, report).await.is_some(), "no report, lost: {lost_one}");
    }
}

#[tokio::test]
async fn a_deleted_entry_is_registered_anew() {
    let mut story = Story::begin(|lab| lab).await;
    let mark = story.lab.mark();
    let uid = story.lab.delete_entry("vms", NAME).unwrap().uid;
    let made = |e: &Event| matches!(&e.what, What::EntryCreated { uid: new, .. } if *new != uid);
    assert!(story.lab.until_since(mark, SOON, made).await.is_some(), "the entry is not made anew");
    story.member(MembershipState::Listed).await;
    assert_eq!(story.healthy(), Some(true));
    // The stream that had the entry was closed after its successor was answered.
    assert!(!story.lab.events_since(mark).iter().any(|e| matches!(e.what, What::EntryDisconnected { .. })));
    story.agent.stop().await;
}

#[tokio::test]
async fn a_lost_report_is_repeated() {
    let mut story = Story::begin(|lab| lab).await;
    let uid = story.lab.entry("vms", NAME).unwrap().uid;
    for healthy in [false, true] {
        let mark = story.lab.mark();
        story.lab.inject(Fault::LoseReports(1));
        story.app.healthy.send_replace(healthy);
        story.report(mark, true).await;
        story.report(mark, false).await;
        story.turns(healthy).await;
        assert_eq!(story.healthy(), Some(healthy));
    }
    assert_eq!(story.lab.entry("vms", NAME).unwrap().uid, uid, "the entry is what it was");
    story.agent.stop().await;
}

#[tokio::test]
async fn a_verdict_during_an_outage_of_the_api_server_arrives_after_it() {
    let mut story = Story::begin(|lab| lab).await;
    let (uid, mark) = (story.lab.entry("vms", NAME).unwrap().uid, story.lab.mark());
    story.lab.inject(Fault::ApiServerDown(Duration::ZERO));
    story.app.healthy.send_replace(false);
    story.report(mark, true).await;
    // Registering anew is tried, and does no harm.
    let told = |w: &WorkloadReport| w.registration.cause.as_deref().is_some_and(|cause| cause.contains("contradicts"));
    let w = story.until("told of it", told).await;
    assert_eq!(w.registration.state, RegistrationState::Registered);
    let mark = story.lab.mark();
    story.lab.heal_all();
    story.report(mark, false).await;
    story.member(MembershipState::Withheld).await;
    assert_eq!((story.healthy(), story.lab.entry("vms", NAME).unwrap().uid), (Some(false), uid));
    story.until("no trouble left", |w| w.ready && w.registration.cause.is_none()).await;
    story.agent.stop().await;
}

/// The agent is restarted, and what it reports first is lost: the list still has what the one before it reported.
#[tokio::test]
async fn a_report_that_is_lost_at_the_start_is_repeated() {
    let mut story = Story::begin(|lab| lab.grace(SOON)).await;
    story.agent.stop().await;
    story.app.healthy.send_replace(false);
    story.lab.inject(Fault::LoseReports(1));
    let mark = story.lab.mark();
    story.agent = story.host.start().await;
    story.report(mark, true).await;
    story.report(mark, false).await;
    story.member(MembershipState::Withheld).await;
    assert_eq!(story.healthy(), Some(false));
    story.agent.stop().await;
}

#[tokio::test]
async fn a_deleted_group_is_told_and_its_return_is_found() {
    let mut story = Story::begin(|lab| lab).await;
    story.lab.remove_group("vms", "payments");
    let w = story.until("parked", |w| w.registration.state == RegistrationState::Parked).await;
    assert!(!w.ready && w.registration.cause.unwrap().contains("WorkloadGroup"));
    story.lab.add_group(group(story.app.port));
    story.member(MembershipState::Listed).await;
    story.until("registered", |w| w.ready && w.registration.cause.is_none()).await;
    assert_eq!(story.healthy(), Some(true));
    story.agent.stop().await;
}

#[tokio::test]
async fn a_service_that_goes_while_the_application_is_unhealthy_is_missed() {
    let mut story = Story::begin(|lab| lab).await;
    story.turns(false).await;
    story.lab.remove_service(SERVICE);
    let unknown =
        |w: &WorkloadReport| w.health.state == HealthState::Unhealthy && w.membership.state == MembershipState::Unknown;
    story.until("not withheld from a service that is gone", unknown).await;
    story.agent.stop().await;
}

#[tokio::test]
async fn a_service_that_selects_others_now_is_told_from_a_lost_entry() {
    let mut story = Story::begin(|lab| lab).await;
    let uid = story.lab.entry("vms", NAME).unwrap().uid;
    story.lab.service(Service::new(SERVICE).port(80, story.app.port).selector([("app", "others")]));
    story.member(MembershipState::Withheld).await;
    story.member(MembershipState::NotSelected).await;
    let w = story.agent.workload("payments").unwrap();
    assert!(w.ready && w.registration.state == RegistrationState::Registered, "{w:#?}");
    assert_eq!(story.lab.entry("vms", NAME).unwrap().uid, uid);
    story.agent.stop().await;
}

#[tokio::test]
async fn a_silent_successor_does_not_keep_the_workload_registered() {
    let mut story = Story::begin(|lab| lab.age_grace(Duration::from_secs(3)).grace(SOON)).await;
    let uid = story.lab.entry("vms", NAME).unwrap().uid;
    story.lab.inject(Fault::Silent);
    story.lab.inject(Fault::Goaway);
    let lost = |w: &WorkloadReport| w.registration.state == RegistrationState::Lost && !w.ready;
    let w = story.until("lost", lost).await;
    assert!(w.registration.cause.unwrap().contains("not answered yet"));
    story.lab.heal_all();
    story.lab.inject(Fault::DropConnections);
    story.until("registered again", |w| w.ready && w.membership.state == MembershipState::Listed).await;
    assert_eq!(story.lab.entry("vms", NAME).unwrap().uid, uid);
    story.agent.stop().await;
}

#[tokio::test]
async fn a_flood_of_pushes_does_not_keep_a_report_waiting() {
    let story = Story::begin(|lab| lab).await;
    story.lab.inject(Fault::Flood);
    // Something that is pushed sets it off.
    story.lab.service(Service::new("others.example.com").port(80, 80).selector([("app", "others")]));
    let mark = story.lab.mark();
    story.app.healthy.send_replace(false);
    let report = |e: &Event| matches!(e.what, What::Health { healthy: false, lost: false, .. });
    let reported = story.lab.until_since(mark, SOON, report).await;
    story.lab.heal_all();
    assert!(reported.is_some(), "the report waits behind the pushes");
    story.agent.stop().await;
}
