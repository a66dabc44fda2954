//! What the mesh makes of us: which services select the workload, whether they list it, and how they will speak to it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::support::{App, Host, Running, SOON};
use serde_json::json;
use std::{net::SocketAddr, sync::Arc};
use tokio::{io::AsyncReadExt, net::TcpListener};
use we_agent::status::{HealthState, IdentityState, MembershipReport, MembershipState, RegistrationState};
use we_lab::{Event, Fault, Group, Lab, Service, What};

const CLUSTERS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";

fn group() -> Group {
    Group::new("vms", "payments").service_account("payments-sa").label("app", "payments")
}

fn service(port: u16) -> Service {
    Service::new("payments.example.com").port(80, port).selector([("app", "payments")])
}

fn host(lab: &Lab) -> Host {
    Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
}

async fn until(agent: &mut Running, state: MembershipState) -> MembershipReport {
    agent.until("payments", state.as_str(), |w| w.membership.state == state).await.membership
}

#[tokio::test]
async fn a_service_that_is_made_later_is_found() {
    let lab = Lab::builder().group(group()).spawn().await.unwrap();
    let vm = host(&lab);
    let mut agent = vm.start().await;
    let before = until(&mut agent, MembershipState::NotSelected).await;
    assert!(agent.workload("payments").unwrap().ready, "to be selected is not ours to do");
    let cause = before.cause.unwrap();
    assert!(cause.contains("no Service or ServiceEntry selects this workload; give one a selector"), "{cause}");

    lab.service(service(8080));
    let listed = until(&mut agent, MembershipState::Listed).await;
    assert_eq!((listed.services, listed.ports), (vec!["payments.example.com:80".to_owned()], vec![8080]));
    lab.remove_service("payments.example.com");
    until(&mut agent, MembershipState::Withheld).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_unhealthy_application_is_withheld() {
    let app = App::start().await;
    app.healthy.send_replace(false);
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let lab = Lab::builder().group(group().probe(probe)).service(service(app.port)).spawn().await.unwrap();
    let vm = host(&lab);
    let mut agent = vm.start().await;
    // Before the first healthy report nobody can tell which services would select it.
    agent.until("payments", "unhealthy", |w| w.health.state == HealthState::Unhealthy).await;
    let unknown = |w: &we_agent::status::WorkloadReport| {
        w.ready && w.membership.cause.as_deref() == Some("the application is not healthy yet")
    };
    agent.until("payments", "waiting for the application", unknown).await;
    assert_eq!(lab.listed("payments.example.com"), []);

    app.healthy.send_replace(true);
    until(&mut agent, MembershipState::Listed).await;
    app.healthy.send_replace(false);
    let withheld = until(&mut agent, MembershipState::Withheld).await;
    assert_eq!(withheld.services, ["payments.example.com:80"]);
    assert_eq!((withheld.tls, withheld.cause), (None, None));
    agent.stop().await;
}

#[tokio::test]
async fn a_mesh_too_large_to_look_at_is_no_harm() {
    let lab = Lab::builder().group(group()).service(service(8080)).spawn().await.unwrap();
    lab.inject(Fault::ObserverTooBig(9));
    let vm = host(&lab);
    let mut agent = vm.start().await;
    let told = |w: &we_agent::status::WorkloadReport| {
        let cause = w.membership.cause.as_deref().unwrap_or_default();
        w.membership.state == MembershipState::Unknown && cause.contains("larger than membership.maxBytes")
    };
    agent.until("payments", "unknown, with the setting to change", told).await;
    assert!(agent.workload("payments").unwrap().ready);
    assert_eq!(lab.listed("payments.example.com").len(), 1, "the registration goes on");
    assert!(!lab.events().iter().any(|e| matches!(e.what, What::EntryDisconnected { .. })));
    agent.stop().await;

    // With more room it is read.
    let config = "defaults: {membership: {maxBytes: 32MiB}}";
    let vm = host(&lab).config(config);
    let mut agent = vm.start().await;
    until(&mut agent, MembershipState::Listed).await;
    agent.stop().await;
}

#[tokio::test]
async fn membership_can_be_turned_off() {
    let lab = Lab::builder().group(group()).service(service(8080)).spawn().await.unwrap();
    let vm = host(&lab).config("defaults: {membership: {enabled: false}}");
    let mut agent = vm.start().await;
    agent.ready("payments").await;
    let off = |w: &we_agent::status::WorkloadReport| {
        w.membership.cause.as_deref().is_some_and(|cause| cause.contains("turned off"))
    };
    agent.until("payments", "turned off", off).await;
    // A moved session asks no more than the first did.
    let mark = lab.mark();
    lab.inject(Fault::Goaway);
    let moved = |e: &Event| matches!(e.what, What::ConnectionClosed { .. });
    assert!(lab.until_since(mark, SOON, moved).await.is_some());
    for event in lab.events() {
        let asked = match &event.what {
            What::StreamOpened { observer, .. } => *observer,
            What::Pushed { type_url, .. } => type_url == CLUSTERS,
            _ => false,
        };
        assert!(!asked, "{event:?}");
    }
    agent.stop().await;
}

/// A server that speaks TLS, with a certificate that nobody trusts.
async fn tls_server() -> u16 {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["app.example".to_owned()]).unwrap().self_signed(&key).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(mut tls) = acceptor.accept(tcp).await {
                    let _ = tls.read(&mut [0; 64]).await;
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn plain_text_behind_mutual_tls_is_told_with_both_remedies() {
    let plain = App::start().await;
    for (port, speaks_tls) in [(plain.port, false), (tls_server().await, true)] {
        let lab = Lab::builder().group(group()).service(service(port)).spawn().await.unwrap();
        let vm = host(&lab);
        let mut agent = vm.start().await;
        let listed = until(&mut agent, MembershipState::Listed).await;
        assert_eq!((listed.tls, listed.ports), (Some(true), vec![port]));
        match (listed.cause, speaks_tls) {
            (None, true) => {}
            (Some(cause), false) => {
                for part in
                    [&format!("mutual TLS to port {port}"), "files in /run/we-agent/payments", "tlsMode: disabled"]
                {
                    assert!(cause.contains(part), "{part} not in {cause}");
                }
            }
            (cause, _) => panic!("an application that speaks TLS: {speaks_tls}, but {cause:?}"),
        }
        agent.stop().await;
    }
    // Who took the second remedy is left alone.
    let group = group().label("security.istio.io/tlsMode", "disabled");
    let lab = Lab::builder().group(group).service(service(plain.port)).spawn().await.unwrap();
    let vm = host(&lab);
    let mut agent = vm.start().await;
    let listed = until(&mut agent, MembershipState::Listed).await;
    assert_eq!((listed.tls, listed.cause), (Some(false), None));
    agent.stop().await;
}

#[tokio::test]
async fn a_command_without_consent_parks_health_alone() {
    let probe = json!({"periodSeconds": 1, "exec": {"command": ["true"]}});
    let lab = Lab::builder().group(group().probe(probe)).service(service(8080)).spawn().await.unwrap();
    let vm = host(&lab);
    let mut agent = vm.start().await;
    let w = agent.until("payments", "parked", |w| w.health.state == HealthState::Parked && w.ready).await;
    assert_eq!((w.identity.state, w.registration.state), (IdentityState::Valid, RegistrationState::Registered));
    let cause = w.health.message.unwrap();
    assert!(cause.contains("allowExec"), "{cause}");
    assert_eq!(lab.entry("vms", "payments-127.0.0.1").unwrap().healthy(), None);
    assert_eq!(lab.listed("payments.example.com"), []);
    assert!(!lab.events().iter().any(|e| matches!(e.what, What::Health { .. })), "nothing is reported");
    agent.stop().await;

    let vm = host(&lab).config("defaults: {health: {allowExec: true}}");
    let mut agent = vm.start().await;
    until(&mut agent, MembershipState::Listed).await;
    assert_eq!(lab.listed("payments.example.com"), ["127.0.0.1:8080".parse::<SocketAddr>().unwrap()]);
    agent.stop().await;
}
