#![allow(clippy::unwrap_used)]
use super::*;
use crate::workload::ProbeMethod;
use std::time::Duration;

fn merged(mesh: &str, variable: &str) -> (ProxyConfig, Vec<String>) {
    let layers =
        vec![mesh_config("mesh.yaml", mesh).unwrap(), proxy_config("cluster.env:3: PROXY_CONFIG", variable).unwrap()];
    let (config, mistakes) = merge(layers);
    (config, mistakes.iter().map(ToString::to_string).collect())
}

#[test]
fn layers_replace_fields_and_merge_two_maps() {
    let mesh = "defaultConfig:\n  tracing: {sampling: 1, zipkin: {address: a}}\n  proxyMetadata: {A: '1', B: '2'}\n  \
                proxyHeaders: {server: {disabled: true}, requestId: {disabled: true}}\n  concurrency: 2\n  meshId: ~\nmtls: 1\n";
    let variable = "tracing: {sampling: 5}\nproxyMetadata: {B: '3'}\nproxyHeaders: {server: {value: x}}\nstatus_port: 15021\nnew: [1]\n";
    let (config, mistakes) = merged(mesh, variable);
    assert_eq!(mistakes, Vec::<String>::new());
    assert_eq!(config.fields["tracing"], json!({"sampling": 5}));
    assert_eq!(config.fields["proxyMetadata"], json!({"A": "1", "B": "3"}));
    assert_eq!(config.fields["proxyHeaders"], json!({"server": {"value": "x"}, "requestId": {"disabled": true}}));
    assert_eq!(config.fields["statusPort"], json!(15021));
    assert_eq!(config.fields["concurrency"], json!(2));
    assert_eq!(config.fields["new"], json!([1]));
    assert_eq!(config.fields["drainDuration"], json!("45s"));
    assert!(!config.fields.contains_key("meshId"));
}

#[test]
fn mistakes_name_the_layer_and_the_field() {
    let (_, mistakes) = merged(
        "defaultConfig: {drainDuration: 45, statusPort: 0, proxyMetadata: {A: 1}, controlPlaneAuthPolicy: X}",
        "concurrency: many\n",
    );
    assert_eq!(
        mistakes,
        [
            "cluster.env:3: PROXY_CONFIG: concurrency: is not a whole number",
            "mesh.yaml:1:74: defaultConfig.controlPlaneAuthPolicy: is not MUTUAL_TLS",
            "mesh.yaml:1:17: defaultConfig.drainDuration: is not a duration in seconds, like 45s or 0.5s",
            "mesh.yaml:1:51: defaultConfig.proxyMetadata: is not a map of texts: put the values in quotes",
            "mesh.yaml:1:36: defaultConfig.statusPort: is not a port from 1 to 65535",
        ]
    );
    for text in ["defaultConfig: [", "- a", "a: b: c", "defaultConfig: 1"] {
        let error = mesh_config("mesh.yaml", text).unwrap_err().to_string();
        assert!(error.starts_with("mesh.yaml"), "{error}");
    }
}

#[test]
fn an_empty_file_has_no_fields() {
    for text in ["", "\n", "# nothing\n", "defaultConfig:\n", "trustDomain: x\n", "defaultConfig: ~\n"] {
        assert!(mesh_config("mesh.yaml", text).unwrap().fields.is_empty(), "{text:?}");
    }
}

#[test]
fn what_is_not_read_names_the_line() {
    for (text, told) in [
        ("defaultConfig:\n  a: 1\n  a: 2\n", "mesh.yaml:3:3: key \"a\" stands already in line 2; keep one"),
        ("a: &a [x]\nb: [*a, *a]\n", "mesh.yaml:1:7: anchors (&name) are not read here"),
        ("defaultConfig: 1\n", "mesh.yaml:1:16: is not a ProxyConfig"),
    ] {
        let error = mesh_config("mesh.yaml", text).unwrap_err().to_string();
        assert!(error.starts_with(told), "{error}");
        let error = proxy_config("cluster.env:3: PROXY_CONFIG", "\na: 1\na: 2\n").unwrap_err().to_string();
        assert!(error.starts_with("cluster.env:3: PROXY_CONFIG: line 3:1: key \"a\" stands already"), "{error}");
    }
    let deep = mesh_config("mesh.yaml", &"[".repeat(100)).unwrap_err().to_string();
    assert!(deep.starts_with("mesh.yaml:1:1: nested deeper than 64 levels"), "{deep}");
}

#[test]
fn mistakes_stand_where_the_field_does() {
    let mesh = "defaultConfig:\n  status_port: 0\n  readinessProbe:\n    http_get:\n      port: 1\n      \
                httpHeaders:\n      - {name: a}\n      - {name: 'b c'}\n    exec: {}\n";
    let layer = mesh_config("mesh.yaml", mesh).unwrap();
    for (path, place) in [
        ("statusPort", "mesh.yaml:2:3: defaultConfig.statusPort"),
        (
            "readinessProbe.httpGet.httpHeaders[1].name",
            "mesh.yaml:8:10: defaultConfig.readinessProbe.httpGet.httpHeaders[1].name",
        ),
        ("readinessProbe.tcpSocket.port", "mesh.yaml:3:3: defaultConfig.readinessProbe.tcpSocket.port"),
        ("none", "mesh.yaml: defaultConfig.none"),
    ] {
        assert_eq!(layer.place(path), place);
    }
    let (_, told) = merge(vec![layer]);
    let told: Vec<_> = told.iter().map(ToString::to_string).collect();
    assert!(told[1].starts_with("mesh.yaml:3:3: defaultConfig.readinessProbe: has both httpGet and exec"), "{told:#?}");
}

fn probe(json: Value) -> Result<Option<ReadinessProbe>, Vec<String>> {
    probe::read(json)
        .map(|found| found.map(|(probe, _)| probe))
        .map_err(|m| m.into_iter().map(|(field, problem)| format!("{field}: {problem}")).collect())
}

#[test]
fn a_probe_without_a_method_is_none() {
    for json in [json!({}), json!(null), json!({"periodSeconds": 5}), json!({"httpGet": null})] {
        assert_eq!(probe(json), Ok(None));
    }
    let (config, _) = merged("defaultConfig: {readinessProbe: {}}", "");
    assert!(config.probe.is_none() && !config.fields.contains_key("readinessProbe"));
}

#[test]
fn probe_defaults_are_istio_agents() {
    let found = probe(json!({"httpGet": {"port": 8080}, "timeoutSeconds": 0})).unwrap().unwrap();
    let http = ProbeMethod::Http { path: "/".into(), port: 8080, host: None, https: false, headers: vec![] };
    assert_eq!(
        found,
        ReadinessProbe {
            initial_delay: Duration::ZERO,
            timeout: Duration::from_secs(1),
            period: Duration::from_secs(10),
            success_threshold: 1,
            failure_threshold: 1,
            method: http,
        }
    );
    let grpc = probe(json!({"grpc": {"port": "9090"}, "period_seconds": 3})).unwrap().unwrap();
    assert_eq!(
        (grpc.method, grpc.period),
        (ProbeMethod::Grpc { port: 9090, service: String::new() }, Duration::from_secs(3))
    );
    let https = probe(json!({"http_get": {"port": 1, "path": "x", "scheme": "https", "host": "h"}})).unwrap().unwrap();
    let ProbeMethod::Http { path, https, host, .. } = https.method else { panic!() };
    assert_eq!((path.as_str(), https, host.as_deref()), ("/x", true, Some("h")));
}

#[test]
fn bad_probes_name_the_field() {
    for (json, field) in [
        (json!([]), ": "),
        (json!({"httpGet": {}}), ".httpGet.port: "),
        (json!({"httpGet": {"port": 0}}), ".httpGet.port: "),
        (json!({"tcpSocket": {"port": 65536}}), ".tcpSocket.port: "),
        (json!({"grpc": {"port": 1, "service": 2}}), ".grpc.service: "),
        (json!({"exec": {"command": []}}), ".exec.command: "),
        (json!({"exec": {"command": [""]}}), ".exec.command: "),
        (json!({"exec": {"command": "true"}}), ".exec.command: "),
        (json!({"exec": {"command": ["a\u{0}"]}}), ".exec.command: "),
        (json!({"exec": {}}), ".exec.command: "),
        (json!({"httpGet": {"port": 1}, "tcpSocket": {"port": 1}}), ": has both httpGet and tcpSocket"),
        (json!({"httpGet": {"port": 1}, "periodSeconds": -1}), ".periodSeconds: "),
        (json!({"httpGet": {"port": 1}, "failureThreshold": -1}), ".failureThreshold: "),
        (json!({"httpGet": {"port": 1}, "timeoutSeconds": 2147483648u64}), ".timeoutSeconds: "),
        (json!({"httpGet": {"port": 1}, "initialDelaySeconds": 0.5}), ".initialDelaySeconds: "),
        (json!({"httpGet": {"port": 1, "path": "/a\r\nX: y"}}), ".httpGet.path: "),
        (json!({"httpGet": {"port": 1, "scheme": "FTP"}}), ".httpGet.scheme: "),
        (json!({"httpGet": {"port": 1, "host": "a b"}}), ".httpGet.host: "),
        (
            json!({"httpGet": {"port": 1, "httpHeaders": [{"name": "A", "value": "a\r\nB: c"}]}}),
            ".httpGet.httpHeaders[0].value: ",
        ),
        (json!({"httpGet": {"port": 1, "httpHeaders": [{"value": "a"}]}}), ".httpGet.httpHeaders[0].name: "),
        (json!({"httpGet": 8080}), ".httpGet: "),
    ] {
        let errors = probe(json.clone()).unwrap_err();
        assert!(errors.len() == 1 && errors[0].starts_with(field), "{json}: {errors:?}");
    }
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "(defaultConfig|readinessProbe|httpGet|port|[:\\n {}\\[\\],\"'&*!|>%@#?0-9a-c.~-]){0,40}") {
        if let Ok(layer) = mesh_config("m", &text) {
            let _ = merge(vec![layer]);
        }
    }
}
