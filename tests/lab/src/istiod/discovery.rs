//! What the mesh looks like from a proxy: clusters, endpoints and names, made from one picture of the store.

use std::{collections::BTreeMap, net::SocketAddr};

use prost::Message;
use prost_types::{Any, Struct, Value, value::Kind};

use super::node::Node;
use crate::{
    group::Service,
    proto::{
        envoy::config::{
            cluster::v3::Cluster,
            core::v3::{Address, Locality, Metadata, SocketAddress},
            endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints},
        },
        istio::{
            mesh::v1alpha1::ProxyConfig,
            networking::nds::v1::{NameTable, name_table::NameInfo},
        },
    },
    store::{State, WorkloadEntry},
};

/// Type URLs, with the prefix that all of them have.
pub(crate) mod types {
    pub(crate) const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    pub(crate) const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
    pub(crate) const NAMES: &str = "type.googleapis.com/istio.networking.nds.v1.NameTable";
    pub(crate) const PROXY_CONFIG: &str = "type.googleapis.com/istio.mesh.v1alpha1.ProxyConfig";
    pub(crate) const HEALTH: &str = "type.googleapis.com/istio.v1.HealthInformation";

    /// Types that istiod knows, and the lab takes without ever answering.
    pub(crate) const SILENT: [&str; 7] = [
        "type.googleapis.com/envoy.config.listener.v3.Listener",
        "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
        "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
        "type.googleapis.com/istio.workload.Workload",
        "type.googleapis.com/istio.workload.Address",
        "type.googleapis.com/istio.security.Authorization",
    ];
}

/// Resources by name.
pub(crate) type Resources = BTreeMap<String, Any>;

/// A picture of the store, taken a little after it changed: istiod collects changes for a while before it pushes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registry {
    services: Vec<Service>,
    entries: Vec<WorkloadEntry>,
    roots: Vec<String>,
    /// The version that answers carry.
    pub(crate) version: String,
}

impl Registry {
    pub(crate) fn new(state: &State, roots: Vec<String>, version: String) -> Self {
        Self {
            services: state.services.values().cloned().collect(),
            entries: state.entries.values().cloned().collect(),
            roots,
            version,
        }
    }

    /// Outbound clusters of every service, and inbound ones of those that select this proxy.
    pub(crate) fn clusters(&self, node: &Node, padding: usize) -> Resources {
        let mut clusters = Resources::new();
        let mut add = |name: String, alt_stat_name: String| {
            let cluster = Cluster { name: name.clone(), alt_stat_name };
            clusters.insert(name, any(types::CLUSTER, &cluster));
        };
        for service in &self.services {
            let selects_us = self.entries.iter().any(|e| e.spec.address == node.address && service.selects(e));
            for (_, port, target) in &service.ports {
                add(format!("outbound|{port}||{}", service.host), String::new());
                if selects_us {
                    add(format!("inbound|{target}||"), String::new());
                }
            }
        }
        for n in 0..padding {
            add(format!("outbound|80||padding-{n}.invalid"), "x".repeat(2048));
        }
        clusters
    }

    /// Whether there is a service of this cluster's name.
    pub(crate) fn has(&self, cluster: &str) -> bool {
        cluster.rsplit('|').next().is_some_and(|host| self.services.iter().any(|service| service.host == host))
    }

    /// The endpoints of a cluster, empty for a name that nobody has.
    pub(crate) fn assignment(&self, name: &str) -> Any {
        let endpoints = self.endpoints(name).into_iter().map(|(entry, port)| locality_of(entry, port)).collect();
        any(types::ENDPOINT, &ClusterLoadAssignment { cluster_name: name.to_owned(), endpoints })
    }

    /// Entries and their ports behind `outbound|PORT|SUBSET|HOST`.
    fn endpoints(&self, cluster: &str) -> Vec<(&WorkloadEntry, u16)> {
        let parts: Vec<&str> = cluster.split('|').collect();
        let ["outbound", port, _, host] = parts[..] else { return Vec::new() };
        let services = self.services.iter().filter(|s| s.host == host);
        let ports =
            services.flat_map(|s| s.ports.iter().map(move |p| (s, p))).filter(|(_, (_, p, _))| p.to_string() == port);
        ports
            .flat_map(|(service, (name, _, target))| {
                let selected = self.entries.iter().filter(|e| service.selects(e) && e.is_endpoint());
                selected.map(|e| (e, service.target(name, *target, e)))
            })
            .collect()
    }

    /// Where calls to a host go, over all of its ports.
    pub(crate) fn listed(&self, host: &str) -> Vec<SocketAddr> {
        let services = self.services.iter().filter(|s| s.host == host);
        let clusters = services.flat_map(|s| s.ports.iter().map(|(_, port, _)| format!("outbound|{port}||{host}")));
        let addresses = clusters.flat_map(|c| {
            self.endpoints(&c)
                .into_iter()
                .filter_map(|(e, port)| Some(SocketAddr::new(e.spec.address.parse().ok()?, port)))
                .collect::<Vec<_>>()
        });
        addresses.collect()
    }

    /// All roots, in one resource.
    pub(crate) fn proxy_config(&self) -> Any {
        any(types::PROXY_CONFIG, &ProxyConfig { ca_certificates_pem: self.roots.clone() })
    }

    pub(crate) fn names(&self) -> Any {
        let info = |s: &Service| NameInfo {
            ips: vec!["240.240.0.1".to_owned()],
            registry: "External".to_owned(),
            shortname: String::new(),
            namespace: s.namespace.clone().unwrap_or_default(),
        };
        any(types::NAMES, &NameTable { table: self.services.iter().map(|s| (s.host.clone(), info(s))).collect() })
    }
}

pub(crate) fn any(type_url: &str, message: &impl Message) -> Any {
    Any { type_url: type_url.to_owned(), value: message.encode_to_vec() }
}

/// An entry with a service account is announced for mTLS, unless its labels say otherwise.
fn locality_of(entry: &WorkloadEntry, port: u16) -> LocalityLbEndpoints {
    let text = |s: &str| Value { kind: Some(Kind::StringValue(s.to_owned())) };
    let mode = Struct { fields: [("tlsMode".to_owned(), text("istio"))].into() };
    let metadata = entry
        .is_mtls()
        .then(|| Metadata { filter_metadata: [("envoy.transport_socket_match".to_owned(), mode)].into() });
    let socket_address = Some(SocketAddress { address: entry.spec.address.clone(), port_value: port.into() });
    let weight = Some(entry.spec.weight.max(1));
    let endpoint = LbEndpoint {
        endpoint: Some(Endpoint { address: Some(Address { socket_address }) }),
        metadata,
        load_balancing_weight: weight,
    };
    let mut parts = entry.spec.locality.split('/').map(str::to_owned);
    let mut part = || parts.next().unwrap_or_default();
    let locality = Locality { region: part(), zone: part(), sub_zone: part() };
    LocalityLbEndpoints { locality: Some(locality), lb_endpoints: vec![endpoint], load_balancing_weight: weight }
}
