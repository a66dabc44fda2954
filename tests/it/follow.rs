//! What runs is what the files say now: they are edited, removed, copied and damaged while the agent runs.

use crate::{
    daemon::{Daemon, we_agent},
    rotation::{ENTRY, lab, uid},
    support::{App, Host, Running, SOON},
};
use nix::sys::signal::Signal;
use serde_json::json;
use std::{fs, os::unix::fs::MetadataExt, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, interval, timeout},
};
use we_agent::{
    agent::{Agent, BindError},
    config::Config,
    files::Root,
    status::{RegistrationState, WorkloadReport},
};
use we_lab::{Event, Group, Lab, Service, What};

const BUNDLE: &str = "/etc/we-agent/payments";

fn host(lab: &Lab) -> Host {
    Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
}

fn append(host: &Host, file: &str, text: &str) {
    let file = host.path(file);
    let old = fs::read_to_string(&file).unwrap();
    fs::write(file, old + text).unwrap();
}

fn stream_opened(event: &Event) -> bool {
    matches!(event.what, What::StreamOpened { observer: false, .. })
}

/// Waits until `wanted` holds, twice as long as usual: a removal alone takes more than ten seconds.
async fn until(what: &str, wanted: impl Fn() -> bool) {
    let (end, mut look) = (Instant::now() + SOON * 2, interval(Duration::from_millis(50)));
    while !wanted() {
        assert!(Instant::now() < end, "{what}: not in time");
        look.tick().await;
    }
}

async fn gone(agent: &Running, name: &str) {
    until("gone", || agent.workload(name).is_none()).await;
}

#[tokio::test]
async fn edited_hosts_are_followed() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let hosts = host.path("/etc/we-agent/payments/hosts");
    let good = fs::read_to_string(&hosts).unwrap();
    // Nobody listens at that address.
    fs::write(&hosts, good.replace("127.0.0.1", "127.0.0.9")).unwrap();
    let mut agent = host.start().await;
    agent.until("payments", "refused", |w| w.registration.cause.is_some()).await;
    fs::write(&hosts, &good).unwrap();
    agent.ready("payments").await;
    agent.stop().await;
}

/// An application that sends back what it gets.
async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

#[tokio::test]
async fn an_edited_bundle_costs_neither_certificate_nor_entry_nor_connections() {
    let lab = lab().spawn().await.unwrap();
    let forward = echo().await;
    let inbound = format!("inbound: [{{listen: '127.0.0.1:0', forward: {forward}, mode: permissive}}]");
    let host = host(&lab).config(&format!("workloads: {{payments: {{{inbound}}}}}\n"));
    let mut agent = host.start().await;
    let before = agent.until("payments", "listening", |w| w.ready && w.inbound[0].address.is_some()).await;
    let uid_before = uid(&lab);
    let mut call = TcpStream::connect(before.inbound[0].address.unwrap()).await.unwrap();
    let mut ask = async || {
        call.write_all(b"on").await.unwrap();
        let mut answer = [0; 2];
        timeout(SOON, call.read_exact(&mut answer)).await.unwrap().unwrap();
        answer
    };
    assert_eq!(&ask().await, b"on");
    let socket = || fs::metadata(host.path("/run/we-agent/payments/agent.sock")).unwrap().ino();
    let socket_before = socket();

    // What says the same in other words changes nothing; then there is something to say.
    append(&host, "/etc/we-agent/payments/cluster.env", "\n# nothing new\n");
    let mark = lab.mark();
    append(&host, "/etc/we-agent/payments/cluster.env", "ISTIO_META_COLOUR='green'\n");
    assert!(lab.until_since(mark, SOON, stream_opened).await.is_some(), "not followed");
    let after = agent.ready("payments").await;
    assert_eq!((&after.identity.serial, uid(&lab)), (&before.identity.serial, uid_before));
    assert_eq!(after.inbound[0].address, before.inbound[0].address);
    assert_eq!(&ask().await, b"on", "an open connection lives on");
    assert_eq!(socket(), socket_before, "it is the same socket");
    let opened = lab.events_since(mark).into_iter().filter(stream_opened).count();
    assert_eq!(opened, 1, "only once");

    // A mistake is told, and what runs goes on.
    append(&host, "/etc/we-agent/payments/cluster.env", "this is no assignment\n");
    let broken = agent.until("payments", "told", |w| !w.broken.is_empty()).await;
    assert!(broken.ready && broken.registration.state == RegistrationState::Registered, "{broken:#?}");
    assert_eq!(&ask().await, b"on");
    agent.stop().await;
}

#[tokio::test]
async fn a_removed_bundle_leaves_the_mesh_in_order() {
    let app = App::start().await;
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let service = Service::new("payments.example.com").port(80, app.port).selector([("app", "payments")]);
    let group = Group::new("vms", "payments").service_account("payments-sa").label("app", "payments").probe(probe);
    let lab = Lab::builder().group(group).service(service).spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    let healthy = |e: &Event| matches!(e.what, What::Health { healthy: true, .. });
    assert!(lab.until(SOON, healthy).await.is_some());
    agent.ready("payments").await;
    until("listed", || lab.listed("payments.example.com").len() == 1).await;
    let mark = lab.mark();
    fs::rename(host.path(BUNDLE), host.path("/away")).unwrap();
    gone(&agent, "payments").await;
    let events = lab.events_since(mark);
    let at = |wanted: &dyn Fn(&Event) -> bool| events.iter().position(wanted);
    let unhealthy = at(&|e| matches!(e.what, What::Health { healthy: false, .. }));
    let left = at(&|e| matches!(e.what, What::EntryDisconnected { .. }));
    assert!(unhealthy.is_some() && unhealthy < left, "{events:?}");
    assert_eq!(lab.listed("payments.example.com"), []);
    assert!(!host.path("/run/we-agent/payments").exists() && host.path("/var/lib/we-agent/payments").exists());

    // It comes back as who it was.
    fs::rename(host.path("/away"), host.path(BUNDLE)).unwrap();
    agent.ready("payments").await;
    let from_token = |e: &Event| matches!(e.what, What::ConnectionOpened { certificate: None, .. });
    assert!(!lab.events_since(mark).iter().any(from_token), "the certificate was kept");
    agent.stop().await;
}

#[tokio::test]
async fn of_twins_the_certificate_decides_and_the_other_waits() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    agent.stop().await;
    // The first in the alphabet, and by another name of the same entry.
    let bundle = lab.bundle("vms", "payments").internal_ip("127.0.0.1");
    let host = host.bundle("copy", &bundle);
    let env = host.path("/etc/we-agent/copy/cluster.env");
    let text = fs::read_to_string(&env).unwrap();
    let others = text.lines().filter(|line| !line.starts_with("ISTIO_SVC_IP"));
    let text: String = others.chain(["INSTANCE_IPS='127.0.0.1,10.9.9.9'", ""]).collect::<Vec<_>>().join("\n");
    fs::write(&env, text).unwrap();
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let copy = agent.until("copy", "told", |w| !w.broken.is_empty()).await;
    let mistake = copy.broken.join("\n");
    assert!(mistake.contains("same WorkloadGroup, network and address as workload payments"), "{mistake}");
    assert!(mistake.contains("remove one of the two directories") && copy.spiffe_id.is_none(), "{mistake}");
    // The remedy helps.
    fs::remove_dir_all(host.path(BUNDLE)).unwrap();
    gone(&agent, "payments").await;
    let copy = agent.ready("copy").await;
    assert_eq!(copy.registration.entry, Some(format!("vms/{ENTRY}")));
    agent.stop().await;
}

#[tokio::test]
async fn istios_own_agent_that_starts_later_has_its_entry_alone() {
    let lab = lab().spawn().await.unwrap();
    let bundle = lab.bundle("vms", "payments").internal_ip("127.0.0.1");
    let host = Host::new();
    let from = host.path("/bundle");
    bundle.write(&from).unwrap();
    for (file, to) in [
        ("cluster.env", "/var/lib/istio/envoy/cluster.env"),
        ("mesh.yaml", "/etc/istio/config/mesh"),
        ("root-cert.pem", "/etc/certs/root-cert.pem"),
        ("istio-token", "/var/run/secrets/tokens/istio-token"),
    ] {
        let to = host.path(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from.join(file), to).unwrap();
    }
    let host = host.config(&format!(
        "defaults: {{controlPlane: {{discoveryAddress: '{}', serverName: istiod.istio-system.svc}}}}\n",
        lab.address()
    ));
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let (mark, process) = (lab.mark(), host.path("/proc/9"));
    fs::create_dir_all(&process).unwrap();
    fs::write(process.join("status"), "NSpid:\t9\n").unwrap();
    fs::write(process.join("comm"), "pilot-agent\n").unwrap();
    let parked = agent.until("payments", "parked", |w| !w.broken.is_empty()).await;
    assert!(parked.broken[0].contains("Istio's own agent runs here (process 9)"), "{parked:#?}");
    let left = |e: &Event| matches!(e.what, What::EntryDisconnected { .. });
    assert!(lab.until_since(mark, SOON, left).await.is_some());
    fs::remove_dir_all(&process).unwrap();
    agent.ready("payments").await;
    agent.stop().await;
}

#[tokio::test]
async fn what_is_removed_is_made_anew_and_never_claimed_meanwhile() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab).config("workloads: {payments: {files: {outputs: [{format: pem}]}}}\n");
    let mut agent = host.start().await;
    let published = |w: &WorkloadReport| w.ready && w.files.iter().all(|file| file.serial.is_some());
    agent.until("payments", "published", published).await;
    for removed in ["/run/we-agent/payments", "/run/we-agent"] {
        fs::remove_dir_all(host.path(removed)).unwrap();
        let w = agent.workload("payments").unwrap();
        assert!(w.files.iter().all(|file| file.serial.is_none() && file.cause.is_some()), "{:#?}", w.files);
        agent.until("payments", "published again", published).await;
        for there in ["payments/key.pem", "payments/agent.sock"] {
            assert!(host.path("/run/we-agent").join(there).exists());
        }
    }
    let admin = host.path("/run/we-agent/admin.sock");
    until("the admin socket", || std::os::unix::net::UnixStream::connect(&admin).is_ok()).await;
    // Whoever starts a second one while there is no socket is told.
    fs::remove_file(&admin).unwrap();
    let root = Root::new(host.path("/"));
    let second = Agent::bind(&root, Config::default()).await;
    assert!(matches!(second, Err(BindError::Locked(_))), "{second:?}");
    let output = we_agent(&host).arg("run").output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert!(said.contains("another we-agent runs here"), "{said}");
    agent.stop().await;
}

#[tokio::test]
async fn a_reload_touches_what_has_changed_alone_and_a_mistake_nothing() {
    let group = |name: &str| Group::new("vms", name).service_account(&format!("{name}-sa"));
    let lab = Lab::builder().group(group("payments")).group(group("orders")).spawn().await.unwrap();
    let orders = lab.bundle("vms", "orders").internal_ip("127.0.0.1");
    let config = |labels: &str| format!("admin: {{address: off}}\nworkloads: {{payments: {{labels: {{{labels}}}}}}}\n");
    let host = host(&lab).bundle("orders", &orders).config(&config(""));
    let daemon = Daemon::start(&host, &[], &[]);
    daemon.until("payments", |w| w.ready).await;
    let serial = daemon.until("orders", |w| w.ready).await.identity.serial;
    let file = host.path("/etc/we-agent/we-agent.yaml");
    let reload = async || {
        let output = we_agent(&host).arg("reload").output().await.unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        (output.status.code(), said)
    };

    // A mistake: told with its place; everything stays, and `status` says that.
    let mark = lab.mark();
    fs::write(&file, config("").replace("labels", "label")).unwrap();
    let (code, said) = reload().await;
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("we-agent.yaml:2:") && said.contains("label") && said.contains("stays in force"), "{said}");
    assert!(daemon.status(&[]).await.contains("the one of before is in force"));
    daemon.signal(Signal::SIGHUP);

    fs::write(&file, config("colour: green")).unwrap();
    let (code, said) = reload().await;
    assert_eq!(code, Some(0), "{said}");
    let moved = |e: &Event| matches!(&e.what, What::StreamOpened { identity, observer: false, .. } if identity.contains("payments"));
    assert!(lab.until_since(mark, SOON, moved).await.is_some(), "{}", daemon.log());
    daemon.until("payments", |w| w.ready).await;
    let other = daemon.until("orders", |w| w.ready).await;
    assert_eq!(other.identity.serial, serial);
    let disturbed = |e: &Event| matches!(&e.what, What::EntryDisconnected { entry, .. } if entry.contains("orders"));
    assert!(!lab.events_since(mark).iter().any(disturbed));

    // And by a signal, which ends nobody.
    let mark = lab.mark();
    fs::write(&file, config("colour: blue")).unwrap();
    daemon.signal(Signal::SIGHUP);
    assert!(lab.until_since(mark, SOON, moved).await.is_some(), "{}", daemon.log());
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;
}
