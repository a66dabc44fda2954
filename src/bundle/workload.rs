//! A bundle with our own configuration on top: a [`Workload`].

use super::{Bundle, BundleErrors, Mistake, mistake::Problem};
use crate::{
    spiffe::SpiffeId,
    workload::{Authority, Endpoint, HostFacts, Overrides, Workload, check_labels, entry_name, token::TokenFile},
};
use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

/// What is listed of a directory that nothing is written to.
const NOT_WRITTEN: &str = "OUTPUT_CERTS (files.outputCerts: true in we-agent.yaml obeys it)";

impl Bundle {
    /// What `name` is with `overrides` on top. The name of the instance is the host's, up to the first dot, unless
    /// the bundle names one (`POD_NAME`).
    ///
    /// # Errors
    /// Everything that istiod or Kubernetes would refuse and that is known before connecting.
    pub fn workload(&self, name: &str, overrides: &Overrides, host: &HostFacts) -> Result<Workload, BundleErrors> {
        let mut mistakes = Vec::new();
        let mut mistake =
            |key: &str, problem: Problem| mistakes.push(Mistake { place: self.place(name, key), problem });

        let mut metadata = self.metadata.clone();
        for (key, value) in [("CLUSTER_ID", &overrides.cluster_id), ("NETWORK", &overrides.network)] {
            metadata.extend(value.iter().map(|v| (key.to_owned(), v.as_str().into())));
        }
        let text = |key: &str| metadata.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        let filled = |key: &str| Some(text(key)).filter(|v| !v.is_empty());
        let group = filled("AUTO_REGISTER_GROUP");
        let existing_entry = filled("WORKLOAD_ENTRY").filter(|_| group.is_none());
        let (network, cluster_id) = (text("NETWORK"), text("CLUSTER_ID"));
        let mut labels = self.labels.clone();
        labels.extend(overrides.labels.clone());

        let mut ignored = self.ignored.clone();
        let set = self.env.filled("OUTPUT_CERTS").is_some();
        ignored.extend((set && !overrides.output_certs).then(|| NOT_WRITTEN.to_owned()));
        ignored.sort();
        if let Some(group) = &group {
            // The network is the same at every address, so any one tells whether it can be part of a name.
            if let Err(error) = entry_name(group, IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), &network) {
                let ours = overrides.network.is_some();
                mistake(if ours { "network" } else { "ISTIO_META_NETWORK" }, error.into());
            }
            for (of, place) in [(&self.labels, "ISTIO_METAJSON_LABELS"), (&overrides.labels, "labels")] {
                check_labels(of).into_iter().for_each(|error| mistake(place, error.into()));
            }
        }
        let domain = overrides.trust_domain.as_ref().unwrap_or(&self.trust_domain);
        let id = SpiffeId::workload(domain, &self.namespace, &self.service_account);
        let id = id.map_err(|error| mistake("SERVICE_ACCOUNT", error.into()));

        let discovery = overrides.discovery.as_ref().unwrap_or(&self.discovery);
        // Istio's agent takes ISTIOD_SAN for the authority too, unless CA_ADDR names a server of its own.
        let own_ca = overrides.ca.as_ref().or(self.ca.as_ref());
        let san = overrides.server_name.as_ref().or(self.server_name.as_ref());
        let ca_san = overrides.server_name.as_ref().or(self.server_name.as_ref().filter(|_| own_ca.is_none()));
        let endpoint = |authority: &Authority, san: Option<&String>, roots: Option<&Path>| Endpoint {
            authority: authority.clone(),
            server_name: san.map_or_else(|| authority.server_name().to_owned(), Clone::clone),
            roots: roots.unwrap_or(&self.roots).to_owned(),
        };
        let short = host.host_name.split('.').next().filter(|n| !n.is_empty()).unwrap_or(name);
        match id {
            Ok(id) if mistakes.is_empty() => Ok(Workload {
                name: name.to_owned(),
                id,
                namespace: self.namespace.clone(),
                service_account: self.service_account.clone(),
                group,
                existing_entry,
                network,
                cluster_id,
                discovery: endpoint(discovery, san, self.discovery_roots.as_deref()),
                ca: endpoint(own_ca.unwrap_or(discovery), ca_san, self.ca_roots.as_deref()),
                token: TokenFile { remove: overrides.remove_token, ..self.token.clone() },
                hosts: self.hosts.clone(),
                ttl: overrides.ttl.unwrap_or(self.ttl),
                key: overrides.key.unwrap_or(self.key),
                given: if overrides.addresses.is_empty() { self.given.clone() } else { overrides.addresses.clone() },
                probe: self.probe.clone(),
                probe_localhost: self.probe_localhost,
                labels,
                locality: overrides.locality.clone().or_else(|| self.locality.clone()),
                output_certs: self.output_certs.clone().filter(|_| overrides.output_certs),
                ignored,
                instance: self.instance.clone().unwrap_or_else(|| short.to_owned()),
                metadata,
                proxy_config: self.proxy_config.clone(),
            }),
            _ => Err(BundleErrors(mistakes)),
        }
    }

    /// Where a key of the bundle was set, or that it is the configuration of this workload.
    fn place(&self, name: &str, key: &str) -> String {
        match self.env.variable(key) {
            Some(variable) => format!("{}:{}: {key}", variable.file.display(), variable.line),
            None => format!("workload {name}: {key}"),
        }
    }
}
