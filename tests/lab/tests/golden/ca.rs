//! The CA's answers: codes, texts, and the profile of what it signs.

use std::time::{Duration, UNIX_EPOCH};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use rcgen::{CertificateParams, DistinguishedName, DnType, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};
use we_lab::{Fault, Lab, What};
use x509_parser::prelude::{GeneralName, X509Certificate};

use super::{cases, fields, read};
use crate::support::{
    CREATE, Client, LIMIT, Pair, csr, eventually, pair,
    proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse},
};

#[tokio::test]
async fn requests_are_signed_and_refused_as_recorded() {
    let lab = Lab::builder().intermediates(0).spawn().await.unwrap();
    let left_out = [("key-p224", "the lab's cryptography has no P-224")];
    for case in cases("ca/csr.json", "id", &left_out) {
        let token = lab.token("ca", "vm", Duration::from_secs(3600)).unwrap();
        compare(&lab, None, &case, &[("authorization".to_owned(), format!("Bearer {token}"))]).await;
    }
}

#[tokio::test]
async fn credentials_count_as_recorded() {
    let left_out = [("sa-deleted-0s", "istiod's cache of ten seconds: the lab refuses a deleted account at once")];
    for case in cases("ca/auth.json", "id", &left_out) {
        let lab = Lab::builder().intermediates(intermediates(&case)).spawn().await.unwrap();
        let headers = headers(&lab, &case);
        compare(&lab, None, &case, &headers).await;
    }
}

#[tokio::test]
async fn client_certificates_count_as_recorded() {
    let left_out = [
        ("sa-deleted-token-15s", "has no client certificate; the same as in auth.json, and tried below"),
        ("ns-deleting-token", "the lab has no namespaces"),
    ];
    for case in cases("ca/clientcert.json", "id", &left_out) {
        let id = case["id"].as_str().unwrap();
        let kept = tempfile::tempdir().unwrap();
        let lab = Lab::builder().intermediates(intermediates(&case)).keep(kept.path()).spawn().await.unwrap();
        let presented = presented(&lab, id, &read_kept(kept.path())).await;
        if id == "sa-deleted-cert-renews" {
            lab.delete_service_account("ca", "gone");
        }
        let headers = headers(&lab, &case);
        match case["response"]["tls_alert"].as_str() {
            None => compare(&lab, Some(&presented), &case, &headers).await,
            Some(alert) => {
                // With TLS 1.2 the client always gets to see the alert.
                let error =
                    Client::connect_with(lab.address(), &lab.root_pem(), Some(&presented), &[&rustls::version::TLS12])
                        .await
                        .err();
                let seen = error.map(|e| format!("{e:?}").to_lowercase());
                assert!(
                    seen.as_ref().is_some_and(|s| s.contains(&alert.replace('_', ""))),
                    "{id}: {alert} in {seen:?}, {:?}",
                    lab.events()
                );
                lab.until(LIMIT, |e| matches!(e.what, What::HandshakeRefused { .. })).await.expect("in the log");
            }
        }
    }
    let lab = Lab::builder().spawn().await.unwrap();
    lab.delete_service_account("ca", "gone");
    let token = lab.token("ca", "gone", Duration::from_secs(3600)).unwrap();
    let client = Client::connect(lab.address(), &lab.root_pem(), None).await.unwrap();
    assert_eq!(
        client.sign(Some(&token), &csr("spiffe://x/y").1, 0).await.unwrap_err().message,
        "request authenticate failure"
    );
}

#[tokio::test]
async fn chains_have_the_recorded_elements() {
    for case in cases("ca/chain.json", "id", &[]) {
        let lab = Lab::builder().intermediates(intermediates(&case)).spawn().await.unwrap();
        if case["ca"].as_str().unwrap().ends_with("both") {
            lab.ca().add_root().unwrap();
        }
        let presented =
            if case["request"]["client_cert"].is_null() { None } else { Some(issued(&lab, "vm", "vm-sa").await) };
        let headers = headers(&lab, &case);
        compare(&lab, presented.as_ref(), &case, &headers).await;
    }
}

/// A CA that was plugged in had a root, an intermediate of the company's, and istiod's.
fn intermediates(case: &Value) -> usize {
    if case["ca"] == "self-signed" { 0 } else { 2 }
}

/// Sends the recorded request and compares the answer with the recorded one.
async fn compare(lab: &Lab, pair: Option<&Pair>, case: &Value, headers: &[(String, String)]) {
    let id = &case["id"];
    let client = Client::connect(lab.address(), &lab.root_pem(), pair).await.unwrap();
    let headers: Vec<(&str, &str)> = headers.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let mut call = client.call(CREATE, &headers).await;
    let request = &case["request"];
    let metadata =
        request["metadata"].is_object().then(|| prost_types::Struct { fields: fields(&request["metadata"]) });
    let csr = request["csr"].as_str().unwrap().to_owned();
    call.send(&IstioCertificateRequest {
        csr,
        validity_duration: request["validity_duration"].as_i64().unwrap(),
        metadata,
    });
    let answer: Option<IstioCertificateResponse> = call.next().await;
    let end = call.end().await;
    let (code, message) =
        (case["response"]["code"].as_i64().unwrap(), case["response"]["message"].as_str().unwrap_or_default());
    assert_eq!((i64::from(end.code), end.message.as_str()), (code, message), "{id}");
    assert_eq!(end.trailers_only, code != 0, "{id}");
    let Some(answer) = answer else { return };
    let blocks =
        |elements: &mut dyn Iterator<Item = &str>| elements.map(|e| e.matches("BEGIN").count()).collect::<Vec<_>>();
    let recorded = &mut case["response"]["cert_chain"].as_array().unwrap().iter().map(|e| e.as_str().unwrap());
    assert_eq!(
        blocks(&mut answer.cert_chain.iter().map(String::as_str)),
        blocks(recorded),
        "{id}: certificates in each element"
    );
    assert!(answer.cert_chain.iter().all(|e| e.ends_with('\n')), "{id}");
    assert_eq!(*answer.cert_chain.last().unwrap(), lab.root_pem(), "{id}");
    let der = CertificateDer::from_pem_slice(answer.cert_chain[0].as_bytes()).unwrap();
    assert_eq!(
        profile(&x509_parser::parse_x509_certificate(&der).unwrap().1),
        recorded_profile(&case["response"]["leaf"]),
        "{id}"
    );
}

/// What of a leaf does not depend on the CA's own key.
#[derive(Debug, PartialEq)]
struct Profile {
    subject_empty: bool,
    life: i64,
    extensions: Vec<String>,
    critical: Vec<String>,
    names: Vec<String>,
}

fn profile(leaf: &X509Certificate<'_>) -> Profile {
    let name = |oid: String| {
        let known = [
            ("2.5.29.15", "keyUsage"),
            ("2.5.29.37", "extendedKeyUsage"),
            ("2.5.29.19", "basicConstraints"),
            ("2.5.29.35", "authorityKeyIdentifier"),
            ("2.5.29.17", "subjectAltName"),
        ];
        known.iter().find(|(known, _)| *known == oid).map_or(oid, |(_, name)| (*name).to_owned())
    };
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let names = leaf.subject_alternative_name().unwrap().unwrap().value.general_names.iter();
    Profile {
        subject_empty: leaf.subject().iter().next().is_none(),
        life: leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp(),
        extensions: sorted(leaf.extensions().iter().map(|e| name(e.oid.to_id_string())).collect()),
        critical: sorted(leaf.extensions().iter().filter(|e| e.critical).map(|e| name(e.oid.to_id_string())).collect()),
        names: names
            .map(|n| if let GeneralName::URI(uri) = n { (*uri).to_owned() } else { format!("{n:?}") })
            .collect(),
    }
}

fn recorded_profile(leaf: &Value) -> Profile {
    let extensions = leaf["exts"].as_object().unwrap();
    let (_, names) = extensions["subjectAltName"].as_str().unwrap().split_once('[').unwrap();
    let critical = extensions.iter().filter(|(_, v)| v.as_str().unwrap().starts_with("critical"));
    Profile {
        subject_empty: leaf["subject"] == "",
        life: leaf["ttl"].as_f64().unwrap() as i64,
        extensions: extensions.keys().cloned().collect(),
        critical: critical.map(|(k, _)| k.clone()).collect(),
        names: names.trim_end_matches(']').split(", ").map(|n| n.trim_matches('\'').to_owned()).collect(),
    }
}

/// The recorded headers, with tokens signed by the lab: the same claims, at the same distance from now.
fn headers(lab: &Lab, case: &Value) -> Vec<(String, String)> {
    let id = case["id"].as_str().unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let header = |h: &Value| {
        let (name, value) = (text(&h[0]), text(&h[1]));
        let (scheme, token) = value
            .rsplit_once(' ')
            .map_or(("", value.as_str()), |(_, token)| (&value[..value.len() - token.len()], token));
        if token.split('.').count() != 3 {
            return (name, value);
        }
        let claims = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
        let mut claims: Value = serde_json::from_slice(&claims).unwrap();
        let now = UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
        let (from, to) = match id {
            "token-expired-1h" => (now - 7200, now - 3600),
            "token-expired-70s" => (now - 600, now - 70),
            "token-nbf-future-5m" => (now + 300, now + 3900),
            _ => (now, now + 3600),
        };
        (claims["iat"], claims["nbf"], claims["exp"]) = (json!(from), json!(from), json!(to));
        let mut token = lab.token_of(&claims).unwrap();
        if id == "auth-sig-destroyed" {
            token.replace_range(token.len() - 20.., "AAAAAAAAAAAAAAAAAAAA");
        }
        (name, format!("{scheme}{token}"))
    };
    case["request"]["headers"].as_array().unwrap().iter().map(header).collect()
}

/// The keys of the lab's CA, with which a test can sign what the lab itself would not.
fn read_kept(dir: &std::path::Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.join("mesh.json")).unwrap()).unwrap()
}

/// A client certificate of the kind that the case presented.
async fn presented(lab: &Lab, id: &str, kept: &Value) -> Pair {
    let names = |names: &[SanType]| signed(kept, names.to_vec());
    let uri = |uri: &str| SanType::URI(uri.try_into().unwrap());
    match id {
        "cert-foreign-ca-only" | "cert-foreign-ca-and-token" => {
            let other = Lab::builder().spawn().await.unwrap();
            issued(&other, "ca", "vm").await
        }
        "cert-expired-only" => {
            lab.inject(Fault::ShortLife(Duration::ZERO));
            let pair = issued(lab, "ca", "vm").await;
            lab.heal_all();
            let not_after =
                x509_parser::parse_x509_certificate(&pair.chain[0]).unwrap().1.validity().not_after.timestamp();
            eventually("past its second", || UNIX_EPOCH.elapsed().unwrap().as_secs() as i64 > not_after).await;
            pair
        }
        "sa-deleted-cert-renews" => issued(lab, "ca", "gone").await,
        "ccert-ok" => names(&[uri("spiffe://cluster.local/ns/vm/sa/x")]),
        "ccert-two-uris" => {
            names(&[uri("spiffe://cluster.local/ns/vm/sa/x"), uri("spiffe://cluster.local/ns/vm/sa/y")])
        }
        "ccert-no-uri-dns-only" => names(&[SanType::DnsName("vm.example.com".try_into().unwrap())]),
        "ccert-other-trust-domain" => names(&[uri("spiffe://other.domain/ns/vm/sa/x")]),
        "ccert-not-spiffe" => names(&[uri("https://example.com/x")]),
        // pilot-agent presents the root too.
        "cert-only-full-chain" | "cert-and-other-token" => {
            let mut pair = issued(lab, "ca", "vm").await;
            pair.chain.push(CertificateDer::from_pem_slice(lab.root_pem().as_bytes()).unwrap());
            pair
        }
        _ => issued(lab, "ca", "vm").await,
    }
}

async fn issued(lab: &Lab, namespace: &str, account: &str) -> Pair {
    let token = lab.token(namespace, account, Duration::from_secs(3600)).unwrap();
    let (key, request) = csr("spiffe://cluster.local/ns/ca/sa/vm");
    let client = Client::connect(lab.address(), &lab.root_pem(), None).await.unwrap();
    pair(key, &client.sign(Some(&token), &request, 0).await.unwrap())
}

fn signed(kept: &Value, names: Vec<SanType>) -> Pair {
    let text = |key: &str| kept["ca"]["intermediates"][0][key].as_str().unwrap().to_owned();
    let mut subject = CertificateParams::default();
    subject.distinguished_name = DistinguishedName::new();
    subject.distinguished_name.push(DnType::OrganizationName, "cluster.local");
    subject.distinguished_name.push(DnType::CommonName, text("name"));
    let issuer = Issuer::new(subject, KeyPair::from_pem(&text("key")).unwrap());
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    let key = KeyPair::generate().unwrap();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    let authorities = kept["ca"]["intermediates"].as_array().unwrap().iter();
    let issuers =
        authorities.map(|a| CertificateDer::from_pem_slice(a["certificate"].as_str().unwrap().as_bytes()).unwrap());
    Pair { chain: [leaf.der().clone()].into_iter().chain(issuers).collect(), key }
}

#[test]
fn recordings_hold_no_private_key() {
    for file in ["csr", "auth", "clientcert", "chain"] {
        assert!(!read(&format!("ca/{file}.json")).contains("PRIVATE KEY"), "{file}");
    }
}
