#![allow(clippy::unwrap_used)]
use super::*;
use crate::{
    authority::{Authority, Leaf},
    spiffe::KeyKind,
};
use rcgen::ExtendedKeyUsagePurpose;
use serde_json::Value;
use std::time::Duration;
use x509_parser::prelude::{X509CertificationRequest, parse_x509_pem};

const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";

/// An answer of a real istiod, from `tests/golden/ca`.
struct Recorded {
    case: String,
    elements: Vec<String>,
    id: SpiffeId,
    public: Vec<u8>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Recorded {
    fn read(file: &str) -> Vec<Self> {
        let path = format!("{}/tests/golden/ca/{file}.json", env!("CARGO_MANIFEST_DIR"));
        let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let granted = cases.iter().filter(|case| case["response"]["code"] == 0);
        granted.map(Self::from_case).collect()
    }

    fn from_case(case: &Value) -> Self {
        let (text, leaf) = (|value: &Value| value.as_str().unwrap().to_owned(), &case["response"]["leaf"]);
        let time = |key: &str| humantime::parse_rfc3339(&text(&leaf[key]).replace("+00:00", "Z")).unwrap();
        // "critical ['spiffe://…']"
        let name = text(&leaf["exts"]["subjectAltName"]);
        let elements: Vec<_> = case["response"]["cert_chain"].as_array().unwrap().iter().map(text).collect();
        let (_, first) = parse_x509_pem(elements[0].as_bytes()).unwrap();
        let public = first.parse_x509().unwrap().public_key().raw.to_owned();
        Self {
            case: text(&case["id"]),
            id: name.split('\'').nth(1).unwrap().parse().unwrap(),
            public,
            not_before: time("nb"),
            not_after: time("na"),
            elements,
        }
    }

    fn named(file: &str, case: &str) -> Self {
        Self::read(file).into_iter().find(|recorded| recorded.case == case).unwrap()
    }

    fn received(&self) -> SystemTime {
        self.not_before + Duration::from_secs(120)
    }

    fn accept(&self, elements: &[String], now: SystemTime) -> Result<Arc<X509Context>, SvidError> {
        X509Context::from_answer(&self.id, PrivateKey::claiming(&self.public)?, elements, now)
    }
}

fn certificates(pem: &str) -> usize {
    pem.matches("BEGIN CERTIFICATE").count()
}

#[test]
fn every_recorded_answer_is_accepted() {
    let mut shapes = std::collections::BTreeSet::new();
    for recorded in ["chain", "csr", "rotation"].into_iter().flat_map(Recorded::read) {
        let case = &recorded.case;
        let context =
            recorded.accept(&recorded.elements, recorded.received()).unwrap_or_else(|e| panic!("{case}: {e}"));
        let svid = &context.svid;
        let [chain @ .., roots] = recorded.elements.as_slice() else { panic!("{case}: empty") };
        assert_eq!(svid.chain().len(), chain.len(), "{case}: leaf and intermediates, no root");
        assert_eq!(context.bundle.roots().count(), certificates(roots), "{case}");
        assert_eq!((svid.not_before(), svid.not_after()), (recorded.not_before, recorded.not_after), "{case}");
        assert_eq!(context.received, recorded.received());
        shapes.insert((recorded.elements.len(), certificates(roots)));
        // Read back from its own PEM it is the same: what the store relies on.
        let key = PrivateKey::claiming(&recorded.public).unwrap();
        let now = recorded.received();
        let again =
            X509Context::from_pem(&recorded.id, key, &svid.chain_pem(), &context.bundle.pem(), now, now).unwrap();
        assert_eq!((again.svid.chain(), again.svid.serial()), (svid.chain(), svid.serial()), "{case}");
        assert_eq!(again.bundle, context.bundle, "{case}");
    }
    assert_eq!(Vec::from_iter(shapes), [(2, 1), (4, 1), (4, 2)], "self-signed, plugged in, and with two roots");
}

/// A mesh whose root is itself signed by a company's root is legal, and istiod then sends that as root bundle: so the
/// last element need not be self-signed, and an answer that lost its root alone cannot be told from one of such a mesh.
#[test]
fn a_root_may_be_signed_by_somebody_else() {
    let recorded = Recorded::named("chain", "chain-A");
    let context = recorded.accept(&recorded.elements[..3], recorded.received()).unwrap();
    assert_eq!((context.svid.chain().len(), context.bundle.roots().count()), (2, 1));
}

#[test]
fn a_recorded_leaf_is_for_the_key_of_its_request() {
    let path = format!("{}/tests/golden/ca/chain.json", env!("CARGO_MANIFEST_DIR"));
    let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let recorded = Recorded::from_case(&cases[0]);
    let (_, csr) = parse_x509_pem(cases[0]["request"]["csr"].as_str().unwrap().as_bytes()).unwrap();
    let (_, csr) = X509CertificationRequest::from_der(&csr.contents).unwrap();
    assert_eq!(csr.certification_request_info.subject_pki.raw, recorded.public);
    let ours = PrivateKey::generate(KeyKind::EcP256).unwrap();
    let error = X509Context::from_answer(&recorded.id, ours, &recorded.elements, recorded.received()).unwrap_err();
    assert!(matches!(error, SvidError::WrongKey));
}

/// Shapes that istiod sends besides the recorded ones; the certificates are recorded.
#[test]
fn the_other_shapes_of_an_answer_give_the_same() {
    let recorded = Recorded::named("chain", "chain-A");
    let now = recorded.received();
    let plain = recorded.accept(&recorded.elements, now).unwrap();
    let [leaf, issuing, middle, root] = recorded.elements.as_slice() else { panic!() };
    let owned = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>();
    for (shape, elements) in [
        ("up to 1.25.0: intermediates in one element", owned(&[leaf, &format!("{issuing}{middle}"), root])),
        ("the root also among the intermediates", owned(&[leaf, issuing, middle, root, root])),
        ("no line feed at the end", owned(&[leaf.trim_end(), issuing.trim_end(), middle.trim_end(), root.trim_end()])),
        (
            "carriage returns",
            owned(&[leaf, issuing, middle, root].map(|part| part.replace('\n', "\r\n")).each_ref().map(String::as_str)),
        ),
        ("the same root twice in the bundle", owned(&[leaf, issuing, middle, &format!("{root}{root}")])),
    ] {
        let context = recorded.accept(&elements, now).unwrap_or_else(|e| panic!("{shape}: {e}"));
        assert_eq!(context.svid.chain(), plain.svid.chain(), "{shape}");
        assert_eq!(context.bundle, plain.bundle, "{shape}");
    }
}

#[test]
fn an_answer_that_lacks_something_is_refused() {
    let recorded = Recorded::named("chain", "chain-A");
    let (now, all) = (recorded.received(), &recorded.elements);
    let refusal = |elements: &[String]| recorded.accept(elements, now).unwrap_err();
    assert!(matches!(refusal(&[]), SvidError::ShortChain(0)));
    assert!(matches!(refusal(&all[..1]), SvidError::ShortChain(1)));
    assert!(matches!(refusal(&[all[0].clone(), all[3].clone()]), SvidError::Chain(_)), "no intermediates");
    assert!(matches!(refusal(&[all[0].clone(), String::new()]), SvidError::Roots(BundleError::Empty)));
    assert!(matches!(refusal(&[String::new(), all[3].clone()]), SvidError::ShortChain(0)));
    let broken = all[0].replacen("MII", "!!!", 1);
    assert!(matches!(refusal(&[broken, all[3].clone()]), SvidError::Unreadable(_)));
    let other = Recorded::named("chain", "chain-E");
    let foreign = [&all[..3], &other.elements[3..]].concat();
    assert!(matches!(refusal(&foreign), SvidError::Chain(_)), "roots of another mesh");
}

struct Issued {
    authority: Authority,
    now: SystemTime,
}

impl Issued {
    fn new() -> Self {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000);
        Self { authority: Authority::root("mesh").intermediate("istiod"), now }
    }

    fn answer(&self, uris: &[&str], change: impl FnOnce(&mut Leaf<'_>)) -> Result<Arc<X509Context>, SvidError> {
        let key = PrivateKey::generate(KeyKind::EcP256)?;
        let mut leaf = Leaf::new(uris, self.now);
        change(&mut leaf);
        let elements = self.authority.issue(key.pem(), &leaf);
        X509Context::from_answer(&ID.parse().unwrap(), key, &elements, self.now)
    }
}

#[test]
fn the_identity_must_be_exactly_ours() {
    let issued = Issued::new();
    let svid = issued.answer(&[ID], |_| {}).unwrap();
    assert_eq!(svid.svid.id().as_str(), ID);
    let other = "spiffe://cluster.local/ns/vms/sa/other";
    for uris in
        [&[other][..], &[ID, other], &[other, ID], &[ID, ID], &[], &["spiffe://cluster.local/ns/vms/sa/payments/"]]
    {
        let error = issued.answer(uris, |_| {}).unwrap_err();
        assert!(matches!(error, SvidError::WrongIdentity { .. }), "{uris:?}: {error}");
        assert_eq!(error.to_string(), format!("the certificate names [{}], not exactly {ID}", uris.join(", ")));
    }
}

#[test]
fn what_holds_a_key_prints_none_of_it() {
    let context = Issued::new().answer(&[ID], |_| {}).unwrap();
    let (key, pair) = (context.svid.key(), context.svid.pair());
    let said = format!("{context:?} {context:#?} {key:?} {pair:?} {:?}", key.signer());
    assert!(said.contains("PrivateKey(…)") && said.contains(context.svid.serial()));
    // Behind what says which kind of key it is, and before the public half.
    let der = key.pkcs8();
    let number = &der.secret_der()[36..68];
    let hex: String = number.iter().map(|byte| format!("{byte:02x}")).collect();
    let list = format!("{number:?}");
    for part in [&hex[..16], &hex[48..], &list[1..40], key.pem().lines().nth(2).unwrap()] {
        assert!(!said.to_lowercase().contains(&part.to_lowercase()), "{part}");
    }
}

#[test]
fn an_authority_is_no_leaf() {
    let issued = Issued::new();
    assert!(matches!(issued.answer(&[ID], |leaf| leaf.ca = true), Err(SvidError::Authority)));
    assert!(matches!(issued.answer(&[ID], |leaf| leaf.signs = true), Err(SvidError::Authority)));
}

#[test]
fn a_leaf_must_serve_clients_and_servers() {
    let issued = Issued::new();
    for only in [ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth] {
        let error = issued.answer(&[ID], |leaf| leaf.usages = vec![only]).unwrap_err();
        assert!(matches!(error, SvidError::Chain(_)), "{error}");
    }
}

#[test]
fn validity_is_judged_on_our_clock() {
    let issued = Issued::new();
    let (now, second) = (issued.now, Duration::from_secs(1));
    for (from, to, good) in [
        (now - second, now + second, true),
        (now, now + second, true),
        (now - second, now, false),
        (now + second, now + 2 * second, false),
    ] {
        let result = issued.answer(&[ID], |leaf| (leaf.not_before, leaf.not_after) = (from, to));
        match result {
            Ok(context) => assert!(good && context.svid.is_valid(now) && !context.svid.is_valid(to)),
            Err(error) => {
                assert!(!good && matches!(error, SvidError::Validity { .. }), "{error}");
                let text = error.to_string();
                let said = if from > now {
                    text.ends_with("but it is 2026-11-18T11:06:40Z here: check the clocks")
                } else {
                    text == "the certificate expired at 2026-11-18T11:06:40Z, and it is 2026-11-18T11:06:40Z here"
                };
                assert!(said, "{text}");
            }
        }
    }
}
