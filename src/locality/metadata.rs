//! The clouds' metadata servers: what each is asked, and what it says.

use super::Platform;
use crate::workload::Locality;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Request, StatusCode, header::HOST};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};
use tokio::{net::TcpStream, pin, select, task::JoinSet, time::timeout};
use tracing::debug;

/// Bounds everything that is asked.
pub(super) const BOUND: Duration = Duration::from_secs(1);
/// Bounds one answer, in bytes; Azure's, the longest, takes a few thousand.
const ANSWER: usize = 256 * 1024;

/// Where the cloud's metadata is: the same link-local address everywhere, and one for VMs with IPv6 only.
const LINK_LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
const AWS_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254));
const GCP_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254));

/// Asks the metadata server of `platform` for the locality, within one second; none when there is none or it does not
/// say.
pub(super) async fn discover(platform: Platform, server: Option<SocketAddr>) -> Option<Locality> {
    let v6 = match platform {
        Platform::Aws => Some(AWS_V6),
        Platform::Gcp => Some(GCP_V6),
        _ => None,
    };
    let servers = match server {
        Some(server) => vec![server],
        None => [LINK_LOCAL].into_iter().chain(v6).map(|ip| SocketAddr::new(ip, 80)).collect(),
    };
    let mut asked = JoinSet::new();
    for server in servers {
        match platform {
            Platform::Aws => drop(asked.spawn(aws(server))),
            Platform::Gcp => drop(asked.spawn(gcp(server))),
            Platform::Azure => drop(asked.spawn(azure(server))),
            Platform::Auto | Platform::Off => return None,
        }
    }
    let first = async {
        while let Some(answer) = asked.join_next().await {
            if let Ok(Some(locality)) = answer {
                return Some(locality);
            }
        }
        None
    };
    let found = timeout(BOUND, first).await.ok().flatten();
    debug!(?platform, ?found, "asked the cloud's metadata server");
    found
}

/// EC2: region and zone, with a session token (IMDSv2) or, where there are none, without. A look-alike that gives a
/// zone alone, as OpenStack's does, is not taken.
async fn aws(server: SocketAddr) -> Option<Locality> {
    let lifetime = [("x-aws-ec2-metadata-token-ttl-seconds", "60")];
    let token = ask(server, Method::PUT, "/latest/api/token", &lifetime).await.map(|answer| answer.body);
    let headers: Vec<_> = token.iter().map(|token| ("x-aws-ec2-metadata-token", token.as_str())).collect();
    let region = ask(server, Method::GET, "/latest/meta-data/placement/region", &headers).await?.body;
    let zone = ask(server, Method::GET, "/latest/meta-data/placement/availability-zone", &headers).await?.body;
    (zone.starts_with(&region)).then_some(())?;
    locality(&region, &zone)
}

/// GCE: `projects/<number>/zones/<zone>`; the region is the zone without its last part.
async fn gcp(server: SocketAddr) -> Option<Locality> {
    let flavor = [("metadata-flavor", "Google")];
    let answer = ask(server, Method::GET, "/computeMetadata/v1/instance/zone", &flavor).await?;
    answer.headers.get("metadata-flavor").filter(|flavor| *flavor == "Google")?;
    let zone = answer.body.rsplit('/').next()?;
    locality(zone.rsplit_once('-')?.0, zone)
}

/// Azure: location and, where there are any, zone.
async fn azure(server: SocketAddr) -> Option<Locality> {
    #[derive(serde::Deserialize)]
    struct Instance {
        compute: Compute,
    }
    #[derive(serde::Deserialize)]
    struct Compute {
        location: String,
        #[serde(default)]
        zone: String,
    }
    let answer = ask(server, Method::GET, "/metadata/instance?api-version=2019-08-15", &[("metadata", "true")]).await?;
    let Instance { compute } = serde_json::from_str(&answer.body).ok()?;
    locality(&compute.location, &compute.zone)
}

/// Takes names only: what comes from the network goes into the mesh.
pub(super) fn locality(region: &str, zone: &str) -> Option<Locality> {
    let name = |text: &str| text.len() <= 63 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    (!region.is_empty() && name(region) && name(zone)).then(|| Locality {
        region: region.to_owned(),
        zone: zone.to_owned(),
        subzone: String::new(),
    })
}

struct Answer {
    headers: HeaderMap,
    body: String,
}

/// One request on a connection of its own; none unless the answer is 200 and text.
async fn ask(server: SocketAddr, method: Method, path: &str, headers: &[(&'static str, &str)]) -> Option<Answer> {
    let mut request = Request::builder().method(method).uri(path).header(HOST, server.ip().to_string());
    for (name, value) in headers {
        request = request.header(HeaderName::from_static(name), *value);
    }
    let request = request.body(Empty::<Bytes>::new()).ok()?;
    let stream = TokioIo::new(TcpStream::connect(server).await.ok()?);
    let (mut sender, connection) = http1::handshake(stream).await.ok()?;
    let exchange = async move {
        let (parts, body) = sender.send_request(request).await.ok()?.into_parts();
        (parts.status == StatusCode::OK).then_some(())?;
        let body = Limited::new(body, ANSWER).collect().await.ok()?.to_bytes();
        let body = String::from_utf8(body.into()).ok()?.trim().to_owned();
        Some(Answer { headers: parts.headers, body })
    };
    pin!(exchange);
    select! {
        biased;
        answer = &mut exchange => answer,
        _ = connection => exchange.await,
    }
}
