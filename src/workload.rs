//! The Istio objects that we touch, and what one workload is.

mod address;
mod entry;
mod locality;
mod node;
mod probe;
pub mod token;

pub use address::{Authority, AuthorityError, host_address, is_host};
pub use entry::{EntryError, check_labels, entry_name, is_dns_label, is_dns_subdomain};
pub use locality::Locality;
pub use node::Node;
pub use probe::{ProbeMethod, ReadinessProbe};

use crate::spiffe::{KeyKind, SpiffeId};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

/// Host names of the bundle's `hosts` file, in lower case, with their addresses.
pub type Hosts = BTreeMap<String, Vec<IpAddr>>;

/// The two encodings of the discovery protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Xds {
    /// Incremental, what Envoy in Istio uses since 1.22.
    #[default]
    Delta,
    /// State of the world.
    Sotw,
}

/// One server of the control plane. Two equal ones can share a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it listens.
    pub authority: Authority,
    /// The name its certificate must have, and the SNI: a DNS name, or an IP address without brackets.
    pub server_name: String,
    /// File of the roots it must chain to, read anew at each dial.
    pub roots: PathBuf,
}

/// What one workload is: the bundle, with our own configuration on top. Data alone, checked when it was made.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// Its name on this host: of the directories, the socket, the lines in the journal.
    pub name: String,
    /// Who it is.
    pub id: SpiffeId,
    /// Namespace of its service account, its group and its entry.
    pub namespace: String,
    /// Its Kubernetes service account.
    pub service_account: String,
    /// The WorkloadGroup to register with. Without one the workload has an identity, but no entry is made.
    pub group: Option<String>,
    /// An existing WorkloadEntry to attach to instead (`ISTIO_META_WORKLOAD_ENTRY`).
    pub existing_entry: Option<String>,
    /// Network id; may be empty.
    pub network: String,
    /// Cluster id, sent as header `clusterid` with each call, even if it is empty.
    pub cluster_id: String,
    /// Registration and health.
    pub discovery: Endpoint,
    /// The certificate authority.
    pub ca: Endpoint,
    /// The service account's token.
    pub token: token::TokenFile,
    /// Names that are resolved inside the agent, before the system's resolver is asked.
    pub hosts: Hosts,
    /// Lifetime to ask for, from one second to 90 days.
    pub ttl: Duration,
    /// Key to make.
    pub key: KeyKind,
    /// Addresses that were given; empty means: find out. The first one names the entry.
    pub given: Vec<IpAddr>,
    /// How to find out whether the application is healthy; without one nothing is reported.
    pub probe: Option<ReadinessProbe>,
    /// Probe `localhost` unless the probe names a host: the given address is not one of this machine.
    pub probe_localhost: bool,
    /// Labels of the entry.
    pub labels: BTreeMap<String, String>,
    /// Where it runs, by configuration or label. If none, the cloud may know.
    pub locality: Option<Locality>,
    /// Where the bundle wants certificate files (`OUTPUT_CERTS`), if the configuration allows it.
    pub output_certs: Option<PathBuf>,
    /// Keys of the bundle that have no effect here, sorted.
    pub ignored: Vec<String>,
    /// Third part of the node id, and metadata `NAME`.
    pub instance: String,
    /// Node metadata from `ISTIO_META_*` and `ISTIO_METAJSON_*`; our own keys come on top.
    pub metadata: Map<String, Value>,
    /// The effective ProxyConfig as proto JSON; holds `readinessProbe` exactly if there is a probe.
    pub proxy_config: Map<String, Value>,
}

/// What our own configuration may say about a workload; each wins over the bundle.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overrides {
    /// Addresses, the primary first; empty means: as the bundle says.
    pub addresses: Vec<IpAddr>,
    /// Trust domain.
    pub trust_domain: Option<crate::spiffe::TrustDomain>,
    /// Kind of key.
    pub key: Option<KeyKind>,
    /// Lifetime to ask for, from one second to 90 days.
    pub ttl: Option<Duration>,
    /// Whether the token is removed when it has served.
    pub remove_token: bool,
    /// Whether the certificate is written to the bundle's `OUTPUT_CERTS`, too.
    pub output_certs: bool,
    /// Address for registration and health.
    pub discovery: Option<Authority>,
    /// Address of the certificate authority.
    pub ca: Option<Authority>,
    /// Name in the certificate of both.
    pub server_name: Option<String>,
    /// Where it runs.
    pub locality: Option<Locality>,
    /// Cluster id.
    pub cluster_id: Option<String>,
    /// Network id.
    pub network: Option<String>,
    /// Labels, added to those of the bundle.
    pub labels: BTreeMap<String, String>,
}

/// What this host says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Its name, short or qualified.
    pub host_name: String,
}

/// The longest lifetime istiod grants (`MAX_WORKLOAD_CERT_TTL`); it refuses more.
pub const MAX_TTL: Duration = Duration::from_secs(90 * 24 * 3600);

impl Workload {
    /// Whether a session is held at all.
    pub fn registers(&self) -> bool {
        self.group.is_some() || self.existing_entry.is_some()
    }

    /// `namespace/name` of the WorkloadEntry at this primary address; none if none is asked for.
    ///
    /// # Errors
    /// When istiod could not make an entry of that name.
    pub fn entry(&self, primary: IpAddr) -> Result<Option<String>, EntryError> {
        let name = match (&self.group, &self.existing_entry) {
            (Some(group), _) => entry_name(group, primary, &self.network)?,
            (None, Some(existing)) => existing.clone(),
            (None, None) => return Ok(None),
        };
        Ok(Some(format!("{}/{name}", self.namespace)))
    }
}
