//! From a bundle to the mesh.

use crate::support::{App, Host, SOON};
use serde_json::json;
use we_agent::status::{HealthState, IdentityState, MembershipState, RegistrationState};
use we_lab::{Group, Lab, Service};

#[tokio::test]
async fn a_bundle_is_all_it_takes() {
    let app = App::start().await;
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let group = Group::new("vms", "payments").service_account("payments-sa").port("http", app.port);
    let group = group.label("app", "payments").probe(probe);
    let service = Service::new("payments.example.com").port(80, app.port).selector([("app", "payments")]);
    let lab = Lab::builder().group(group).service(service).spawn().await.unwrap();
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"));
    let mut agent = host.start().await;

    let w = agent.ready("payments").await;
    assert_eq!(w.spiffe_id.as_deref(), Some("spiffe://cluster.local/ns/vms/sa/payments-sa"));
    assert_eq!(w.identity.state, IdentityState::Valid);
    assert_eq!(w.registration.state, RegistrationState::Registered);
    assert_eq!(w.registration.entry.as_deref(), Some("vms/payments-127.0.0.1"));
    for file in ["key.pem", "cert-chain.pem", "root-cert.pem"] {
        assert!(
            host.path("/run/we-agent/payments").join(file).exists() || {
                agent.until("payments", "published", |w| w.files.iter().all(|f| f.serial.is_some())).await;
                true
            }
        );
    }
    let w = agent.until("payments", "listed", |w| w.membership.state == MembershipState::Listed).await;
    assert_eq!(w.membership.services, ["payments.example.com:80"]);
    assert_eq!(w.membership.tls, Some(true));
    assert_eq!(w.health.state, HealthState::Healthy);
    let entry = lab.entry("vms", "payments-127.0.0.1").unwrap();
    assert_eq!(entry.healthy(), Some(true));

    app.healthy.send_replace(false);
    agent.until("payments", "withheld", |w| w.membership.state == MembershipState::Withheld).await;
    assert_eq!(lab.entry("vms", "payments-127.0.0.1").unwrap().healthy(), Some(false));
    app.healthy.send_replace(true);
    agent.until("payments", "listed again", |w| w.membership.state == MembershipState::Listed).await;

    let mark = lab.mark();
    agent.stop().await;
    let disconnected = |e: &we_lab::Event| matches!(e.what, we_lab::What::EntryDisconnected { .. });
    assert!(lab.until_since(mark, SOON, disconnected).await.is_some());
    assert_eq!(lab.counters().connections, 1, "one connection serves CA and registration");
}
