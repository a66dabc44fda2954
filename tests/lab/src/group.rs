//! What the mesh's owner declares: groups of VMs, and the services that select them.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::store::{WorkloadEntry, uid};

/// A WorkloadGroup: what istiod makes entries from, and istioctl bundles.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Group {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    /// The group's own annotations.
    pub(crate) annotations: BTreeMap<String, String>,
    /// `spec.metadata`.
    pub(crate) entry_labels: BTreeMap<String, String>,
    pub(crate) entry_annotations: BTreeMap<String, String>,
    /// `spec.template`.
    pub(crate) template: Spec,
    pub(crate) probe: Option<Value>,
}

/// The `spec` of a WorkloadEntry, and the template of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Spec {
    pub address: String,
    pub ports: BTreeMap<String, u16>,
    pub labels: BTreeMap<String, String>,
    pub network: String,
    pub locality: String,
    pub weight: u32,
    pub service_account: String,
}

/// A file that is no WorkloadGroup.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// Neither YAML nor JSON.
    #[error("the group is no YAML")]
    Yaml(#[from] serde_yaml::Error),
    /// A field is missing or of another type.
    #[error("the group's {0} is missing or of another type")]
    Field(&'static str),
}

impl Group {
    /// A group without ports, labels or probe, of service account `default`.
    pub fn new(namespace: &str, name: &str) -> Self {
        let template = Spec { service_account: "default".to_owned(), ..Spec::default() };
        Self { namespace: namespace.to_owned(), name: name.to_owned(), uid: uid(), template, ..Self::default() }
    }

    /// Reads the WorkloadGroup of a YAML or JSON text; a missing service account becomes `default`, as `istioctl -f` does it.
    pub fn from_yaml(text: &str) -> Result<Self, GroupError> {
        let value: Value = serde_yaml::from_str(text)?;
        let text = |v: &Value| v.as_str().map(str::to_owned);
        let strings = |v: &Value| -> BTreeMap<String, String> {
            v.as_object().into_iter().flatten().filter_map(|(k, v)| Some((k.clone(), text(v)?))).collect()
        };
        let template = &value["spec"]["template"];
        let mut ports = BTreeMap::new();
        for (name, port) in template["ports"].as_object().into_iter().flatten() {
            ports.insert(
                name.clone(),
                port.as_u64().and_then(|p| u16::try_from(p).ok()).ok_or(GroupError::Field("spec.template.ports"))?,
            );
        }
        let spec = Spec {
            address: text(&template["address"]).unwrap_or_default(),
            ports,
            labels: strings(&template["labels"]),
            network: text(&template["network"]).unwrap_or_default(),
            locality: text(&template["locality"]).unwrap_or_default(),
            weight: template["weight"].as_u64().unwrap_or_default().try_into().unwrap_or_default(),
            service_account: text(&template["serviceAccount"]).unwrap_or_else(|| "default".to_owned()),
        };
        Ok(Self {
            namespace: text(&value["metadata"]["namespace"]).ok_or(GroupError::Field("metadata.namespace"))?,
            name: text(&value["metadata"]["name"]).ok_or(GroupError::Field("metadata.name"))?,
            uid: uid(),
            annotations: strings(&value["metadata"]["annotations"]),
            entry_labels: strings(&value["spec"]["metadata"]["labels"]),
            entry_annotations: strings(&value["spec"]["metadata"]["annotations"]),
            template: spec,
            probe: value["spec"].get("probe").filter(|p| !p.is_null()).cloned(),
        })
    }

    /// Sets `template.serviceAccount`; empty lets any account of the namespace register.
    pub fn service_account(mut self, name: &str) -> Self {
        self.template.service_account = name.to_owned();
        self
    }

    /// Adds to `template.ports`.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.template.ports.insert(name.to_owned(), port);
        self
    }

    /// Adds to the labels that entries get (`spec.metadata.labels`).
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.entry_labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Adds to `template.labels`, which the other labels override.
    pub fn template_label(mut self, key: &str, value: &str) -> Self {
        self.template.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Adds to the annotations that entries get (`spec.metadata.annotations`).
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.entry_annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Sets `template.network`.
    pub fn network(mut self, network: &str) -> Self {
        self.template.network = network.to_owned();
        self
    }

    /// Sets `template.locality`.
    pub fn locality(mut self, locality: &str) -> Self {
        self.template.locality = locality.to_owned();
        self
    }

    /// Sets `template.weight`.
    pub fn weight(mut self, weight: u32) -> Self {
        self.template.weight = weight;
        self
    }

    /// Sets `spec.probe`, in the JSON of Istio's ReadinessProbe.
    pub fn probe(mut self, probe: Value) -> Self {
        self.probe = Some(probe);
        self
    }
}

/// A Service or ServiceEntry that selects entries by their labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub(crate) host: String,
    pub(crate) namespace: Option<String>,
    /// Name, service port, target port.
    pub(crate) ports: Vec<(String, u16, u16)>,
    pub(crate) selector: BTreeMap<String, String>,
}

impl Service {
    /// A service that selects nothing yet, in every namespace.
    pub fn new(host: &str) -> Self {
        Self { host: host.to_owned(), namespace: None, ports: Vec::new(), selector: BTreeMap::new() }
    }

    /// Selects only in this namespace, as a real one does.
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// Adds a port and the entry's port behind it.
    pub fn port(self, port: u16, target: u16) -> Self {
        self.named_port("", port, target)
    }

    /// Adds a port with a name: an entry's port of that name is then the target.
    pub fn named_port(mut self, name: &str, port: u16, target: u16) -> Self {
        self.ports.push((name.to_owned(), port, target));
        self
    }

    /// Adds to the selector.
    pub fn selector<'a>(mut self, labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        self.selector.extend(labels.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())));
        self
    }

    /// Selection sees both sets of labels, those of `metadata` win. An empty selector selects nothing.
    pub(crate) fn selects(&self, entry: &WorkloadEntry) -> bool {
        !self.selector.is_empty()
            && self.namespace.as_ref().is_none_or(|ns| *ns == entry.namespace)
            && self.selector.iter().all(|(k, v)| entry.labels.get(k).or_else(|| entry.spec.labels.get(k)) == Some(v))
    }

    /// The target on this entry of one of the service's ports.
    pub(crate) fn target(&self, name: &str, target: u16, entry: &WorkloadEntry) -> u16 {
        entry.spec.ports.get(name).copied().unwrap_or(target)
    }
}
