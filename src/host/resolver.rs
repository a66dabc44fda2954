//! What a host name means.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
};

/// Looks names up: first those that the bundle's `hosts` file gives, then the system's resolver. So the agent finds its
/// control plane without a line in `/etc/hosts`.
#[derive(Debug, Clone, Default)]
pub struct Resolver {
    hosts: BTreeMap<String, Vec<IpAddr>>,
}

impl Resolver {
    /// A resolver that knows `hosts` before it asks the system. Names are compared without regard to case.
    pub fn new(hosts: BTreeMap<String, Vec<IpAddr>>) -> Self {
        Self { hosts: hosts.into_iter().map(|(name, ips)| (canonical(&name), ips)).collect() }
    }

    /// The addresses of `host`, at least one, in the order in which they shall be tried. Waits as long as the system's
    /// resolver does: the caller sets the bound.
    pub async fn lookup(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        if let Some(ips) = self.hosts.get(&canonical(host)).filter(|ips| !ips.is_empty()) {
            return Ok(ips.iter().map(|&ip| SocketAddr::new(ip, port)).collect());
        }
        let found: Vec<_> = tokio::net::lookup_host((host, port)).await?.collect();
        if found.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        Ok(found)
    }
}

fn canonical(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn the_bundle_comes_before_the_system() {
        let ips: Vec<IpAddr> = vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
        let hosts =
            BTreeMap::from([("Istiod.istio-system.svc".to_owned(), ips.clone()), ("localhost".to_owned(), vec![])]);
        let resolver = Resolver::new(hosts);
        let found = resolver.lookup("istiod.istio-system.SVC.", 15012).await.unwrap();
        assert_eq!(found, ips.iter().map(|&ip| SocketAddr::new(ip, 15012)).collect::<Vec<_>>());
        // A name without an address in the bundle is the system's, and literals are nobody's.
        assert!(resolver.lookup("localhost", 1).await.unwrap().iter().all(|a| a.ip().is_loopback()));
        assert_eq!(resolver.lookup("::1", 2).await.unwrap(), vec!["[::1]:2".parse().unwrap()]);
    }
}
