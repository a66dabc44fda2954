//! Node metadata that a bundle carries: `ISTIO_META_*`, `ISTIO_METAJSON_*`, and the labels.

use super::{
    keys::{Keys, go_bool},
    mistake::{Mistake, Problem},
};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What istiod wants of a key that it knows; a wrong type makes it refuse all of the metadata.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Set by us, whatever the bundle says.
    Ours,
    Text,
    /// A *text* that is a boolean.
    Flag,
    /// A *text* that holds a JSON array.
    ListText,
    /// Not a text, so no variable can hold it.
    Structured,
}

/// The keys that istiod decodes, in its spelling. It compares without regard to case.
const KNOWN: [(&str, Kind); 54] = [
    ("NAMESPACE", Kind::Ours),
    ("NAME", Kind::Ours),
    ("SERVICE_ACCOUNT", Kind::Ours),
    ("INSTANCE_IPS", Kind::Ours),
    ("ISTIO_VERSION", Kind::Ours),
    ("AUTO_REGISTER_GROUP", Kind::Text),
    ("WORKLOAD_ENTRY", Kind::Text),
    ("NETWORK", Kind::Text),
    ("CLUSTER_ID", Kind::Text),
    ("MESH_ID", Kind::Text),
    ("WORKLOAD_NAME", Kind::Text),
    ("INTERCEPTION_MODE", Kind::Text),
    ("IDLE_TIMEOUT", Kind::Text),
    ("HTTP10", Kind::Text),
    ("HTTP_PROXY_PORT", Kind::Text),
    ("UNPRIVILEGED_POD", Kind::Text),
    ("STS_PORT", Kind::Text),
    ("TLS_CLIENT_CERT_CHAIN", Kind::Text),
    ("TLS_CLIENT_KEY", Kind::Text),
    ("TLS_CLIENT_ROOT_CERT", Kind::Text),
    ("TLS_SERVER_CERT_CHAIN", Kind::Text),
    ("TLS_SERVER_KEY", Kind::Text),
    ("TLS_SERVER_ROOT_CERT", Kind::Text),
    ("BASE", Kind::Text),
    ("OWNER", Kind::Text),
    ("APP_CONTAINERS", Kind::Text),
    ("ISTIO_REVISION", Kind::Text),
    ("NODE_NAME", Kind::Text),
    ("REQUESTED_NETWORK_VIEW", Kind::Text),
    ("WORKLOAD_IDENTITY_SOCKET_FILE", Kind::Text),
    ("DNS_PROXY_ADDR", Kind::Text),
    ("CERT_SIGNER", Kind::Text),
    ("ISTIO_PROXY_SHA", Kind::Text),
    ("CLOUDRUN_ADDR", Kind::Text),
    ("GENERATOR", Kind::Ours), // `grpc` would turn the answers into those for proxyless clients
    ("POD_PORTS", Kind::ListText),
    ("DNS_CAPTURE", Kind::Flag),
    ("DNS_AUTO_ALLOCATE", Kind::Flag),
    ("ENABLE_HBONE", Kind::Flag),
    ("DISABLE_HBONE_SEND", Kind::Flag),
    ("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", Kind::Flag),
    ("METADATA_DISCOVERY", Kind::Flag),
    ("ENVOY_SKIP_DEPRECATED_LOGS", Kind::Flag),
    ("ENABLE_SELF_DISCOVERY", Kind::Flag),
    ("LABELS", Kind::Structured),
    ("STATIC_LABELS", Kind::Structured),
    ("ANNOTATIONS", Kind::Structured),
    ("PROXY_CONFIG", Kind::Structured),
    ("PLATFORM_METADATA", Kind::Structured),
    ("PILOT_SAN", Kind::Structured),
    ("ENVOY_STATUS_PORT", Kind::Structured),
    ("ENVOY_PROMETHEUS_PORT", Kind::Structured),
    ("ENVOY_SECURE_METRICS_PORT", Kind::Structured),
    ("ENVOY_SECURE_MERGED_METRICS_PORT", Kind::Structured),
];

fn known(key: &str) -> Option<(&'static str, Kind)> {
    KNOWN.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(key))
}

/// Why a node that serves no HBONE does not say that it does.
const NO_HBONE: &str = "ISTIO_META_ENABLE_HBONE (we-agent serves no HBONE, and a mesh that is told otherwise sends ambient \
                        callers to port 15008, where nobody listens)";

/// Metadata and labels.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    pub(super) fields: Map<String, Value>,
    pub(super) labels: BTreeMap<String, String>,
    /// What is not sent although the bundle says it, and why.
    pub(super) ignored: Vec<String>,
}

/// Collects it: `proxyMetadata` first, the environment over it; JSON objects below texts.
///
/// istio-agent also repeats each label as a top-level key; nobody reads those, and a label called `namespace` would
/// replace the real one, so they are left out.
pub(super) fn read(keys: &mut Keys<'_>, proxy_metadata: Option<&Value>, place: impl Fn(&str) -> String) -> Metadata {
    let mut found = Metadata::default();
    for (name, variable) in keys.env.iter() {
        let Some(suffix) = name.strip_prefix("ISTIO_METAJSON_") else { continue };
        let Ok(Value::Object(object)) = serde_json::from_str(&variable.value) else {
            keys.mistake(name, Problem::Type("a JSON object: write '{\"name\":\"value\"}' in single quotes"));
            continue;
        };
        if suffix != "LABELS" {
            found.fields.extend(object.into_iter().filter(|(key, _)| known(key).is_none()));
            continue;
        }
        for (label, value) in object {
            match value {
                Value::String(value) => _ = found.labels.insert(label, value),
                _ => keys.mistake(name, Problem::Label(label)),
            }
        }
    }
    let declared = proxy_metadata.and_then(Value::as_object).into_iter().flatten();
    let declared = declared.filter_map(|(k, v)| Some((k.as_str(), v.as_str()?, place(k))));
    let set = keys.env.iter().map(|(k, v)| (k, v.value.as_str(), keys.place(k)));
    let mut texts = BTreeMap::new();
    for (name, value, place) in declared.chain(set) {
        if let Some(key) = name.strip_prefix("ISTIO_META_").filter(|key| !key.is_empty()) {
            texts.insert(known(key).map_or(key, |(spelling, _)| spelling), (value, place));
        }
    }
    for (key, (value, place)) in texts {
        match check(key, value) {
            // Told so, istiod labels the entry for its whole life.
            Ok(true) if key == "ENABLE_HBONE" => {
                found.ignored.extend((go_bool(value) == Some(true)).then(|| NO_HBONE.to_owned()));
            }
            Ok(true) => _ = found.fields.insert(key.to_owned(), value.into()),
            Ok(false) => {}
            Err(expected) => keys.mistakes.push(Mistake { place, problem: Problem::Type(expected) }),
        }
    }
    found
}

/// Whether the text may be sent under that key.
fn check(key: &str, value: &str) -> Result<bool, &'static str> {
    let Some((_, kind)) = known(key) else { return Ok(true) };
    match kind {
        Kind::Ours => Ok(false),
        Kind::Text => Ok(true),
        Kind::Flag if go_bool(value).is_some() => Ok(true),
        Kind::Flag => Err("true or false, and istiod would refuse the registration: correct or remove it"),
        Kind::ListText if serde_json::from_str::<Vec<Value>>(value).is_ok() => Ok(true),
        Kind::ListText => Err("a JSON array, and istiod would refuse the registration: correct or remove it"),
        Kind::Structured => Err("something a variable can hold, and istiod would refuse the registration: remove it"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::bundle::env::{self, Env};
    use serde_json::json;
    use std::path::Path;

    fn read_text(text: &str, proxy: &Value) -> (Metadata, Vec<String>) {
        let env = env::parse(Path::new("cluster.env"), text, &Env::default()).unwrap();
        let mut keys = Keys { env: &env, file: "cluster.env".into(), mistakes: Vec::new() };
        let found = read(&mut keys, Some(proxy), |k| format!("mesh.yaml: defaultConfig.proxyMetadata.{k}"));
        (found, keys.mistakes.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn texts_objects_and_labels() {
        let text = "ISTIO_META_NETWORK=''\nISTIO_META_X=1\nISTIO_METAJSON_M='{\"a\":{\"b\":[1,true,null]},\"namespace\":\"evil\",\"X\":2}'\n\
                    ISTIO_METAJSON_LABELS='{\"app\":\"a\",\"namespace\":\"l\"}'\nISTIO_META_NAMESPACE=evil\nISTIO_META_=x\nISTIO_META_namespace=evil\nISTIO_META_cluster_id=c\n";
        let (found, mistakes) = read_text(text, &json!({"ISTIO_META_NETWORK": "n", "ISTIO_META_Y": "y", "OTHER": "o"}));
        assert_eq!(mistakes, Vec::<String>::new());
        assert_eq!(
            Value::Object(found.fields),
            json!({"CLUSTER_ID": "c", "NETWORK": "", "X": "1", "Y": "y", "a": {"b": [1, true, null]}})
        );
        assert_eq!(found.labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>(), ["app=a", "namespace=l"]);
    }

    #[test]
    fn nobody_is_told_of_an_hbone_that_is_not_served() {
        let in_proxy = json!({"ISTIO_META_ENABLE_HBONE": "true"});
        for (text, proxy, told) in [
            ("", in_proxy.clone(), true),
            ("ISTIO_META_ENABLE_HBONE=true\n", json!({}), true),
            ("ISTIO_META_enable_hbone=1\n", json!({}), true),
            ("ISTIO_META_ENABLE_HBONE=false\n", in_proxy, false),
            ("ISTIO_META_DISABLE_HBONE_SEND=true\n", json!({}), false),
        ] {
            let (found, mistakes) = read_text(text, &proxy);
            assert_eq!(mistakes, Vec::<String>::new());
            assert!(!found.fields.contains_key("ENABLE_HBONE"), "{text} {proxy}");
            assert_eq!(found.ignored.iter().any(|line| line.contains("port 15008")), told, "{text} {proxy}");
        }
    }

    #[test]
    fn what_istiod_could_not_decode_is_refused_with_its_place() {
        let text = "ISTIO_META_DNS_CAPTURE=yes\nISTIO_META_LABELS=x\nISTIO_META_POD_PORTS='{}'\nISTIO_METAJSON_A='[1]'\n\
                    ISTIO_METAJSON_LABELS='{\"a\":1}'\nISTIO_META_ENVOY_STATUS_PORT=15021\n";
        let (_, mistakes) = read_text(text, &json!({"ISTIO_META_ENABLE_HBONE": ""}));
        for place in [
            "cluster.env:1: ISTIO_META_DNS_CAPTURE: ",
            "cluster.env:2: ISTIO_META_LABELS: ",
            "cluster.env:3: ISTIO_META_POD_PORTS: ",
            "cluster.env:4: ISTIO_METAJSON_A: ",
            "cluster.env:5: ISTIO_METAJSON_LABELS: ",
            "cluster.env:6: ISTIO_META_ENVOY_STATUS_PORT: ",
            "mesh.yaml: defaultConfig.proxyMetadata.ISTIO_META_ENABLE_HBONE: ",
        ] {
            assert!(mistakes.iter().any(|m| m.starts_with(place)), "{place} in {mistakes:?}");
        }
        assert_eq!(mistakes.len(), 7);
    }
}
