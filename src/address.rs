//! The loop that owns the addresses by which the mesh knows this host.
//!
//! It looks again at every second beat, so a new DHCP lease or a moved VM is noticed without a netlink socket; and it
//! publishes only what differs.

mod choice;

use crate::{
    host::{Resolver, is_of_this_host, source_of_route},
    status::{self, Addresses},
    time::{BEAT, next_beat},
};
use choice::{Interface, choose};
use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};
use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// From one look to the next while there is no address at all, as early in a boot.
const HASTE: Duration = Duration::from_millis(500);
/// How long the name of the control plane may take. Without an answer the interfaces decide.
const LOOKUP: Duration = Duration::from_secs(2);

/// Keeps `fact`, whose only writer it is, until `shutdown`.
///
/// The primary address is the first of `given` (`ISTIO_SVC_IP`, `INSTANCE_IP` or our configuration), else the source
/// address of the route to `control_plane` (host and port), else the first usable address of an interface that is up.
/// Nothing is sent to find the route.
pub async fn run(
    given: Vec<IpAddr>,
    control_plane: (String, u16),
    resolver: Resolver,
    fact: watch::Sender<Addresses>,
    shutdown: CancellationToken,
) {
    let mut route = Route { control_plane, resolver, targets: Vec::new() };
    let (mut before, mut said) = (Vec::new(), None);
    let look = async {
        loop {
            let interfaces = interfaces();
            let source = if given.is_empty() { route.source(interfaces != before).await } else { None };
            let new = choose(&given, source, &interfaces);
            if said.replace(new.primary) != Some(new.primary) {
                say(new.primary);
            }
            status::tell(&fact, new.clone());
            before = interfaces;
            sleep_until(if new.primary.is_some() { next_beat(2 * BEAT) } else { Instant::now() + HASTE }).await;
        }
    };
    shutdown.run_until_cancelled(look).await;
}

fn say(primary: Option<IpAddr>) {
    match primary {
        Some(address) if !is_of_this_host(address) => {
            info!(%address, "this host's address in the mesh, which is on no interface of it: probes ask localhost");
        }
        Some(address) => info!(%address, "this host's address in the mesh"),
        None => warn!("no usable address: give one as `address` in /etc/we-agent/we-agent.yaml"),
    }
}

/// The way to the control plane. Its name is looked up again only when the interfaces have changed or the way is lost:
/// another instance of it hardly ever means another address of ours.
struct Route {
    control_plane: (String, u16),
    resolver: Resolver,
    targets: Vec<SocketAddr>,
}

impl Route {
    async fn source(&mut self, changed: bool) -> Option<IpAddr> {
        if !changed && let Some(source) = self.targets.iter().copied().find_map(source_of_route) {
            return Some(source);
        }
        let (host, port) = &self.control_plane;
        match timeout(LOOKUP, self.resolver.lookup(host, *port)).await {
            Ok(Ok(targets)) => self.targets = targets,
            Ok(Err(error)) => debug!(%host, %error, "the control plane's name cannot be looked up"),
            Err(_) => debug!(%host, "the control plane's name is looked up for too long"),
        }
        self.targets.iter().copied().find_map(source_of_route)
    }
}

/// The addresses of the interfaces that are up; none if the kernel does not tell (a sandbox without netlink).
fn interfaces() -> Vec<Interface> {
    let found = match getifaddrs() {
        Ok(found) => found,
        Err(error) => {
            debug!(%error, "the addresses of the interfaces cannot be listed");
            return Vec::new();
        }
    };
    let ip = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    found
        .filter(|interface| interface.flags.contains(InterfaceFlags::IFF_UP))
        .filter_map(|i| Some(Interface { ip: ip(i.address?)?, name: i.interface_name }))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    async fn first_look(given: &[&str], control_plane: &str) -> Addresses {
        let (fact, mut seen) = watch::channel(Addresses::default());
        let given = given.iter().map(|ip| ip.parse().unwrap()).collect();
        let shutdown = CancellationToken::new();
        let target = (control_plane.to_owned(), 15012);
        let looking = tokio::spawn(run(given, target, Resolver::default(), fact, shutdown.clone()));
        seen.changed().await.unwrap();
        shutdown.cancel();
        looking.await.unwrap();
        seen.borrow().clone()
    }

    #[tokio::test]
    async fn what_is_given_is_first() {
        let found = first_look(&["203.0.113.7", "127.0.0.1"], "192.0.2.1").await;
        assert_eq!(found.primary, Some("203.0.113.7".parse().unwrap()));
        assert_eq!(found.all[..2], ["203.0.113.7".parse::<IpAddr>().unwrap(), "127.0.0.1".parse().unwrap()]);
    }

    #[tokio::test]
    async fn a_route_over_loopback_is_not_our_address() {
        let found = first_look(&[], "127.0.0.1").await;
        assert!(!found.candidates.is_empty());
        assert!(found.all.iter().all(|ip| !ip.is_loopback()), "{found:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_differs_is_published() {
        let (fact, mut seen) = watch::channel(Addresses::default());
        let shutdown = CancellationToken::new();
        let given = vec!["203.0.113.7".parse().unwrap()];
        let looking = run(given, ("192.0.2.1".to_owned(), 1), Resolver::default(), fact, shutdown.clone());
        let watching = async {
            seen.changed().await.unwrap();
            assert!(timeout(BEAT * 20, seen.changed()).await.is_err(), "nothing changed, but it was said");
            shutdown.cancel();
        };
        tokio::join!(looking, watching);
    }
}
