#![allow(clippy::unwrap_used)]
use super::*;
use crate::workload::{HostFacts, Overrides};
use std::fs;

const ENV: &str = "ISTIO_NAMESPACE='vms'\nSERVICE_ACCOUNT='payments'\nTRUST_DOMAIN=''\nISTIO_META_AUTO_REGISTER_GROUP='payments'\n\
                   ISTIO_META_NETWORK='net'\nISTIO_METAJSON_LABELS='{\"app\":\"payments\"}'\n";

const MESH: &str = "defaultConfig: {discoveryAddress: 'istiod.istio-system.svc:15012'}\n";

/// A host with one bundle.
struct Host(tempfile::TempDir);

impl Host {
    fn new(env: &str, mesh: &str) -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().pem();
        for (file, text) in [
            ("cluster.env", env),
            ("mesh.yaml", mesh),
            ("root-cert.pem", &root),
            ("hosts", "10.0.0.9 istiod.istio-system.svc\n"),
        ] {
            host.write(file, text);
        }
        host
    }

    fn write(&self, file: &str, text: impl AsRef<[u8]>) {
        fs::write(self.0.path().join(file), text).unwrap();
    }

    fn read(&self) -> Result<Bundle, Vec<String>> {
        Bundle::read(&Root::default(), &BundleDir::directory(self.0.path())).map_err(|e| {
            e.0.iter().map(|m| m.to_string().replace(&format!("{}/", self.0.path().display()), "")).collect()
        })
    }
}

#[test]
fn a_bundle_of_istioctl_is_a_workload() {
    let host = Host::new(
        ENV,
        "defaultConfig:\n  discoveryAddress: istiod.edge.svc:15012\n  readinessProbe: {tcpSocket: {port: 80}}\n",
    );
    let bundle = host.read().unwrap();
    let workload =
        bundle.workload("payments", &Overrides::default(), &HostFacts { host_name: "vm1.example.com".into() }).unwrap();
    assert_eq!(workload.id.as_str(), "spiffe://cluster.local/ns/vms/sa/payments");
    assert_eq!(workload.discovery, workload.ca); // one connection for both
    assert_eq!(workload.discovery.server_name, "istiod.edge.svc");
    assert_eq!(workload.entry("10.0.0.5".parse().unwrap()).unwrap().unwrap(), "vms/payments-10.0.0.5-net");
    assert_eq!(
        (workload.instance.as_str(), workload.ttl, workload.key),
        ("vm1", Duration::from_secs(86400), KeyKind::EcP256)
    );
    assert_eq!(workload.hosts["istiod.istio-system.svc"], ["10.0.0.9".parse::<IpAddr>().unwrap()]);
    assert!(workload.probe.is_some() && workload.registers() && workload.given.is_empty());
    assert!(workload.proxy_config.contains_key("readinessProbe"));
    assert_eq!(workload.token, TokenFile::new(host.0.path().join("istio-token"))); // need not exist
}

#[test]
fn our_configuration_wins() {
    let host = Host::new(
        &format!(
            "{ENV}CA_ADDR=ca.example.com:443\nISTIOD_SAN=san\nISTIO_SVC_IP=10.1.1.1\nSECRET_TTL=1h\nOUTPUT_CERTS=/etc/mine\n"
        ),
        MESH,
    );
    let bundle = host.read().unwrap();
    let plain = bundle.workload("w", &Overrides::default(), &HostFacts::default()).unwrap();
    // ISTIOD_SAN is not for an authority that has an address of its own.
    assert_eq!((plain.ca.server_name.as_str(), plain.discovery.server_name.as_str()), ("ca.example.com", "san"));
    assert_eq!((plain.ttl, plain.instance.as_str()), (Duration::from_secs(3600), "w"));
    let overrides = Overrides {
        addresses: vec!["10.2.2.2".parse().unwrap()],
        trust_domain: Some("td".parse().unwrap()),
        key: Some(KeyKind::Rsa2048),
        ttl: Some(Duration::from_secs(60)),
        remove_token: true,
        output_certs: true,
        discovery: Some("127.0.0.1:1".parse().unwrap()),
        ca: Some("127.0.0.1:1".parse().unwrap()),
        server_name: Some("x".into()),
        locality: Locality::parse("r/z"),
        cluster_id: Some("c".into()),
        network: Some(String::new()),
        labels: BTreeMap::from([("app".into(), "other".into()), ("v".into(), "1".into())]),
    };
    let mine = bundle.workload("w", &overrides, &HostFacts::default()).unwrap();
    assert_eq!(mine.discovery, mine.ca);
    assert!(mine.token.remove && !plain.token.remove);
    assert_eq!((mine.output_certs, plain.output_certs), (Some("/etc/mine".into()), None));
    assert_eq!(plain.ignored, ["OUTPUT_CERTS (files.outputCerts: true in we-agent.yaml obeys it)"]);
    assert!(mine.ignored.is_empty());
    assert_eq!(mine.id.as_str(), "spiffe://td/ns/vms/sa/payments");
    assert_eq!((mine.cluster_id.as_str(), mine.network.as_str(), mine.given), ("c", "", overrides.addresses.clone()));
    let node = bundle.workload("w", &overrides, &HostFacts::default()).unwrap().node(&overrides.addresses, None, true);
    assert_eq!(node.metadata["LABELS"], serde_json::json!({"app": "other", "v": "1"}));
    assert_eq!((&node.metadata["CLUSTER_ID"], &node.metadata["NETWORK"]), (&"c".into(), &"".into()));
    assert_eq!(node.locality, overrides.locality);
}

#[test]
fn all_mistakes_are_told_at_once() {
    let host = Host::new(
        "ISTIO_NAMESPACE=vms\nSECRET_TTL=3000h\nECC_SIGNATURE_ALGORITHM=RSA\nECC_CURVE=P521\nTRUST_DOMAIN=A\nISTIO_SVC_IP=vm1\n\
         CA_ADDR=istiod:15010\nISTIO_CP_AUTH=NONE\nCA_ROOT_CA=SYSTEM\nREWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION=ja\n",
        "defaultConfig: {discoveryAddress: istiod, readinessProbe: {exec: {command: []}}}\n",
    );
    host.write("root-cert.pem", "nothing");
    host.write("hosts", "x y\n");
    let told = host.read().unwrap_err();
    for begin in [
        "cluster.env: SERVICE_ACCOUNT: is not set: create the bundle again",
        "cluster.env:2: SECRET_TTL: \"3000h\" is not from 1s to 2160h",
        "cluster.env:3: ECC_SIGNATURE_ALGORITHM: ",
        "cluster.env:4: ECC_CURVE: ",
        "cluster.env:5: TRUST_DOMAIN: ",
        "cluster.env:6: ISTIO_SVC_IP: \"vm1\" is not an IP address",
        "cluster.env:7: CA_ADDR: \"istiod:15010\" is istiod's plaintext port",
        "cluster.env:8: ISTIO_CP_AUTH: the control plane is only spoken to over TLS",
        "cluster.env:9: CA_ROOT_CA: ",
        "cluster.env:10: REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION: ",
        "mesh.yaml:1:17: defaultConfig.discoveryAddress: \"istiod\" has no port",
        "mesh.yaml:1:67: defaultConfig.readinessProbe.exec.command: ",
        "root-cert.pem: no certificate in it",
        "hosts:1: \"x\" is no IP address",
    ] {
        assert!(told.iter().any(|m| m.starts_with(begin)), "{begin}\nin {told:#?}");
    }
    assert_eq!(told.len(), 14, "{told:#?}");
}

#[test]
fn what_is_no_file_of_a_bundle_is_told() {
    let empty = tempfile::tempdir().unwrap();
    let error = Bundle::read(&Root::default(), &BundleDir::directory(empty.path())).unwrap_err();
    let places: Vec<_> = error.0.iter().map(|m| m.place.rsplit('/').next().unwrap().to_owned()).collect();
    assert_eq!(places, ["cluster.env", "mesh.yaml", "root-cert.pem"]);

    let host = Host::new(ENV, MESH);
    host.write("mesh.yaml", [b'#', 0xff]);
    host.write("hosts", vec![b'#'; MAX_FILE + 1]);
    fs::remove_file(host.0.path().join("root-cert.pem")).unwrap();
    fs::create_dir(host.0.path().join("root-cert.pem")).unwrap();
    let problems: Vec<_> = Bundle::read(&Root::default(), &BundleDir::directory(host.0.path())).unwrap_err().0;
    let problems: Vec<_> = problems.into_iter().map(|m| m.problem).collect();
    assert_eq!(
        problems,
        [
            Problem::File(ReadError::NotText(1)),
            Problem::File(ReadError::TooLong(MAX_FILE)),
            Problem::File(ReadError::NotAFile)
        ]
    );
}

#[test]
fn what_kubernetes_would_refuse_is_told_before_connecting() {
    let env = ENV.replace("'net'", "'Net_1/x'").replace("\"payments\"}", "\"a b\"}");
    let bundle = Host::new(&env, MESH).read().unwrap();
    let told = bundle.workload("w", &Overrides::default(), &HostFacts::default()).unwrap_err();
    assert_eq!(told.0.len(), 2, "{told}");
    assert!(
        told.to_string().contains("cluster.env:5: ISTIO_META_NETWORK: ")
            && told.to_string().contains("ISTIO_METAJSON_LABELS")
    );
    // Without registration there is no entry, and nothing to refuse.
    let env = env.replace("ISTIO_META_AUTO_REGISTER_GROUP='payments'", "ISTIO_META_AUTO_REGISTER_GROUP=");
    let workload =
        Host::new(&env, MESH).read().unwrap().workload("w", &Overrides::default(), &HostFacts::default()).unwrap();
    assert!(!workload.registers());
}

#[test]
fn names_and_overrides_are_checked_too() {
    let env = ENV.replace("'vms'", "'v_ms'").replace("'payments'\nTRUST", "'pay/ments'\nTRUST");
    let told = Host::new(&format!("{env}ISTIOD_SAN='a b'\n"), MESH).read().unwrap_err();
    for (told, begin) in told.iter().zip([
        "cluster.env:1: ISTIO_NAMESPACE: ",
        "cluster.env:2: SERVICE_ACCOUNT: ",
        "cluster.env:7: ISTIOD_SAN: ",
    ]) {
        assert!(told.starts_with(begin), "{told}");
    }
    assert_eq!(told.len(), 3);
    let overrides = Overrides {
        network: Some("A".into()),
        labels: BTreeMap::from([("a".into(), "b c".into())]),
        ..Overrides::default()
    };
    let told = Host::new(ENV, MESH).read().unwrap().workload("w", &overrides, &HostFacts::default()).unwrap_err();
    let places: Vec<_> = told.0.iter().map(|m| m.place.as_str()).collect();
    assert_eq!(places, ["workload w: network", "workload w: labels"]);
}

#[test]
fn what_is_printed_for_debugging_has_no_value() {
    let bundle = Host::new(&format!("{ENV}XDS_HEADER_X='s3cret'\n"), MESH).read().unwrap();
    let printed = format!("{bundle:?}");
    assert!(printed.contains("XDS_HEADER_X") && !printed.contains("s3cret"));
}

#[test]
fn keys_without_effect_are_listed() {
    let env = format!(
        "{ENV}ISTIO_INBOUND_PORTS='*'\nWORKLOAD_RSA_KEY_SIZE=4096\nISTIO_META_DNS_CAPTURE='true'\nPROV_CERT=/x\nPOD_NAME=p\nISTIO_META_=x\n"
    );
    let bundle = Host::new(&env, MESH).read().unwrap();
    assert_eq!(
        bundle.ignored,
        ["ISTIO_INBOUND_PORTS", "ISTIO_META_", "ISTIO_META_DNS_CAPTURE", "PROV_CERT", "WORKLOAD_RSA_KEY_SIZE"]
    );
}

#[test]
fn a_mesh_file_that_is_not_whole_is_told() {
    let whole = "defaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n";
    Host::new(ENV, whole).read().unwrap();
    for mesh in ["", "defaultConfig:\n", "defaultConfig:\n  discoveryAddress:\n", "trustDomain: cluster.local\n"] {
        let told = Host::new(ENV, mesh).read().unwrap_err();
        assert!(told[0].starts_with("mesh.yaml: has no defaultConfig.discoveryAddress, which istioctl"), "{told:?}");
        // What stands elsewhere does not make it whole: the probe may be lost, too.
        let elsewhere = format!("{ENV}PROXY_CONFIG='discoveryAddress: a:1'\n");
        assert_eq!(Host::new(&elsewhere, mesh).read().unwrap_err().len(), 1);
    }
    let host = Host::new(ENV, whole);
    fs::remove_file(host.0.path().join("mesh.yaml")).unwrap();
    assert!(host.read().unwrap_err()[0].starts_with("mesh.yaml: the file is missing: `istioctl"));
}

#[test]
fn a_mark_of_the_byte_order_is_read_over_in_every_file() {
    let host = Host::new(ENV, MESH);
    let plain = host.read().unwrap();
    for file in ["cluster.env", "mesh.yaml", "root-cert.pem", "hosts"] {
        let text = fs::read_to_string(host.0.path().join(file)).unwrap();
        host.write(file, format!("\u{feff}{text}"));
    }
    assert_eq!(host.read().unwrap(), plain);
}

#[test]
fn each_label_that_is_no_text_is_named() {
    let env = ENV.replace(r#"{"app":"payments"}"#, r#"{"a":1,"b":true,"c":["x"],"d":"fine"}"#);
    let told = Host::new(&env, MESH).read().unwrap_err();
    for (told, label) in told.iter().zip(["a", "b", "c"]) {
        let begin = format!("cluster.env:6: ISTIO_METAJSON_LABELS: label {label:?} has a value that is no text");
        assert!(told.starts_with(&begin), "{told}");
    }
    assert_eq!(told.len(), 3);
}

#[test]
fn what_is_made_of_a_variable_that_nobody_sets_is_told() {
    let told = |line: &str| Host::new(&format!("{ENV}{line}\n"), MESH).read();
    let says = "cluster.env:7: ISTIO_SVC_IP: is made of ${HOST_IP}, which is not set in this file";
    for line in ["ISTIO_SVC_IP=${HOST_IP}", "ISTIO_SVC_IP=\"$HOST_IP\"", "export ISTIO_SVC_IP=10.0.0.$HOST_IP"] {
        let mistakes = told(line).unwrap_err();
        assert!(mistakes.iter().any(|mistake| mistake.starts_with(says)), "{line}: {mistakes:?}");
    }
    for line in ["HOST_IP=10.0.0.7; ISTIO_SVC_IP=$HOST_IP", "ISTIO_SVC_IP=${HOST_IP:-10.0.0.7}", "MINE=$HOST_IP"] {
        told(line).unwrap();
    }
}

/// Roots that ended in those years.
fn roots(years: &[i32]) -> String {
    let root = |year: &i32| {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.not_after = rcgen::date_time_ymd(*year, 1, 1);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
    };
    years.iter().map(root).collect()
}

#[test]
fn roots_are_used_or_told() {
    let host = Host::new(ENV, MESH);
    let read = |pem: &str| {
        host.write("root-cert.pem", pem);
        host.read().map(|bundle| bundle.ignored.join("\n"))
    };
    let good = roots(&[4000]);
    let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
    // As it comes from other systems, and from editors.
    for pem in [good.replace('\n', "\r\n"), good.trim_end().to_owned(), format!("# mesh\n{good}"), roots(&[2001, 4000])]
    {
        assert_eq!(read(&pem), Ok(String::new()), "{pem}");
    }
    for (pem, told) in [
        (format!("{key}{good}"), "a private key in "),
        (roots(&[2001, 2002]), "all have expired, the last at 2002-01-01T00:00:00Z"),
    ] {
        let odd = read(&pem).unwrap();
        assert!(odd.contains(told) && odd.contains("root-cert.pem") && odd.lines().count() == 1, "{odd}");
    }
    let damaged = good.replacen("\nMII", "\nAAA", 1);
    for (pem, told) in [
        (format!("{good}{damaged}{good}"), "root-cert.pem: certificate 2 in it is damaged"),
        (format!("{good}{}", &good[..200]), "root-cert.pem: it ends within certificate 2, so a part of it is missing"),
        (format!("{good}-----BEGIN CER"), "root-cert.pem: it ends within certificate 2"),
        (String::new(), "root-cert.pem: no certificate in it"),
        (good.repeat(2000), "root-cert.pem: is longer than 1048576 bytes"),
    ] {
        let mistakes = read(&pem).unwrap_err();
        assert!(mistakes.len() == 1 && mistakes[0].starts_with(told), "{told}: {mistakes:?}");
    }
}
