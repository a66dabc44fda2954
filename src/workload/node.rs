//! How a workload presents itself on an ADS stream: the `Node` of the first request. istiod makes the WorkloadEntry
//! from its metadata, and refuses all of it when one value has the wrong JSON type.

use super::{Locality, Workload, locality::OLD_LABEL};
use crate::proto::envoy::config::core::v3 as wire;
use prost_types::value::Kind;
use serde_json::{Map, Value};
use std::net::IpAddr;

/// istiod shapes configuration by the version of the *Istio* agent. Ours is none, and we want what the newest gets. A
/// text that does not begin with a number does that; a missing key does it too, but with a warning in istiod's log at
/// each connect. `istioctl proxy-status` shows the text, so it says who is there.
const ISTIO_VERSION: &str = concat!("we-agent-", env!("CARGO_PKG_VERSION"));

/// Who speaks, where, and everything it says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// `sidecar~<ip>~<instance>.<namespace>~<namespace>.svc.cluster.local`.
    pub id: String,
    /// Name for telemetry.
    pub cluster: String,
    /// Left out when unknown: an empty one would erase the locality of the group's template.
    pub locality: Option<Locality>,
    /// JSON as istiod decodes it.
    pub metadata: Map<String, Value>,
}

impl Workload {
    /// The node at these addresses, the primary first. `cloud` is where the platform says that we are; a configured
    /// locality or a label wins. Not `registering`: an observer, which is served but makes no entry.
    pub fn node(&self, addresses: &[IpAddr], cloud: Option<&Locality>, registering: bool) -> Node {
        let ips: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
        let text = |text: &str| Value::String(text.to_owned());
        let mut metadata = self.metadata.clone();
        for key in ["AUTO_REGISTER_GROUP", "WORKLOAD_ENTRY"] {
            metadata.remove(key);
        }
        match (&self.group, &self.existing_entry) {
            (Some(group), _) if registering => metadata.insert("AUTO_REGISTER_GROUP".into(), text(group)),
            (None, Some(entry)) if registering => metadata.insert("WORKLOAD_ENTRY".into(), text(entry)),
            _ => None,
        };
        for (key, value) in [
            ("NAMESPACE", &self.namespace),
            ("SERVICE_ACCOUNT", &self.service_account),
            ("NAME", &self.instance),
            ("INSTANCE_IPS", &ips.join(",")), // one blank or bad element, and istiod drops all
            ("ISTIO_VERSION", &ISTIO_VERSION.to_owned()),
        ] {
            metadata.insert(key.into(), text(value));
        }
        if !self.labels.is_empty() {
            metadata.insert("LABELS".into(), Value::Object(self.wire_labels()));
        }
        metadata.insert("PROXY_CONFIG".into(), Value::Object(self.proxy_config.clone()));
        let ip = ips.first().map_or("", String::as_str);
        let (instance, namespace) = (&self.instance, &self.namespace);
        Node {
            id: format!("sidecar~{ip}~{instance}.{namespace}~{namespace}.svc.cluster.local"),
            cluster: self.cluster(),
            locality: self.locality.as_ref().or(cloud).cloned(),
            metadata,
        }
    }

    fn wire_labels(&self) -> Map<String, Value> {
        let mut labels: Map<_, _> = self.labels.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
        if let (Some(old), Some(place)) = (labels.get_mut(OLD_LABEL), Locality::from_labels(&self.labels)) {
            *old = place.to_string().into();
        }
        labels
    }

    /// `Node.cluster` by Istio's rule: the service cluster if one was chosen, else app label, else workload name.
    fn cluster(&self) -> String {
        let filled = |v: Option<&Value>| v.and_then(Value::as_str).filter(|s| !s.is_empty()).map(str::to_owned);
        let default = "istio-proxy";
        if let Some(chosen) = filled(self.proxy_config.get("serviceCluster")).filter(|c| c != default) {
            return chosen;
        }
        let app = self.labels.get("app").filter(|a| !a.is_empty()).cloned();
        let name = app.or_else(|| filled(self.metadata.get("WORKLOAD_NAME"))).unwrap_or_else(|| default.to_owned());
        format!("{name}.{}", self.namespace)
    }
}

impl From<&Node> for wire::Node {
    fn from(node: &Node) -> Self {
        Self {
            id: node.id.clone(),
            cluster: node.cluster.clone(),
            metadata: Some(structure(&node.metadata)),
            locality: node.locality.as_ref().map(|l| wire::Locality {
                region: l.region.clone(),
                zone: l.zone.clone(),
                sub_zone: l.subzone.clone(),
            }),
            user_agent_name: "we-agent".to_owned(),
        }
    }
}

fn structure(map: &Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct { fields: map.iter().map(|(k, v)| (k.clone(), value(v))).collect() }
}

fn value(json: &Value) -> prost_types::Value {
    let kind = match json {
        Value::Null => Kind::NullValue(0),
        Value::Bool(b) => Kind::BoolValue(*b),
        Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()), // a Struct has doubles alone
        Value::String(s) => Kind::StringValue(s.clone()),
        Value::Array(a) => Kind::ListValue(prost_types::ListValue { values: a.iter().map(value).collect() }),
        Value::Object(o) => Kind::StructValue(structure(o)),
    };
    prost_types::Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn json_keeps_its_types_on_the_wire() {
        let Value::Object(metadata) = json!({"A": "true", "B": true, "C": 1.5, "D": null, "E": {"x": ["y", 2]}}) else {
            panic!()
        };
        let locality = Locality::parse("r/z/s");
        let node = wire::Node::from(&Node { id: "i".into(), cluster: "c".into(), locality, metadata });
        let fields = node.metadata.unwrap().fields;
        let kind = |k: &str| fields[k].kind.clone().unwrap();
        assert_eq!(kind("A"), Kind::StringValue("true".into()));
        assert_eq!(kind("B"), Kind::BoolValue(true));
        assert_eq!(kind("C"), Kind::NumberValue(1.5));
        assert_eq!(kind("D"), Kind::NullValue(0));
        let Kind::StructValue(e) = kind("E") else { panic!() };
        let Some(Kind::ListValue(list)) = &e.fields["x"].kind else { panic!() };
        assert_eq!(list.values[1].kind, Some(Kind::NumberValue(2.0)));
        assert_eq!(node.locality.unwrap().sub_zone, "s");
    }
}
