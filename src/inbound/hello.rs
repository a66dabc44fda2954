//! The first bytes of a connection: TLS or not, and what a ClientHello asks for.

use rustls::server::Acceptor;
use std::io;

/// The longest ClientHello that is read, in bytes: one record (RFC 8446, section 5.1).
const LONGEST: usize = 5 + (1 << 14);

/// What the first bytes are.
#[derive(Debug)]
pub(super) enum First {
    /// Too few to know.
    Short,
    /// The first record of a TLS handshake has arrived.
    Hello(Hello),
    /// No TLS, or nothing that we could answer: the text says which.
    Other(&'static str),
}

/// What we need of a ClientHello.
#[derive(Debug)]
pub(super) struct Hello {
    /// Server name indication.
    pub(super) server_name: Option<String>,
    /// The application protocols that are offered, best first.
    pub(super) protocols: Vec<Vec<u8>>,
}

/// Looks at `bytes`, all that has arrived.
pub(super) fn first(bytes: &[u8]) -> First {
    // Content type handshake, and a version that begins with 3 (RFC 8446, section 5.1).
    match bytes {
        [] | [0x16] => First::Short,
        [0x16, 3] | [0x16, 3, _] | [0x16, 3, _, _] => First::Short,
        [0x16, 3, _, high, low, rest @ ..] => {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            if length + 5 > LONGEST {
                return First::Other("its first record is longer than TLS allows");
            }
            if rest.len() < length { First::Short } else { hello(bytes) }
        }
        _ => First::Other("it does not speak TLS"),
    }
}

/// Whether `bytes` begin as a TLS handshake does, as far as they go.
pub(super) fn may_be_tls(bytes: &[u8]) -> bool {
    bytes.iter().zip([0x16, 3]).all(|(byte, tls)| *byte == tls)
}

/// The library reads it twice: here to learn what is offered, and again when the handshake is made.
fn hello(bytes: &[u8]) -> First {
    let mut acceptor = Acceptor::default();
    let mut left = bytes;
    while !left.is_empty() {
        match acceptor.read_tls(&mut left as &mut dyn io::Read) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                return First::Hello(Hello {
                    server_name: hello.server_name().map(str::to_owned),
                    protocols: hello.alpn().into_iter().flatten().map(<[u8]>::to_vec).collect(),
                });
            }
            Ok(None) => {}
            Err(_) => return First::Other("its first record is no ClientHello"),
        }
    }
    // A ClientHello in several records; nobody does that who does not test us.
    if bytes.len() > LONGEST { First::Other("its ClientHello is too long") } else { First::Short }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::aws_lc_rs};
    use std::sync::Arc;

    fn client_hello(protocols: &[&str]) -> Vec<u8> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        let mut client = ClientConnection::new(Arc::new(config), "outbound_.19080_._.a.b".try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_hello_is_read_when_it_is_whole() {
        let bytes = client_hello(&["istio", "h2"]);
        for end in 0..bytes.len() {
            assert!(matches!(first(&bytes[..end]), First::Short), "{end}");
            assert!(may_be_tls(&bytes[..end]));
        }
        let First::Hello(hello) = first(&bytes) else { panic!() };
        assert_eq!(hello.server_name.as_deref(), Some("outbound_.19080_._.a.b"));
        assert_eq!(hello.protocols, [b"istio".to_vec(), b"h2".to_vec()]);
        let First::Hello(hello) = first(&[bytes, vec![1, 2, 3]].concat()) else { panic!() };
        assert_eq!(hello.protocols.len(), 2);
    }

    #[test]
    fn everything_else_is_not_waited_for() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            &[0x15, 3, 1],
            &[0x16, 2],
            &[0x16, 3, 1, 0xff, 0xff],
            &[0x16, 3, 1, 0, 4, 9, 9, 9, 9],
        ] {
            assert!(matches!(first(bytes), First::Other(_)), "{bytes:?}");
        }
        assert!(!may_be_tls(b"G") && may_be_tls(b""));
    }
}
