//! From a name to a TLS connection: look it up, try its addresses, shake hands. All of it within one bound.

use super::{Error, error::text, tls};
use crate::{control::credential::Rung, host::Resolver, spiffe::X509Bundle, workload::Endpoint};
use rustls::{AlertDescription, pki_types::ServerName};
use std::{collections::VecDeque, io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Bound on a dial, whatever the name means.
const DIAL: Duration = Duration::from_secs(10);
/// Bound on the name service, within that: then the address that was good last is tried.
const LOOKUP: Duration = Duration::from_secs(4);
/// Bound on one handshake, within that: then the next address is tried.
const HANDSHAKE: Duration = Duration::from_secs(6);
/// From one address to the next while none has answered (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// How many addresses are tried, if they refuse at once; of those that do not answer it is as many as the time allows.
const MOST: usize = 256;

/// A connection, and the address that it reached.
pub(super) struct Dialled {
    pub(super) stream: TlsStream<TcpStream>,
    pub(super) peer: SocketAddr,
}

/// Dials `endpoint`, an address that was `good` before others. Nothing of a credential is sent before the server is verified
/// by `roots`; where one address leads to a stranger, the next is tried.
pub(super) async fn dial(
    endpoint: &Endpoint,
    rung: &Rung,
    roots: &X509Bundle,
    resolver: &Resolver,
    good: Option<SocketAddr>,
) -> Result<Dialled, Error> {
    let deadline = Instant::now() + DIAL;
    let address = endpoint.authority.to_string();
    let (host, port) = (&endpoint.authority.host, endpoint.authority.port);
    let found = match timeout(LOOKUP, resolver.lookup(host, port)).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {}", humantime::format_duration(LOOKUP))),
    };
    let found = match (found, good) {
        (Ok(found), _) => found,
        (Err(_), Some(good)) => vec![good],
        (Err(cause), None) => return Err(Error::Resolve { host: host.clone(), cause }),
    };
    let mut race = Race::new(order(found, good));
    // What a server said of itself is told before what a network said.
    let mut strange: Option<Error> = None;
    let mut away = Error::Connect { address: address.clone(), cause: "the name has no address".to_owned() };
    loop {
        let connected = match timeout_at(deadline, race.next()).await {
            Ok(Some(connected)) => connected,
            Ok(None) => return Err(strange.unwrap_or(away)),
            Err(_) => {
                let cause = format!("no answer within {}", humantime::format_duration(DIAL));
                return Err(strange.unwrap_or(Error::Connect { address, cause }));
            }
        };
        let connect = |cause: String| Error::Connect { address: with(&address, connected.0), cause };
        let tcp = match connected.1.and_then(|tcp| tcp.set_nodelay(true).map(|()| tcp)) {
            Ok(tcp) => tcp,
            Err(error) => {
                away = connect(error.to_string());
                continue;
            }
        };
        match shake(endpoint, rung, roots, tcp, deadline).await {
            Ok(stream) => return Ok(Dialled { stream, peer: connected.0 }),
            // The other addresses lead to servers with the same opinion of it.
            Err(Broke::Told(error @ Error::Dropped { .. })) => return Err(error),
            Err(Broke::Told(error)) => strange = Some(strange.unwrap_or(error)),
            Err(Broke::Silent(cause)) => away = connect(cause),
        }
    }
}

/// `host:port`, and the address that it was, if that is another.
fn with(address: &str, at: SocketAddr) -> String {
    if at.to_string() == address { address.to_owned() } else { format!("{address} ({at})") }
}

/// In which order the addresses that were found are tried: the one that was good first, families in turns, not all of a
/// thousand. One that was good and is not named any more comes last: the name service may be the one that errs.
fn order(mut found: Vec<SocketAddr>, good: Option<SocketAddr>) -> Vec<SocketAddr> {
    if found.len() > MOST {
        fastrand::shuffle(&mut found);
    }
    let first_v4 = found.first().is_some_and(SocketAddr::is_ipv4);
    let (ours, others): (VecDeque<_>, VecDeque<_>) = found.into_iter().partition(|at| at.is_ipv4() == first_v4);
    let (mut families, mut order) = ([ours, others], Vec::new());
    while families.iter().any(|family| !family.is_empty()) {
        for at in families.iter_mut().filter_map(VecDeque::pop_front) {
            if !order.contains(&at) {
                order.push(at);
            }
        }
    }
    let named = good.filter(|good| order.contains(good));
    if let Some(good) = named {
        order.retain(|at| *at != good);
        order.insert(0, good);
    }
    order.truncate(MOST);
    order.extend(good.filter(|_| named.is_none()));
    order
}

/// Addresses that are tried one after the other, the next when one has failed or does not answer soon.
struct Race {
    waiting: VecDeque<SocketAddr>,
    trying: JoinSet<(SocketAddr, io::Result<TcpStream>)>,
    next_at: Instant,
}

impl Race {
    fn new(addresses: Vec<SocketAddr>) -> Self {
        Self { waiting: addresses.into(), trying: JoinSet::new(), next_at: Instant::now() }
    }

    /// The next that has connected or failed; none when all have. Safe to cancel.
    async fn next(&mut self) -> Option<(SocketAddr, io::Result<TcpStream>)> {
        loop {
            if self.trying.is_empty() {
                self.next_at = Instant::now();
            }
            tokio::select! {
                Some(done) = self.trying.join_next() => {
                    self.next_at = Instant::now();
                    if let Ok(done) = done {
                        return Some(done);
                    }
                }
                () = sleep_until(self.next_at), if !self.waiting.is_empty() => {
                    self.next_at = Instant::now() + STAGGER;
                    if let Some(at) = self.waiting.pop_front() {
                        self.trying.spawn(async move { (at, TcpStream::connect(at).await) });
                    }
                }
                else => return None,
            }
        }
    }
}

/// How a handshake failed.
enum Broke {
    /// The connection ended before the server had done anything for it: as good as refused.
    Silent(String),
    Told(Error),
}

async fn shake(
    endpoint: &Endpoint,
    rung: &Rung,
    roots: &X509Bundle,
    tcp: TcpStream,
    deadline: Instant,
) -> Result<TlsStream<TcpStream>, Broke> {
    let address = endpoint.authority.to_string();
    let untrusted = |e: &rustls::Error| {
        Broke::Told(Error::Untrusted { address: address.clone(), cause: e.to_string(), fix: fix(e) })
    };
    let (config, presented) = tls::client_config(roots, rung).map_err(|e| untrusted(&e))?;
    let name = ServerName::try_from(endpoint.server_name.clone())
        .map_err(|e| Broke::Told(Error::Invalid(format!("server name {:?}: {e}", endpoint.server_name))))?;
    let within = deadline.min(Instant::now() + HANDSHAKE);
    let shaken = timeout_at(within, TlsConnector::from(Arc::new(config)).connect(name, tcp)).await;
    let late = || Broke::Told(Error::Timeout { call: "TLS handshake", address: address.clone(), within: HANDSHAKE });
    let error = match shaken.map_err(|_| late())? {
        Ok(stream) => return Ok(stream),
        Err(error) => error,
    };
    let cause = text(&error);
    Err(match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(e @ (rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented)) => untrusted(e),
        // In TLS 1.2 a refused certificate is always this; in 1.3 the handshake is over before it is looked at. A connection
        // that just breaks says nothing about it.
        Some(rustls::Error::AlertReceived(alert)) if matches!(rung, Rung::Pair(_)) && is_about_certificate(*alert) => {
            Broke::Told(Error::Dropped { address, credential: rung.describe(), cause })
        }
        None if !presented.asked() => Broke::Silent(cause),
        _ => Broke::Told(Error::Broken { address, cause }),
    })
}

/// Alerts by which a server refuses a client's certificate (RFC 8446, section 6.2).
fn is_about_certificate(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        alert,
        A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateExpired
            | A::CertificateUnknown
            | A::UnknownCA
            | A::AccessDenied
            | A::DecryptError
    )
}

fn fix(error: &rustls::Error) -> &'static str {
    use rustls::CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext,
    };
    match error {
        rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }) => {
            "set ISTIOD_SAN (or controlPlane.serverName) to a name in its certificate"
        }
        rustls::Error::InvalidCertificate(
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. },
        ) => "check the clocks of this host and of the control plane",
        _ => "if the mesh has a new root, put its root-cert.pem (and a new istio-token) in place",
    }
}

#[cfg(test)]
mod tests;
