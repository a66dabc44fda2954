//! What a listener does, as configured.

use crate::{host::Local, spiffe::IdPattern};
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// What one listener does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `listen`.
    pub listen: Listen,
    /// `forward`: where the application is.
    pub forward: Local,
    /// `mode`: whether clients that speak no TLS are let through (`permissive`); the default is `strict`.
    pub permissive: bool,
    /// `allow`: who may call; empty stands for every identity of the workload's trust domain.
    pub allow: Vec<IdPattern>,
    /// `proxyProtocol`: `v2` tells the application who calls; the default is `off`.
    pub proxy_header: bool,
    /// `maxConnectionAge`; none lets connections live.
    pub max_age: Option<Duration>,
    /// `idleTimeout`: a connection on which nothing was moved for so long is ended (1 h, as Istio's).
    pub idle: Duration,
    /// `handshakeTimeout`: from the connection to the end of the handshake (10 s).
    pub handshake: Duration,
    /// `maxConnections`: for one more, the oldest handshake of the busiest address is ended; without one it is refused
    /// (10,000).
    pub max_connections: u64,
    /// `maxConnectionsPerIdentity`: for one more of the same caller, it is refused (seven eighths of `maxConnections`).
    pub max_per_identity: u64,
    /// `maxHandshakes`: for one more in flight, the oldest of the busiest address is ended (1,024).
    pub max_handshakes: usize,
    /// `drainTimeout`: how long open connections may go on when the service stops (5 s, at most 60 s). During a restart new
    /// ones wait as long, and callers give up before when it is long (Istio's `connectTimeout`: 10 s; Envoy's
    /// `connect_timeout`: 5 s).
    pub drain: Duration,
}

/// Where it listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// None stands for every address of the host.
    pub ip: Option<IpAddr>,
    /// The port; 0 takes any free one.
    pub port: u16,
}

impl Listen {
    /// Whether who calls `to` reaches this place.
    pub fn answers(self, to: SocketAddr) -> bool {
        self.port == to.port() && self.ip.is_none_or(|ip| ip == to.ip().to_canonical())
    }

    /// Whether both cannot be had at once: a port of every address leaves none for one address.
    pub fn overlaps(self, other: Self) -> bool {
        let same = |ip: IpAddr| other.ip.is_none_or(|other| other == ip);
        self.port == other.port && self.port > 0 && self.ip.is_none_or(same)
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            Some(ip) => SocketAddr::new(ip, self.port).fmt(f),
            None => self.port.fmt(f),
        }
    }
}
