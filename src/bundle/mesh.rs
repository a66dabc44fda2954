//! `mesh.yaml` and the variable `PROXY_CONFIG`: layers of one ProxyConfig, as istio-agent merges them.

mod layer;
mod probe;

pub(super) use layer::{Layer, mesh_config, proxy_config};

use super::mistake::{Mistake, Problem};
use crate::workload::ReadinessProbe;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The effective ProxyConfig.
#[derive(Debug, Default)]
pub(super) struct ProxyConfig {
    /// Proto JSON; holds `readinessProbe` exactly if there is a probe.
    pub(super) fields: Map<String, Value>,
    /// The probe, checked.
    pub(super) probe: Option<ReadinessProbe>,
    layers: Vec<Layer>,
    /// The layer that each field came from.
    of: BTreeMap<String, usize>,
}

impl ProxyConfig {
    /// Where a field was set: `discoveryAddress`, `readinessProbe.httpGet.port`.
    pub(super) fn place(&self, path: &str) -> String {
        let field = path.split(['.', '[']).next().unwrap_or_default();
        let layer = self.of.get(field).and_then(|layer| self.layers.get(*layer));
        layer.map_or_else(|| path.to_owned(), |layer| layer.place(path))
    }
}

/// Proto JSON takes `snake_case` too.
fn camel(key: &str) -> String {
    let mut parts = key.split('_');
    let mut name = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut chars = part.chars();
        name.extend(chars.next().map(|c| c.to_ascii_uppercase()));
        name.push_str(chars.as_str());
    }
    name
}

/// What istio-agent starts from.
fn defaults() -> Map<String, Value> {
    let fields = json!({
        "configPath": "./etc/istio/proxy", "binaryPath": "/usr/local/bin/envoy", "serviceCluster": "istio-proxy",
        "drainDuration": "45s", "terminationDrainDuration": "5s", "proxyAdminPort": 15000, "statusPort": 15020,
        "statNameLength": 189, "controlPlaneAuthPolicy": "MUTUAL_TLS",
        "discoveryAddress": "istiod.istio-system.svc:15012",
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// Merges the layers on top of the defaults, later ones winning: whole top-level fields, but `proxyMetadata` and
/// `proxyHeaders` by key; then checks what is sent on and what is used here. Unknown fields are passed on.
pub(super) fn merge(layers: Vec<Layer>) -> (ProxyConfig, Vec<Mistake>) {
    let mut config = ProxyConfig { fields: defaults(), ..ProxyConfig::default() };
    for (number, layer) in layers.iter().enumerate() {
        for (key, value) in &layer.fields {
            if value.is_null() {
                continue; // proto JSON: null is absence
            }
            config.of.insert(key.clone(), number);
            match (config.fields.get_mut(key), value) {
                (Some(Value::Object(old)), Value::Object(new)) if key == "proxyMetadata" || key == "proxyHeaders" => {
                    old.extend(new.clone());
                }
                (_, value) => {
                    config.fields.insert(key.clone(), value.clone());
                }
            }
        }
    }
    config.layers = layers;
    let mut mistakes = Vec::new();
    for (key, value) in &config.fields {
        let field = FIELDS.iter().find(|(name, _)| name == key);
        if let Some(expected) = field.and_then(|(_, kind)| kind.refuses(value)) {
            mistakes.push(Mistake { place: config.place(key), problem: Problem::Type(expected) });
        }
    }
    match config.fields.remove("readinessProbe").map(probe::read) {
        Some(Ok(Some((probe, json)))) => {
            config.probe = Some(probe);
            config.fields.insert("readinessProbe".into(), json);
        }
        Some(Err(found)) => mistakes.extend(
            found
                .into_iter()
                .map(|(field, problem)| Mistake { place: config.place(&format!("readinessProbe{field}")), problem }),
        ),
        Some(Ok(None)) | None => {}
    }
    (config, mistakes)
}

/// JSON type of a field. istiod refuses the whole node when one is wrong.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Filled,
    Flag,
    Integer,
    Port,
    Seconds,
    Policy,
    Texts,
    TextMap,
    Object,
}

const FIELDS: [(&str, Kind); 25] = [
    ("configPath", Kind::Filled),
    ("binaryPath", Kind::Filled),
    ("serviceCluster", Kind::Filled),
    ("drainDuration", Kind::Seconds),
    ("terminationDrainDuration", Kind::Seconds),
    ("fileFlushInterval", Kind::Seconds),
    ("discoveryAddress", Kind::Text),
    ("meshId", Kind::Text),
    ("customConfigFile", Kind::Text),
    ("statsdUdpAddress", Kind::Text),
    ("proxyBootstrapTemplatePath", Kind::Text),
    ("availabilityZone", Kind::Text),
    ("proxyAdminPort", Kind::Port),
    ("statusPort", Kind::Port),
    ("statNameLength", Kind::Integer),
    ("concurrency", Kind::Integer),
    ("fileFlushMinSizeKb", Kind::Integer),
    ("holdApplicationUntilProxyStarts", Kind::Flag),
    ("controlPlaneAuthPolicy", Kind::Policy),
    ("extraStatTags", Kind::Texts),
    ("caCertificatesPem", Kind::Texts),
    ("proxyMetadata", Kind::TextMap),
    ("runtimeValues", Kind::TextMap),
    ("tracing", Kind::Object),
    ("proxyHeaders", Kind::Object),
];

impl Kind {
    /// What the value should be, if it is not.
    fn refuses(self, value: &Value) -> Option<&'static str> {
        let (good, expected) = match self {
            Self::Text => (value.is_string(), "a text: put it in quotes"),
            Self::Filled => (value.as_str().is_some_and(|s| !s.is_empty()), "a text of at least one character"),
            Self::Flag => (value.is_boolean(), "true or false"),
            Self::Integer => (integer(value).is_some(), "a whole number"),
            Self::Port => (integer(value).is_some_and(|n| (1..=65535).contains(&n)), "a port from 1 to 65535"),
            Self::Seconds => (value.as_str().is_some_and(is_seconds), "a duration in seconds, like 45s or 0.5s"),
            Self::Policy => (matches!(value.as_str(), Some("NONE" | "MUTUAL_TLS")), "MUTUAL_TLS"),
            Self::Texts => (value.as_array().is_some_and(|a| a.iter().all(Value::is_string)), "a list of texts"),
            Self::TextMap => (
                value.as_object().is_some_and(|m| m.values().all(Value::is_string)),
                "a map of texts: put the values in quotes",
            ),
            Self::Object => (value.is_object(), "a mapping (keys and values)"),
        };
        (!good).then_some(expected)
    }
}

/// An integer as proto JSON takes it: a number, or a text that is one.
fn integer(value: &Value) -> Option<i64> {
    value
        .as_i64()
        .or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 1e15).map(|f| f as i64))
        .or_else(|| value.as_str().and_then(|s| s.parse().ok()))
}

/// A Duration of proto JSON that is positive.
fn is_seconds(text: &str) -> bool {
    text.strip_suffix('s').is_some_and(|number| {
        number.bytes().all(|b| b.is_ascii_digit() || b == b'.') && number.parse::<f64>().is_ok_and(|n| n > 0.0)
    })
}

#[cfg(test)]
mod tests;
