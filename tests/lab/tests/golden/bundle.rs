//! Every recorded bundle that the lab's inputs can describe, byte for byte.

use std::{fs, os::unix::fs::PermissionsExt};

use serde_json::{Value, json};
use we_lab::{Group, Lab};

use super::{golden, read};

/// Cases that are left out, and why.
const LEFT_OUT: [(&str, &str); 3] = [
    ("53-mesh-nested", "the lab takes mesh configuration as it stands: it does not reformat durations"),
    ("54-mesh-nested-annotations", "the same, and it knows no schema by which to drop unknown fields"),
    ("62-mesh-unknown-fields", "it knows no schema by which to drop unknown fields"),
];

#[tokio::test]
async fn bundles_are_istioctls_byte_for_byte() {
    let lab = Lab::builder().spawn().await.unwrap();
    let mut compared = 0;
    for case in fs::read_dir(golden("bundle")).unwrap() {
        let case = case.unwrap().file_name().into_string().unwrap();
        let complete =
            ["group.yaml", "args", "hosts", "mesh.yaml"].iter().all(|f| golden(&format!("bundle/{case}/{f}")).exists());
        if complete && !LEFT_OUT.iter().any(|(name, _)| *name == case) {
            compare(&lab, &case);
            compared += 1;
        }
    }
    assert!(compared >= 38, "only {compared} cases: are the recordings there?");
}

fn compare(lab: &Lab, case: &str) {
    let file = |name: &str| read(&format!("bundle/{case}/{name}"));
    let group = Group::from_yaml(&file("group.yaml")).unwrap_or_else(|e| panic!("{case}: {e}"));
    lab.add_group(group);
    let value: Value = serde_yaml::from_str(&file("group.yaml")).unwrap();
    let name = |key: &str| value["metadata"][key].as_str().unwrap().to_owned();
    let mesh = mesh_config(case);
    let mut bundle =
        lab.bundle(&name("namespace"), &name("name")).autoregister(false).address("127.0.0.1:15012".parse().unwrap());
    bundle = bundle
        .trust_domain(mesh["trustDomain"].as_str().unwrap_or_default())
        .default_config(mesh["defaultConfig"].clone());
    // The address of the control plane comes from objects that the lab does not have; what it makes of it is compared.
    bundle = bundle.ingress_ip(file("hosts").split(' ').next().unwrap_or_default());
    let mut revision = if case.starts_with("07-") { "canary".to_owned() } else { String::new() };
    if case.starts_with("73-") {
        bundle = bundle.cluster_id("");
    }
    let args = file("args");
    let mut args = args.lines();
    while let Some(arg) = args.next() {
        bundle = match arg {
            "-f" | "--name" | "-n" | "-o" | "--ingressIP" | "--ingressService" | "--tokenDuration" => {
                args.next();
                bundle
            }
            "--autoregister" => bundle.autoregister(true),
            "--capture-dns=false" => bundle.dns_capture(false),
            "--clusterID" => bundle.cluster_id(args.next().unwrap()),
            "--internalIP" => bundle.internal_ip(args.next().unwrap()),
            "--externalIP" => bundle.external_ip(args.next().unwrap()),
            "--revision" => {
                args.next().unwrap().clone_into(&mut revision);
                bundle
            }
            other => panic!("{case}: the flag {other} is new here"),
        };
    }
    if revision.is_empty() && mesh["defaultConfig"].get("discoveryAddress").is_none() {
        bundle = bundle.discovery_address("");
    }
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("out");
    bundle.revision(&revision).root_pem(&file("root-cert.pem")).token(&file("istio-token")).write(&dir).unwrap();
    for name in ["cluster.env", "mesh.yaml", "hosts", "root-cert.pem", "istio-token"] {
        let (ours, theirs) = (fs::read_to_string(dir.join(name)).unwrap(), file(name));
        assert_eq!(ports_sorted(&ours), ports_sorted(&theirs), "{case}/{name}");
        assert_eq!(
            fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o700,
            0o700,
            "{case}/{name}: mode 0744 under a umask"
        );
    }
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 5);
}

fn mesh_config(case: &str) -> Value {
    let path = format!("bundle/{case}/mesh-config.yaml");
    if !golden(&path).exists() {
        return json!({"defaultConfig": {"discoveryAddress": "istiod.istio-system.svc:15012"}, "trustDomain": "cluster.local"});
    }
    let config: Value = serde_yaml::from_str(&read(&path)).unwrap();
    match config["data"]["mesh"].as_str() {
        Some(mesh) => serde_yaml::from_str(mesh).unwrap(),
        None => config,
    }
}

/// istioctl writes the ports in an order of the moment.
fn ports_sorted(text: &str) -> String {
    let sort = |line: &str| match line.strip_prefix("ISTIO_INBOUND_PORTS='") {
        Some(rest) => {
            let mut ports: Vec<&str> = rest.trim_end_matches('\'').split(',').collect();
            ports.sort_unstable();
            format!("ISTIO_INBOUND_PORTS='{}'\n", ports.join(","))
        }
        None => format!("{line}\n"),
    };
    text.split('\n').map(sort).collect()
}
