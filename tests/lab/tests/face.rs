//! The lab from outside: what a client sees, and what the lab says of it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "face/faults.rs"]
mod faults;
mod support;

use std::time::{Duration, UNIX_EPOCH};

use prost::Message;
use support::{
    CDS, Call, Client, LIMIT, Pair, csr, eventually, first, health, pair,
    proto::envoy::{
        config::endpoint::v3::ClusterLoadAssignment,
        service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse},
    },
    with_probe,
};
use we_lab::{Credential, Fault, Group, Lab, Outcome, Service, Shape, What};

const NODE: [(&str, &str); 3] = [("NAMESPACE", "vms"), ("SERVICE_ACCOUNT", "sa"), ("AUTO_REGISTER_GROUP", "payments")];
const HOUR: Duration = Duration::from_secs(3600);

fn group() -> Group {
    Group::new("vms", "payments").service_account("sa").port("http", 8080).label("app", "payments")
}

async fn lab() -> Lab {
    let lab = Lab::builder()
        .group(group())
        .grace(Duration::from_millis(300))
        .debounce(Duration::from_millis(20))
        .spawn()
        .await
        .unwrap();
    lab.service(Service::new("payments.example.com").port(80, 8080).selector([("app", "payments")]));
    lab
}

async fn connect(lab: &Lab) -> Client {
    Client::connect(lab.address(), &lab.root_pem(), None).await.unwrap()
}

fn token(lab: &Lab) -> String {
    lab.token("vms", "sa", HOUR).unwrap()
}

async fn identity(lab: &Lab) -> Pair {
    let (key, csr) = csr("spiffe://cluster.local/ns/vms/sa/sa");
    pair(key, &connect(lab).await.sign(Some(&token(lab)), &csr, 0).await.unwrap())
}

fn endpoints(answer: &DeltaDiscoveryResponse) -> usize {
    answer
        .resources
        .iter()
        .map(|r| ClusterLoadAssignment::decode(&*r.resource.as_ref().unwrap().value).unwrap().endpoints.len())
        .sum()
}

#[tokio::test]
async fn a_certificate_by_token_then_by_certificate() {
    let lab = lab().await;
    let (key, request) = csr("spiffe://elsewhere/ns/x/sa/y");
    let chain = connect(&lab).await.sign(Some(&token(&lab)), &request, 60).await.unwrap();
    assert_eq!(chain.len(), 3, "leaf, intermediate, root");
    assert_eq!(chain[2], lab.root_pem());
    let pair = pair(key, &chain);
    let (_, leaf) = x509_parser::parse_x509_certificate(&pair.chain[0]).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(
        names.critical && format!("{:?}", names.value).contains("spiffe://cluster.local/ns/vms/sa/sa"),
        "the caller's name, not the request's"
    );
    assert_eq!(leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp(), 180);
    assert!(leaf.basic_constraints().unwrap().is_some_and(|c| c.critical && !c.value.ca));
    assert!(leaf.subject().iter().next().is_none());
    let again = Client::connect(lab.address(), &lab.root_pem(), Some(&pair)).await.unwrap();
    assert_eq!(again.sign(None, &request, 0).await.unwrap().len(), 3);
    let by: Vec<Credential> = lab
        .events()
        .iter()
        .filter_map(|e| if let What::Csr { credential, .. } = e.what { Some(credential) } else { None })
        .collect();
    assert_eq!(by, [Credential::Token, Credential::Certificate]);
}

#[tokio::test]
async fn bad_client_certificates_kill_the_handshake() {
    let lab = lab().await;
    let mut pair = identity(&lab).await;
    pair.chain.truncate(1);
    refused(&lab, &pair, "UnknownIssuer").await;
    lab.inject(Fault::RefuseNewCertificate);
    let (older, newer) = (identity(&lab).await, identity(&lab).await);
    refused(&lab, &newer, "UnknownIssuer").await;
    lab.heal(Fault::RefuseNewCertificate);
    assert!(
        Client::connect(lab.address(), &lab.root_pem(), Some(&older))
            .await
            .unwrap()
            .sign(None, &csr("spiffe://x/y").1, 0)
            .await
            .is_ok()
    );
    lab.inject(Fault::LoseAlerts);
    pair.chain.truncate(1);
    refused(&lab, &pair, "UnknownIssuer").await;
    lab.heal_all();
    lab.inject(Fault::ShortLife(Duration::ZERO));
    let expired = identity(&lab).await;
    lab.heal_all();
    let not_after = x509_parser::parse_x509_certificate(&expired.chain[0]).unwrap().1.validity().not_after.timestamp();
    eventually("past its second", || UNIX_EPOCH.elapsed().unwrap().as_secs() as i64 > not_after).await;
    refused(&lab, &expired, "expired").await;
}

/// With TLS 1.3 the client may think for a moment that it is in.
async fn refused(lab: &Lab, pair: &Pair, cause: &str) {
    let mark = lab.mark();
    if let Ok(client) = Client::connect(lab.address(), &lab.root_pem(), Some(pair)).await {
        assert!(
            tokio::time::timeout(LIMIT, client.closed).await.unwrap().unwrap().is_err()
                || client.requests.ready().await.is_err()
        );
    }
    let event = lab.until_since(mark, LIMIT, |e| matches!(e.what, What::HandshakeRefused { .. })).await.unwrap();
    assert!(format!("{event:?}").contains(cause), "{event:?}");
}

#[tokio::test]
async fn registration_health_membership_and_leave() {
    let lab = lab().await;
    let client = connect(&lab).await;
    let mut stream = client
        .register(&token(&lab), &with_probe(first("127.0.0.1", &NODE, &["outbound|80||payments.example.com"])))
        .await;
    assert_eq!(endpoints(&stream.next_delta().await), 0);
    let entry = lab.entry("vms", "payments-127.0.0.1").unwrap();
    assert_eq!(entry.healthy(), None);
    stream.send(&health(None));
    assert_eq!(endpoints(&stream.next_delta().await), 1);
    assert_eq!(lab.listed("payments.example.com"), ["127.0.0.1:8080".parse().unwrap()]);
    stream.send(&health(Some("bad code 503")));
    assert_eq!(endpoints(&stream.next_delta().await), 0);
    let entry = lab.entry("vms", "payments-127.0.0.1").unwrap();
    assert_eq!((entry.healthy(), entry.health_message()), (Some(false), Some("bad code 503")));
    assert!(entry.yaml().contains("    proxy.istio.io/health-checks-enabled: \"true\"\n"));
    stream.half_close();
    assert_eq!(stream.end().await.code, 0);
    lab.until(LIMIT, |e| matches!(e.what, What::EntryDeleted { .. })).await.expect("cleaned up after the grace");
    assert!(lab.entries().is_empty());
}

#[tokio::test]
async fn a_reconnect_within_the_grace_keeps_the_entry() {
    let lab = lab().await;
    let client = connect(&lab).await;
    let mut stream = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    stream.next_delta().await;
    let uid = lab.entry("vms", "payments-127.0.0.1").unwrap().uid;
    stream.half_close();
    lab.until(LIMIT, |e| matches!(e.what, What::EntryDisconnected { .. })).await.unwrap();
    let mut again = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    again.next_delta().await;
    assert_eq!(again.ends_within(Duration::from_millis(500)).await, None);
    assert_eq!(lab.entry("vms", "payments-127.0.0.1").unwrap().uid, uid);
}

#[tokio::test]
async fn closing_the_newer_stream_first_leaks_the_entry() {
    let lab = lab().await;
    let client = connect(&lab).await;
    let mut older = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    older.next_delta().await;
    let mut newer = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    newer.next_delta().await;
    newer.half_close();
    newer.end().await;
    older.half_close();
    older.end().await;
    eventually("both closed", || {
        lab.events().iter().filter(|e| matches!(e.what, What::StreamClosed { .. })).count() == 2
    })
    .await;
    assert!(lab.entry("vms", "payments-127.0.0.1").unwrap().connected_at().is_some());
}

#[tokio::test]
async fn an_observer_learns_what_selects_it() {
    let lab = lab().await;
    let client = connect(&lab).await;
    client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await.next_delta().await;
    let mut observer = client
        .register(
            &token(&lab),
            &DeltaDiscoveryRequest { type_url: CDS.to_owned(), ..first("127.0.0.1", &NODE[..2], &[]) },
        )
        .await;
    let mut names = Vec::new();
    while !["outbound|80||payments.example.com", "inbound|8080||"].iter().all(|n| names.iter().any(|name| name == n)) {
        names.extend(observer.next_delta().await.resources.into_iter().map(|r| r.name));
    }
    lab.inject(Fault::ObserverTooBig(9));
    let mut observer = client
        .register(
            &token(&lab),
            &DeltaDiscoveryRequest { type_url: CDS.to_owned(), ..first("127.0.0.1", &NODE[..2], &[]) },
        )
        .await;
    assert!(observer.next_delta().await.encoded_len() > 9 << 20);
}

#[tokio::test]
async fn ageing_says_so_twice_and_then_cuts_the_line() {
    let lab = Lab::builder()
        .group(group())
        .max_connection_age(Duration::from_millis(200))
        .age_grace(Duration::from_millis(400))
        .spawn()
        .await
        .unwrap();
    let client = connect(&lab).await;
    let mut stream = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    stream.next_delta().await;
    lab.until(LIMIT, |e| matches!(e.what, What::Goaway { .. })).await.unwrap();
    stream.send(&health(None));
    lab.until(LIMIT, |e| matches!(e.what, What::Health { lost: false, .. })).await.expect("the old stream works on");
    assert_eq!(stream.end().await.code, -1);
    assert!(client.requests.ready().await.is_err());
}

#[tokio::test]
async fn a_stop_leaves_the_entry_connected_and_another_instance_takes_it_over() {
    let lab = lab().await;
    let other = Lab::builder().store(&lab).name("istiod-1").spawn().await.unwrap();
    let client = connect(&lab).await;
    let mut stream = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    stream.next_delta().await;
    let before = lab.entry("vms", "payments-127.0.0.1").unwrap();
    lab.stop().await;
    assert_eq!(stream.end().await.code, -1);
    assert!(Client::connect(lab.address(), &lab.root_pem(), None).await.is_err());
    assert_eq!(lab.entry("vms", "payments-127.0.0.1").unwrap(), before);
    let taken = Client::connect(other.address(), &lab.root_pem(), None).await.unwrap();
    taken.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await.next_delta().await;
    let after = lab.entry("vms", "payments-127.0.0.1").unwrap();
    assert_eq!((&after.uid, after.annotations["istio.io/workloadController"].as_str()), (&before.uid, "istiod-1"));
    lab.restart().await;
    assert!(connect(&lab).await.sign(Some(&token(&lab)), &csr("spiffe://x/y").1, 0).await.is_ok());
}

#[tokio::test]
async fn however_a_stream_ends_its_entry_is_marked_and_then_deleted() {
    for way in ["half-close", "reset", "cut"] {
        let lab = lab().await;
        let client = connect(&lab).await;
        let mut stream = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
        stream.next_delta().await;
        match way {
            "half-close" => stream.half_close(),
            "reset" => stream.body.send_reset(h2::Reason::CANCEL),
            _ => client.closed.abort(),
        }
        let marked = lab.until(Duration::from_millis(250), |e| matches!(e.what, What::EntryDisconnected { .. })).await;
        assert!(marked.is_some(), "{way}: {:?}", lab.events());
        lab.until(LIMIT, |e| matches!(e.what, What::EntryDeleted { .. })).await.unwrap();
    }
}

#[tokio::test]
async fn endpoints_are_those_of_the_recorded_table() {
    let lab = lab().await;
    let client = connect(&lab).await;
    let listed = async |wanted: bool| {
        eventually("the table holds", || lab.listed("payments.example.com").is_empty() != wanted).await
    };
    let mut with = client.register(&token(&lab), &with_probe(first("127.0.0.1", &NODE, &["x"]))).await;
    with.next_delta().await;
    assert!(lab.listed("payments.example.com").is_empty(), "no report yet");
    for (report, wanted) in [(None, true), (Some("x"), false), (None, true)] {
        with.send(&health(report));
        listed(wanted).await;
    }
    with.half_close();
    with.end().await;
    assert!(!lab.listed("payments.example.com").is_empty(), "inside the grace");
    listed(false).await;
    let mut without = client.register(&token(&lab), &first("127.0.0.2", &NODE, &["x"])).await;
    without.next_delta().await;
    listed(true).await;
    let mark = lab.mark();
    without.send(&health(Some("x")));
    lab.until_since(mark, LIMIT, |e| matches!(e.what, What::Health { lost: false, .. })).await.unwrap();
    assert!(!lab.listed("payments.example.com").is_empty(), "no probe, so a report changes nothing");
    assert_eq!(lab.entry("vms", "payments-127.0.0.2").unwrap().healthy(), Some(false));
}

#[tokio::test]
async fn a_close_overtakes_a_report() {
    let lab = lab().await;
    let client = connect(&lab).await;
    let mut stream = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    stream.next_delta().await;
    lab.inject(Fault::SlowReports(Duration::from_millis(50)));
    stream.send(&health(Some("leaving")));
    stream.half_close();
    lab.until(LIMIT, |e| matches!(e.what, What::Health { lost: true, .. })).await.expect("lost");
}

#[tokio::test]
async fn a_group_that_comes_back_gets_its_connected_entries_back() {
    let lab = lab().await;
    let client = connect(&lab).await;
    client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await.next_delta().await;
    let mut stream = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    stream.next_delta().await;
    lab.remove_group("vms", "payments");
    assert!(lab.entries().is_empty());
    lab.add_group(group());
    assert_eq!(lab.entries().len(), 1);
}

#[tokio::test]
async fn state_of_the_world_is_acknowledged_and_pushed() {
    let lab = lab().await;
    let client = connect(&lab).await;
    let mut stream = client.call(support::SOTW, &[("authorization", &format!("Bearer {}", token(&lab)))]).await;
    let node = first("127.0.0.1", &NODE, &[]).node;
    let names = vec!["outbound|80||payments.example.com".to_owned()];
    let ask = |nonce: &str, names: &[String]| DiscoveryRequest {
        type_url: support::EDS.to_owned(),
        resource_names: names.to_vec(),
        response_nonce: nonce.to_owned(),
        ..Default::default()
    };
    stream.send(&DiscoveryRequest { node, ..ask("", &names) });
    let count = |answer: &DiscoveryResponse| {
        ClusterLoadAssignment::decode(&*answer.resources[0].value).unwrap().endpoints.len()
    };
    let answer: DiscoveryResponse = stream.next().await.unwrap();
    assert_eq!(count(&answer), 0);
    stream.send(&ask(&answer.nonce, &names));
    let push: DiscoveryResponse = stream.next().await.unwrap();
    assert_eq!(count(&push), 1);
    stream.send(&ask("stale", &["other".to_owned()]));
    stream.send(&ask(&push.nonce, &[names[0].clone(), "more".to_owned()]));
    let more: DiscoveryResponse = stream.next().await.unwrap();
    assert_eq!((more.resources.len(), count(&more)), (1, 0));
    stream.send(&ask("", &names));
    assert_eq!(count(&stream.next().await.unwrap()), 1, "no nonce: everything again");
}

#[tokio::test]
async fn roots_are_pushed_to_who_subscribes_if_the_mesh_has_several() {
    let lab = Lab::builder().group(group()).debounce(Duration::from_millis(20)).multiroot(true).spawn().await.unwrap();
    let client = connect(&lab).await;
    let pcds = "type.googleapis.com/istio.mesh.v1alpha1.ProxyConfig";
    let mut stream = client
        .register(&token(&lab), &DeltaDiscoveryRequest { type_url: pcds.to_owned(), ..first("127.0.0.1", &NODE, &[]) })
        .await;
    let roots = |answer: DeltaDiscoveryResponse| {
        let config = &answer.resources[0].resource.as_ref().unwrap().value;
        support::proto::istio::mesh::v1alpha1::ProxyConfig::decode(&**config).unwrap().ca_certificates_pem.len()
    };
    assert_eq!(roots(stream.next_delta().await), 1);
    lab.ca().rotate_root(true).unwrap();
    assert_eq!(roots(stream.next_delta().await), 2);
}

#[tokio::test]
async fn after_a_live_change_of_the_root_new_certificates_count_only_from_the_next_start() {
    let lab = lab().await;
    let older = identity(&lab).await;
    lab.ca().rotate_intermediate().unwrap();
    let renewed = identity(&lab).await;
    Client::connect(lab.address(), &lab.root_pem(), Some(&renewed))
        .await
        .unwrap()
        .sign(None, &csr("spiffe://x/y").1, 0)
        .await
        .unwrap();
    lab.ca().add_root().unwrap();
    lab.ca().rotate_root(true).unwrap();
    let newer = identity(&lab).await;
    refused(&lab, &newer, "UnknownIssuer").await;
    let client = Client::connect(lab.address(), &lab.root_pem(), Some(&older)).await.unwrap();
    client.sign(None, &csr("spiffe://x/y").1, 0).await.unwrap();
    lab.restart().await;
    let client = Client::connect(lab.address(), &lab.root_pem(), Some(&newer)).await.unwrap();
    client.sign(None, &csr("spiffe://x/y").1, 0).await.unwrap();
}
