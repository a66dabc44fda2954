//! What Istio's agent says first, recorded under its real start script, against what we say with the same files.
//!
//! `tests/golden/bundle/first-request/<case>.json`: `set_up` names the bundle and the lines added to it; `node`, `csr`,
//! `streams` and `tls` are what a server saw. 10.77.0.5 and fd77::5 are the host's addresses, `vm` its name.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use serde_json::{Map, Value, json};
use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};
use we_agent::{
    bundle::{Bundle, BundleDir},
    files::Root,
    workload::{HostFacts, Locality, Node, Overrides, Workload},
};

/// Metadata that we leave out, and why. A label's top-level copy is left out too: nobody reads it, and a label called
/// `namespace` would replace the real namespace.
const LEFT_OUT: [(&str, &str); 8] = [
    ("ENVOY_STATUS_PORT", "shapes Envoy's listeners; we take none"),
    ("ENVOY_PROMETHEUS_PORT", "shapes Envoy's listeners; we take none"),
    ("ENVOY_SKIP_DEPRECATED_LOGS", "for Envoy's bootstrap"),
    ("METADATA_DISCOVERY", "peer metadata of Envoy's filters"),
    ("PILOT_SAN", "for Envoy's bootstrap"),
    ("PLATFORM_METADATA", "telemetry of Envoy; the locality that comes of it is in Node.locality"),
    ("STATIC_LABELS", "configuration of Envoy; the entry's labels come from LABELS"),
    ("WORKLOAD_IDENTITY_SOCKET_FILE", "for Envoy's bootstrap"),
];

/// Where we differ on purpose: case, what, the value we give, and why.
fn differences() -> Vec<(&'static str, &'static str, Value, &'static str)> {
    let own_flags = "ISTIO_AGENT_FLAGS are arguments of another program";
    let one_server = "without CA_ADDR the authority is where the discovery service is, under the same name";
    vec![
        ("discovery-domain-flag", "id", json!("sidecar~10.77.0.5~vm.vms~vms.svc.cluster.local"), own_flags),
        ("sidecar-env", "PROXY_CONFIG.concurrency", Value::Null, own_flags),
        ("sudo-branch", "PROXY_CONFIG.concurrency", Value::Null, own_flags),
        ("istiod-san", "ca", json!("discovery.example.com"), one_server),
        ("mesh-nested-annotations", "ca", json!("discovery.example.com"), one_server),
        ("headers", "x_foo", Value::Null, "XDS_HEADER_* is listed as ignored"),
        ("headers", "x_ca", Value::Null, "CA_HEADER_* is listed as ignored"),
    ]
}

/// Set-ups that are refused before anything is sent, and what is said.
const REFUSED: [(&str, &str); 8] = [
    ("cp-auth-none", "sidecar.env:1: ISTIO_CP_AUTH: the control plane is only spoken to over TLS"),
    ("empty-cluster-env", "cluster.env: SERVICE_ACCOUNT: is not set"), // recorded: a CSR for …/sa/ (nobody)
    ("key-dash", "cluster.env:20: \"my-key\" begins no assignment"),   // recorded: the start script ends with 127
    ("locality-topology-label", "label \"topology.istio.io/locality\" has a value that Kubernetes refuses"),
    // What is cut short may have lost the probe, too; istioctl always writes the address.
    ("mesh-absent", "mesh: the file is missing"),
    ("mesh-bad", ": no YAML: "),
    ("mesh-empty", "mesh: has no defaultConfig.discoveryAddress"),
    ("mesh-statusport0", ": defaultConfig.statusPort: is not a port from 1 to 65535"),
];

/// Set-ups where Istio's agent sends nothing and we do.
const BETTER: [(&str, &str); 1] =
    [("secrets-layout-unappended", "the root is found in /var/run/secrets/istio without the two extra lines too")];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bundle")
}

/// Puts the files of a recording where Istio's documentation has them.
fn set_up(root: &Root, set_up: &Value) {
    let case = golden().join(set_up["group_and_bundle"].as_str().unwrap());
    let file = |name: &str| fs::read_to_string(case.join(name)).unwrap();
    let text = |key: &str| set_up.get(key).and_then(Value::as_str);
    let write = |path: &str, content: String| {
        let path = root.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    let cluster = text("env_text").map_or_else(|| file("cluster.env"), str::to_owned);
    write("/var/lib/istio/envoy/cluster.env", cluster + text("extra").unwrap_or_default());
    if let Some(sidecar) = text("sidecar") {
        write("/var/lib/istio/envoy/sidecar.env", sidecar.to_owned());
    }
    match set_up.get("mesh") {
        None => write("/etc/istio/config/mesh", file("mesh.yaml")),
        Some(Value::String(said)) if said.contains("15999 changed to 15012") => {
            write("/etc/istio/config/mesh", file("mesh.yaml").replace("15999", "15012"));
        }
        Some(Value::String(mesh)) => write("/etc/istio/config/mesh", mesh.clone()),
        Some(_) => {} // no such file
    }
    let certs = if text("layout") == Some("secrets") { "/var/run/secrets/istio" } else { "/etc/certs" };
    write(&format!("{certs}/root-cert.pem"), file("root-cert.pem"));
}

fn workload(root: &Root) -> Result<Workload, String> {
    let bundle = Bundle::read(root, &BundleDir::istio(root)).map_err(|e| e.to_string())?;
    let host = HostFacts { host_name: "vm.example.com".into() };
    bundle.workload("reviews", &Overrides::default(), &host).map_err(|e| e.to_string())
}

/// The addresses as the address room would have them: given ones first, then the host's.
fn addresses(workload: &Workload) -> Vec<IpAddr> {
    let mut all = workload.given.clone();
    for ip in ["10.77.0.5", "fd77::5"].map(|ip| ip.parse().unwrap()) {
        if !all.contains(&ip) {
            all.push(ip);
        }
    }
    all
}

fn place(recorded: &Value) -> Option<Locality> {
    let part = |key: &str| recorded[key].as_str().unwrap_or_default().to_owned();
    Some(Locality { region: part("region"), zone: part("zone"), subzone: part("subZone") })
        .filter(|l| !l.region.is_empty())
}

/// One recording, and which of the documented differences it has used.
struct Case<'a> {
    name: &'a str,
    recorded: &'a Value,
    used: BTreeSet<(&'static str, &'static str)>,
    left_out: BTreeSet<String>,
}

impl Case<'_> {
    /// Recorded and ours are equal, or differ as the table says.
    fn same(&mut self, what: &str, recorded: Option<&Value>, ours: Option<&Value>) {
        let (recorded, ours) = (recorded.unwrap_or(&Value::Null), ours.unwrap_or(&Value::Null));
        if what == "ISTIO_VERSION" {
            // We are no version of Istio; a text that does not begin with a number gets what the newest version gets.
            let ours = ours.as_str().unwrap();
            return assert!(recorded == "unknown" && ours.starts_with("we-agent-"), "{}: {ours}", self.name);
        }
        match differences().into_iter().find(|(case, field, ..)| *case == self.name && *field == what) {
            Some((case, field, value, _)) => {
                assert_ne!(recorded, ours, "{}: {what} does not differ", self.name);
                assert_eq!(*ours, value, "{}: {what}", self.name);
                self.used.insert((case, field));
            }
            None => assert_eq!(ours, recorded, "{}: {what}", self.name),
        }
    }

    fn node(&mut self, workload: &Workload, node: &Node) {
        let recorded = &self.recorded["node"];
        self.same("id", recorded.get("id"), Some(&json!(node.id)));
        self.same("cluster", recorded.get("cluster"), Some(&json!(node.cluster)));
        // An empty locality would erase that of the group's template: ours is left out instead.
        assert_eq!(node.locality, place(&recorded["locality"]), "{}", self.name);
        let theirs = recorded["metadata"].as_object().unwrap();
        let copy = |key: &str| workload.labels.contains_key(key);
        for key in theirs.keys().chain(node.metadata.keys()).collect::<BTreeSet<_>>() {
            let ours = node.metadata.get(key);
            if copy(key) || LEFT_OUT.iter().any(|(left, _)| left == key) {
                assert_eq!(ours, None, "{}: {key} is said to be left out", self.name);
                self.left_out.insert(key.clone());
            } else if key == "PROXY_CONFIG" {
                let fields = |v: &Value| v.as_object().cloned().unwrap_or_else(Map::new);
                let (theirs, ours) = (fields(&theirs[key]), fields(ours.unwrap()));
                for field in theirs.keys().chain(ours.keys()).collect::<BTreeSet<_>>() {
                    self.same(&format!("{key}.{field}"), theirs.get(field), ours.get(field));
                }
            } else {
                self.same(key, theirs.get(key), ours);
            }
        }
    }

    /// Headers, server names, and what is asked of the certificate authority.
    fn calls(&mut self, workload: &Workload) {
        let recorded = self.recorded;
        let server = |call: &Value| {
            let of = |t: &&Value| t["conn"] == call["conn"];
            recorded["tls"].as_array().unwrap().iter().find(of).map(|t| t["sni"].clone())
        };
        for (what, calls, endpoint) in [("ca", "csr", &workload.ca), ("discovery", "streams", &workload.discovery)] {
            for call in recorded[calls].as_array().unwrap() {
                self.same(what, server(call).as_ref(), Some(&json!(endpoint.server_name)));
                for (header, value) in call["headers"].as_object().unwrap() {
                    match header.as_str() {
                        "authorization" | "content-type" | "user-agent" | ":authority" => {} // of the call, not of the bundle
                        "clusterid" => self.same(header, Some(value), Some(&json!(workload.cluster_id))),
                        other => self.same(other, Some(value), None),
                    }
                }
            }
        }
        for csr in recorded["csr"].as_array().unwrap() {
            assert_eq!(csr["uris"], json!([workload.id.as_str()]), "{}", self.name);
            assert_eq!(csr["validity_duration"], json!(workload.ttl.as_secs()), "{}", self.name);
        }
    }
}

#[test]
fn first_requests_say_what_istios_agent_says() {
    let mut paths: Vec<_> = fs::read_dir(golden().join("first-request")).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    assert_eq!(paths.len(), 44);
    let (mut used, mut left_out, mut compared) = (BTreeSet::new(), BTreeSet::new(), 0);
    for path in paths {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let recorded: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        set_up(&root, &recorded["set_up"]);
        let workload = workload(&root);
        if let Some((_, said)) = REFUSED.iter().find(|(n, _)| *n == name) {
            let errors = workload.expect_err(name);
            assert!(errors.contains(said), "{name}: {errors}");
            continue;
        }
        let workload = workload.unwrap_or_else(|e| panic!("{name}: {e}"));
        let node = workload.node(&addresses(&workload), place(&recorded["node"]["locality"]).as_ref(), true);
        if BETTER.iter().any(|(n, _)| *n == name) {
            assert!(recorded.get("node").is_none() && !node.id.is_empty(), "{name}");
            continue;
        }
        let mut case = Case { name, recorded: &recorded, used: BTreeSet::new(), left_out: BTreeSet::new() };
        case.node(&workload, &node);
        case.calls(&workload);
        used.extend(case.used);
        left_out.extend(case.left_out);
        compared += 1;
    }
    assert_eq!(compared, 44 - REFUSED.len() - BETTER.len());
    // Nothing in the tables is stale.
    assert_eq!(used, differences().into_iter().map(|(case, what, ..)| (case, what)).collect());
    for (key, reason) in LEFT_OUT {
        assert!(left_out.contains(key), "{key} ({reason}) is in no recording");
    }
}

#[test]
fn an_observer_asks_for_no_entry_and_is_the_same_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::new(dir.path());
    set_up(&root, &json!({"group_and_bundle": "02-docs-autoregister"}));
    let workload = workload(&root).unwrap();
    let addresses = addresses(&workload);
    let (registering, observer) = (workload.node(&addresses, None, true), workload.node(&addresses, None, false));
    assert_eq!(registering.metadata["AUTO_REGISTER_GROUP"], "reviews");
    let mut same = registering.metadata;
    same.remove("AUTO_REGISTER_GROUP");
    assert_eq!(observer.metadata, same);
}
