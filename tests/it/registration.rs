//! The entry outlives everything that happens to its streams.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::support::{App, Host, SOON};
use serde_json::json;
use std::{
    net::SocketAddr,
    time::{Duration, SystemTime},
};
use we_agent::status::RegistrationState;
use we_lab::{Event, Fault, Group, Lab, LabBuilder, Service, What};

const SERVICE: &str = "payments.example.com";
const NAME: &str = "payments-127.0.0.1";
/// What the agent promises between the answer to a new stream and the end of the old one; the rest is two clocks.
const OVERLAP: Duration = Duration::from_millis(95);
const ENCODINGS: [&str; 2] = ["delta", "sotw"];

fn group() -> Group {
    Group::new("vms", "payments").service_account("payments-sa").port("http", 8080).label("app", "payments")
}

/// A lab with the group, and a service that selects its entries.
fn lab() -> LabBuilder {
    let service = Service::new(SERVICE).port(80, 8080).selector([("app", "payments")]);
    Lab::builder().group(group()).service(service)
}

fn host(lab: &Lab) -> Host {
    Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
}

fn uid(lab: &Lab) -> String {
    lab.entry("vms", NAME).expect("the entry is gone").uid
}

/// The registration's streams that were opened since `mark`, in order.
fn opened(events: &[Event]) -> Vec<(SystemTime, u64)> {
    let opened = |e: &Event| match e.what {
        What::StreamOpened { stream, observer: false, .. } => Some((e.at, stream)),
        _ => None,
    };
    events.iter().filter_map(opened).collect()
}

fn at(events: &[Event], wanted: impl Fn(&What) -> bool) -> Option<SystemTime> {
    events.iter().find(|e| wanted(&e.what)).map(|e| e.at)
}

/// Waits until `count` streams of the registration were closed after `mark`.
async fn closed(lab: &Lab, mark: usize, count: usize) {
    let mut seen = Vec::new();
    let mut ended = 0;
    let found = lab.until_since(mark, SOON, |e| {
        match e.what {
            What::StreamOpened { stream, observer: false, .. } => seen.push(stream),
            What::StreamClosed { stream, .. } if seen.contains(&stream) => ended += 1,
            _ => {}
        }
        ended == count
    });
    assert!(found.await.is_some(), "{count} streams were not replaced: {:#?}", lab.events_since(mark));
}

/// Nothing that happened since `mark` took the workload out of the mesh.
fn undisturbed(lab: &Lab, mark: usize) {
    for event in lab.events_since(mark) {
        let disturbed = matches!(
            event.what,
            What::EntryDisconnected { .. } | What::EntryDeleted { .. } | What::Health { healthy: false, .. }
        );
        assert!(!disturbed, "{event:?}");
    }
}

/// The lab's mesh lists the workload whenever anything happens, until the guard is asked.
struct Listed(tokio::task::JoinHandle<Vec<String>>, tokio::sync::watch::Sender<bool>);

impl Listed {
    fn watch(lab: &std::sync::Arc<Lab>) -> Self {
        let (end, mut ended) = tokio::sync::watch::channel(false);
        let lab = lab.clone();
        let mut lengths = lab.lengths();
        let watching = async move {
            let mut gaps = Vec::new();
            let mut mark = lab.mark();
            loop {
                if lab.listed(SERVICE).is_empty() {
                    gaps.push(format!("{:?}", lab.events_since(mark)));
                }
                mark = lab.mark();
                tokio::select! {
                    changed = lengths.changed() => if changed.is_err() { return gaps },
                    _ = ended.changed() => return gaps,
                }
            }
        };
        Self(tokio::spawn(watching), end)
    }

    async fn always(self) {
        self.1.send_replace(true);
        let gaps = self.0.await.unwrap();
        assert!(gaps.is_empty(), "the mesh did not list the workload after {gaps:#?}");
    }
}

#[tokio::test]
async fn both_encodings_register_and_follow_the_application() {
    for xds in ENCODINGS {
        let app = App::start().await;
        let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
        let service = Service::new(SERVICE).port(80, app.port).selector([("app", "payments")]);
        let lab = Lab::builder().group(group().probe(probe)).service(service).spawn().await.unwrap();
        let host = host(&lab).config(&format!("defaults: {{controlPlane: {{xds: {xds}}}}}"));
        let mut agent = host.start().await;
        agent.ready("payments").await;
        let listed = |w: &we_agent::status::WorkloadReport| w.membership.services == [format!("{SERVICE}:80")];
        agent.until("payments", "selected", listed).await;
        for (wanted, listed) in [(false, 0), (true, 1)] {
            let mark = lab.mark();
            app.healthy.send_replace(wanted);
            let report = |e: &Event| matches!(e.what, What::Health { healthy, lost: false, .. } if healthy == wanted);
            assert!(lab.until_since(mark, SOON, report).await.is_some(), "{xds}: no report of {wanted}");
            assert_eq!(lab.listed(SERVICE).len(), listed, "{xds}");
        }
        assert!(!lab.events().iter().any(|e| matches!(e.what, What::Nack { .. } | What::Crashed { .. })), "{xds}");
        assert_eq!(lab.counters().connections, 1, "{xds}: one connection serves CA and registration");
        agent.stop().await;
    }
}

/// Connections age, and are told to go away: the next stream is open and answered before the old one is closed.
async fn ageing(xds: &str) {
    let lab = lab().max_connection_age(Duration::from_millis(1500)).grace(Duration::from_secs(1));
    let lab = std::sync::Arc::new(lab.spawn().await.unwrap());
    let host = host(&lab).config(&format!("defaults: {{controlPlane: {{xds: {xds}}}}}"));
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let (uid_before, mark) = (uid(&lab), 0);
    let listed = Listed::watch(&lab);
    closed(&lab, mark, 3).await;
    // By force, besides.
    for round in 4..=6 {
        lab.inject(Fault::Goaway);
        closed(&lab, mark, round).await;
    }
    listed.always().await;
    undisturbed(&lab, mark);
    assert_eq!(uid(&lab), uid_before, "{xds}");
    let w = agent.workload("payments").unwrap();
    assert_eq!(w.registration.state, RegistrationState::Registered, "{xds}");

    let events = lab.events();
    let streams = opened(&events);
    for pair in streams.windows(2) {
        let [(_, old), (open, new)] = pair else { unreachable!() };
        let answered = at(&events, |w| matches!(w, What::Pushed { stream, .. } if stream == new));
        let Some(ended) = at(&events, |w| matches!(w, What::StreamClosed { stream, .. } if stream == old)) else {
            continue; // the last replacement may still be under way
        };
        let answered = answered.unwrap_or_else(|| panic!("{xds}: stream {new} was never answered"));
        assert!(*open <= answered && answered < ended, "{xds}: stream {old} ended before {new} was answered");
        let overlap = ended.duration_since(answered).unwrap();
        assert!(overlap >= OVERLAP, "{xds}: stream {old} ended {overlap:?} after the answer to {new}");
    }

    let mark = lab.mark();
    agent.stop().await;
    let deleted = |e: &Event| matches!(&e.what, What::EntryDeleted { uid, .. } if *uid == uid_before);
    assert!(lab.until_since(mark, SOON, deleted).await.is_some(), "{xds}: the entry has leaked");
    assert_eq!(lab.entries(), []);
}

#[tokio::test]
async fn ageing_is_never_seen_incremental() {
    ageing("delta").await;
}

#[tokio::test]
async fn ageing_is_never_seen_state_of_the_world() {
    ageing("sotw").await;
}

/// Waits until the entry was taken up again after `mark`, by the same object.
async fn resumed(lab: &Lab, mark: usize, uid: &str) {
    let taken = |e: &Event| matches!(e.what, What::EntryConnected { .. } | What::EntryCreated { .. });
    let event = lab.until_since(mark, SOON, taken).await.expect("not registered again");
    assert!(matches!(&event.what, What::EntryConnected { uid: same, .. } if same == uid), "{event:?}");
}

/// Faults, and how many of istiod's own write conflicts each of them meets. A storm is a story of its own: whose sessions
/// live for moments comes back more and more slowly.
async fn storm(faults: &[(Fault, u32)], window: Duration) {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let uid_before = uid(&lab);
    lab.inject(Fault::ConflictWindow(window));
    for (fault, conflicts) in faults {
        let mark = lab.mark();
        lab.inject(Fault::Conflict(*conflicts));
        lab.inject(fault.clone());
        resumed(&lab, mark, &uid_before).await;
        let met = |e: &&Event| matches!(e.what, What::StreamRefused { code: 2, .. });
        let refused = lab.events_since(mark).iter().filter(met).count();
        let all = usize::try_from(*conflicts).unwrap();
        assert!(refused == all || !window.is_zero(), "{refused} of {all} conflicts were met");
    }
    agent.ready("payments").await;
    assert_eq!(uid(&lab), uid_before);
    assert!(!lab.events().iter().any(|e| matches!(e.what, What::EntryDeleted { .. })));
    agent.stop().await;
}

#[tokio::test]
async fn lost_streams_and_conflicts_do_not_cost_the_entry() {
    let (none, window) = (Duration::ZERO, Duration::from_millis(300));
    storm(&[(Fault::DropStreams, 0), (Fault::DropConnections, 0), (Fault::DropStreams, 0)], none).await;
    storm(&[(Fault::Goaway, 1), (Fault::DropStreams, 5)], none).await;
    storm(&[(Fault::DropConnections, 3)], none).await;
    // And the race as it is: whoever comes back too soon meets it.
    storm(&[(Fault::DropStreams, 0)], window).await;
}

#[tokio::test]
async fn a_conflict_while_moving_is_not_even_noticed() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let mark = lab.mark();
    lab.inject(Fault::Conflict(3));
    lab.inject(Fault::Goaway);
    resumed(&lab, mark, &uid(&lab)).await;
    undisturbed(&lab, mark);
    assert!(agent.workload("payments").unwrap().ready);
    agent.stop().await;
}

#[tokio::test]
async fn another_instance_takes_over() {
    let first = lab().spawn().await.unwrap();
    let host = host(&first);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let uid_before = uid(&first);

    first.stop().await;
    agent.until("payments", "lost", |w| w.registration.state == RegistrationState::Lost).await;
    assert!(first.listed(SERVICE).len() == 1, "the entry of a dead istiod stays");
    let second = Lab::builder().store(&first).listen(first.address()).name("istiod-1").spawn().await.unwrap();
    resumed(&second, 0, &uid_before).await;
    agent.ready("payments").await;
    let entry = second.entry("vms", NAME).unwrap();
    assert_eq!(entry.annotations.get("istio.io/workloadController").map(String::as_str), Some("istiod-1"));

    // And back again.
    let mark = first.mark();
    second.stop().await;
    first.restart().await;
    resumed(&first, mark, &uid_before).await;
    agent.ready("payments").await;
    assert_eq!(uid(&first), uid_before);
    let mark = first.mark();
    agent.stop().await;
    let marked = |e: &Event| matches!(&e.what, What::EntryDisconnected { uid, .. } if *uid == uid_before);
    assert!(first.until_since(mark, SOON, marked).await.is_some());
}

#[tokio::test]
async fn a_restart_inside_the_grace_is_not_seen() {
    let app = App::start().await;
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let service = Service::new(SERVICE).port(80, app.port).selector([("app", "payments")]);
    let lab = Lab::builder().group(group().probe(probe)).service(service).grace(SOON);
    let lab = std::sync::Arc::new(lab.spawn().await.unwrap());
    let host = host(&lab);
    let mut agent = host.start().await;
    let healthy = |e: &Event| matches!(e.what, What::Health { healthy: true, lost: false, .. });
    agent.ready("payments").await;
    assert!(lab.until(SOON, healthy).await.is_some());
    let uid_before = uid(&lab);
    let listed = Listed::watch(&lab);
    let start = lab.mark();
    for crash in [false, true, false] {
        let mark = lab.mark();
        if crash {
            agent.crash().await
        } else {
            agent.stop().await
        }
        agent = host.start().await;
        resumed(&lab, mark, &uid_before).await;
        agent.ready("payments").await;
        assert!(lab.until_since(mark, SOON, healthy).await.is_some(), "the verdict is told again");
    }
    listed.always().await;
    let unhealthy = |e: &Event| matches!(e.what, What::Health { healthy: false, .. });
    let told = lab.events_since(start);
    assert!(!told.iter().any(unhealthy), "{told:#?}");
    agent.stop().await;
}

#[tokio::test]
async fn an_ipv6_address_names_the_entry() {
    let lab = lab().spawn().await.unwrap();
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("::1"));
    let mut agent = host.start().await;
    let w = agent.ready("payments").await;
    assert_eq!(w.registration.entry.as_deref(), Some("vms/payments---1"));
    assert_eq!(lab.entry("vms", "payments---1").unwrap().spec.address, "::1");
    let listed = |w: &we_agent::status::WorkloadReport| w.membership.services == [format!("{SERVICE}:80")];
    agent.until("payments", "listed", listed).await;
    assert_eq!(lab.listed(SERVICE), [SocketAddr::new("::1".parse().unwrap(), 8080)]);
    agent.stop().await;
}

const INSIDE: &str = "WE_AGENT_TEST_MOVES";
const MOVES: &str = "registration::a_moved_host_gets_a_new_entry_before_the_old_one_goes";

fn ip(arguments: &str) {
    let status = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// In a network namespace of its own, where the host's addresses are the test's.
#[tokio::test]
async fn a_moved_host_gets_a_new_entry_before_the_old_one_goes() {
    if std::env::var_os(INSIDE).is_some() {
        return moving().await;
    }
    let unshare = |program: &str| {
        let mut command = tokio::process::Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", program]).kill_on_drop(true);
        command
    };
    if !unshare("ip").arg("link").output().await.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: needs `unshare` (user namespaces allowed) and `ip`");
        return;
    }
    let itself = std::env::current_exe().unwrap();
    let inside = unshare(itself.to_str().unwrap()).args([MOVES, "--exact"]).env(INSIDE, "1").output().await.unwrap();
    let said = String::from_utf8_lossy(&inside.stdout);
    assert!(inside.status.success() && said.contains("1 passed"), "{said}");
}

async fn moving() {
    ip("link set lo up");
    ip("addr add 10.99.0.5/32 dev lo");
    ip("addr add 10.99.0.6/32 dev lo");
    // The way to the control plane starts at the first address; it is local, but no address of this host.
    let way = |from: &str| format!("route replace table local local 10.99.9.1 dev lo src {from}");
    ip(&way("10.99.0.5"));
    let lab = lab().listen("10.99.9.1:0".parse().unwrap()).grace(Duration::from_secs(1)).spawn().await.unwrap();
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments"));
    let mut agent = host.start().await;
    let w = agent.ready("payments").await;
    assert_eq!(w.registration.entry.as_deref(), Some("vms/payments-10.99.0.5"));

    let mark = lab.mark();
    ip(&way("10.99.0.6"));
    let moved = |w: &we_agent::status::WorkloadReport| {
        w.ready && w.registration.entry.as_deref() == Some("vms/payments-10.99.0.6")
    };
    agent.until("payments", "moved", moved).await;
    let old = |e: &Event| matches!(&e.what, What::EntryDeleted { entry, .. } if entry == "vms/payments-10.99.0.5");
    assert!(lab.until_since(mark, SOON, old).await.is_some(), "the old entry has leaked");
    let events = lab.events_since(mark);
    let new = |w: &What| matches!(w, What::EntryCreated { entry, .. } if entry == "vms/payments-10.99.0.6");
    let gone = |w: &What| matches!(w, What::EntryDisconnected { entry, .. } if entry == "vms/payments-10.99.0.5");
    let (made, left) = (at(&events, new), at(&events, gone));
    assert!(made.is_some() && made < left, "{events:#?}");
    assert_eq!(lab.entries().iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["payments-10.99.0.6"]);
    agent.stop().await;
}
