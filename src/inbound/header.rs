//! The header that tells the application who calls: PROXY protocol, version 2 (haproxy's proxy-protocol.txt, section 2.2).

use super::handshake::Welcome;
use crate::spiffe::SpiffeId;
use rustls::ProtocolVersion;
use std::net::{IpAddr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// Kinds of the additional fields.
const ALPN: u8 = 0x01;
const AUTHORITY: u8 = 0x02;
const SSL: u8 = 0x20;
const SSL_VERSION: u8 = 0x21;
const SSL_CN: u8 = 0x22;
/// The first kind that is nobody's (`PP2_TYPE_MIN_CUSTOM`): the peer's SPIFFE id.
pub(super) const SPIFFE_ID: u8 = 0xE0;
/// The peer speaks TLS, and has shown a certificate on this connection.
const SSL_WITH_CERTIFICATE: u8 = 0x01 | 0x02;

/// The header of a connection from `peer` to `local`.
pub(super) fn header(peer: SocketAddr, local: SocketAddr, welcome: &Welcome) -> Vec<u8> {
    let mut body = addresses(peer, local);
    let family = if body.len() == 12 { TCP4 } else { TCP6 };
    if let Some(tls) = &welcome.tls {
        let state = tls.state();
        if let Some(protocol) = state.alpn_protocol() {
            field(&mut body, ALPN, protocol);
        }
        if let Some(name) = &welcome.server_name {
            field(&mut body, AUTHORITY, name.as_bytes());
        }
        let version = match state.protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
            _ => "TLSv1.3",
        };
        field(&mut body, SSL, &ssl(version, welcome.caller.as_ref()));
        if let Some(id) = &welcome.caller {
            field(&mut body, SPIFFE_ID, id.as_str().as_bytes());
        }
    }
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX); // an id has at most 2048 bytes, a name 255
    [&SIGNATURE[..], &[PROXY, family], &length.to_be_bytes(), &body].concat()
}

/// The verified TLS of the peer: 0 stands for a certificate that was verified. The common name is where programs look for
/// who it is; Istio's certificates have none, so their id takes its place.
fn ssl(version: &str, id: Option<&SpiffeId>) -> Vec<u8> {
    let mut fields = vec![SSL_WITH_CERTIFICATE, 0, 0, 0, 0];
    field(&mut fields, SSL_VERSION, version.as_bytes());
    if let Some(id) = id {
        field(&mut fields, SSL_CN, id.as_str().as_bytes());
    }
    fields
}

fn addresses(peer: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let ports = [peer.port().to_be_bytes(), local.port().to_be_bytes()].concat();
    match (peer.ip().to_canonical(), local.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [&from.octets()[..], &to.octets(), &ports].concat(),
        (from, to) => {
            let six = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            [&six(from)[..], &six(to), &ports].concat()
        }
    }
}

fn field(to: &mut Vec<u8>, kind: u8, value: &[u8]) {
    let Ok(length) = u16::try_from(value.len()) else { return };
    to.push(kind);
    to.extend(length.to_be_bytes());
    to.extend(value);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_plain_client_has_its_addresses_alone() {
        let welcome = Welcome { caller: None, tls: None, said: Vec::new(), server_name: None };
        let (peer, local) = ("10.0.0.1:258".parse().unwrap(), "[::ffff:10.0.0.2]:3".parse().unwrap());
        let bytes = header(peer, local, &welcome);
        assert_eq!(bytes[..12], SIGNATURE);
        assert_eq!(bytes[12..], [0x21, 0x11, 0, 12, 10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 0, 3]);
        let bytes = header("[::1]:258".parse().unwrap(), "[::1]:3".parse().unwrap(), &welcome);
        assert_eq!(bytes[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!(bytes.len(), 16 + 36);
    }

    #[test]
    fn the_id_stands_where_programs_look_for_it() {
        let id: SpiffeId = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let fields = ssl("TLSv1.3", Some(&id));
        assert_eq!(fields[..5], [3, 0, 0, 0, 0]);
        assert_eq!(fields[5..15], [&[0x21, 0, 7][..], b"TLSv1.3"].concat());
        assert_eq!(fields[15..], [&[0x22, 0, 21][..], id.as_str().as_bytes()].concat());
    }
}
