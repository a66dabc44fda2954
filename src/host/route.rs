//! What the kernel's routes say.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

/// The source address that a packet to `target` would have; none where no route leads. Connecting a UDP socket asks the
/// kernel and sends nothing.
pub fn source_of_route(target: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let source = || -> io::Result<IpAddr> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(target)?;
        Ok(socket.local_addr()?.ip())
    };
    source().ok()
}

/// Whether `ip` is an address of this host: a packet to it would come from it. (That it can be bound says nothing where
/// `ip_nonlocal_bind` is set, as beside a load balancer.)
pub fn is_of_this_host(ip: IpAddr) -> bool {
    ip.is_loopback() || source_of_route(SocketAddr::new(ip, 9)) == Some(ip)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use nix::ifaddrs::getifaddrs;

    #[test]
    fn the_addresses_of_the_interfaces_are_of_this_host() {
        assert_eq!(source_of_route("127.0.0.9:1".parse().unwrap()), Some("127.0.0.1".parse().unwrap()));
        let v4 = getifaddrs().unwrap().filter_map(|i| Some(i.address?.as_sockaddr_in()?.ip())).collect::<Vec<_>>();
        assert!(!v4.is_empty() && v4.iter().all(|ip| is_of_this_host((*ip).into())), "{v4:?}");
        // Documentation addresses (RFC 5737) are nobody's, unless this very machine uses them.
        let foreign = (1..255).map(|n| Ipv4Addr::new(203, 0, 113, n)).find(|ip| !v4.contains(ip)).unwrap();
        assert!(!is_of_this_host(foreign.into()));
    }
}
