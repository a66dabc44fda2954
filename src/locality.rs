//! Where this host stands, as its cloud's metadata server says. (A label of the workload's own, or our configuration,
//! says it better: see [`Locality::from_labels`]. Who knows nothing says nothing, so that the template of the
//! WorkloadGroup keeps its word.)
//!
//! The firmware names the cloud, so a host elsewhere sends nothing and waits for nothing, and nobody on its network can
//! pretend to be a cloud. (Istio's agent asks all clouds over the network and waits up to five seconds.)

use crate::{
    files::{MAX_FILE, Root, read_text},
    workload::Locality,
};
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
const BOUND: Duration = Duration::from_secs(1);
/// Bounds one answer, in bytes; Azure's, the longest, takes a few thousand.
const ANSWER: usize = 256 * 1024;

/// Where the cloud's metadata is: the same link-local address everywhere, and one for VMs with IPv6 only.
const LINK_LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
const AWS_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254));
const GCP_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254));

/// Which cloud is asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Platform {
    /// The one that the firmware names, if any.
    #[default]
    Auto,
    /// None.
    Off,
    /// Amazon EC2.
    Aws,
    /// Google Compute Engine.
    Gcp,
    /// Microsoft Azure.
    Azure,
}

/// Asks the metadata server of `platform` for the locality, within one second; none when there is none or it does not
/// say. `server` stands in for the clouds' own addresses in tests.
pub async fn discover(platform: Platform, root: &Root, server: Option<SocketAddr>) -> Option<Locality> {
    let platform = match platform {
        Platform::Auto => named_by_firmware(root),
        chosen => chosen,
    };
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

/// The cloud by the names in the firmware's tables, which every user may read. Old EC2 instances run on Xen and name
/// Amazon only in the version.
fn named_by_firmware(root: &Root) -> Platform {
    let table = |name| {
        let file = root.path(format!("/sys/class/dmi/id/{name}"));
        read_text(&file, MAX_FILE).map(|text| text.to_string()).unwrap_or_default()
    };
    match table("sys_vendor").trim() {
        "Amazon EC2" => Platform::Aws,
        "Google" => Platform::Gcp,
        "Microsoft Corporation" => Platform::Azure,
        _ if table("bios_version").contains("amazon") => Platform::Aws,
        _ => Platform::Off,
    }
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
fn locality(region: &str, zone: &str) -> Option<Locality> {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use hyper::{body::Incoming, server::conn::http1 as server, service::service_fn};
    use std::{convert::Infallible, fs};
    use tokio::{net::TcpListener, time::Instant};

    /// A metadata server that answers by `answers`: method, path, a header that must be there, status, body.
    async fn metadata(answers: &'static [(&str, &str, &str, u16, &str)]) -> (SocketAddr, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = service_fn(move |request: Request<Incoming>| async move {
                    let found = answers.iter().find(|(method, path, header, ..)| {
                        let (name, value) = header.split_once('=').unwrap();
                        let given = request.headers().get(name).map(|v| v.as_bytes());
                        request.method() == method
                            && *request.uri().path_and_query().unwrap() == **path
                            && given == (!value.is_empty()).then_some(value.as_bytes())
                    });
                    let (status, body) = found.map_or((404, ""), |a| (a.3, a.4));
                    let answer = http::Response::builder().status(status).header("metadata-flavor", "Google");
                    Ok::<_, Infallible>(answer.body(body.to_owned()).unwrap())
                });
                let _ = server::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            }
        });
        (address, tasks)
    }

    fn host(vendor: &str) -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        fs::create_dir_all(root.path("/sys/class/dmi/id")).unwrap();
        fs::write(root.path("/sys/class/dmi/id/sys_vendor"), format!("{vendor}\n")).unwrap();
        (dir, root)
    }

    async fn found_by(platform: Platform, vendor: &str, server: SocketAddr) -> Option<String> {
        let (_dir, root) = host(vendor);
        discover(platform, &root, Some(server)).await.map(|l| l.to_string())
    }

    #[tokio::test]
    async fn aws_with_and_without_a_session_token() {
        let (v2, _tasks) = metadata(&[
            ("PUT", "/latest/api/token", "x-aws-ec2-metadata-token-ttl-seconds=60", 200, "TOKEN"),
            ("GET", "/latest/meta-data/placement/region", "x-aws-ec2-metadata-token=TOKEN", 200, "us-west-2"),
            (
                "GET",
                "/latest/meta-data/placement/availability-zone",
                "x-aws-ec2-metadata-token=TOKEN",
                200,
                "us-west-2b",
            ),
        ])
        .await;
        let (v1, _tasks) = metadata(&[
            ("GET", "/latest/meta-data/placement/region", "x-aws-ec2-metadata-token=", 200, "us-west-2"),
            ("GET", "/latest/meta-data/placement/availability-zone", "x-aws-ec2-metadata-token=", 200, "us-west-2b"),
        ])
        .await;
        for server in [v2, v1] {
            assert_eq!(found_by(Platform::Auto, "Amazon EC2", server).await.as_deref(), Some("us-west-2/us-west-2b"));
        }
        assert_eq!(found_by(Platform::Aws, "QEMU", v2).await.as_deref(), Some("us-west-2/us-west-2b"));
        assert_eq!(found_by(Platform::Auto, "QEMU", v2).await, None, "the firmware names no cloud");
        assert_eq!(found_by(Platform::Off, "Amazon EC2", v2).await, None);
        assert_eq!(found_by(Platform::Gcp, "Amazon EC2", v2).await, None);
    }

    #[tokio::test]
    async fn gcp_and_azure() {
        static ANSWERS: &[(&str, &str, &str, u16, &str)] = &[
            (
                "GET",
                "/computeMetadata/v1/instance/zone",
                "metadata-flavor=Google",
                200,
                "projects/4711/zones/us-central1-f",
            ),
            (
                "GET",
                "/metadata/instance?api-version=2019-08-15",
                "metadata=true",
                200,
                r#"{"compute":{"location":"westeurope","zone":"2","other":[1]},"network":{}}"#,
            ),
        ];
        let (server, _tasks) = metadata(ANSWERS).await;
        assert_eq!(found_by(Platform::Auto, "Google", server).await.as_deref(), Some("us-central1/us-central1-f"));
        assert_eq!(found_by(Platform::Auto, "Microsoft Corporation", server).await.as_deref(), Some("westeurope/2"));
    }

    #[tokio::test]
    async fn a_look_alike_or_a_silent_server_gives_nothing() {
        let (openstack, _tasks) = metadata(&[(
            "GET",
            "/latest/meta-data/placement/availability-zone",
            "x-aws-ec2-metadata-token=",
            200,
            "nova",
        )])
        .await;
        assert_eq!(found_by(Platform::Aws, "OpenStack Foundation", openstack).await, None);
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let begun = Instant::now();
        assert_eq!(found_by(Platform::Azure, "", silent.local_addr().unwrap()).await, None);
        assert!(begun.elapsed() >= BOUND && begun.elapsed() < BOUND * 5);
        assert_eq!(locality("us-west-2", "a b\n"), None);
    }
}
