//! Where a control plane listens.

use std::{fmt, net::IpAddr, str::FromStr};

/// The name istiod's certificate has for us when the address is one of this machine (as istio-agent does).
const LOCAL_NAME: &str = "istiod.istio-system.svc";
/// The port where istiod speaks without TLS.
const PLAINTEXT: u16 = 15010;

/// Why a text is no address of a control plane. Each reads on after the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// There is a scheme or a path.
    #[error("is a URL: write host:port alone")]
    Url,
    /// There is no port.
    #[error("has no port: write host:port (istiod listens on 15012), with an IPv6 address in brackets")]
    NoPort,
    /// The port is no number from 1 to 65535.
    #[error("has no port from 1 to 65535")]
    Port,
    /// The host is neither a name nor an address.
    #[error("has a host that is neither a DNS name nor an IP address")]
    Host,
    /// Port 15010 is plaintext, and has no certificate authority.
    #[error("is istiod's plaintext port, where anybody could listen in and no certificate is issued: use 15012")]
    Plaintext,
}

/// `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Authority {
    /// A DNS name or an IP address, the latter without brackets.
    pub host: String,
    /// From 1 to 65535.
    pub port: u16,
}

impl Authority {
    /// The name in the server's certificate, and the SNI: the host, but istiod's usual name where the host is a
    /// `localhost` (istio-agent's rule). `ISTIOD_SAN` and the configuration may name another.
    pub fn server_name(&self) -> &str {
        if self.host.contains("localhost") { LOCAL_NAME } else { &self.host }
    }
}

impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('/') {
            return Err(AuthorityError::Url);
        }
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => rest.split_once("]:").ok_or(AuthorityError::NoPort)?,
            None => text.rsplit_once(':').ok_or(AuthorityError::NoPort)?,
        };
        let bracketed = text.starts_with('[');
        if !bracketed && host.contains(':') {
            return Err(AuthorityError::NoPort);
        }
        let port = match port.parse::<u16>() {
            Ok(PLAINTEXT) => return Err(AuthorityError::Plaintext),
            Ok(number) if number > 0 && port.bytes().all(|b| b.is_ascii_digit()) => number,
            _ => return Err(AuthorityError::Port),
        };
        let host = match host.parse::<IpAddr>() {
            Ok(ip) if ip.is_ipv6() == bracketed => ip.to_string(),
            Err(_) if !bracketed && is_dns_name(host) => host.to_owned(),
            _ => return Err(AuthorityError::Host),
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// An address that one host can have, IPv4 taken out of IPv6; none for "any" and for groups.
pub fn host_address(ip: IpAddr) -> Option<IpAddr> {
    Some(ip.to_canonical()).filter(|ip| !ip.is_unspecified() && !ip.is_multicast())
}

/// Whether the text is an IP address or a DNS name, and so can be in a certificate.
pub fn is_host(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok() || is_dns_name(text)
}

/// A host name (RFC 1123, section 2.1), in either case; `_` is let pass as resolvers do.
fn is_dns_name(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    // A last label of digits alone means a broken IPv4 address.
    let digits = |l: &str| l.bytes().all(|b| b.is_ascii_digit());
    name.len() <= 253 && name.split('.').all(label) && !name.rsplit('.').next().is_some_and(digits)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses_print_as_they_are_written() {
        for (text, host, name) in [
            ("istiod.istio-system.svc:15012", "istiod.istio-system.svc", "istiod.istio-system.svc"),
            ("10.0.0.1:443", "10.0.0.1", "10.0.0.1"),
            ("[2001:db8::1]:15012", "2001:db8::1", "2001:db8::1"),
            ("localhost:15012", "localhost", "istiod.istio-system.svc"),
            ("my-localhost.example:1", "my-localhost.example", "istiod.istio-system.svc"),
        ] {
            let authority: Authority = text.parse().unwrap();
            assert_eq!((authority.host.as_str(), authority.server_name()), (host, name));
            assert_eq!(authority.to_string(), text);
        }
    }

    #[test]
    fn refusals_name_the_reason() {
        use AuthorityError::*;
        for (text, error) in [
            ("", NoPort),
            ("istiod", NoPort),
            ("2001:db8::1", NoPort),
            ("[2001:db8::1]", NoPort),
            ("https://istiod:15012", Url),
            ("istiod:0", Port),
            ("istiod:+1", Port),
            ("istiod:65536", Port),
            ("istiod:grpc", Port),
            ("istiod:15010", Plaintext),
            (":15012", Host),
            ("a b:15012", Host),
            ("-x:15012", Host),
            ("10.0.0:15012", Host),
            ("[istiod]:15012", Host),
            ("[fe80::1%eth0]:15012", Host),
        ] {
            assert_eq!(text.parse::<Authority>(), Err(error), "{text}");
        }
    }
}
