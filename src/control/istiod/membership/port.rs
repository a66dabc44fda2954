//! What a port of the application speaks.

use crate::{control::istiod::Istiod, host::is_of_this_host, status::Selection};
use rustls::ClientConnection;
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// Bound on finding out.
const PEEK: Duration = Duration::from_secs(2);

/// The label by which ambient callers are told to tunnel.
const TUNNEL: &str = "networking.istio.io/tunnel";

fn tunnelled(labels: &BTreeMap<String, String>) -> bool {
    labels.get(TUNNEL).is_some_and(|kinds| kinds.split(',').any(|kind| kind.trim() == "http"))
}

/// What to say when nobody serves a port that the mesh was told, or when the mesh will speak TLS to one where nothing
/// answers a handshake; none when all is well.
pub(super) async fn mismatch(istiod: &Istiod, ip: IpAddr, selection: &Selection) -> Option<String> {
    let workload = &istiod.workload.name;
    if tunnelled(&istiod.workload.labels) {
        return Some(format!(
            "the label {TUNNEL}=http tells the mesh that this host serves HBONE, so ambient callers go to port 15008, where \
             nobody listens; take it from the WorkloadGroup's template (and from ISTIO_METAJSON_LABELS of the bundle), then let \
             {workload} register anew: an entry keeps its labels"
        ));
    }
    let served = istiod.membership.as_ref().map_or(&[][..], |settings| &settings.served);
    for port in selection.ports.iter().filter(|port| !served.contains(port)) {
        // An address that others translate to ours leads elsewhere from here; the application is on this host all the same.
        let here = is_of_this_host(ip);
        let spoken = speaks_tls(SocketAddr::new(if here { ip } else { Ipv4Addr::LOCALHOST.into() }, *port)).await;
        if spoken.is_none() && !here {
            return Some(format!(
                "the mesh was told that {ip} serves port {port}; that address is on no interface of this host, and nobody listens                  on port {port} of localhost, so what callers find there was not looked at: compare what translates the address"
            ));
        }
        if spoken.is_none() {
            return Some(format!(
                "the mesh was told that {ip} serves port {port}, but nobody listens there, so calls from the mesh fail; \
                 start the application, or change the port in the Service, the ServiceEntry or the WorkloadGroup's template"
            ));
        }
        if selection.tls == Some(true) && spoken == Some(false) {
            return Some(format!(
                "the mesh speaks mutual TLS to port {port}, but what listens there answers no TLS handshake, so calls from the mesh fail; \
                 let we-agent answer for it (`workloads: {{{workload}: {{inbound: [{{listen: {port}, forward: ...}}]}}}}` in \
                 /etc/we-agent/we-agent.yaml), let the application serve TLS with the files in /run/we-agent/{workload}, or label the WorkloadGroup's template \
                 security.istio.io/tlsMode: disabled and register anew"
            ));
        }
    }
    None
}

/// Sends a ClientHello and looks at the first byte that comes back: a handshake or an alert (RFC 8446, section 5.1), or
/// something else. None when the connection is refused.
async fn speaks_tls(at: SocketAddr) -> Option<bool> {
    let name = rustls::pki_types::ServerName::IpAddress(at.ip().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().ok()?;
    // No root is trusted and nothing but the hello is ever sent: the connection is dropped after the first byte.
    let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), name).ok()?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello).ok()?;
    let peek = async {
        let mut tcp = match TcpStream::connect(at).await {
            Ok(tcp) => tcp,
            Err(error) => return (error.kind() != io::ErrorKind::ConnectionRefused).then_some(true),
        };
        if tcp.write_all(&hello).await.is_err() {
            return Some(false);
        }
        let mut first = [0];
        Some(matches!(tcp.read(&mut first).await, Ok(1)) && matches!(first[0], 0x15 | 0x16))
    };
    timeout(PEEK, peek).await.unwrap_or(Some(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_is_promised_by_a_label_that_lists_http() {
        for (value, promised) in [("http", true), ("none, http", true), ("none", false), ("httpx", false), ("", false)]
        {
            assert_eq!(tunnelled(&BTreeMap::from([(TUNNEL.to_owned(), value.to_owned())])), promised, "{value}");
        }
        assert!(!tunnelled(&BTreeMap::new()));
    }
}
