//! What the listener needs to serve, and does not have: a certificate, or descriptors. The mesh is told, and nobody else
//! suffers.

use super::{Echo, Pod, WEB};
use crate::{
    daemon::Daemon,
    rotation::ENTRY,
    support::{App, Host, SOON},
};
use serde_json::json;
use std::time::Duration;
use tokio::net::TcpStream;
use we_agent::status::{HealthState, WorkloadReport};
use we_lab::{Event, Fault, Group, Lab, LabBuilder};

/// A lab whose group has a probe of this port.
fn lab(port: u16) -> LabBuilder {
    let probe = json!({"periodSeconds": 1, "failureThreshold": 1, "httpGet": {"path": "/healthz", "port": port, "host": "127.0.0.1"}});
    Lab::builder().group(Group::new("vms", "payments").service_account("payments-sa").probe(probe))
}

fn vm(lab: &Lab, forward: u16) -> Host {
    let inbound = format!("inbound: [{{listen: '127.0.0.1:0', forward: '127.0.0.1:{forward}'}}]");
    Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
        .config(&format!("workloads: {{payments: {{renewal: {{minInterval: 100ms}}, {inbound}}}}}\n"))
}

async fn entry_is(lab: &Lab, healthy: bool, message: &str) {
    let is = |_: &Event| {
        lab.entry("vms", ENTRY).is_some_and(|entry| {
            entry.healthy() == Some(healthy) && entry.health_message().unwrap_or_default().contains(message)
        })
    };
    if !lab.events().last().is_some_and(is) {
        assert!(lab.until_since(lab.mark(), SOON, is).await.is_some(), "not {healthy}: {:?}", lab.entry("vms", ENTRY));
    }
}

#[tokio::test]
async fn without_a_certificate_the_entry_is_unhealthy() {
    let app = App::start().await;
    let lab = lab(app.port).ttl(Duration::from_secs(6)).spawn().await.unwrap();
    lab.inject(Fault::CaDown);
    let host = vm(&lab, app.port);
    let mut agent = host.start().await;
    // From the start: the application is well, and who is sent to it would be refused.
    entry_is(&lab, false, "there is no certificate yet, so every call of the mesh is refused").await;
    lab.heal_all();
    entry_is(&lab, true, "").await;
    agent.ready("payments").await;
    // And when it has expired.
    lab.inject(Fault::CaDown);
    entry_is(&lab, false, "the certificate has expired").await;
    let w = agent.workload("payments").unwrap();
    assert!(w.inbound[0].address.is_some() && w.inbound[0].cause.is_some(), "{:#?}", w.inbound);
    lab.heal_all();
    entry_is(&lab, true, "").await;
    agent.stop().await;
}

#[tokio::test]
async fn strangers_leave_descriptors_for_probe_control_plane_and_store() {
    const STRANGERS: usize = 1500;
    let (app, echo) = (App::start().await, Echo::start().await);
    let lab = lab(app.port).ttl(Duration::from_secs(8)).spawn().await.unwrap();
    let host = vm(&lab, echo.address.port());
    let daemon = Daemon::start_by(&host, &["sh", "-c", "ulimit -n 1024; exec \"$@\"", "sh"]);
    let listening =
        |w: &WorkloadReport| w.ready && w.inbound[0].address.is_some() && w.health.state == HealthState::Healthy;
    let first = daemon.until("payments", listening).await;
    let said = |words| daemon.log().contains(words);
    assert!(said("1024 files and sockets open") && said("LimitNOFILE="), "{}", daemon.log());
    let at = first.inbound[0].address.unwrap();
    let mut silent = Vec::new();
    for _ in 0..STRANGERS {
        silent.push(TcpStream::connect(at).await.unwrap());
    }
    let answered = *app.answered.borrow();
    assert_eq!(Pod::new(&lab, WEB).echo(at, b"honest").await, b"honest");
    let renewed = |w: &WorkloadReport| w.identity.serial != first.identity.serial && w.identity.store.durable;
    let w = daemon.until("payments", renewed).await;
    assert!(w.ready && w.health.state == HealthState::Healthy, "{w:#?}");
    let mut asked = app.answered.clone();
    asked.wait_for(|count| *count > answered + 2).await.unwrap();
    let w = daemon.until("payments", |_| true).await;
    assert_eq!((w.health.state, w.health.message), (HealthState::Healthy, None));
    assert!(!daemon.log().contains("too many open files"), "{}", daemon.log());
    daemon.kill().await;
}
