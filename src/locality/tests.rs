#![allow(clippy::unwrap_used)]
use super::{
    metadata::{BOUND, locality},
    *,
};
use http::Request;
use hyper::{body::Incoming, server::conn::http1 as server, service::service_fn};
use hyper_util::rt::TokioIo;
use std::{convert::Infallible, fs};
use tokio::{net::TcpListener, task::JoinSet, time::Instant};

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
        ("GET", "/latest/meta-data/placement/availability-zone", "x-aws-ec2-metadata-token=TOKEN", 200, "us-west-2b"),
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
    let (openstack, _tasks) =
        metadata(&[("GET", "/latest/meta-data/placement/availability-zone", "x-aws-ec2-metadata-token=", 200, "nova")])
            .await;
    assert_eq!(found_by(Platform::Aws, "OpenStack Foundation", openstack).await, None);
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let begun = Instant::now();
    assert_eq!(found_by(Platform::Azure, "", silent.local_addr().unwrap()).await, None);
    assert!(begun.elapsed() >= BOUND);
    assert_eq!(locality("us-west-2", "a b\n"), None);
}
