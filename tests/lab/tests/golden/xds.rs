//! ADS: what recorded first requests lead to. Codes, texts and frames, entries, conditions, the shape of answers.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use we_lab::{Fault, Group, Lab, Service};

use super::cases;
use crate::support::{
    Call, Client, DELTA, LIMIT, Pair, SOTW, csr, eventually, pair,
    proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse},
};

const HOUR: Duration = Duration::from_secs(3600);

/// The fixtures of the recordings. A service stands for those that any cluster has.
async fn lab() -> Lab {
    let g = Group::new("gold", "g")
        .service_account("sa1")
        .template_label("app", "g")
        .template_label("t", "template")
        .port("http", 8080);
    let g = g
        .locality("us-east1/z1/s1")
        .weight(7)
        .network("tnet")
        .label("t", "metadata")
        .label("m", "metadata")
        .annotation("note", "hi");
    let builder = Lab::builder().group(g).group(Group::new("gold", "open").service_account("").port("http", 8080));
    let builder = builder.group(Group::new("gold", "gsa2").service_account("sa2")).group(Group::new("gold2", "only2"));
    builder.service(Service::new("kubernetes.default.svc.cluster.local").port(443, 6443)).spawn().await.unwrap()
}

#[tokio::test]
async fn registrations() {
    replay("registration", &[]).await;
}

#[tokio::test]
async fn refusals() {
    replay("refusals", &[("plaintext", "the lab has no plaintext port")]).await;
}

#[tokio::test]
async fn health_reports() {
    replay("health", &[]).await;
}

#[tokio::test]
async fn certificates() {
    replay("certificates", &[]).await;
}

async fn replay(file: &str, left_out: &[(&str, &str)]) {
    let lab = lab().await;
    let cases = cases(&format!("xds/{file}.json"), "name", left_out);
    assert!(!cases.is_empty());
    for case in &cases {
        compare(&lab, case).await;
    }
}

async fn compare(lab: &Lab, case: &Value) {
    let name = case["name"].as_str().unwrap();
    let (token, presented) = credential(lab, case["credential"].as_str().unwrap()).await;
    let connected = Client::connect(lab.address(), &lab.root_pem(), presented.as_ref()).await;
    if case["end"]["grpc_status"].is_null() && case["end"]["open"] == false {
        // Refused in the handshake; with TLS 1.3 that shows a little later.
        let ended = match connected {
            Ok(client) => tokio::time::timeout(LIMIT, client.closed).await.unwrap().unwrap().is_err(),
            Err(_) => true,
        };
        return assert!(ended, "{name}");
    }
    let client = connected.unwrap();
    let bearer = token.map(|t| format!("Bearer {t}"));
    let mut headers: Vec<(&str, &str)> = bearer.iter().map(|b| ("authorization", b.as_str())).collect();
    headers.extend(case["headers"].as_object().unwrap().iter().map(|(k, v)| (k.as_str(), v.as_str().unwrap())));
    let delta = case["rpc"] == "DeltaAggregatedResources";
    let mut call = client.call(if delta { DELTA } else { SOTW }, &headers).await;
    for event in case["events"].as_array().unwrap() {
        if event.get("recv").is_some() {
            answered(&mut call, delta, &event["recv"], name).await;
        } else {
            // One message was too long to be recorded, and was nothing but long.
            call.send_bytes(&event["hex"].as_str().map_or_else(|| vec![0; 4_194_554], unhex));
        }
    }
    if case["end"]["open"] == true {
        assert_eq!(call.ends_within(Duration::from_millis(30)).await, None, "{name}: should stay open");
    } else {
        let end = call.end().await;
        let text = case["end"]["grpc_message_header_raw"].as_str().unwrap();
        assert_eq!(
            (i64::from(end.code), end.message.as_str()),
            (case["end"]["grpc_status"].as_i64().unwrap(), text),
            "{name}"
        );
        assert!(end.trailers_only, "{name}");
    }
    let expected = normal(&case["workloadentry"]);
    let found = || {
        lab.entries().iter().map(|e| normal(&e.json())).find(|e| e["metadata"]["name"] == expected["metadata"]["name"])
    };
    if expected.is_null() {
        assert!(
            !lab.entries().iter().any(|e| case["events"].to_string().contains(&format!("~{}~", e.spec.address))),
            "{name}: an entry"
        );
    } else {
        let label = format!("{name}: the entry {expected:#}, not {:#}", found().unwrap_or_default());
        eventually(&label, || found().as_ref() == Some(&expected)).await;
    }
}

/// The next answer has the recorded type, and resources of that type if the recorded one had.
async fn answered(call: &mut Call, delta: bool, recorded: &Value, name: &str) {
    let (type_url, nonce, resources): (String, String, Vec<String>) = if delta {
        let answer: DeltaDiscoveryResponse = call.next().await.expect("an answer");
        (answer.type_url, answer.nonce, answer.resources.into_iter().map(|r| r.resource.unwrap().type_url).collect())
    } else {
        let answer: DiscoveryResponse = call.next().await.expect("an answer");
        (answer.type_url, answer.nonce, answer.resources.into_iter().map(|r| r.type_url).collect())
    };
    assert_eq!(recorded["type_url"], type_url, "{name}");
    assert!(!nonce.is_empty(), "{name}");
    let expected: Vec<&str> =
        recorded["resources"].as_array().unwrap().iter().map(|r| r["any_type_url"].as_str().unwrap()).collect();
    assert_eq!(resources.is_empty(), expected.is_empty(), "{name}");
    assert!(resources.iter().all(|r| r == expected[0]), "{name}: {resources:?}");
}

/// Bearer token and certificate that stand for what the recording presented.
async fn credential(lab: &Lab, what: &str) -> (Option<String>, Option<Pair>) {
    let token = |account: &str| Some(lab.token("gold", account, HOUR).unwrap());
    match what {
        "none" => (None, None),
        "garbage token" => (Some("garbage".to_owned()), None),
        "token audience foo" => (Some(lab.token_for("gold", "sa1", "foo", 3600).unwrap()), None),
        "token gold/sa1" => (token("sa1"), None),
        "client certificate gold/sa1" => (None, Some(certificate(lab, "sa1").await)),
        "client certificate gold/sa2" => (None, Some(certificate(lab, "sa2").await)),
        "client certificate gold/sa1 + garbage token" => {
            (Some("garbage".to_owned()), Some(certificate(lab, "sa1").await))
        }
        "expired client certificate gold/sa1 + token gold/sa1" => {
            lab.inject(Fault::ShortLife(Duration::ZERO));
            let pair = certificate(lab, "sa1").await;
            lab.heal_all();
            let now = UNIX_EPOCH.elapsed().unwrap().as_secs();
            eventually("past its second", || UNIX_EPOCH.elapsed().unwrap().as_secs() > now + 1).await;
            (token("sa1"), Some(pair))
        }
        other => panic!("the credential {other} is new here"),
    }
}

async fn certificate(lab: &Lab, account: &str) -> Pair {
    let client = Client::connect(lab.address(), &lab.root_pem(), None).await.unwrap();
    let (key, request) = csr("spiffe://cluster.local/ns/gold/sa/sa1");
    pair(key, &client.sign(Some(&lab.token("gold", account, HOUR).unwrap()), &request, 0).await.unwrap())
}

/// An entry without what a run makes of its own: times and uids. Whether they are there is kept.
fn normal(entry: &Value) -> Value {
    let mut entry = entry.clone();
    for path in [
        "/metadata/annotations/istio.io~1connectedAt",
        "/metadata/annotations/istio.io~1disconnectedAt",
        "/metadata/creationTimestamp",
        "/metadata/uid",
        "/metadata/ownerReferences/0/uid",
    ] {
        if let Some(value) = entry.pointer_mut(path) {
            *value = json!("...");
        }
    }
    for condition in entry.pointer_mut("/status/conditions").and_then(Value::as_array_mut).into_iter().flatten() {
        condition["lastProbeTime"] = json!("...");
        condition["lastTransitionTime"] = json!("...");
    }
    if let Some(metadata) = entry.get_mut("metadata").and_then(Value::as_object_mut) {
        // The lab counts no generations.
        metadata.remove("generation");
    }
    entry
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}
