//! No byte of a token or a key is ever said: the real program at its most talkative, through good times and bad.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    daemon::Daemon,
    memory::consumers,
    support::{App, Host, SOON},
};
use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD, prelude::BASE64_URL_SAFE_NO_PAD};
use nix::sys::signal::Signal;
use serde_json::json;
use std::{collections::BTreeSet, fmt::Write, path::Path, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use we_agent::status::{HealthState, IdentityState, RegistrationState, WorkloadReport};
use we_lab::{Event, Fault, Group, Lab, Outcome, What};

/// Everything that is said at all, what is said by the libraries on the wire included.
const MOST: &str =
    "trace,h2=trace,hyper=trace,hyper_util=trace,rustls=trace,tokio_rustls=trace,tonic=trace,tower=trace";

/// Every way in which `secret` could stand in a text, whole or in part.
fn spellings(secret: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for part in secret.chunks(24).filter(|part| part.len() == 24) {
        let hex = part.iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        found.extend([hex.to_uppercase(), hex, format!("{part:?}").trim_matches(['[', ']']).to_owned()]);
        found.push(part.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":"));
        found.push(part.iter().map(|byte| format!("{byte:#04x}")).collect::<Vec<_>>().join(", "));
        // Base64 inside a longer text may begin at any of three places.
        for shift in 0..3 {
            let shifted = &part[shift..];
            let whole = &shifted[..shifted.len() / 3 * 3];
            found.extend([STANDARD_NO_PAD.encode(whole), BASE64_URL_SAFE_NO_PAD.encode(whole)]);
        }
    }
    found
}

/// Pieces of a text, so that a part of it is found, too.
fn pieces(text: &str, size: usize) -> impl Iterator<Item = String> {
    let starts = (0..text.len().saturating_sub(size - 1)).step_by(size / 2);
    starts.filter_map(move |start| text.get(start..start + size)).map(str::to_owned)
}

/// What must not be said of a token: its parts, pieces of them, and its bytes in any spelling.
fn of_token(token: &str) -> Vec<String> {
    let parts = token.split('.').filter(|part| part.len() > 8).map(str::to_owned);
    let signature = token.rsplit('.').next().and_then(|part| BASE64_URL_SAFE_NO_PAD.decode(part).ok());
    let spelled = spellings(token.as_bytes()).into_iter().chain(spellings(&signature.unwrap_or_default()));
    parts.chain(pieces(token, 24)).chain(spelled).collect()
}

/// What must not be said of a PEM key: its lines, pieces of them, and its number in any spelling.
fn of_key(text: &str) -> Vec<String> {
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with("-----") && !line.is_empty()).collect();
    let der = pem::parse(text).unwrap().into_contents();
    // PKCS#8 begins with what kind of key it is, which is no secret; the number itself follows SEC 1's header.
    let header = [0x02, 0x01, 0x01, 0x04, 0x20];
    let number = der.windows(header.len()).position(|w| w == header).expect("a P-256 key") + header.len();
    let (kind, number) = (number / 3 * 4, &der[number..number + 32]);
    let secret = pieces(&lines[0][kind..], 16).chain(pieces(lines[1], 16).take(3));
    let lines = lines.iter().map(|line| (*line).to_owned());
    lines.chain(secret).chain(spellings(number)).chain(spellings(&number[8..])).collect()
}

/// All private keys below `dir`, present and kept.
fn keys(dir: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if kind.is_dir() {
                open.push(path);
            } else if kind.is_file() {
                // It may be replaced at this very moment.
                let text = std::fs::read_to_string(path).unwrap_or_default();
                let blocks = pem::parse_many(&text).unwrap_or_default().into_iter();
                found.extend(blocks.filter(|b| b.tag().contains("PRIVATE KEY")).map(|block| pem::encode(&block)));
            }
        }
    }
    found
}

async fn metrics(log: &str) -> String {
    let address = log.split("readiness and metrics are on http://").nth(1).expect("the address is said");
    let address: String = address.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

/// A life of the daemon, and everything that it said.
async fn life(format: &str) {
    let app = App::start().await;
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let group = Group::new("vms", "payments").service_account("payments-sa").port("http", app.port).probe(probe);
    let lab = Lab::builder().group(group).ttl(Duration::from_secs(4)).spawn().await.unwrap();
    let first = lab.token("vms", "payments-sa", Duration::from_secs(3600)).unwrap();
    let bundle = lab.bundle("vms", "payments").internal_ip("127.0.0.1").token(&first);
    let config = "admin: {address: '127.0.0.1:0'}\ndefaults: {renewal: {minInterval: 1s}}\n";
    let host = Host::new().bundle("payments", &bundle).config(config);
    let daemon = Daemon::start(&host, &["--log-level", MOST, "--log-format", format], &[]);
    let mut tokens = vec![first];
    let mut seen = BTreeSet::new();
    let mut said = String::new();
    let mut look = async |name: &str, wanted: &dyn Fn(&WorkloadReport) -> bool| {
        let w = daemon.until("payments", wanted).await;
        seen.extend(keys(&host.path("/")));
        said += &daemon.status(&["--json"]).await;
        said += &daemon.status(&[]).await;
        said += &metrics(&daemon.log()).await;
        assert!(said.contains("payments"), "{name}: {w:?}");
    };
    let token = host.path("/etc/we-agent/payments/istio-token");
    let mut put = |text: String| {
        std::fs::write(&token, &text).unwrap();
        tokens.push(text);
    };
    let issued = |e: &Event| matches!(e.what, What::Csr { outcome: Outcome::Issued { .. }, .. });

    // Good times: a certificate, and two more.
    look("ready", &|w| w.ready && w.health.state == HealthState::Healthy).await;
    let mut consumers = consumers(&host).await;
    for given in &mut consumers {
        timeout(SOON, given.wait_for(|given| !given.is_empty())).await.unwrap().unwrap();
    }
    for _ in 0..2 {
        assert!(lab.until_since(lab.mark(), SOON, issued).await.is_some());
        look("rotated", &|w| w.ready).await;
    }
    // Bad times: answers that are not used, refusals of each credential, and a control plane that breaks off.
    lab.inject(Fault::WrongIdentity);
    look("wrong identity", &|w| w.identity.cause.is_some()).await;
    lab.heal_all();
    lab.inject(Fault::RefuseStreams(9));
    lab.inject(Fault::CaRefuses(7));
    lab.inject(Fault::DropStreams);
    look("refused", &|w| w.registration.state == RegistrationState::Parked).await;
    look("expired", &|w| w.identity.state == IdentityState::Expired).await;
    // A try that has read the token before it is another may still be under way; one of nobody has read the other.
    let of_nobody = |e: &Event| matches!(e.what, What::Csr { identity: None, .. });
    let mark = lab.mark();
    put(lab.token_for("vms", "payments-sa", "istio-ca", -600).unwrap());
    assert!(lab.until_since(mark, SOON, of_nobody).await.is_some());
    lab.heal_all();
    // A new token ends the wait after a refusal.
    put(lab.token_for("vms", "payments-sa", "istio-ca", -500).unwrap());
    look("dead", &|w| w.identity.state == IdentityState::Dead).await;
    let mark = lab.mark();
    put("this.is.no-token-at-all-but-as-secret-as-one".to_owned());
    let unreadable = |e: &Event| matches!(e.what, What::Csr { outcome: Outcome::Refused { .. }, .. });
    assert!(lab.until_since(mark, SOON, unreadable).await.is_some());
    look("still dead", &|w| w.identity.state == IdentityState::Dead).await;
    put(lab.token("vms", "intruder", Duration::from_secs(600)).unwrap());
    look("mismatch", &|w| w.identity.cause.as_deref().is_some_and(|cause| cause.contains("intruder"))).await;
    put(lab.token("vms", "payments-sa", Duration::from_secs(600)).unwrap());
    look("recovered", &|w| w.ready).await;
    daemon.signal(Signal::SIGTERM);
    assert!(lab.until_since(lab.mark(), SOON, |e| matches!(e.what, What::ConnectionClosed { .. })).await.is_some());
    let log = host.path("/daemon.log");
    daemon.ended().await;
    seen.extend(keys(&host.path("/")));
    said += &std::fs::read_to_string(log).unwrap();

    let traced = said.contains("TRACE") || said.contains(r#""level":"trace""#);
    assert!(traced && seen.len() > 3 && tokens.len() == 6, "{traced}, {} keys", seen.len());
    let tokens = tokens.iter().flat_map(|token| of_token(token));
    let secrets: BTreeSet<String> = tokens.chain(seen.iter().flat_map(|key| of_key(key))).collect();
    for secret in &secrets {
        if let Some(at) = said.find(secret.as_str()) {
            let line = said[..at].rfind('\n').map_or(0, |i| i + 1);
            panic!("{format}: a secret is said: {}", &said[line..(at + secret.len()).min(said.len())]);
        }
    }
}

#[tokio::test]
async fn text_tells_no_secret() {
    life("text").await;
}

#[tokio::test]
async fn json_tells_no_secret() {
    life("json").await;
}

/// The search finds what it is to find.
#[test]
fn a_secret_would_be_found() {
    let secret = b"Bearer eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJlLW9mLWEtdG9rZW4";
    let token = std::str::from_utf8(&secret[7..]).unwrap();
    let found = |text: &str| of_token(token).iter().any(|spelling| text.contains(spelling.as_str()));
    assert!(found(&format!("authorization: Bearer {token}")));
    assert!(found("a part alone: eyJzdWIiOiJ4In0") && found(&token[10..50]));
    assert!(found(&format!("{secret:?}")) && found(&format!("{:02x?}", &secret[7..]).replace(", ", "")));
    for before in ["", "a", "ab"] {
        let encoded = STANDARD_NO_PAD.encode([before.as_bytes(), &secret[7..]].concat());
        assert!(found(&encoded), "{before:?}");
    }
    assert!(!found("token of payments-sa, valid until 2026-01-01T00:00:00Z"));

    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let found = |text: &str| of_key(&key.serialize_pem()).iter().any(|spelling| text.contains(spelling.as_str()));
    let der = key.serialize_der();
    assert!(found(&key.serialize_pem()) && found(&format!("{der:?}")) && found(&format!("{:?}", &der[30..])));
    assert!(found(&STANDARD_NO_PAD.encode(&der)) && found(&STANDARD_NO_PAD.encode(&der[1..])));
    let text = key.serialize_pem();
    for part in [&text[80..110], &text[100..130], &text[70..180]] {
        assert!(found(part), "{part}");
    }
    assert!(!found(&key.public_key_pem()));
}
