//! Which address names this host: decided purely.

use crate::status::{Addresses, Candidate};
use std::net::IpAddr;

/// One address of one interface that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) ip: IpAddr,
}

/// Chooses. What is `given` is taken as it is, loopback and addresses of a NAT gateway included; then come the source
/// address of the `route` to the control plane and the addresses of the `interfaces`, as far as others can reach us at
/// them. Addresses are canonical (an IPv4-mapped one is IPv4) and listed once.
pub(super) fn choose(given: &[IpAddr], route: Option<IpAddr>, interfaces: &[Interface]) -> Addresses {
    let mut addresses = Addresses::default();
    for ip in given {
        // The kernel may not tell the interfaces; then nothing is known of them.
        let known = interfaces.is_empty() || ip.to_canonical().is_loopback();
        let here = known || interfaces.iter().any(|interface| interface.ip.to_canonical() == ip.to_canonical());
        let origin = if here { "given" } else { "given, on no interface of this host, which is probed at localhost" };
        consider(&mut addresses, *ip, origin, None);
    }
    if let Some(ip) = route {
        consider(&mut addresses, ip, "source address of the route to the control plane", unusable(ip));
    }
    for Interface { name, ip } in interfaces {
        consider(&mut addresses, *ip, &format!("address of {name}"), unusable(*ip));
    }
    addresses
}

/// Takes `ip` in unless there is an objection; the first one taken is the primary.
fn consider(addresses: &mut Addresses, ip: IpAddr, origin: &str, objection: Option<&str>) {
    let ip = ip.to_canonical();
    if addresses.candidates.iter().any(|known| known.ip == ip) {
        return;
    }
    let reason = match (objection, addresses.primary) {
        (Some(objection), _) => format!("not used: {origin}, {objection}"),
        (None, None) => format!("primary: {origin}"),
        (None, Some(_)) => format!("also announced: {origin}"),
    };
    addresses.candidates.push(Candidate { ip, reason });
    if objection.is_none() {
        addresses.primary.get_or_insert(ip);
        addresses.all.push(ip);
    }
}

/// Why nobody else can reach us at `ip`; none if they may.
fn unusable(ip: IpAddr) -> Option<&'static str> {
    let ip = ip.to_canonical();
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    match ip {
        _ if ip.is_unspecified() => Some("which is no address"),
        _ if ip.is_loopback() => Some("which is loopback"),
        _ if link_local => Some("which is link-local"),
        _ if ip.is_multicast() => Some("which is multicast"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn on(list: &[(&str, &str)]) -> Vec<Interface> {
        list.iter().map(|(name, ip)| Interface { name: (*name).to_owned(), ip: ip.parse().unwrap() }).collect()
    }

    #[test]
    fn given_beats_route_beats_interfaces() {
        let up = on(&[
            ("lo", "127.0.0.1"),
            ("eth0", "10.0.0.4"),
            ("eth1", "10.0.0.5"),
            ("eth1", "fe80::5"),
            ("eth1", "fd00::5"),
        ]);
        let found = choose(&[], Some(ip("10.0.0.5")), &up);
        assert_eq!(found.primary, Some(ip("10.0.0.5")));
        assert_eq!(found.all, [ip("10.0.0.5"), ip("10.0.0.4"), ip("fd00::5")]);
        let reasons: Vec<_> = found.candidates.iter().map(|c| format!("{} {}", c.ip, c.reason)).collect();
        assert_eq!(
            reasons,
            [
                "10.0.0.5 primary: source address of the route to the control plane",
                "127.0.0.1 not used: address of lo, which is loopback",
                "10.0.0.4 also announced: address of eth0",
                "fe80::5 not used: address of eth1, which is link-local",
                "fd00::5 also announced: address of eth1",
            ]
        );
        assert_eq!(choose(&[], None, &up).primary, Some(ip("10.0.0.4")));
        let found = choose(&[ip("203.0.113.7")], None, &up);
        assert!(found.candidates[0].reason.contains("on no interface of this host"), "{found:?}");
        assert_eq!(choose(&[ip("10.0.0.4")], None, &up).candidates[0].reason, "primary: given");
        assert_eq!(found.all, [ip("203.0.113.7"), ip("10.0.0.4"), ip("10.0.0.5"), ip("fd00::5")]);
    }

    #[test]
    fn a_lone_route_may_be_unusable() {
        let found = choose(&[], Some(ip("127.0.0.1")), &on(&[("lo", "127.0.0.1")]));
        assert_eq!((found.primary, found.all.len(), found.candidates.len()), (None, 0, 1));
        assert_eq!(choose(&[ip("127.0.0.1")], None, &on(&[("lo", "127.0.0.1")])).primary, Some(ip("127.0.0.1")));
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        let special = [
            "127.0.0.1",
            "::1",
            "169.254.1.1",
            "fe80::1",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "10.0.0.1",
            "255.255.255.255",
        ];
        prop_oneof![any::<IpAddr>(), proptest::sample::select(special.to_vec()).prop_map(ip)]
    }

    proptest! {
        #[test]
        fn the_choice_holds_its_promises(
            given in proptest::collection::vec(address(), 0..3),
            route in proptest::option::of(address()),
            up in proptest::collection::vec(address(), 0..6),
        ) {
            let up: Vec<_> = up.into_iter().map(|ip| Interface { name: "eth0".to_owned(), ip }).collect();
            let found = choose(&given, route, &up);
            prop_assert_eq!(found.primary, found.all.first().copied());
            for (i, ip) in found.all.iter().enumerate() {
                prop_assert!(!found.all[..i].contains(ip), "twice: {}", ip);
                prop_assert_eq!(ip.to_canonical(), *ip);
                let was_given = given.iter().any(|g| g.to_canonical() == *ip);
                prop_assert!(was_given || unusable(*ip).is_none(), "{}", ip);
            }
            if let Some(first) = given.first() {
                prop_assert_eq!(found.primary, Some(first.to_canonical()));
            }
            // Everything that was looked at is told, once.
            for ip in given.iter().chain(&route).chain(up.iter().map(|i| &i.ip)) {
                prop_assert_eq!(found.candidates.iter().filter(|c| c.ip == ip.to_canonical()).count(), 1);
            }
        }
    }
}
