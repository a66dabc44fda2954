#![allow(clippy::unwrap_used)]
use super::*;
use crate::status::Consumers;
use crate::{
    spiffe::{KeyKind, PrivateKey, SpiffeId, X509Context},
    status::*,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn at(seconds: u64) -> SystemTime {
    NOW + Duration::from_secs(seconds)
}

/// A certificate that is valid from 0 to 1000 s after the epoch.
fn context() -> Arc<X509Context> {
    let id: SpiffeId = "spiffe://cluster.local/ns/vms/sa/payments".parse().unwrap();
    let ca_key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    (ca.not_before, ca.not_after) = (at(0).into(), at(1000).into());
    let root = ca.self_signed(&ca_key).unwrap().pem();
    let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
    let mut leaf = CertificateParams::new(Vec::new()).unwrap();
    leaf.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
    (leaf.not_before, leaf.not_after) = (at(0).into(), at(1000).into());
    let pair = KeyPair::from_pem(key.pem()).unwrap();
    let leaf = leaf.signed_by(&pair, &Issuer::from_params(&ca, &ca_key)).unwrap().pem();
    X509Context::from_answer(&id, key, &[leaf, root], at(1)).unwrap()
}

fn trouble(kind: &'static str, cause: &str) -> Trouble {
    Trouble::met(None, kind, cause.to_owned(), at(5))
}

/// The writing ends, with the workload that reads them.
struct Writers {
    identity: watch::Sender<Identity>,
    durable: watch::Sender<Durable>,
    token: watch::Sender<Token>,
    registration: watch::Sender<Registration>,
    membership: watch::Sender<Membership>,
    health: watch::Sender<Health>,
    addresses: watch::Sender<Addresses>,
    files: watch::Sender<Publication>,
    reload: watch::Sender<Reload>,
    workload: WorkloadStatus,
}

fn payments() -> Writers {
    let (identity, i) = watch::channel(Identity::default());
    let (durable, d) = watch::channel(Durable::default());
    let (token, t) = watch::channel(Token::default());
    let (registration, r) = watch::channel(Registration::default());
    let (membership, m) = watch::channel(Membership::default());
    let (health, h) = watch::channel(Health::default());
    let (addresses, a) = watch::channel(Addresses::default());
    let (files, f) = watch::channel(Publication::default());
    let (reload, n) = watch::channel(Reload::None);
    let publications = vec![Published { name: "files".to_owned(), fact: f, paths: Vec::new() }];
    let reloads = vec![("nginx.service".to_owned(), n)];
    let consumers = watch::channel(Consumers::default()).1;
    let facts = Facts {
        identity: i,
        durable: d,
        token: t,
        registration: r,
        membership: m,
        health: h,
        addresses: a,
        publications,
        consumers,
        reloads,
        inbounds: Vec::new(),
    };
    let workload = WorkloadStatus {
        name: "payments".to_owned(),
        spiffe_id: Some("spiffe://cluster.local/ns/vms/sa/payments".to_owned()),
        registers: true,
        broken: Vec::new(),
        ignored: vec!["ISTIO_META_DNS_CAPTURE".to_owned()],
        facts: Some(facts),
    };
    Writers { identity, durable, token, registration, membership, health, addresses, files, reload, workload }
}

fn broken() -> WorkloadStatus {
    WorkloadStatus {
        name: "orders".to_owned(),
        spiffe_id: None,
        registers: false,
        broken: vec!["cluster.env:3: no assignment; remove the line".to_owned()],
        ignored: Vec::new(),
        facts: None,
    }
}

fn entry() -> String {
    "vms/payments-10.0.0.7".to_owned()
}

fn registered(trouble: Option<Trouble>) -> Registration {
    Registration::Registered { entry: entry(), since: at(3), trouble }
}

#[test]
fn identity_has_five_states() {
    use IdentityState as S;
    let current = Some(context());
    let refused = trouble(Trouble::NEW_CERTIFICATE_REFUSED, "istiod does not accept what it issued; restart it");
    let other = trouble("ca_unavailable", "no answer");
    let absent = Registration::Absent;
    for (state, current, dead, registration, now) in [
        (S::None, &None, false, &absent, 2),
        (S::Valid, &current, false, &absent, 2),
        (S::Valid, &current, false, &registered(Some(other)), 2),
        (S::Refused, &current, false, &registered(Some(refused.clone())), 2),
        (S::Expired, &current, false, &registered(Some(refused)), 1000),
        (S::Dead, &current, true, &absent, 1000),
        (S::Valid, &current, true, &absent, 2),
        (S::Dead, &None, true, &absent, 2),
    ] {
        let identity = Identity { current: current.clone(), credentials_dead: dead, ..Identity::default() };
        let report = IdentityReport::of(&identity, registration, at(now));
        assert_eq!(report.state, state);
        let told = report.cause.as_deref() == Some("istiod does not accept what it issued; restart it");
        assert!(told || state != S::Refused, "{report:?}");
        assert_eq!(report.not_after, current.as_ref().map(|_| Timestamp(at(1000))));
    }
}

#[test]
fn a_workload_is_ready_with_certificate_and_registration_only() {
    let w = payments();
    let look = || WorkloadReport::of(&w.workload, at(10));
    assert_eq!(look().cause.as_deref(), Some("no certificate yet"));
    w.identity.send_modify(|i| i.trouble = Some(trouble("ca_unavailable", "istiod: refused; start it")));
    assert_eq!(look().cause.as_deref(), Some("istiod: refused; start it"));
    w.identity.send_modify(|i| i.current = Some(context()));
    assert_eq!(look().cause.as_deref(), Some("not registered yet"));
    w.registration.send_replace(Registration::Asked { entry: entry(), since: at(2), trouble: None });
    assert_eq!(look().cause.as_deref(), Some("registration asked for, no answer yet"));
    w.registration.send_replace(Registration::Parked { entry: entry(), trouble: trouble("no_group", "create it") });
    assert_eq!(look().cause.as_deref(), Some("create it"));
    w.registration.send_replace(registered(None));
    assert!(look().ready && look().cause.is_none(), "a renewal that fails does not unready: {:?}", look());
    let late = WorkloadReport::of(&w.workload, at(1000));
    assert!(!late.ready && late.identity.state == IdentityState::Expired);
    let mut unregistered = payments();
    unregistered.identity.send_modify(|i| i.current = Some(context()));
    unregistered.workload.registers = false;
    assert!(WorkloadReport::of(&unregistered.workload, at(10)).ready);
}

#[tokio::test]
async fn a_workload_whose_listener_cannot_listen_is_not_ready() {
    let mut w = payments();
    let (place, fact) = watch::channel(InboundPlace::Absent);
    w.workload.facts.as_mut().unwrap().inbounds.push(Inbound {
        listen: "8080".to_owned(),
        forward: "127.0.0.1:8081".to_owned(),
        permissive: false,
        notes: Vec::new(),
        place: fact,
        counters: Arc::default(),
    });
    w.identity.send_modify(|i| i.current = Some(context()));
    w.registration.send_replace(registered(None));
    let (_sender, receiver) = watch::channel(Workloads { list: vec![w.workload], note: None });
    let mut status = Status::new(receiver);
    assert!(status.report(at(9)).ready, "it is about to listen");
    place.send_replace(InboundPlace::Failed("cannot listen on port 8080: taken; give it back".to_owned()));
    tokio::time::timeout(Duration::from_secs(20), status.changed()).await.unwrap();
    let report = status.report(at(9));
    let said = "0 of 1 workload ready; payments: cannot listen on port 8080: taken; give it back";
    assert_eq!((report.summary().as_str(), report.ready), (said, false));
    place.send_replace(InboundPlace::Bound("[::]:8080".parse().unwrap()));
    tokio::time::timeout(Duration::from_secs(20), status.changed()).await.unwrap();
    assert!(status.report(at(9)).ready);
}

#[test]
fn the_host_is_ready_when_all_workloads_are() {
    let w = payments();
    let (sender, receiver) = watch::channel(Workloads::default());
    let status = Status::new(receiver);
    assert_eq!(status.report(NOW).summary(), "there is no workload");
    sender.send_modify(|all| all.note = Some("no bundle in /etc/we-agent".to_owned()));
    assert_eq!(status.report(NOW).summary(), "no bundle in /etc/we-agent");
    sender.send_replace(Workloads { list: vec![w.workload.clone()], note: None });
    assert_eq!(status.report(NOW).summary(), "0 of 1 workload ready; payments: no certificate yet");
    w.identity.send_modify(|i| i.current = Some(context()));
    w.registration.send_replace(registered(None));
    assert_eq!(status.report(at(9)).summary(), "1 of 1 workload ready");
    assert!(status.report(at(9)).ready);
    sender.send_modify(|all| all.list.insert(0, broken()));
    let report = status.report(at(9));
    assert_eq!(report.summary(), "1 of 2 workloads ready; orders: cluster.env:3: no assignment; remove the line");
    assert!(!report.ready);
}

#[test]
fn a_hook_tells_what_is_served_only_where_somebody_looked() {
    let w = payments();
    let serial = || "0a".to_owned();
    let look = || WorkloadReport::of(&w.workload, at(10)).reloads.remove(0);
    for (fact, state, told, served) in [
        (Reload::None, ReloadState::None, None, None),
        (Reload::Running { serial: serial() }, ReloadState::Running, Some(serial()), None),
        (Reload::Reloaded { serial: serial(), verified: false }, ReloadState::Reloaded, Some(serial()), None),
        (Reload::Reloaded { serial: serial(), verified: true }, ReloadState::Reloaded, Some(serial()), Some(serial())),
        (Reload::Failed { serial: serial(), trouble: trouble("x", "y") }, ReloadState::Failed, Some(serial()), None),
    ] {
        w.reload.send_replace(fact);
        let ReloadReport { hook, state: is, serial, served: seen, cause, .. } = look();
        assert_eq!((hook.as_str(), is, serial, seen), ("nginx.service", state, told, served));
        assert_eq!(cause.is_some(), state == ReloadState::Failed);
    }
}

#[test]
fn json_has_the_documented_words_and_reads_back() {
    let w = payments();
    w.identity.send_modify(|i| {
        i.current = Some(context());
        i.renew_at = Some(at(500));
    });
    w.token.send_replace(Token::Stays { cause: "let us write there".to_owned() });
    w.durable.send_replace(Durable { serial: None, trouble: Some(trouble("disk_full", "free some space there")) });
    w.registration.send_replace(registered(None));
    let selection = Selection {
        services: vec!["payments.vms.svc.cluster.local:80".to_owned()],
        ports: vec![8080],
        tls: Some(true),
        mismatch: None,
    };
    w.membership.send_replace(Membership::Withheld(selection));
    w.health.send_replace(Health::Unhealthy { message: "status code 503".to_owned() });
    let ip = "10.0.0.7".parse().unwrap();
    let candidates = vec![Candidate { ip, reason: "source of the route to istiod".to_owned() }];
    w.addresses.send_replace(Addresses { primary: Some(ip), all: vec![ip], candidates });
    w.files.send_replace(Publication { serial: Some("0a".to_owned()), trouble: None });
    let stale = trouble("reload_stale", "look at its log");
    w.reload.send_replace(Reload::Stale { serial: "0a".to_owned(), served: Some("09".to_owned()), trouble: stale });
    let workloads = Workloads { list: vec![broken(), w.workload.clone()], note: None };
    let report = Status::new(watch::channel(workloads).1).report(at(9));
    let json = serde_json::to_value(&report).unwrap();
    let serial = report.workloads[1].identity.serial.clone();
    assert_eq!(
        json["workloads"][1],
        serde_json::json!({
            "name": "payments",
            "spiffe_id": "spiffe://cluster.local/ns/vms/sa/payments",
            "ready": true,
            "cause": null,
            "identity": {
                "state": "valid", "serial": serial, "not_before": "1970-01-01T00:00:00Z",
                "not_after": "1970-01-01T00:16:40Z", "renew_at": "1970-01-01T00:08:20Z", "kind": null, "cause": null,
                "store": { "durable": false, "kind": "disk_full", "cause": "free some space there" },
                "token": { "state": "stays", "cause": "let us write there" },
            },
            "registration": {
                "state": "registered", "entry": "vms/payments-10.0.0.7", "since": "1970-01-01T00:00:03Z",
                "kind": null, "cause": null,
            },
            "membership": {
                "state": "withheld", "services": ["payments.vms.svc.cluster.local:80"], "ports": [8080], "tls": true,
                "cause": null,
            },
            "health": { "state": "unhealthy", "message": "status code 503" },
            "address": {
                "primary": "10.0.0.7", "all": ["10.0.0.7"],
                "candidates": [{ "ip": "10.0.0.7", "reason": "source of the route to istiod" }],
            },
            "consumers": [],
            "inbound": [],
            "files": [{ "publisher": "files", "serial": "0a", "kind": null, "cause": null }],
            "reloads": [{
                "hook": "nginx.service", "state": "stale", "serial": "0a", "served": "09",
                "kind": "reload_stale", "cause": "look at its log",
            }],
            "failures": [],
            "ignored": ["ISTIO_META_DNS_CAPTURE"],
            "broken": [],
        })
    );
    assert_eq!(json["workloads"][0]["identity"]["state"], "none");
    assert_eq!(json["ready"], false);
    assert_eq!(serde_json::from_value::<Report>(json).unwrap(), report);
}

#[tokio::test]
async fn what_fails_is_counted_by_its_kind() {
    let w = payments();
    let (sender, receiver) = watch::channel(Workloads { list: vec![w.workload.clone()], note: None });
    let status = Status::new(receiver);
    let stop = CancellationToken::new();
    let counting = tokio::spawn(status.clone().count_failures(stop.clone()));
    let again = |kind| {
        w.identity.send_modify(|identity| {
            identity.trouble = Some(Trouble::met(identity.trouble.as_ref(), kind, "why".to_owned(), at(5)));
        });
    };
    let counted = async |wanted: &[(&str, &str, u64)]| {
        let seen = || {
            let list = status.report(at(9)).workloads;
            let failures = list.into_iter().flat_map(|workload| workload.failures);
            failures.map(|f| (f.what, f.kind, f.count)).collect::<Vec<_>>()
        };
        let wanted: Vec<_> =
            wanted.iter().map(|(what, kind, n)| ((*what).to_owned(), (*kind).to_owned(), *n)).collect();
        let end = tokio::time::Instant::now() + Duration::from_secs(20);
        while seen() != wanted {
            assert!(tokio::time::Instant::now() < end, "{:?}", seen());
            tokio::task::yield_now().await;
        }
    };
    counted(&[]).await;
    again("unavailable");
    counted(&[("identity", "unavailable", 1)]).await;
    // Twice before anybody looks, and what has nothing to do with it.
    again("unavailable");
    again("unavailable");
    w.identity.send_modify(|identity| identity.renew_at = Some(at(7)));
    counted(&[("identity", "unavailable", 3)]).await;
    w.identity.send_modify(|identity| identity.trouble = None);
    again("denied");
    w.registration.send_replace(registered(Some(trouble("new_certificate_refused", "why"))));
    w.files.send_replace(Publication { serial: None, trouble: Some(trouble("disk_full", "why")) });
    w.reload.send_replace(Reload::Failed { serial: "0a".to_owned(), trouble: trouble("reload_failed", "why") });
    let all = [
        ("hook", "reload_failed", 1),
        ("identity", "denied", 1),
        ("identity", "unavailable", 3),
        ("publication", "disk_full", 1),
        ("registration", "new_certificate_refused", 1),
    ];
    counted(&all).await;
    // Who is gone is forgotten.
    sender.send_replace(Workloads::default());
    counted(&[]).await;
    stop.cancel();
    counting.await.unwrap();
}

#[tokio::test]
async fn every_fact_wakes_whoever_waits_and_nothing_else_does() {
    let w = payments();
    let (sender, receiver) = watch::channel(Workloads::default());
    let mut status = Status::new(receiver);
    sender.send_modify(|all| all.list.push(w.workload.clone()));
    let soon = Duration::from_secs(5);
    let quiet = Duration::from_millis(20);
    tokio::time::timeout(soon, status.changed()).await.unwrap();
    let news: [&dyn Fn(); 8] = [
        &|| w.identity.send_modify(|_| {}),
        &|| w.durable.send_modify(|_| {}),
        &|| w.token.send_modify(|_| {}),
        &|| w.registration.send_modify(|_| {}),
        &|| w.membership.send_modify(|_| {}),
        &|| w.health.send_modify(|_| {}),
        &|| w.addresses.send_modify(|_| {}),
        &|| sender.send_modify(|_| {}),
    ];
    for tell in news {
        assert!(tokio::time::timeout(quiet, status.changed()).await.is_err());
        tell();
        tokio::time::timeout(soon, status.changed()).await.unwrap();
    }
    drop((w, sender));
    assert!(tokio::time::timeout(quiet, status.changed()).await.is_err(), "a writer that is gone wakes nobody");
}
