//! Who a proxy says it is: its node id, and its metadata with the types that istiod insists on.

use std::{collections::BTreeMap, net::IpAddr};

use prost_types::value::Kind as Proto;
use serde_json::{Map, Number, Value};

use crate::{
    grpc::{Status, code},
    proto::envoy::config::core::v3 as core,
    store::parse_bool,
};

/// The part of a node that registration looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// The third part of the node id: how logs and errors name the proxy.
    pub(crate) name: String,
    /// The first address, as it was written.
    pub(crate) address: String,
    /// Metadata `NAMESPACE`; empty if absent.
    pub(crate) namespace: String,
    /// `NAMESPACE`, or the first label of the node id's domain.
    pub(crate) config_namespace: String,
    pub(crate) service_account: String,
    pub(crate) group: String,
    pub(crate) workload_entry: String,
    pub(crate) network: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// `region[/zone[/subzone]]` if the message was there, even an empty one.
    pub(crate) locality: Option<String>,
    /// `PROXY_CONFIG.readinessProbe` is there.
    pub(crate) probe: bool,
}

impl Node {
    pub(crate) fn parse(node: Option<&core::Node>) -> Result<Self, Status> {
        let invalid = |message: String| Status::new(code::INVALID_ARGUMENT, message);
        let node = node.filter(|n| !n.id.is_empty()).ok_or_else(|| invalid("missing node information".to_owned()))?;
        let metadata = node.metadata.as_ref().map(struct_json).unwrap_or_default();
        let metadata = Metadata::check(metadata).map_err(invalid)?;
        let parts: Vec<&str> = node.id.split('~').collect();
        let [kind, address, name, domain] = parts[..] else {
            return Err(invalid(format!("missing parts in the service node {:?}", node.id)));
        };
        if !["sidecar", "router", "waypoint", "ztunnel", "agentgateway"].contains(&kind) {
            let types = "valid types: [sidecar router waypoint ztunnel]";
            return Err(invalid(format!("invalid node type ({types}) in the service node {:?}", node.id)));
        }
        let addresses: Vec<String> = metadata.text("INSTANCE_IPS").split(',').map(str::to_owned).collect();
        let address = match addresses.iter().all(|a| is_ip(a)) {
            true => addresses.into_iter().next(),
            false => is_ip(address).then(|| address.to_owned()),
        };
        let address =
            address.ok_or_else(|| invalid("no valid IP address in the service node id or metadata".to_owned()))?;
        let namespace = metadata.text("NAMESPACE");
        let config_namespace = if namespace.is_empty() {
            domain.split('.').next().unwrap_or_default().to_owned()
        } else {
            namespace.clone()
        };
        Ok(Self {
            name: name.to_owned(),
            address,
            namespace,
            config_namespace,
            service_account: metadata.text("SERVICE_ACCOUNT"),
            group: metadata.text("AUTO_REGISTER_GROUP"),
            workload_entry: metadata.text("WORKLOAD_ENTRY"),
            network: metadata.text("NETWORK"),
            labels: metadata.labels(),
            locality: node.locality.as_ref().map(locality),
            probe: metadata
                .get("PROXY_CONFIG")
                .is_some_and(|c| !c["readinessProbe"].is_null() || !c["readiness_probe"].is_null()),
        })
    }
}

/// A subzone without a zone is dropped; a zone without a region is not.
fn locality(l: &core::Locality) -> String {
    match (l.zone.as_str(), l.sub_zone.as_str()) {
        ("", _) => l.region.clone(),
        (zone, "") => format!("{}/{zone}", l.region),
        (zone, subzone) => format!("{}/{zone}/{subzone}", l.region),
    }
}

/// Go's parser: any notation of an address, an IPv6 zone included.
fn is_ip(text: &str) -> bool {
    text.split_once('%').map_or(text, |(address, _)| address).parse::<IpAddr>().is_ok()
}

/// Metadata whose types were found right.
struct Metadata(Map<String, Value>);

/// What istiod takes a key for. Keys that it does not know may be anything.
#[derive(Clone, Copy)]
enum Type {
    Text,
    /// A text with a boolean.
    Switch,
    Number,
    Texts,
    List,
    /// A text with a JSON array.
    Ports,
    Config,
}

fn type_of(key: &str) -> Option<Type> {
    Some(match key.to_ascii_uppercase().as_str() {
        "NAMESPACE"
        | "SERVICE_ACCOUNT"
        | "AUTO_REGISTER_GROUP"
        | "WORKLOAD_ENTRY"
        | "INSTANCE_IPS"
        | "NETWORK"
        | "CLUSTER_ID"
        | "MESH_ID"
        | "WORKLOAD_NAME"
        | "NAME"
        | "ISTIO_VERSION"
        | "INTERCEPTION_MODE"
        | "IDLE_TIMEOUT"
        | "HTTP10"
        | "HTTP_PROXY_PORT"
        | "UNPRIVILEGED_POD"
        | "STS_PORT"
        | "TLS_CLIENT_CERT_CHAIN"
        | "TLS_CLIENT_KEY"
        | "TLS_CLIENT_ROOT_CERT"
        | "TLS_SERVER_CERT_CHAIN"
        | "TLS_SERVER_KEY"
        | "TLS_SERVER_ROOT_CERT"
        | "BASE"
        | "OWNER"
        | "APP_CONTAINERS"
        | "ISTIO_REVISION"
        | "NODE_NAME"
        | "REQUESTED_NETWORK_VIEW"
        | "WORKLOAD_IDENTITY_SOCKET_FILE"
        | "DNS_PROXY_ADDR"
        | "GENERATOR" => Type::Text,
        "DNS_CAPTURE"
        | "DNS_AUTO_ALLOCATE"
        | "ENABLE_HBONE"
        | "DISABLE_HBONE_SEND"
        | "EXIT_ON_ZERO_ACTIVE_CONNECTIONS"
        | "METADATA_DISCOVERY"
        | "ENVOY_SKIP_DEPRECATED_LOGS"
        | "ENABLE_SELF_DISCOVERY" => Type::Switch,
        "ENVOY_STATUS_PORT" | "ENVOY_PROMETHEUS_PORT" => Type::Number,
        "LABELS" | "STATIC_LABELS" | "PLATFORM_METADATA" | "ANNOTATIONS" => Type::Texts,
        "PILOT_SAN" => Type::List,
        "POD_PORTS" => Type::Ports,
        "PROXY_CONFIG" => Type::Config,
        _ => return None,
    })
}

impl Metadata {
    /// One wrong type makes the whole of it fail, and all of it is told back.
    fn check(map: Map<String, Value>) -> Result<Self, String> {
        for (key, value) in &map {
            if let Some(kind) = type_of(key).filter(|_| !value.is_null()) {
                let told = || Value::Object(map.clone());
                check(key, kind, value)
                    .map_err(|cause| format!("failed to unmarshal node metadata ({}): {cause}", told()))?;
            }
        }
        Ok(Self(map))
    }

    /// Keys match whatever their case.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).or_else(|| self.0.iter().find(|(k, _)| k.eq_ignore_ascii_case(key)).map(|(_, v)| v))
    }

    fn text(&self, key: &str) -> String {
        self.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let labels = self.get("LABELS").and_then(Value::as_object).into_iter().flatten();
        labels.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect()
    }
}

fn check(key: &str, kind: Type, value: &Value) -> Result<(), String> {
    let mismatch = |value: &Value, of: &str| {
        let found = match value {
            Value::Bool(_) => "bool",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            _ => "object",
        };
        Err(format!(
            "json: cannot unmarshal {found} into Go struct field BootstrapNodeMetadata2.NodeMetadata.{key} of type {of}"
        ))
    };
    match (kind, value) {
        (Type::Text, Value::String(_)) | (Type::Number, Value::Number(_)) => Ok(()),
        (Type::Text, _) => mismatch(value, "string"),
        (Type::Number, _) => mismatch(value, "int"),
        (Type::Switch, Value::String(text)) if parse_bool(text).is_some() => Ok(()),
        (Type::Ports, Value::String(text)) if serde_json::from_str::<Vec<Value>>(text).is_ok() => Ok(()),
        (Type::Switch | Type::Ports, _) => Err("invalid syntax".to_owned()),
        (Type::Texts, Value::Object(map)) => {
            map.values().find(|v| !v.is_string() && !v.is_null()).map_or(Ok(()), |v| mismatch(v, "string"))
        }
        (Type::Texts, _) => mismatch(value, "map[string]string"),
        (Type::List, Value::Array(list)) => {
            list.iter().find(|v| !v.is_string()).map_or(Ok(()), |v| mismatch(v, "string"))
        }
        (Type::List, _) => mismatch(value, "[]string"),
        (Type::Config, Value::Object(config)) => {
            let duration = ["drainDuration", "terminationDrainDuration"]
                .into_iter()
                .find(|d| config.get(*d).is_some_and(|v| !v.is_string()));
            duration.map_or(Ok(()), |d| Err(format!("bad Duration: json: cannot unmarshal {d}")))
        }
        (Type::Config, _) => mismatch(value, "map[string]json.RawMessage"),
    }
}

/// Struct to JSON; a number without a fraction prints as one.
fn struct_json(message: &prost_types::Struct) -> Map<String, Value> {
    message.fields.iter().map(|(k, v)| (k.clone(), value_json(v))).collect()
}

fn value_json(value: &prost_types::Value) -> Value {
    match &value.kind {
        None | Some(Proto::NullValue(_)) => Value::Null,
        Some(Proto::BoolValue(b)) => Value::Bool(*b),
        Some(Proto::NumberValue(n)) if n.fract() == 0.0 && n.abs() < 1e15 => Value::Number(Number::from(*n as i64)),
        Some(Proto::NumberValue(n)) => Number::from_f64(*n).map_or(Value::Null, Value::Number),
        Some(Proto::StringValue(s)) => Value::String(s.clone()),
        Some(Proto::ListValue(list)) => Value::Array(list.values.iter().map(value_json).collect()),
        Some(Proto::StructValue(inner)) => Value::Object(struct_json(inner)),
    }
}
