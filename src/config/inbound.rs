//! `inbound`: ports on which the mesh speaks mutual TLS to us, for an application that speaks none.

use super::{allow::counted, section::Section, value};
use crate::{
    host::Local,
    inbound::{Listen, Settings},
    spiffe::IdPattern,
    workload::{is_dns_label, is_dns_subdomain},
};
use std::{
    cell::Cell,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

/// Reads one item of the list; none when it has a mistake.
pub(super) fn read(s: &mut Section<'_>) -> Option<Settings> {
    let (mut listen, mut forward, mut permissive, mut proxy_header) = (None, None, false, false);
    s.set_some("listen", self::listen, &mut listen);
    s.set_some("forward", self::forward, &mut forward);
    s.set("mode", |text| value::one_of(text, &[("strict", false), ("permissive", true)]), &mut permissive);
    let mut patterns = Vec::new();
    s.list("allow", |s| patterns.extend(pattern(s)));
    s.set("proxyProtocol", |text| value::one_of(text, &[("off", false), ("v2", true)]), &mut proxy_header);
    let (mut max_age, mut idle, mut handshake) = (None, Duration::from_secs(3600), Duration::from_secs(10));
    s.set_some("maxConnectionAge", value::up_to(value::YEAR), &mut max_age);
    s.set("idleTimeout", value::up_to(value::YEAR), &mut idle);
    s.set("handshakeTimeout", value::up_to(value::HOUR), &mut handshake);
    let (mut max_connections, mut max_handshakes) = (10_000, 1024);
    s.set("maxConnections", count, &mut max_connections);
    let mut max_per_identity = max_connections - max_connections / 8;
    s.set("maxConnectionsPerIdentity", count, &mut max_per_identity);
    s.set("maxHandshakes", count, &mut max_handshakes);
    let mut drain = Duration::from_secs(5);
    s.set("drainTimeout", self::drain, &mut drain);
    let wrong = s.is_wrong();
    let (Some(listen), Some(forward)) = (listen, forward) else {
        if !wrong {
            s.mistake(
                "must say listen (a port, or address:port) and forward (a loopback address and port, or unix:/path)",
            );
        }
        return None;
    };
    if let Local::Tcp(to) = &forward
        && listen.answers(*to)
    {
        s.mistake(&format!(
            "forwards to itself: {listen} answers at {to}, too; give the application another port, or listen on the \
             address of this host alone, for example 10.0.0.7:{}",
            to.port()
        ));
    }
    (!wrong).then_some(Settings {
        listen,
        forward,
        permissive,
        allow: patterns,
        proxy_header,
        max_age,
        idle,
        handshake,
        max_connections,
        max_per_identity,
        max_handshakes: usize::try_from(max_handshakes).unwrap_or(usize::MAX),
        drain,
    })
}

/// One entry of `allow`.
fn pattern(s: &mut Section<'_>) -> Option<IdPattern> {
    let (mut id, mut trust_domain, mut namespace, mut service_account) = (None, None, None, None);
    let seen = Cell::new(0);
    let exact = |text: &str| text.parse().map_err(|error| format!("is no SPIFFE id: {error}"));
    s.set_some("id", exact, &mut id);
    s.set_some("trustDomain", |text| counted(&seen, value::trust_domain(text)), &mut trust_domain);
    s.set_some("namespace", |text| counted(&seen, name(text, is_dns_label)), &mut namespace);
    s.set_some("serviceAccount", |text| counted(&seen, name(text, is_dns_subdomain)), &mut service_account);
    match (id, seen.get()) {
        (Some(id), 0) => Some(IdPattern::Exact(id)),
        (None, 1..) => Some(IdPattern::Parts { trust_domain, namespace, service_account }),
        _ if s.is_wrong() => None,
        _ => {
            s.mistake("must say either id, or one or more of namespace, serviceAccount and trustDomain");
            None
        }
    }
}

/// Name of a namespace or a service account, as it stands in an id.
fn name(text: &str, legal: fn(&str) -> bool) -> Result<String, String> {
    if legal(text) { Ok(text.to_owned()) } else { Err("is no name of a namespace or a service account".to_owned()) }
}

fn listen(text: &str) -> Result<Listen, String> {
    if let Ok(port) = text.parse() {
        return Ok(Listen { ip: None, port });
    }
    let address = text.parse::<SocketAddr>();
    let address = address.map_err(|_| "is neither a port nor address:port; write for example 8443 or 10.0.0.7:8443")?;
    let ip = Some(address.ip().to_canonical()).filter(|ip| !ip.is_unspecified());
    Ok(Listen { ip, port: address.port() })
}

fn forward(text: &str) -> Result<Local, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return value::path(path).map(Local::Unix);
    }
    let address = match text.parse::<u16>() {
        Ok(port) => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        Err(_) => text.parse::<SocketAddr>(),
    };
    match address {
        Ok(address) if address.port() > 0 && address.ip().to_canonical().is_loopback() => Ok(Local::Tcp(address)),
        Ok(_) => {
            Err("is not on this host alone: the bytes are no longer encrypted there, so the application must listen \
                      on a loopback address, for example 127.0.0.1:8080"
                .to_owned())
        }
        Err(_) => {
            Err("is no place of the application; write for example 127.0.0.1:8080 or unix:/run/app.sock".to_owned())
        }
    }
}

fn count(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(count @ 1..=1_000_000) => Ok(count),
        _ => Err("is no number from 1 to 1000000".to_owned()),
    }
}

fn drain(text: &str) -> Result<Duration, String> {
    let time = value::up_to(value::YEAR)(text)?;
    if time > Duration::from_secs(60) {
        return Err(
            "is longer than 60s; a service that does not stop is killed (TimeoutStopSec=, 90s by default)".to_owned()
        );
    }
    Ok(time)
}

#[cfg(test)]
mod tests;
