//! The objects of the miniature cluster: groups, entries and services, with one lock and a version to watch.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::{
    group::{Group, Service, Spec},
    yaml,
};

/// One condition of an entry's status. Times are RFC 3339 with nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Condition {
    pub kind: String,
    pub status: String,
    pub message: String,
    pub last_probe_time: String,
    pub last_transition_time: String,
}

/// A WorkloadEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct WorkloadEntry {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub creation_timestamp: String,
    pub annotations: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    /// Name and uid of the WorkloadGroup that owns it.
    pub owner: Option<(String, String)>,
    pub spec: Spec,
    pub conditions: Vec<Condition>,
}

/// Annotations by which istiod keeps book.
pub(crate) mod annotation {
    pub(crate) const GROUP: &str = "istio.io/autoRegistrationGroup";
    pub(crate) const CONTROLLER: &str = "istio.io/workloadController";
    pub(crate) const CONNECTED: &str = "istio.io/connectedAt";
    pub(crate) const DISCONNECTED: &str = "istio.io/disconnectedAt";
    pub(crate) const HEALTH: &str = "proxy.istio.io/health-checks-enabled";
}

impl WorkloadEntry {
    /// An entry as somebody applies it by hand: no owner, no annotations, no status.
    pub fn new(namespace: &str, name: &str, spec: Spec) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: uid(),
            creation_timestamp: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            annotations: BTreeMap::new(),
            labels: spec.labels.clone(),
            owner: None,
            spec,
            conditions: Vec::new(),
        }
    }

    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The condition `Healthy`, if there is one.
    pub fn healthy(&self) -> Option<bool> {
        self.health().map(|c| c.status == "True")
    }

    /// The message of the condition `Healthy`; empty while it is true.
    pub fn health_message(&self) -> Option<&str> {
        self.health().map(|c| c.message.as_str())
    }

    /// Of two conditions of that type the first counts.
    fn health(&self) -> Option<&Condition> {
        self.conditions.iter().find(|c| c.kind == "Healthy")
    }

    /// When its present stream connected, if it is connected.
    pub fn connected_at(&self) -> Option<&str> {
        self.annotations.get(annotation::CONNECTED).map(String::as_str)
    }

    /// When its last stream ended, if it has none.
    pub fn disconnected_at(&self) -> Option<&str> {
        self.annotations.get(annotation::DISCONNECTED).map(String::as_str)
    }

    /// Whether the mesh sends traffic here: always without health checks, else only while `Healthy` is `True`.
    pub(crate) fn is_endpoint(&self) -> bool {
        let checked = self.annotations.get(annotation::HEALTH).is_some_and(|v| parse_bool(v) == Some(true));
        !checked || self.healthy() == Some(true)
    }

    /// Whether the mesh speaks mTLS to it.
    pub(crate) fn is_mtls(&self) -> bool {
        let label =
            self.labels.get("security.istio.io/tlsMode").or_else(|| self.spec.labels.get("security.istio.io/tlsMode"));
        label.map_or(!self.spec.service_account.is_empty(), |mode| mode == "istio")
    }

    /// The object as the API serves it.
    pub fn json(&self) -> Value {
        let mut metadata = Map::new();
        put(&mut metadata, "annotations", json!(self.annotations));
        metadata.insert("creationTimestamp".to_owned(), json!(self.creation_timestamp));
        put(&mut metadata, "labels", json!(self.labels));
        metadata.insert("name".to_owned(), json!(self.name));
        metadata.insert("namespace".to_owned(), json!(self.namespace));
        if let Some((name, uid)) = &self.owner {
            let owner = json!({"apiVersion": "networking.istio.io/v1", "controller": true, "kind": "WorkloadGroup", "name": name, "uid": uid});
            metadata.insert("ownerReferences".to_owned(), json!([owner]));
        }
        metadata.insert("uid".to_owned(), json!(self.uid));
        let mut spec = Map::new();
        put(&mut spec, "address", json!(self.spec.address));
        put(&mut spec, "labels", json!(self.spec.labels));
        put(&mut spec, "locality", json!(self.spec.locality));
        put(&mut spec, "network", json!(self.spec.network));
        put(&mut spec, "ports", json!(self.spec.ports));
        put(&mut spec, "serviceAccount", json!(self.spec.service_account));
        if self.spec.weight != 0 {
            spec.insert("weight".to_owned(), json!(self.spec.weight));
        }
        let mut object = json!({"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry", "metadata": metadata, "spec": spec});
        if !self.conditions.is_empty() {
            let conditions: Vec<Value> = self.conditions.iter().map(Condition::json).collect();
            object["status"] = json!({"conditions": conditions});
        }
        object
    }

    /// The object as `kubectl get -o yaml` prints it.
    pub fn yaml(&self) -> String {
        yaml::document(&self.json())
    }
}

impl Condition {
    fn json(&self) -> Value {
        let mut condition = Map::new();
        condition.insert("lastProbeTime".to_owned(), json!(self.last_probe_time));
        condition.insert("lastTransitionTime".to_owned(), json!(self.last_transition_time));
        put(&mut condition, "message", json!(self.message));
        condition.insert("status".to_owned(), json!(self.status));
        condition.insert("type".to_owned(), json!(self.kind));
        Value::Object(condition)
    }
}

/// Inserts what is not empty: the API does not serve empty fields.
fn put(map: &mut Map<String, Value>, key: &str, value: Value) {
    let empty = match &value {
        Value::String(s) => s.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    };
    if !empty {
        map.insert(key.to_owned(), value);
    }
}

/// Go's `strconv.ParseBool`.
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// RFC 3339 with nanoseconds, without trailing zeros, as Go writes it.
pub(crate) fn rfc3339_nano(at: SystemTime) -> String {
    let text = humantime::format_rfc3339_nanos(at).to_string();
    let trimmed = text.trim_end_matches('Z').trim_end_matches('0').trim_end_matches('.');
    format!("{trimmed}Z")
}

/// A random UUID (version 4).
pub(crate) fn uid() -> String {
    let n = fastrand::u128(..) & !(0xf000 << 64) & !(0xc000 << 48) | (0x4000 << 64) | (0x8000 << 48);
    let hex = format!("{n:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Everything the API server would hold.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) groups: BTreeMap<(String, String), Group>,
    pub(crate) entries: BTreeMap<(String, String), WorkloadEntry>,
    pub(crate) services: BTreeMap<String, Service>,
    /// Namespace and name of service accounts that are gone.
    pub(crate) deleted_accounts: HashSet<(String, String)>,
}

/// The store: a lock, and a version that moves with each change of what the mesh serves.
#[derive(Debug)]
pub(crate) struct Store {
    state: Mutex<State>,
    version: watch::Sender<u64>,
}

impl Store {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::default(), version: watch::Sender::new(1) }
    }

    pub(crate) fn read(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and lets everybody know.
    pub(crate) fn write<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.read());
        self.version.send_modify(|v| *v += 1);
        result
    }

    pub(crate) fn versions(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}
