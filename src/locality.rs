//! Where this host stands, as its cloud's metadata server says. (A label of the workload's own, or our configuration,
//! says it better: see [`Locality::from_labels`]. Who knows nothing says nothing, so that the template of the
//! WorkloadGroup keeps its word.)
//!
//! The firmware names the cloud, so a host elsewhere sends nothing and waits for nothing, and nobody on its network can
//! pretend to be a cloud. (Istio's agent asks all clouds over the network and waits up to five seconds.)

use crate::{
    files::{MAX_FILE, Root, read_text},
    status::{Addresses, Located},
    time::Backoff,
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
use tokio::{
    net::TcpStream,
    pin, select,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// How often is asked, in all: for about eight minutes. A network comes up in parts, and a metadata server may be late.
const TRIES: u32 = 14;
/// After so many without an answer nobody waits for one any more.
const HOPEFUL: u32 = 2;
/// From one try to the next: at first, and in the end.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
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

/// Asks the platform, as soon as this host has an address and until it answers (or was asked often enough), and writes
/// `fact`, whose only writer it is. Until `stop`.
pub async fn run(
    platform: Platform,
    root: Root,
    addresses: watch::Receiver<Addresses>,
    fact: watch::Sender<Located>,
    stop: CancellationToken,
) {
    stop.run_until_cancelled(locate(of_this_host(platform, &root), None, addresses, &fact)).await;
    stop.cancelled().await;
}

/// `server` stands in for the clouds' own addresses in tests.
async fn locate(
    platform: Platform,
    server: Option<SocketAddr>,
    mut addresses: watch::Receiver<Addresses>,
    fact: &watch::Sender<Located>,
) {
    let mut backoff = Backoff::new(WAIT.0, WAIT.1);
    let tries = if platform == Platform::Off { 0 } else { TRIES };
    for tried in 1..=tries {
        if addresses.wait_for(|addresses| addresses.primary.is_some()).await.is_err() {
            break;
        }
        if let Some(locality) = discover(platform, server).await {
            tracing::info!(%locality, "the platform has said where this host stands");
            fact.send_replace(Located::Known(locality));
            return;
        }
        if tried >= HOPEFUL {
            fact.send_replace(Located::Unknown);
        }
        sleep(if tried < HOPEFUL { WAIT.0 } else { backoff.next_wait() }).await;
    }
    fact.send_replace(Located::Unknown);
}

/// The platform to ask: the firmware's, unless one was chosen.
fn of_this_host(platform: Platform, root: &Root) -> Platform {
    match platform {
        Platform::Auto => named_by_firmware(root),
        chosen => chosen,
    }
}

/// Asks the metadata server of `platform` for the locality, within one second; none when there is none or it does not
/// say.
async fn discover(platform: Platform, server: Option<SocketAddr>) -> Option<Locality> {
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
        discover(of_this_host(platform, &root), Some(server)).await.map(|l| l.to_string())
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

    fn at(ip: Option<&str>) -> Addresses {
        Addresses { primary: ip.map(|ip| ip.parse().unwrap()), ..Addresses::default() }
    }

    /// The network comes up after the daemon, and the metadata server after the network.
    #[tokio::test]
    async fn it_is_asked_when_there_is_an_address_and_again_until_it_answers() {
        let (asks, mut asked) = watch::channel(0);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        let late = async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let asks = &asks;
                let service = service_fn(|_: Request<Incoming>| async move {
                    asks.send_modify(|asks| *asks += 1);
                    let status = if *asks.borrow() < 3 { 503 } else { 200 };
                    let answer = http::Response::builder().status(status).header("metadata-flavor", "Google");
                    Ok::<_, Infallible>(answer.body("projects/1/zones/us-east1-b".to_owned()).unwrap())
                });
                let _ = server::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            }
        };
        let (host, addresses) = watch::channel(at(None));
        let (fact, mut located) = watch::channel(Located::Soon);
        let story = async {
            tokio::task::yield_now().await;
            assert_eq!((*asked.borrow_and_update(), located.borrow().clone()), (0, Located::Soon));
            host.send_replace(at(Some("192.0.2.1")));
            // Who registers does not wait for ever.
            located.wait_for(|located| *located == Located::Unknown).await.unwrap();
            assert_eq!(*asked.borrow(), 2);
            let known = located.wait_for(|located| matches!(located, Located::Known(_))).await.unwrap().clone();
            assert_eq!(known, Located::Known(locality("us-east1", "us-east1-b").unwrap()));
        };
        tokio::select! {
            biased;
            ((), ()) = async { tokio::join!(locate(Platform::Gcp, Some(server), addresses, &fact), story) } => {}
            () = late => {}
        }
    }

    #[tokio::test]
    async fn without_a_platform_nobody_waits() {
        let (_host, addresses) = watch::channel(at(None));
        let (fact, located) = watch::channel(Located::Soon);
        locate(Platform::Off, None, addresses, &fact).await;
        assert_eq!(*located.borrow(), Located::Unknown);
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
        assert!(begun.elapsed() >= BOUND);
        assert_eq!(locality("us-west-2", "a b\n"), None);
    }
}
