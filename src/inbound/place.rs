//! Where a listener listens, and getting its socket.

use super::Listen;
use crate::{
    status::{InboundPlace, tell},
    systemd::{Listeners, listen},
    time::Backoff,
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    time::Duration,
};
use tokio::{net::TcpSocket, sync::watch};

/// How many connections may wait to be taken; the kernel has a bound of its own (`net.core.somaxconn`).
const BACKLOG: u32 = 4096;

/// Where a listener listens.
#[derive(Debug)]
pub struct Place {
    listen: Listen,
    /// What a socket that outlives us is called.
    name: String,
    inherited: Option<TcpListener>,
    /// Where it is handed on.
    listeners: Listeners,
}

impl Place {
    /// At `listen`, for `workload`.
    pub fn new(workload: &str, listen: Listen) -> Self {
        // Without colons, which a name may not have (sd_pid_notify_with_fds(3)).
        let at = listen.ip.map_or_else(String::new, |ip| format!("{ip}-").replace(':', "."));
        let name = format!("{}{workload}-{at}{}", listen::INBOUND, listen.port);
        Self { listen, name, inherited: None, listeners: Listeners::default() }
    }

    /// What its socket is called when it outlives us.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Serves the socket of the service manager that is bound there already, if there is one: of a socket unit, else one that
    /// a process before us has asked it to keep, or that a listener before us has handed on. At the end it is handed on there.
    #[must_use]
    pub fn inherit(self, listeners: &Listeners) -> Self {
        let inherited = match self.listen.port {
            0 => None,
            port => listeners.take_tcp(|at| at.port() == port && self.covers(at.ip())),
        };
        Self { inherited, listeners: listeners.clone(), ..self }
    }

    /// Hands the socket on to who listens here next. One at any port is never found again.
    pub(super) fn hand_on(&self, listener: TcpListener) {
        if self.listen.port != 0 {
            self.listeners.hand_on(&self.name, listener);
        }
    }

    /// Whether a socket bound to `ip` is ours.
    fn covers(&self, ip: IpAddr) -> bool {
        match self.listen.ip {
            Some(wanted) => wanted == ip.to_canonical(),
            None => ip.is_unspecified(),
        }
    }

    /// The socket and its address; tries until it is there.
    pub(super) async fn listen(&mut self, fact: &watch::Sender<InboundPlace>) -> (TcpListener, SocketAddr) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let got = match self.inherited.take() {
                Some(listener) => Ok(listener),
                None => self.bind(),
            };
            match got.and_then(|listener| Ok((listener.local_addr()?, listener))) {
                Ok((address, listener)) => {
                    tracing::info!(%address, "listening for the mesh");
                    return (listener, address);
                }
                Err(error) => {
                    if error.kind() == io::ErrorKind::AddrInUse && self.listen.port != 0 {
                        // Perhaps it is ours: kept for a process after this one, but this one goes on.
                        listen::forget(&self.name);
                    }
                    let cause = self.trouble(&error);
                    if *fact.borrow() != InboundPlace::Failed(cause.clone()) {
                        tracing::warn!(cause, "no inbound listener, tried again");
                    }
                    tell(fact, InboundPlace::Failed(cause));
                }
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    fn bind(&self) -> io::Result<TcpListener> {
        let listener = match self.listen.ip {
            Some(ip) => bind(SocketAddr::new(ip, self.listen.port)),
            // One socket for both families, where there are both.
            None => bind((Ipv6Addr::UNSPECIFIED, self.listen.port).into())
                .or_else(|_| bind((Ipv4Addr::UNSPECIFIED, self.listen.port).into())),
        }?;
        if self.listen.port != 0 {
            listen::keep_tcp(&self.name, &listener);
        }
        Ok(listener)
    }

    fn trouble(&self, error: &io::Error) -> String {
        let at = match self.listen.ip {
            Some(ip) => SocketAddr::new(ip, self.listen.port).to_string(),
            None => format!("port {}", self.listen.port),
        };
        let fix = match error.kind() {
            io::ErrorKind::AddrInUse if self.listen.ip.is_none() => &format!(
                "; somebody else listens there, on one address at least: if it is the application on a loopback address, let us \
                 listen on this host's own alone (`listen: 10.0.0.7:{}`, if that is it), else give it another port",
                self.listen.port
            ),
            io::ErrorKind::AddrInUse => {
                "; somebody else listens there: let the application listen on a loopback address alone, or on another port"
            }
            io::ErrorKind::PermissionDenied => {
                "; ports below 1024 are for root: let systemd listen (a socket unit), or give the service \
                 CAP_NET_BIND_SERVICE"
            }
            io::ErrorKind::AddrNotAvailable => "; this host does not have that address",
            _ => "",
        };
        format!("cannot listen on {at}: {}{fix}", crate::command::words(error))
    }
}

fn bind(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = if at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?; // connections of before may linger
    socket.bind(at)?;
    socket.listen(BACKLOG)?.into_std()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_socket_that_is_kept_has_a_name_of_its_own() {
        let name = |ip: &str| Place::new("a", Listen { ip: ip.parse().ok(), port: 80 }).name;
        assert_eq!(name(""), "inbound-a-80");
        assert_eq!(name("10.0.0.7"), "inbound-a-10.0.0.7-80");
        assert_eq!(name("fd00::1"), "inbound-a-fd00..1-80");
    }

    #[test]
    fn who_has_the_application_on_loopback_already_is_told_what_to_write() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let place = Place::new("a", Listen { ip: None, port });
        let trouble = place.trouble(&place.bind().unwrap_err());
        assert!(trouble.contains(&format!("`listen: 10.0.0.7:{port}`")), "{trouble}");
        let place = Place::new("a", Listen { ip: Some(Ipv4Addr::LOCALHOST.into()), port });
        let trouble = place.trouble(&place.bind().unwrap_err());
        assert!(trouble.contains("let the application listen on a loopback address alone"), "{trouble}");
    }
}
