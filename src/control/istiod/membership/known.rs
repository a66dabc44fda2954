//! What the mesh says of us, cluster by cluster. Pure: answers in, the fact out.

use crate::{
    proto::envoy::config::{
        core::v3::{address, socket_address::PortSpecifier},
        endpoint::v3::{ClusterLoadAssignment, LbEndpoint, lb_endpoint::HostIdentifier},
    },
    status::{Membership, Selection},
};
use prost_types::value::Kind;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Key of the endpoint metadata by which a sidecar picks plain text or mutual TLS.
const TRANSPORT: &str = "envoy.transport_socket_match";

/// One endpoint of ours as the mesh has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    port: u16,
    tls: bool,
}

/// What is known of the services that select us: cluster name → our endpoints in it. Each has listed us once.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Known {
    clusters: BTreeMap<String, Vec<Place>>,
}

/// What a look at the whole mesh has brought.
#[derive(Debug, Default)]
pub(in super::super) struct Seen {
    /// Every service that there is.
    pub(in super::super) clusters: BTreeSet<String>,
    /// Those that list us.
    pub(in super::super) listing: Known,
}

impl Known {
    /// The names to watch.
    pub(in super::super) fn names(&self) -> BTreeSet<String> {
        self.clusters.keys().cloned().collect()
    }

    /// What an observer was told of all clusters: those that list one of our addresses.
    pub(in super::super) fn found(assignments: Vec<ClusterLoadAssignment>, ours: &[IpAddr]) -> Self {
        let places = assignments.into_iter().map(|a| (places_of(&a, ours), a.cluster_name));
        Self {
            clusters: places.filter(|(places, _)| !places.is_empty()).map(|(places, name)| (name, places)).collect(),
        }
    }

    /// Whether any of them lists us; none while there is none.
    pub(in super::super) fn listed(&self) -> Option<bool> {
        (!self.clusters.is_empty()).then(|| self.clusters.values().any(|places| !places.is_empty()))
    }

    /// Whether one of them lists us no more.
    pub(in super::super) fn lacks(&self) -> bool {
        self.clusters.values().any(Vec::is_empty)
    }

    /// Takes in a look. When nobody lists us it may be the entry that is missing, or healthy no more: then the services
    /// that there still are remain, unless that is `final`, and we were left out on purpose.
    pub(in super::super) fn take(&mut self, seen: Seen, is_final: bool) {
        if is_final || seen.listing.listed() == Some(true) {
            self.clusters = seen.listing.clusters;
        } else {
            self.clusters.retain(|name, _| seen.clusters.contains(name));
        }
    }

    /// Takes in what the mesh says of clusters; tells whether one of those we watch was among them.
    pub(in super::super) fn update(&mut self, assignments: &[ClusterLoadAssignment], ours: &[IpAddr]) -> bool {
        let mut ours_too = false;
        for assignment in assignments {
            if let Some(places) = self.clusters.get_mut(&assignment.cluster_name) {
                *places = places_of(assignment, ours);
                ours_too = true;
            }
        }
        ours_too
    }

    /// The fact.
    pub(in super::super) fn membership(&self) -> Membership {
        if self.clusters.is_empty() {
            return Membership::NotSelected;
        }
        let places: Vec<&Place> = self.clusters.values().flatten().collect();
        let ports: BTreeSet<u16> = places.iter().map(|place| place.port).collect();
        let selection = Selection {
            services: self.clusters.keys().map(|name| service(name)).collect(),
            ports: ports.into_iter().collect(),
            tls: (!places.is_empty()).then(|| places.iter().any(|place| place.tls)),
            mismatch: None,
        };
        if places.is_empty() { Membership::Withheld(selection) } else { Membership::Listed(selection) }
    }
}

/// `outbound|80||host` as people write it: `host:80`.
fn service(cluster: &str) -> String {
    let mut parts = cluster.splitn(4, '|');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some("outbound"), Some(port), Some(_), Some(host)) => format!("{host}:{port}"),
        _ => cluster.to_owned(),
    }
}

fn places_of(assignment: &ClusterLoadAssignment, ours: &[IpAddr]) -> Vec<Place> {
    let endpoints = assignment.endpoints.iter().flat_map(|locality| &locality.lb_endpoints);
    endpoints.filter_map(|endpoint| place_of(endpoint, ours)).collect()
}

fn place_of(endpoint: &LbEndpoint, ours: &[IpAddr]) -> Option<Place> {
    let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else { return None };
    let Some(address::Address::SocketAddress(socket)) = host.address.as_ref()?.address.as_ref() else { return None };
    let ip: IpAddr = socket.address.parse().ok()?;
    let port = match socket.port_specifier {
        Some(PortSpecifier::PortValue(port)) => port,
        None => 0,
    };
    let mode = endpoint.metadata.as_ref().and_then(|m| m.filter_metadata.get(TRANSPORT)?.fields.get("tlsMode"));
    let tls = matches!(mode.and_then(|v| v.kind.as_ref()), Some(Kind::StringValue(mode)) if mode == "istio");
    ours.contains(&ip).then(|| Place { port: u16::try_from(port).unwrap_or(0), tls })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::proto::envoy::config::{
        core::v3::{Address, Metadata, SocketAddress},
        endpoint::v3::{Endpoint, LocalityLbEndpoints},
    };
    use prost_types::{Struct, Value};

    fn assignment(cluster: &str, endpoints: &[(&str, u32, bool)]) -> ClusterLoadAssignment {
        let endpoint = |(ip, port, tls): &(&str, u32, bool)| {
            let socket =
                SocketAddress { address: (*ip).to_owned(), port_specifier: Some(PortSpecifier::PortValue(*port)) };
            let mode = Value { kind: Some(Kind::StringValue("istio".to_owned())) };
            let fields = Struct { fields: [("tlsMode".to_owned(), mode)].into() };
            LbEndpoint {
                metadata: tls.then(|| Metadata { filter_metadata: [(TRANSPORT.to_owned(), fields)].into() }),
                host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
                    address: Some(Address { address: Some(address::Address::SocketAddress(socket)) }),
                })),
            }
        };
        let lb_endpoints = endpoints.iter().map(endpoint).collect();
        let endpoints = vec![LocalityLbEndpoints { lb_endpoints }];
        ClusterLoadAssignment { cluster_name: cluster.to_owned(), endpoints }
    }

    #[test]
    fn a_service_is_forgotten_when_it_is_gone_or_does_without_us() {
        let ours: Vec<IpAddr> = vec!["10.0.0.5".parse().unwrap()];
        let (a, b) = ("outbound|80||a.example.com", "outbound|80||b.example.com");
        let listing = |clusters: &[&str]| {
            Known::found(clusters.iter().map(|c| assignment(c, &[("10.0.0.5", 80, false)])).collect(), &ours)
        };
        let there = |clusters: &[&str]| clusters.iter().map(|c| (*c).to_owned()).collect::<BTreeSet<_>>();
        let look = |clusters: &[&str], listed: &[&str], is_final: bool| {
            let mut known = listing(&[a, b]);
            known.update(&[assignment(a, &[]), assignment(b, &[])], &ours);
            assert_eq!(known.listed(), Some(false));
            known.take(Seen { clusters: there(clusters), listing: listing(listed) }, is_final);
            known.names()
        };
        assert_eq!(look(&[a, b], &[], false), there(&[a, b]), "the entry may be missing");
        assert_eq!(look(&[b], &[], false), there(&[b]), "a was deleted");
        assert_eq!(look(&[], &[], false), there(&[]));
        assert_eq!(look(&[a, b], &[b], false), there(&[b]), "a does without us");
        assert_eq!(look(&[a, b], &[], true), there(&[]), "so do both, though we are registered and healthy");
        assert_eq!(Known::default().listed(), None);
    }

    #[test]
    fn listed_withheld_or_not_selected() {
        let ours: Vec<IpAddr> = vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
        let (ps, other) = ("outbound|80||ps.example.com", "outbound|80||other.example.com");
        let mut known = Known::found(
            vec![
                assignment(ps, &[("10.0.0.9", 8080, true), ("10.0.0.5", 8080, true)]),
                assignment(other, &[("10.0.0.9", 80, false)]),
            ],
            &ours,
        );
        assert_eq!(known.names(), [ps.to_owned()].into());
        let selection = Selection {
            services: vec!["ps.example.com:80".to_owned()],
            ports: vec![8080],
            tls: Some(true),
            mismatch: None,
        };
        assert_eq!(known.membership(), Membership::Listed(selection));

        assert!(!known.update(&[assignment(other, &[("10.0.0.5", 1, true)])], &ours), "nobody asked for that one");
        assert!(known.update(&[assignment(ps, &[("10.0.0.9", 8080, true)])], &ours));
        assert!(matches!(known.membership(), Membership::Withheld(s) if s.tls.is_none() && s.ports.is_empty()));

        assert!(known.update(&[assignment(ps, &[("fd00::5", 8080, false)])], &ours));
        assert!(matches!(known.membership(), Membership::Listed(s) if s.tls == Some(false)));
        assert_eq!(Known::found(vec![assignment(other, &[])], &ours).membership(), Membership::NotSelected);
    }
}
