//! The real program comes and goes: what the service manager is told, and what the mesh sees of it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    daemon::Daemon,
    support::{App, Host, SOON},
};
use nix::sys::signal::Signal;
use serde_json::json;
use std::{
    os::unix::fs::PermissionsExt,
    time::{Duration, SystemTime},
};
use tokio::{net::UnixDatagram, time::timeout};
use we_lab::{Event, Group, Lab, Service, What};

fn group() -> Group {
    Group::new("vms", "payments").service_account("payments-sa").label("app", "payments")
}

fn host(lab: &Lab) -> Host {
    let config = "startup: {readyTimeout: 1s}\nadmin: {address: off}\n";
    Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1")).config(config)
}

fn disconnected(event: &Event) -> bool {
    matches!(event.what, What::EntryDisconnected { .. })
}

#[tokio::test]
async fn a_restart_of_the_program_is_not_seen() {
    let app = App::start().await;
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let service = Service::new("payments.example.com").port(80, app.port).selector([("app", "payments")]);
    let lab = Lab::builder().group(group().probe(probe)).service(service).grace(SOON).spawn().await.unwrap();
    let host = host(&lab);
    let mut daemon = Daemon::start(&host, &[], &[]);
    let healthy = |e: &Event| matches!(e.what, What::Health { healthy: true, lost: false, .. });
    assert!(lab.until(SOON, healthy).await.is_some());
    daemon.until("payments", |w| w.ready).await;
    let uid = lab.entry("vms", "payments-127.0.0.1").unwrap().uid;
    for _ in 0..2 {
        let mark = lab.mark();
        let told = SystemTime::now();
        daemon.signal(Signal::SIGTERM);
        let marked = lab.until_since(mark, SOON, disconnected).await.expect("the entry was not marked");
        let took = marked.at.duration_since(told).unwrap();
        assert!(took < Duration::from_secs(5), "the entry was marked {took:?} after SIGTERM");
        daemon.ended().await;
        assert_eq!(lab.listed("payments.example.com").len(), 1, "stopping is not leaving");
        for file in ["run/we-agent/payments/key.pem", "var/lib/we-agent/payments"] {
            assert!(host.path(file).exists(), "{file} is gone");
        }

        daemon = Daemon::start(&host, &[], &[]);
        let taken = |e: &Event| matches!(&e.what, What::EntryConnected { uid: same, .. } if *same == uid);
        assert!(lab.until_since(mark, SOON, taken).await.is_some(), "{}", daemon.log());
        assert!(lab.until_since(mark, SOON, healthy).await.is_some());
        for event in lab.events_since(mark) {
            let seen = matches!(event.what, What::Health { healthy: false, .. } | What::EntryDeleted { .. });
            let from_token = matches!(event.what, What::ConnectionOpened { certificate: None, .. });
            assert!(!seen && !from_token, "{event:?}");
        }
        assert_eq!(lab.listed("payments.example.com").len(), 1);
        daemon.until("payments", |w| w.ready).await;
    }
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;
}

/// A service manager: what it was told, in order.
struct Manager {
    socket: UnixDatagram,
    told: String,
}

impl Manager {
    fn new(host: &Host) -> Self {
        Self { socket: UnixDatagram::bind(host.path("/notify")).unwrap(), told: String::new() }
    }

    async fn hear(&mut self, wanted: &str) {
        while !self.told.contains(wanted) {
            let mut buffer = [0; 4096];
            let Ok(size) = timeout(SOON, self.socket.recv(&mut buffer)).await else {
                panic!("{wanted} not in {}", self.told);
            };
            self.told.push_str(std::str::from_utf8(&buffer[..size.unwrap()]).unwrap());
        }
    }
}

#[tokio::test]
async fn ready_is_said_when_the_workload_is() {
    let lab = Lab::builder().group(group()).spawn().await.unwrap();
    let host = host(&lab).config("startup: {readyTimeout: 9m}\nadmin: {address: off}\n");
    let mut manager = Manager::new(&host);
    let socket = host.path("/notify");
    let environment = [("NOTIFY_SOCKET", socket.to_str().unwrap()), ("WATCHDOG_USEC", "200000")];
    lab.stop().await;
    let daemon = Daemon::start(&host, &[], &environment);
    // Alive all along, and not ready: the status says why.
    manager.hear("STATUS=starting: 0 of 1 workload ready; payments: ").await;
    manager.hear("cannot be reached").await;
    manager.hear("WATCHDOG=1").await;
    assert!(!manager.told.contains("READY=1"), "{}", manager.told);
    lab.restart().await;
    manager.hear("READY=1\nSTATUS=1 of 1 workload ready").await;

    let mark = lab.mark();
    daemon.signal(Signal::SIGTERM);
    manager.hear("STOPPING=1").await;
    assert!(lab.until_since(mark, SOON, disconnected).await.is_some());
    daemon.ended().await;
    let reports = lab.events_since(mark).into_iter().filter(|e| matches!(e.what, What::Health { .. }));
    assert_eq!(reports.count(), 0, "a service that is stopped takes nothing out of the mesh");
}

#[tokio::test]
async fn a_dead_control_plane_does_not_block_the_boot() {
    let lab = Lab::builder().group(group()).spawn().await.unwrap();
    let host = host(&lab);
    let mut manager = Manager::new(&host);
    let socket = host.path("/notify");
    lab.stop().await;
    let daemon = Daemon::start(&host, &[], &[("NOTIFY_SOCKET", socket.to_str().unwrap())]);
    manager.hear("READY=1\nSTATUS=degraded: 0 of 1 workload ready; payments: ").await;
    lab.restart().await;
    manager.hear("STATUS=1 of 1 workload ready").await;
    assert_eq!(manager.told.matches("READY=1").count(), 1);
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;
}

#[tokio::test]
async fn a_machine_that_goes_down_leaves_the_mesh_first() {
    let lab = Lab::builder().group(group()).spawn().await.unwrap();
    let host = host(&lab);
    let mut manager = Manager::new(&host);
    // A service manager that is stopping everything.
    let systemctl = host.path("/systemctl");
    std::fs::write(&systemctl, "#!/bin/sh\necho stopping\nexit 1\n").unwrap();
    std::fs::set_permissions(&systemctl, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (socket, path) = (host.path("/notify"), host.path("/"));
    let environment = [("NOTIFY_SOCKET", socket.to_str().unwrap()), ("PATH", path.to_str().unwrap())];
    let daemon = Daemon::start(&host, &[], &environment);
    manager.hear("READY=1\nSTATUS=1 of 1 workload ready").await;
    let mark = lab.mark();
    daemon.signal(Signal::SIGTERM);
    assert!(lab.until_since(mark, SOON, disconnected).await.is_some());
    daemon.ended().await;
    let said = lab.events_since(mark);
    let unhealthy = said.iter().position(|e| {
        matches!(&e.what, What::Health { healthy: false, lost: false, message, .. } if message == "the host is shutting down")
    });
    let gone = said.iter().position(disconnected);
    assert!(unhealthy.is_some() && unhealthy < gone, "{said:#?}");
}
