//! The files that `istioctl x workload entry configure` writes become a [`Bundle`], or all of their mistakes at once.
//! The files are only read, and nothing in them is ever run.

mod env;
mod find;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod hosts;
mod keys;
mod mesh;
mod metadata;
mod mistake;
mod permit;
mod workload;

pub use env::{Env, EnvError, EnvProblem, Variable, parse as parse_env};
pub use find::{BundleDir, find, istio_agent};
pub use mistake::{BundleErrors, Mistake, Problem};
pub use permit::{Left, Permitted, permit};

use crate::{
    files::{MAX_FILE, MAX_ROOTS, ReadError, Root, read_text},
    spiffe::{KeyKind, TrustDomain, X509Bundle},
    workload::{Authority, Hosts, Locality, ReadinessProbe, is_dns_label, is_dns_subdomain, token::TokenFile},
};
use keys::Keys;
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use zeroize::Zeroizing;

/// The fix for a file that is not there.
const WRITTEN: &str = "`istioctl x workload entry configure` writes it, copy it there";

/// All that the files say, checked. [`Bundle::workload`] puts our own configuration on top.
#[derive(Debug, Clone, PartialEq)]
pub struct Bundle {
    /// Every variable of the environment files.
    pub env: Env,
    /// The effective ProxyConfig as proto JSON; holds `readinessProbe` exactly if there is a probe.
    pub proxy_config: Map<String, Value>,
    /// The probe of the WorkloadGroup.
    pub probe: Option<ReadinessProbe>,
    /// Names of the `hosts` file.
    pub hosts: Hosts,
    /// Labels for the entry.
    pub labels: BTreeMap<String, String>,
    /// Other node metadata.
    pub metadata: Map<String, Value>,
    /// Keys that have no effect here, sorted.
    pub ignored: Vec<String>,
    trust_domain: TrustDomain,
    namespace: String,
    service_account: String,
    instance: Option<String>,
    discovery: Authority,
    ca: Option<Authority>,
    server_name: Option<String>,
    roots: PathBuf,
    ca_roots: Option<PathBuf>,
    discovery_roots: Option<PathBuf>,
    token: TokenFile,
    ttl: Duration,
    key: KeyKind,
    given: Vec<IpAddr>,
    locality: Option<Locality>,
    probe_localhost: bool,
    output_certs: Option<PathBuf>,
}

impl Bundle {
    /// Reads and checks the files of `dir`.
    ///
    /// # Errors
    /// Every mistake that can be found, each with its place and the fix.
    pub fn read(root: &Root, dir: &BundleDir) -> Result<Self, BundleErrors> {
        let mut mistakes: Vec<Mistake> = dir.bad_name.iter().cloned().collect();
        let mut env = Env::default();
        for (i, path) in dir.env.iter().enumerate() {
            // Only the last one, cluster.env, must be there; mistakes of both are told.
            let last = i + 1 == dir.env.len();
            match text(path, MAX_FILE, last.then_some(WRITTEN)) {
                Ok(text) => match parse_env(path, text.as_deref().map_or("", String::as_str), &env) {
                    Ok(read) => env = read,
                    Err(errors) => mistakes.extend(errors.into_iter().map(|e| Mistake {
                        place: format!("{}:{}", path.display(), e.line),
                        problem: e.problem.into(),
                    })),
                },
                Err(mistake) => mistakes.push(mistake),
            }
        }
        let broken_env = !mistakes.is_empty();
        let file = dir.env.last().map(|p| p.display().to_string()).unwrap_or_default();
        let mut keys = Keys { env: &env, file, mistakes };
        let proxy = proxy_config(&mut keys, dir);
        let discovery = discovery(&mut keys, &proxy);
        let place = |key: &str| proxy.place(&format!("proxyMetadata.{key}"));
        let metadata = metadata::read(&mut keys, proxy.fields.get("proxyMetadata"), place);
        let hosts = hosts(&mut keys.mistakes, dir);
        let (Roots { general: roots, ca: ca_roots, discovery: discovery_roots }, odd) = roots(&mut keys, root, dir);
        keys.refuse_plaintext();
        keys.refuse_unset();
        // A variable of a broken file is not known to be missing.
        let (namespace, service_account) = match broken_env {
            true => (None, None),
            false => (
                keys.name(&["ISTIO_NAMESPACE", "POD_NAMESPACE"], is_dns_label),
                keys.name(&["SERVICE_ACCOUNT"], is_dns_subdomain),
            ),
        };
        let (trust_domain, ca, server_name) = (keys.trust_domain(), keys.ca(), keys.server_name());
        let (ttl, key, given) = (keys.ttl(), keys.key_kind(), keys.addresses());
        let probe_localhost = keys.flag("REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION");
        let mut ignored = keys.ignored(dir.istio);
        ignored.extend(metadata.ignored.into_iter().chain(odd));
        let output = match env.get("OUTPUT_CERTS") {
            Some(path) => Some(path).filter(|p| !p.is_empty()),
            None => dir.istio.then_some("/etc/certs"), // the start script's default
        };
        match (trust_domain, namespace, service_account, discovery, keys.mistakes) {
            (Some(trust_domain), Some(namespace), Some(service_account), Some(discovery), mistakes)
                if mistakes.is_empty() =>
            {
                Ok(Self {
                    trust_domain,
                    namespace: namespace.to_owned(),
                    service_account: service_account.to_owned(),
                    instance: env.filled("POD_NAME").map(str::to_owned),
                    discovery,
                    ca,
                    server_name: server_name.map(str::to_owned),
                    roots,
                    ca_roots,
                    discovery_roots,
                    token: dir.token.clone(),
                    ttl,
                    key,
                    given,
                    locality: Locality::from_labels(&metadata.labels),
                    probe_localhost,
                    output_certs: output.map(PathBuf::from),
                    proxy_config: proxy.fields,
                    probe: proxy.probe,
                    hosts,
                    labels: metadata.labels,
                    metadata: metadata.fields,
                    ignored,
                    env,
                })
            }
            (.., mistakes) => Err(BundleErrors(mistakes)),
        }
    }
}

/// The layers of the ProxyConfig in Istio's order: `mesh.yaml`, then the variable, which the start script fills.
fn proxy_config(keys: &mut Keys<'_>, dir: &BundleDir) -> mesh::ProxyConfig {
    let mut layers = Vec::new();
    let pilot = keys.pilot();
    let from_variable = match (keys.env.filled("PROXY_CONFIG"), &pilot) {
        (Some(text), _) => Some(mesh::proxy_config(&keys.place("PROXY_CONFIG"), text)),
        (None, Some(_)) => None,
        (None, None) => {
            let service = keys.env.filled("ISTIO_SERVICE").unwrap_or("rawvm");
            Some(Ok(mesh::Layer::of(keys.place("ISTIO_SERVICE"), "serviceCluster", service)))
        }
    };
    let from_file = mesh_config(&dir.mesh);
    // Without the one field that istioctl always writes it is half a file, and what else it lacks, the probe for example, is
    // not known to be unwanted.
    if from_file.as_ref().is_ok_and(|layer| !layer.has("discoveryAddress")) {
        keys.mistakes.push(Mistake { place: dir.mesh.display().to_string(), problem: Problem::NoDiscovery });
    }
    for layer in std::iter::once(from_file).chain(from_variable) {
        match layer {
            Ok(layer) => layers.push(layer),
            Err(mistake) => keys.mistakes.push(mistake),
        }
    }
    if let Some((key, address)) = pilot {
        layers.push(mesh::Layer::of(keys.place(key), "discoveryAddress", &address));
    }
    let (config, mistakes) = mesh::merge(layers);
    keys.mistakes.extend(mistakes);
    config
}

fn mesh_config(path: &Path) -> Result<mesh::Layer, Mistake> {
    let text = text(path, MAX_FILE, Some(WRITTEN))?;
    mesh::mesh_config(&path.display().to_string(), text.as_deref().map_or("", String::as_str))
}

fn discovery(keys: &mut Keys<'_>, proxy: &mesh::ProxyConfig) -> Option<Authority> {
    if proxy.fields.get("controlPlaneAuthPolicy").and_then(Value::as_str) == Some("NONE") {
        let reason = "the control plane is only spoken to over TLS, anything else would show the token: use MUTUAL_TLS";
        let place = proxy.place("controlPlaneAuthPolicy");
        keys.mistakes.push(Mistake { place, problem: Problem::Refused(reason) });
    }
    let address = proxy.fields.get("discoveryAddress")?.as_str()?;
    let place = proxy.place("discoveryAddress");
    address
        .parse()
        .map_err(|e| keys.mistakes.push(Mistake { place, problem: Problem::Authority(address.to_owned(), e) }))
        .ok()
}

fn hosts(mistakes: &mut Vec<Mistake>, dir: &BundleDir) -> Hosts {
    let Some(path) = &dir.hosts else { return Hosts::new() };
    let read = text(path, MAX_FILE, None)
        .map_err(|mistake| vec![mistake])
        .and_then(|text| hosts::parse(&path.display().to_string(), text.as_deref().map_or("", String::as_str)));
    read.unwrap_or_else(|found| {
        mistakes.extend(found);
        Hosts::new()
    })
}

/// The files of roots.
struct Roots {
    /// The mesh's.
    general: PathBuf,
    /// For one service alone, by its key.
    ca: Option<PathBuf>,
    discovery: Option<PathBuf>,
}

/// The file of the mesh's roots, and what the keys name for the two services; and what is odd in them. All that are used are
/// read once here, so that a broken one is told at once; the dials read them again.
fn roots(keys: &mut Keys<'_>, root: &Root, dir: &BundleDir) -> (Roots, Vec<String>) {
    let named = [keys.root_file("CA_ROOT_CA"), keys.root_file("XDS_ROOT_CA")].map(|path| path.map(|p| root.path(p)));
    let mut candidates = dir.roots.clone();
    if let (true, Some(provided)) = (dir.istio, keys.env.filled("PROV_CERT")) {
        candidates.insert(0, root.path(provided).join("root-cert.pem"));
    }
    let found = candidates.iter().find(|p| p.exists()).or(candidates.first()).cloned().unwrap_or_default();
    let general = if named.iter().all(Option::is_some) { None } else { Some(&found) };
    let mut odd = Vec::new();
    for path in general.into_iter().chain(named.iter().flatten()) {
        let missing = "copy the root certificate of the mesh there (the bundle's root-cert.pem)";
        match text(path, MAX_ROOTS, Some(missing)) {
            Ok(text) => {
                let text = text.as_deref().map_or("", String::as_str);
                match X509Bundle::from_pem(text) {
                    Ok(bundle) => odd.extend(oddities(path, text, &bundle, SystemTime::now())),
                    Err(error) => {
                        keys.mistakes
                            .push(Mistake { place: path.display().to_string(), problem: Problem::Roots(error) });
                    }
                }
            }
            Err(mistake) => keys.mistakes.push(mistake),
        }
    }
    let [ca, discovery] = named;
    (Roots { general: found, ca, discovery }, odd)
}

/// What is not obeyed in a file of roots that can be used.
fn oddities(path: &Path, text: &str, bundle: &X509Bundle, now: SystemTime) -> impl Iterator<Item = String> {
    let file = path.display();
    let key = text.lines().any(|line| line.starts_with("-----BEGIN ") && line.contains("PRIVATE KEY"));
    let key = key.then(|| format!("a private key in {file} (nobody needs it there: remove it, and make another)"));
    let ended = bundle.ended(now).map(|end| {
        format!(
            "the end of the roots in {file} (all have expired, the last at {}, and Istio's own programs refuse them: copy the \
             mesh's root certificate again, or look at the clock)",
            humantime::format_rfc3339_seconds(end)
        )
    });
    key.into_iter().chain(ended)
}

/// The content of a file. `missing`: what to do if it is not there; without it, absence is no mistake.
fn text(path: &Path, limit: usize, missing: Option<&'static str>) -> Result<Option<Zeroizing<String>>, Mistake> {
    let mistake = |problem| Mistake { place: path.display().to_string(), problem };
    match read_text(path, limit) {
        Ok(text) => Ok(Some(text)),
        Err(ReadError::Missing) => missing.map_or(Ok(None), |fix| Err(mistake(Problem::Missing(fix)))),
        Err(error) => Err(mistake(error.into())),
    }
}

#[cfg(test)]
mod tests;
