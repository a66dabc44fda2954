//! Connecting to what is probed, and saying why it failed in the words of Istio's own agent.

use crate::{
    command::words,
    host::{Local, LocalStream, Resolver, is_of_this_host},
    status::InboundPlace,
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
    sync::watch,
};

/// The source addresses that Istio's packet rules exempt from capture, so that a probe reaches the application itself.
const EXEMPT_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));
const EXEMPT_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// As the routes say.
    Ordinary,
    /// The address of the target's family that is exempt from capture, where that can work: to an address of this host
    /// (a loopback source reaches nothing else), and for IPv6 only if somebody gave `::6` to an interface.
    Exempt,
}

/// A port of this host at which we listen ourselves, in front of the application: it is the application that is asked.
#[derive(Debug, Clone)]
pub struct Detour {
    /// Our address, if it is one of several, and port.
    pub listen: (Option<IpAddr>, u16),
    /// Whether we listen there, and can serve: if not, the mesh must not call, however well the application is.
    pub place: watch::Receiver<InboundPlace>,
    /// Where the application is.
    pub to: Local,
    /// Whether it expects the header of the PROXY protocol.
    pub proxy_header: bool,
}

/// The header of a connection that stands for nobody else: version 2, command LOCAL (haproxy's proxy-protocol.txt, section
/// 2.2), which is what it is for.
const LOCAL: [u8; 16] = *b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

impl Detour {
    async fn connect(&self) -> Result<LocalStream, String> {
        let failed = |error: io::Error| format!("dial {}: connect: {}", self.to, words(&error));
        let mut stream = self.to.connect().await.map_err(failed)?;
        if self.proxy_header {
            stream.write_all(&LOCAL).await.map_err(failed)?;
        }
        Ok(stream)
    }
}

/// Connects to the first address of `host` that answers; an error is the first address's.
pub(super) async fn dial(host: &str, port: u16, source: Source, detours: &[Detour]) -> Result<LocalStream, String> {
    let mut failure = None;
    for target in resolve(host, port).await? {
        let connected = match detour(target, detours) {
            Some(detour) => detour.connect().await,
            None => connect(target, source).await.map(LocalStream::Left),
        };
        match connected {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    Err(failure.unwrap_or_else(|| format!("dial tcp: lookup {host}: no such host")))
}

/// The one in front of `target`: that of its address, or of all addresses, or else the first that has the port.
fn detour(target: SocketAddr, detours: &[Detour]) -> Option<&Detour> {
    let ip = target.ip().to_canonical();
    let near = |detour: &&Detour| match detour.listen.0 {
        Some(ours) if ours == ip => 0,
        None => 1,
        Some(_) => 2,
    };
    let of_port = detours.iter().filter(|detour| detour.listen.1 == target.port());
    of_port.min_by_key(near).filter(|_| is_of_this_host(target.ip()))
}

async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    // RFC 6761: `localhost` and the names below it are loopback. Nobody is asked, so the commonest name needs no thread.
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    if name == "localhost" || name.ends_with(".localhost") {
        return Ok(vec![(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]);
    }
    Resolver::default().lookup(host, port).await.map_err(|error| format!("dial tcp: lookup {host}: {error}"))
}

async fn connect(target: SocketAddr, source: Source) -> Result<TcpStream, String> {
    let open = || if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let failed = |from: &str, error: &io::Error| format!("dial tcp {from}{target}: connect: {}", words(error));
    let mut socket = open().map_err(|e| failed("", &e))?;
    let mut from = String::new();
    if source == Source::Exempt && is_of_this_host(target.ip()) {
        let exempt = SocketAddr::new(if target.is_ipv4() { EXEMPT_V4 } else { EXEMPT_V6 }, 0);
        match socket.bind(exempt) {
            Ok(()) => from = format!("{exempt}->"),
            Err(_) => socket = open().map_err(|e| failed("", &e))?,
        }
    }
    socket.connect(target).await.map_err(|e| failed(&from, &e))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn the_source_follows_the_family_of_the_target() {
        let v4 = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = v4.local_addr().unwrap().port();
        let (_kept, accepted) = tokio::join!(dial("127.0.0.1", port, Source::Exempt, &[]), v4.accept());
        assert_eq!(accepted.unwrap().1.ip(), EXEMPT_V4);
        let (_kept, accepted) = tokio::join!(dial("127.0.0.1", port, Source::Ordinary, &[]), v4.accept());
        assert_eq!(accepted.unwrap().1.ip(), IpAddr::V4(Ipv4Addr::LOCALHOST));
        // No interface has ::6 here, and the probe works all the same.
        let Ok(v6) = TcpListener::bind("[::1]:0").await else { return };
        let port = v6.local_addr().unwrap().port();
        let (stream, accepted) = tokio::join!(dial("::1", port, Source::Exempt, &[]), v6.accept());
        assert!(stream.is_ok() && accepted.is_ok());
    }

    #[tokio::test]
    async fn the_application_is_asked_where_we_listen_in_front_of_it() {
        let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let place = watch::channel(InboundPlace::Absent).1;
        let to = Local::Tcp(application.local_addr().unwrap());
        let detours = [Detour { listen: (None, 1), place, to, proxy_header: false }];
        assert!(dial("localhost", 1, Source::Exempt, &detours).await.is_ok());
    }

    #[test]
    fn of_two_listeners_of_a_port_that_of_the_address_is_looked_behind() {
        let detour_of = |listen: (Option<&str>, u16), forward: u16| Detour {
            listen: (listen.0.map(|ip| ip.parse().unwrap()), listen.1),
            place: watch::channel(InboundPlace::Absent).1,
            to: Local::Tcp((Ipv4Addr::LOCALHOST, forward).into()),
            proxy_header: false,
        };
        let detours = [
            detour_of((Some("127.0.0.7"), 80), 1),
            detour_of((Some("127.0.0.8"), 80), 2),
            detour_of((Some("::1"), 80), 3),
            detour_of((None, 81), 4),
        ];
        let behind = |target: &str| detour(target.parse().unwrap(), &detours).map(|detour| detour.to.to_string());
        assert_eq!(behind("127.0.0.8:80").unwrap(), "127.0.0.1:2");
        assert_eq!(behind("[::1]:80").unwrap(), "127.0.0.1:3");
        assert_eq!(behind("127.0.0.1:80").unwrap(), "127.0.0.1:1", "of none, the first");
        assert_eq!(behind("127.0.0.8:81").unwrap(), "127.0.0.1:4");
        assert_eq!((behind("127.0.0.8:82"), behind("192.0.2.1:80")), (None, None));
    }

    #[tokio::test]
    async fn failures_name_both_ends() {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        assert_eq!(
            dial("127.0.0.1", port, Source::Exempt, &[]).await.unwrap_err(),
            format!("dial tcp 127.0.0.6:0->127.0.0.1:{port}: connect: connection refused")
        );
        assert_eq!(
            dial("localhost", port, Source::Ordinary, &[]).await.unwrap_err(),
            format!("dial tcp 127.0.0.1:{port}: connect: connection refused")
        );
    }
}
