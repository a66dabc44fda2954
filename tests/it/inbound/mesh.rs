//! What the mesh is told of an application behind a listener of ours.

use super::{Pod, WEB};
use crate::{
    rotation::lab,
    support::{App, Host, Running},
};
use serde_json::json;
use we_agent::status::{HealthState, IdentityState, MembershipState, RegistrationState};
use we_lab::{Group, Lab, Service};

/// A VM at 127.0.0.2, where our listener has the port that the application has at 127.0.0.1.
async fn start(lab: &Lab, app: &App, more: &str) -> (Host, Running) {
    let port = app.port;
    let inbound = format!("inbound: [{{listen: '127.0.0.2:{port}', forward: {port}{more}}}]");
    let host = Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.2"))
        .config(&format!("workloads: {{payments: {{{inbound}}}}}\n"));
    let agent = host.start().await;
    (host, agent)
}

#[tokio::test]
async fn the_probe_asks_the_application_and_the_mesh_finds_tls() {
    let app = App::start().await;
    let group = Group::new("vms", "payments").service_account("payments-sa").label("app", "payments");
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let service = Service::new("payments.example.com").port(80, app.port).selector([("app", "payments")]);
    let lab = Lab::builder().group(group.probe(probe)).service(service).spawn().await.unwrap();
    let (_host, mut agent) = start(&lab, &app, "").await;
    let listed = agent.until("payments", "listed", |w| w.membership.state == MembershipState::Listed).await;
    assert_eq!((listed.health.state, listed.membership.tls), (HealthState::Healthy, Some(true)));
    assert_eq!(listed.membership.cause, None, "the mesh will speak TLS, and TLS is spoken");
    let at = format!("127.0.0.2:{}", app.port).parse().unwrap();
    let answer = Pod::new(&lab, WEB).echo(at, b"GET / HTTP/1.1\r\n\r\n").await;
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
    // Nobody asked our listener how the application is.
    let w = agent.workload("payments").unwrap();
    assert!(!w.inbound[0].refused.contains_key("not_tls"), "{:?}", w.inbound[0]);
    app.healthy.send_replace(false);
    agent.until("payments", "unhealthy", |w| w.health.state == HealthState::Unhealthy).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_listener_that_cannot_listen_is_not_called() {
    let app = App::start().await;
    let taken = std::net::TcpListener::bind(("127.0.0.2", app.port)).unwrap();
    let group = Group::new("vms", "payments").service_account("payments-sa").label("app", "payments");
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let service = Service::new("payments.example.com").port(80, app.port).selector([("app", "payments")]);
    let lab = Lab::builder().group(group.probe(probe)).service(service).spawn().await.unwrap();
    let (_host, mut agent) = start(&lab, &app, "").await;
    let deaf = agent.until("payments", "unhealthy", |w| w.health.state == HealthState::Unhealthy).await;
    let cause = format!("cannot listen on 127.0.0.2:{}: address already in use; somebody else listens there", app.port);
    let said = |text: Option<&String>| text.is_some_and(|text| text.contains(&cause));
    assert!(said(deaf.health.message.as_ref()) && said(deaf.inbound[0].cause.as_ref()), "{deaf:?}");
    let registered = |w: &we_agent::status::WorkloadReport| {
        w.registration.state == RegistrationState::Registered && w.identity.state == IdentityState::Valid
    };
    let deaf = agent.until("payments", "registered", registered).await;
    assert!(!deaf.ready && said(deaf.cause.as_ref()), "{deaf:?}");
    let metrics = crate::several_workloads::get(agent.admin, "/metrics").await;
    let line = format!("we_agent_inbound_listening{{workload=\"payments\",listen=\"127.0.0.2:{}\"}} 0", app.port);
    assert!(metrics.lines().any(|l| l == line), "{line} is not in\n{metrics}");
    // It is tried again.
    drop(taken);
    agent.ready("payments").await;
    agent.until("payments", "listed", |w| w.membership.state == MembershipState::Listed).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_port_that_nobody_serves_is_said() {
    let app = App::start().await;
    let closed = tokio::net::TcpListener::bind("127.0.0.2:0").await.unwrap().local_addr().unwrap().port();
    let group = Group::new("vms", "payments").service_account("payments-sa").label("app", "payments");
    let service = Service::new("payments.example.com").port(80, closed).selector([("app", "payments")]);
    let lab = Lab::builder().group(group).service(service).spawn().await.unwrap();
    let (_host, mut agent) = start(&lab, &app, "").await;
    let told = agent.until("payments", "told", |w| w.membership.cause.is_some() && w.membership.tls.is_some()).await;
    let cause = told.membership.cause.unwrap();
    assert!(cause.contains(&format!("serves port {closed}, but nobody listens there")), "{cause}");
    agent.stop().await;
}

#[tokio::test]
async fn ports_that_do_not_match_the_group_are_said() {
    let app = App::start().await;
    let lab =
        Lab::builder().group(Group::new("vms", "payments").port("web", 80).port("more", 81)).spawn().await.unwrap();
    let (_host, mut agent) = start(&lab, &app, "").await;
    let notes = agent.until("payments", "there", |w| w.inbound.len() == 1).await.inbound.remove(0).notes;
    let port = app.port;
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(
        notes[0].starts_with("the WorkloadGroup announces ports 80, 81, not ") && notes[0].contains(&port.to_string())
    );
    assert!(notes[1].starts_with("the WorkloadGroup announces ports 80, 81, where no entry of inbound listens"));
    agent.stop().await;
}

#[tokio::test]
async fn a_probe_that_goes_past_a_later_entry_is_said_too() {
    let app = App::start().await;
    let group = Group::new("vms", "payments").probe(json!({"tcpSocket": {"port": app.port}}));
    let lab = Lab::builder().group(group).spawn().await.unwrap();
    let inbound = format!("[{{listen: '127.0.0.2:0', forward: 1}}, {{listen: '127.0.0.2:0', forward: {}}}]", app.port);
    let bundle = lab.bundle("vms", "payments").internal_ip("127.0.0.2");
    let config = format!("workloads: {{payments: {{inbound: {inbound}}}}}\n");
    let host = Host::new().bundle("payments", &bundle).config(&config);
    let mut agent = host.start().await;
    let listeners = agent.until("payments", "there", |w| w.inbound.len() == 2).await.inbound;
    let said = |n: usize| listeners[n].notes.iter().any(|note| note.starts_with("the probe asks port"));
    assert!(!said(0) && said(1), "{listeners:?}");
    agent.stop().await;
}

#[tokio::test]
async fn figures_are_in_the_metrics() {
    let app = App::start().await;
    let lab = lab().spawn().await.unwrap();
    let (_host, mut agent) = start(&lab, &app, ", allow: [{namespace: elsewhere}]").await;
    agent.until("payments", "listening", |w| w.inbound[0].address.is_some()).await;
    agent.ready("payments").await;
    let at = format!("127.0.0.2:{}", app.port);
    super::is_refused(&Pod::new(&lab, WEB), at.parse().unwrap()).await;
    agent.until("payments", "refused", |w| w.inbound[0].refused.contains_key("not_allowed")).await;
    let metrics = crate::several_workloads::get(agent.admin, "/metrics").await;
    let line =
        format!("we_agent_inbound_refused_total{{workload=\"payments\",listen=\"{at}\",reason=\"not_allowed\"}} 1");
    assert!(metrics.lines().any(|l| l == line), "{line} is not in\n{metrics}");
    agent.stop().await;
}
