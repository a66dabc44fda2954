use super::*;
use crate::status::*;
use std::time::UNIX_EPOCH;

fn at(seconds: u64) -> Timestamp {
    Timestamp(UNIX_EPOCH + Duration::from_secs(seconds))
}

fn workload(name: &str) -> WorkloadReport {
    WorkloadReport {
        name: name.to_owned(),
        spiffe_id: None,
        ready: false,
        cause: None,
        identity: Default::default(),
        registration: Default::default(),
        membership: Default::default(),
        health: Default::default(),
        address: Default::default(),
        files: Vec::new(),
        consumers: Vec::new(),
        reloads: Vec::new(),
        inbound: Vec::new(),
        failures: Vec::new(),
        ignored: Vec::new(),
        broken: Vec::new(),
    }
}

fn plain(workloads: Vec<WorkloadReport>, cause: Option<&str>) -> String {
    let cause = cause.map(str::to_owned);
    let report = Report { version: "1".to_owned(), time: at(10_000), ready: false, cause, note: None, workloads };
    anstream::adapter::strip_str(&text(&report)).to_string()
}

#[test]
fn a_workload_reads_as_a_block() {
    let mut broken = workload("orders");
    broken.broken = vec!["cluster.env:3: no assignment; remove the line".to_owned()];
    let mut w = workload("payments");
    w.spiffe_id = Some("spiffe://cluster.local/ns/vms/sa/payments".to_owned());
    w.ready = true;
    w.identity = IdentityReport {
        state: IdentityState::Valid,
        not_after: Some(at(53_200)),
        renew_at: Some(at(31_600)),
        ..Default::default()
    };
    w.registration = RegistrationReport {
        kind: None,
        state: RegistrationState::Registered,
        entry: Some("vms/payments-10.0.0.7".to_owned()),
        since: Some(at(9_818)),
        cause: None,
    };
    w.membership = MembershipReport {
        state: MembershipState::Listed,
        services: vec!["payments.vms.svc.cluster.local:80".to_owned()],
        ports: vec![8080],
        tls: Some(true),
        cause: Some("port 8080 answers no TLS\x1b[2J; serve TLS there".to_owned()),
    };
    w.health = HealthReport { state: HealthState::Unhealthy, message: Some("status code 503".to_owned()) };
    w.address.all = vec![std::net::Ipv4Addr::new(10, 0, 0, 7).into()];
    w.files = vec![PublicationReport {
        publisher: "files".to_owned(),
        serial: Some("1f".to_owned()),
        kind: None,
        cause: None,
    }];
    w.reloads = vec![ReloadReport {
        kind: None,
        hook: "nginx.service".to_owned(),
        state: ReloadState::Stale,
        serial: Some("1f".to_owned()),
        served: Some("1e".to_owned()),
        cause: Some("look at its log".to_owned()),
    }];
    w.ignored = vec!["ISTIO_META_DNS_CAPTURE".to_owned()];
    let expected = "\
orders  not ready
  bundle        broken
                ! cluster.env:3: no assignment; remove the line

payments  ready
  spiffe id     spiffe://cluster.local/ns/vms/sa/payments
  identity      valid, expires in 12h (1970-01-01T14:46:40Z), renewal in 6h
  registration  registered as vms/payments-10.0.0.7, 3m 2s ago
  membership    listed for payments.vms.svc.cluster.local:80; pods speak mutual TLS to port 8080
                ! port 8080 answers no TLS [2J; serve TLS there
  health        unhealthy
                ! status code 503
  address       10.0.0.7
  files         serial 1f
  hook          stale, nginx.service, still serving 1e
                ! look at its log
  not obeyed    ISTIO_META_DNS_CAPTURE
";
    assert_eq!(plain(vec![broken, w], None), expected);
}

#[test]
fn a_trouble_of_two_facts_is_told_once() {
    let mut w = workload("payments");
    w.identity.cause = Some("restart istiod".to_owned());
    w.registration.cause = Some("restart istiod".to_owned());
    assert_eq!(plain(vec![w], None).matches("! restart istiod").count(), 1);
}

#[test]
fn an_empty_host_says_why() {
    assert_eq!(plain(vec![], Some("no bundle in /etc/we-agent")), "no bundle in /etc/we-agent\n");
}

#[test]
fn times_are_told_from_now() {
    assert_eq!(relative(at(10_061), at(10_000)), "in 1m 1s");
    assert_eq!(relative(at(10_000), at(10_000)), "in 0s");
    assert_eq!(relative(at(0), at(100_000)), "1day 3h ago");
}

#[test]
fn consumers_in_trouble_are_seen_in_a_crowd() {
    let consumer = |pid, state, cause: Option<&str>| ConsumerReport {
        protocol: "sds".to_owned(),
        resource: "default".to_owned(),
        state,
        node: "envoy".to_owned(),
        uid: 101,
        pid: Some(pid),
        version: Some("1f".to_owned()),
        cause: cause.map(str::to_owned),
    };
    let mut w = workload("payments");
    w.consumers = (0..9).map(|pid| consumer(pid, ConsumerState::Current, None)).collect();
    w.consumers.push(consumer(77, ConsumerState::Refused, Some("key values mismatch")));
    let told = plain(vec![w], None);
    let rows: Vec<_> = told.lines().skip_while(|line| !line.contains("consumer")).collect();
    assert_eq!(rows[0], "  consumer      refused, sds default for uid 101, pid 77, envoy: 1f");
    assert_eq!(rows[1], "                ! key values mismatch");
    assert_eq!(rows[2], "  consumer      current, sds default for uid 101, pid 0, envoy: 1f");
    assert_eq!((rows.len(), rows[9]), (10, "                and 2 more"));
}
