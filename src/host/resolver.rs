//! What a host name means.

use crate::aside::Questions;
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs as _},
    sync::LazyLock,
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

    /// The addresses of `host`, at least one, in the order in which the system prefers them. Waits as long as the system's
    /// resolver does: the caller sets the bound. Who asks again meanwhile waits for the same answer.
    pub async fn lookup(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        if let Some(ips) = self.hosts.get(&canonical(host)).filter(|ips| !ips.is_empty()) {
            return Ok(ips.iter().map(|&ip| SocketAddr::new(ip, port)).collect());
        }
        let asked = (host.to_owned(), 0);
        let ask = move || match asked.to_socket_addrs() {
            Ok(found) => Ok(found.map(|at| at.ip()).collect()),
            Err(error) => Err((error.kind(), error.to_string())),
        };
        let found: Vec<_> =
            SYSTEM.ask(&canonical(host), ask).await.map_err(|(kind, cause)| io::Error::new(kind, cause))?;
        if found.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        Ok(found.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
    }
}

/// What a name service answered; an error as its kind and text.
type Answer = Result<Vec<IpAddr>, (io::ErrorKind, String)>;

/// What the system is being asked: a name service that hangs holds one thread for each name, however often and by whom it is
/// asked.
static SYSTEM: LazyLock<Questions<Answer>> = LazyLock::new(Questions::default);

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
