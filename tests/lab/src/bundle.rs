//! The five files of `istioctl x workload entry configure`, byte for byte.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    net::{IpAddr, SocketAddr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::{Map, Value, json};

use crate::{Error, group::Group, mesh::Mesh, token::AUDIENCE, yaml};

/// What istioctl would be told on its command line, and find in the cluster.
#[derive(Clone)]
pub struct BundleOptions {
    mesh: Arc<Mesh>,
    group: Result<Group, (String, String)>,
    /// The control plane's address for `hosts` and its port.
    address: SocketAddr,
    discovery_address: Option<String>,
    autoregister: bool,
    capture_dns: bool,
    internal_ip: Option<String>,
    external_ip: Option<String>,
    revision: String,
    istio_namespace: String,
    cluster_id: Option<String>,
    network: Option<String>,
    ingress_ip: Option<String>,
    token_seconds: i64,
    token: Option<String>,
    root_pem: Option<String>,
    trust_domain: Option<String>,
    default_config: Map<String, Value>,
}

/// The content of the five files.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Files {
    pub mesh_yaml: String,
    pub cluster_env: String,
    pub root_cert: String,
    pub istio_token: String,
    pub hosts: String,
}

impl BundleOptions {
    pub(crate) fn new(mesh: Arc<Mesh>, namespace: &str, group: &str, address: SocketAddr) -> Self {
        let key = (namespace.to_owned(), group.to_owned());
        let group = mesh.store.read().groups.get(&key).cloned().ok_or(key);
        Self {
            mesh,
            group,
            address,
            discovery_address: None,
            autoregister: true,
            capture_dns: true,
            internal_ip: None,
            external_ip: None,
            revision: String::new(),
            istio_namespace: "istio-system".to_owned(),
            cluster_id: None,
            network: None,
            ingress_ip: None,
            token_seconds: 3600,
            token: None,
            root_pem: None,
            trust_domain: None,
            default_config: Map::new(),
        }
    }

    /// `--autoregister`; on unless switched off here.
    pub fn autoregister(mut self, on: bool) -> Self {
        self.autoregister = on;
        self
    }

    /// `--capture-dns`; on by default, as in istioctl.
    pub fn dns_capture(mut self, on: bool) -> Self {
        self.capture_dns = on;
        self
    }

    /// `--internalIP`: `ISTIO_SVC_IP`, not checked.
    pub fn internal_ip(mut self, ip: &str) -> Self {
        self.internal_ip = Some(ip.to_owned());
        self
    }

    /// `--externalIP`: `ISTIO_SVC_IP`, and probes go to localhost.
    pub fn external_ip(mut self, ip: &str) -> Self {
        self.external_ip = Some(ip.to_owned());
        self
    }

    /// `--revision`.
    pub fn revision(mut self, revision: &str) -> Self {
        self.revision = revision.to_owned();
        self
    }

    /// `--istioNamespace`.
    pub fn istio_namespace(mut self, namespace: &str) -> Self {
        self.istio_namespace = namespace.to_owned();
        self
    }

    /// `--clusterID`; the lab's cluster by default.
    pub fn cluster_id(mut self, id: &str) -> Self {
        self.cluster_id = Some(id.to_owned());
        self
    }

    /// The network of the group's template, for this bundle alone.
    pub fn network(mut self, network: &str) -> Self {
        self.network = Some(network.to_owned());
        self
    }

    /// `--ingressIP`: the address in `hosts`. By default the lab's own; empty leaves `hosts` empty.
    pub fn ingress_ip(mut self, ip: &str) -> Self {
        self.ingress_ip = Some(ip.to_owned());
        self
    }

    /// `host:port` of the control plane in the mesh configuration; by default istiod's name and the lab's port.
    pub fn discovery_address(mut self, address: &str) -> Self {
        self.discovery_address = Some(address.to_owned());
        self
    }

    /// The control plane is at another port or instance.
    pub fn address(mut self, address: SocketAddr) -> Self {
        self.address = address;
        self
    }

    /// `--tokenDuration`; any length, the 600 s minimum of the API server is not kept.
    pub fn token_ttl(mut self, ttl: Duration) -> Self {
        self.token_seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX / 4);
        self
    }

    /// The token expired this long ago.
    pub fn expired_token(mut self, ago: Duration) -> Self {
        self.token_seconds = -i64::try_from(ago.as_secs()).unwrap_or(i64::MAX / 4);
        self
    }

    /// This very token.
    pub fn token(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// These roots instead of the lab's.
    pub fn root_pem(mut self, pem: &str) -> Self {
        self.root_pem = Some(pem.to_owned());
        self
    }

    /// `trustDomain` of the mesh configuration, the lab's by default; empty as when the configuration has none.
    pub fn trust_domain(mut self, domain: &str) -> Self {
        self.trust_domain = Some(domain.to_owned());
        self
    }

    /// `defaultConfig` of the mesh configuration, as JSON in proto form; overlaid on what the lab has.
    pub fn default_config(mut self, config: Value) -> Self {
        if let Value::Object(config) = config {
            self.default_config = config;
        }
        self
    }

    /// The content of the files.
    pub fn files(&self) -> Result<Files, Error> {
        let group = self.group.as_ref().map_err(|(namespace, name)| Error::NoGroup(format!("{namespace}/{name}")))?;
        let config = self.config(group)?;
        let token = match &self.token {
            Some(token) => token.clone(),
            None => self.mesh.tokens.mint(
                &group.namespace,
                &group.template.service_account,
                AUDIENCE,
                self.token_seconds,
                SystemTime::now(),
            )?,
        };
        Ok(Files {
            cluster_env: self.cluster_env(group, &config),
            mesh_yaml: yaml::document(&json!({"defaultConfig": config})),
            root_cert: self.root_pem.clone().unwrap_or_else(|| self.mesh.ca.root_pem()),
            istio_token: token,
            hosts: self.hosts(),
        })
    }

    /// Writes the files in istioctl's order, with its modes. Files that are there are overwritten, their modes kept.
    pub fn write(&self, dir: impl AsRef<Path>) -> Result<(), Error> {
        let files = self.files()?;
        let dir = dir.as_ref();
        fs::DirBuilder::new().recursive(true).mode(0o744).create(dir)?;
        for (name, content) in [
            ("mesh.yaml", &files.mesh_yaml),
            ("cluster.env", &files.cluster_env),
            ("root-cert.pem", &files.root_cert),
            ("istio-token", &files.istio_token),
            ("hosts", &files.hosts),
        ] {
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o744).open(dir.join(name))?;
            file.write_all(content.as_bytes())?;
        }
        Ok(())
    }

    fn hosts(&self) -> String {
        let ip = self.ingress_ip.clone().unwrap_or_else(|| self.address.ip().to_string());
        match ip.parse::<IpAddr>() {
            Ok(ip) => format!("{ip} {}\n", self.host()),
            Err(_) => String::new(),
        }
    }

    fn has_revision(&self) -> bool {
        !self.revision.is_empty() && self.revision != "default"
    }

    fn host(&self) -> String {
        let revision = if self.has_revision() { format!("-{}", self.revision) } else { String::new() };
        format!("istiod{revision}.{}.svc", self.istio_namespace)
    }

    /// `defaultConfig`: the mesh's, two annotations over it, then istioctl's metadata, and the group's probe.
    fn config(&self, group: &Group) -> Result<Map<String, Value>, Error> {
        let mut config = self.default_config.clone();
        let own = format!("{}:{}", self.host(), self.address.port());
        let discovery = match (&self.discovery_address, config.get("discoveryAddress")) {
            (Some(address), _) => Some(address.clone()),
            (None, Some(_)) => None,
            (None, None) => Some(own),
        };
        if let Some(address) = discovery.filter(|a| !a.is_empty()) {
            config.insert("discoveryAddress".to_owned(), json!(address));
        }
        for annotations in [&group.annotations, &group.entry_annotations] {
            let Some(text) = annotations.get("proxy.istio.io/config") else { continue };
            let Value::Object(overlay) = serde_yaml::from_str(text).map_err(|_| Error::Annotation)? else {
                return Err(Error::Annotation);
            };
            merge(&mut config, overlay);
        }
        let metadata = self.metadata(group, config.get("meshId").and_then(Value::as_str).unwrap_or_default());
        merge(&mut config, [("proxyMetadata".to_owned(), json!(metadata))].into_iter().collect());
        match &group.probe {
            Some(probe) => config.insert("readinessProbe".to_owned(), without_zeros(probe)),
            None => config.remove("readinessProbe"),
        };
        Ok(config)
    }

    fn metadata(&self, group: &Group, mesh_id: &str) -> BTreeMap<&'static str, String> {
        let mut labels = group.entry_labels.clone();
        labels.extend(group.template.labels.clone());
        let first =
            |keys: [&str; 3], or: &str| keys.iter().find_map(|k| labels.get(*k)).map_or(or.to_owned(), Clone::clone);
        let service = first(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"], &group.name);
        let revision = first(["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"], "latest");
        labels.insert("service.istio.io/canonical-name".to_owned(), service.clone());
        labels.insert("service.istio.io/canonical-revision".to_owned(), revision.clone());
        let mut metadata = BTreeMap::from([
            ("CANONICAL_SERVICE", service),
            ("CANONICAL_REVISION", revision),
            ("POD_NAMESPACE", group.namespace.clone()),
            ("SERVICE_ACCOUNT", group.template.service_account.clone()),
            ("TRUST_DOMAIN", self.trust_domain.as_ref().unwrap_or(&self.mesh.trust_domain).clone()),
            ("ISTIO_META_CLUSTER_ID", self.cluster_id.as_ref().unwrap_or(&self.mesh.cluster).clone()),
            ("ISTIO_META_MESH_ID", mesh_id.to_owned()),
            ("ISTIO_META_NETWORK", self.network.as_ref().unwrap_or(&group.template.network).clone()),
            ("ISTIO_META_WORKLOAD_NAME", group.name.clone()),
            ("ISTIO_METAJSON_LABELS", go_json(&json!(labels).to_string())),
        ]);
        if !group.template.ports.is_empty() {
            metadata.insert("ISTIO_META_POD_PORTS", pod_ports(group));
        }
        if self.capture_dns {
            metadata.insert("ISTIO_META_DNS_CAPTURE", "true".to_owned());
        }
        if self.autoregister {
            metadata.insert("ISTIO_META_AUTO_REGISTER_GROUP", group.name.clone());
        }
        metadata
    }

    fn cluster_env(&self, group: &Group, config: &Map<String, Value>) -> String {
        let mut env: BTreeMap<String, String> = config
            .get("proxyMetadata")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned()))
            .collect();
        let ports: Vec<String> = group.template.ports.values().map(u16::to_string).collect();
        let status_port = config.get("statusPort").and_then(Value::as_u64).unwrap_or(15020);
        let mut exclude = "22,15090,15021".to_owned();
        if status_port != 15090 && status_port != 15021 {
            exclude = format!("{exclude},{status_port}");
        }
        let mut set = |key: &str, value: String| env.insert(key.to_owned(), value);
        set("ISTIO_INBOUND_PORTS", if ports.is_empty() { "*".to_owned() } else { ports.join(",") });
        set("ISTIO_LOCAL_EXCLUDE_PORTS", exclude);
        set("ISTIO_NAMESPACE", group.namespace.clone());
        set("ISTIO_SERVICE", format!("{}.{}", group.name, group.namespace));
        set("ISTIO_SERVICE_CIDR", "*".to_owned());
        set("SERVICE_ACCOUNT", group.template.service_account.clone());
        if self.has_revision() {
            set("CA_ADDR", format!("{}:{}", self.host(), self.address.port()));
        }
        if let Some(ip) = self.internal_ip.as_ref().or(self.external_ip.as_ref()) {
            set("ISTIO_SVC_IP", ip.clone());
        }
        if self.external_ip.is_some() {
            set("REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION", "true".to_owned());
        }
        // Sorted as finished lines, not by key.
        let mut lines: Vec<String> = env.iter().map(|(k, v)| format!("{k}={}", quote(v))).collect();
        lines.sort();
        lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

/// Top-level fields replace each other, `proxyMetadata` is merged by key.
fn merge(config: &mut Map<String, Value>, overlay: Map<String, Value>) {
    for (key, value) in overlay {
        match (config.get_mut(&key), value) {
            (Some(Value::Object(old)), Value::Object(new)) if key == "proxyMetadata" => old.extend(new),
            (_, value) => _ = config.insert(key, value),
        }
    }
}

/// Integers of 0 are not written, as everywhere in proto JSON.
fn without_zeros(value: &Value) -> Value {
    match value {
        Value::Object(map) => map
            .iter()
            .filter(|(_, v)| **v != json!(0) && **v != json!(""))
            .map(|(k, v)| (k.clone(), without_zeros(v)))
            .collect(),
        Value::Array(list) => list.iter().map(without_zeros).collect(),
        other => other.clone(),
    }
}

/// Sorted by name, a nameless port without the key.
fn pod_ports(group: &Group) -> String {
    let port = |(name, port): (&String, &u16)| {
        let name = if name.is_empty() { String::new() } else { format!("\"name\":{},", json!(name)) };
        format!("{{{name}\"containerPort\":{port},\"protocol\":\"\"}}")
    };
    go_json(&format!("[{}]", group.template.ports.iter().map(port).collect::<Vec<_>>().join(",")))
}

/// Go's encoder hides what could be HTML.
fn go_json(json: &str) -> String {
    json.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

/// istioctl's quoting: only values of these eleven characters alone are left bare.
fn quote(value: &str) -> String {
    if !value.is_empty() && value.chars().all(|c| "\\w@%+=:,./-".contains(c)) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\'', r#"'"'"'"#))
}
