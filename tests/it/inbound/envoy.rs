//! The real Envoy calls, as the sidecars of the mesh do: HTTP/1.1, HTTP/2 and plain TCP.

use super::{Pod, WEB, inbound, started, vm};
use crate::{
    peers_envoy::{envoy::Http, program},
    rotation::{ID, lab},
    support::{Running, SOON},
};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use std::{
    convert::Infallible,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};
use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    time::{Instant, interval},
};
use we_lab::Lab;

/// Answers with the version of HTTP that it was asked in: HTTP/2 where a connection begins with its preface.
async fn application() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let answer = service_fn(|request: Request<Incoming>| async move {
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(format!("{:?}", request.version())))))
                });
                let mut first = [0];
                stream.peek(&mut first).await.unwrap();
                let io = TokioIo::new(stream);
                // The preface begins with P, and nobody here sends a POST.
                if first == *b"P" {
                    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(io, answer)
                        .await;
                } else {
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, answer).await;
                }
            });
        }
    });
    address
}

/// An Envoy that takes HTTP on three sockets of its directory, each the name of a way to call.
struct Client {
    child: Child,
    dir: TempDir,
}

impl Client {
    async fn start(program: &Path, lab: &Lab, at: SocketAddr, expects: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (key, chain) = lab.ca().pod(&[WEB], SystemTime::now(), Duration::from_secs(3600)).unwrap();
        for (name, text) in [("key.pem", key), ("chain.pem", chain), ("roots.pem", lab.root_pem())] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let config = dir.path().join("envoy.json");
        std::fs::write(&config, serde_json::to_vec_pretty(&bootstrap(dir.path(), at, expects)).unwrap()).unwrap();
        let log = std::fs::File::create(dir.path().join("envoy.log")).unwrap();
        let mut command = Command::new(program);
        command.arg("-c").arg(&config).args(["--disable-hot-restart", "--concurrency", "1", "-l", "warning"]);
        let child = command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let client = Self { child, dir };
        let (end, mut look) = (Instant::now() + SOON, interval(Duration::from_millis(20)));
        while std::os::unix::net::UnixStream::connect(client.dir.path().join("tcp")).is_err() {
            assert!(Instant::now() < end, "{}", std::fs::read_to_string(client.dir.path().join("envoy.log")).unwrap());
            look.tick().await;
        }
        client
    }

    /// One request, which is blocking.
    async fn get(&self, way: &str) -> Result<String, String> {
        let path = self.dir.path().join(way);
        tokio::task::spawn_blocking(move || Http::open(&path)?.get("/")).await.unwrap()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As istiod writes it, but for addresses and files.
fn bootstrap(dir: &Path, at: SocketAddr, expects: &str) -> Value {
    let pipe = |name: &str| json!({"pipe": {"path": dir.join(name)}});
    let file = |name: &str| json!({"filename": dir.join(name)});
    let cluster = |name: &str, protocols: &[&str], options: Value| {
        let mut cluster = json!({"name": name, "type": "STATIC", "connect_timeout": "5s",
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address":
                {"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}}}}]}]},
            "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": "outbound_.19080_._.payments.vms.svc.cluster.local",
                "common_tls_context": {"alpn_protocols": protocols,
                    "tls_certificates": [{"certificate_chain": file("chain.pem"), "private_key": file("key.pem")}],
                    "validation_context": {"trusted_ca": file("roots.pem"),
                        "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": expects}}]}}}}});
        if !options.is_null() {
            cluster["typed_extension_protocol_options"] = json!({
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": options}});
        }
        cluster
    };
    let http = |name: &str| {
        json!({"name": name, "address": pipe(name), "filter_chains": [{"filters": [{"name": "http", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name, "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
                {"match": {"prefix": "/"}, "route": {"cluster": name}}]}]},
            "http_filters": [{"name": "router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}}]}]})
    };
    let tcp = json!({"name": "tcp", "address": pipe("tcp"), "filter_chains": [{"filters": [{"name": "tcp", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "tcp", "cluster": "tcp"}}]}]});
    json!({"static_resources": {
        "listeners": [http("h1"), http("h2"), tcp],
        "clusters": [
            cluster("h1", &["istio-http/1.1", "istio", "http/1.1"], json!({"http_protocol_options": {}})),
            cluster("h2", &["istio-h2", "istio", "h2"], json!({"http2_protocol_options": {}})),
            cluster("tcp", &["istio-peer-exchange", "istio"], Value::Null),
        ],
    }})
}

async fn renewed(agent: &mut Running, times: usize) {
    for _ in 0..times {
        let serial = agent.workload("payments").unwrap().identity.serial;
        agent.until("payments", "renewed", |w| w.identity.serial != serial).await;
    }
}

#[tokio::test]
async fn envoy_calls_in_every_way_that_the_mesh_has() {
    let Some(program) = program() else { return };
    let lab = lab().ttl(Duration::from_secs(2)).spawn().await.unwrap();
    let (_host, mut agent, at) = started(vm(&lab, application().await, "")).await;
    let envoy = Client::start(&program, &lab, at, ID).await;
    let answers = [("h1", "HTTP/1.1"), ("h2", "HTTP/2.0"), ("tcp", "HTTP/1.1")];
    for (way, version) in answers {
        assert_eq!(envoy.get(way).await.as_deref(), Ok(version), "{way}: {:?}", inbound(&agent));
    }
    // The certificate is renewed; connections that are open and those that are new go on.
    let mut calls = 0;
    for _ in 0..3 {
        renewed(&mut agent, 1).await;
        for (way, version) in answers.iter().cycle().take(30) {
            assert_eq!(envoy.get(way).await.as_deref(), Ok(*version), "{way} after {calls} calls");
            calls += 1;
        }
    }
    let seen = inbound(&agent);
    assert!(seen.refused.is_empty() && seen.handshakes.count >= 30, "{seen:?}");
    agent.stop().await;
}

#[tokio::test]
async fn envoy_refuses_who_is_not_whom_it_expects() {
    let Some(program) = program() else { return };
    let lab = lab().spawn().await.unwrap();
    let (_host, mut agent, at) = started(vm(&lab, application().await, "")).await;
    let envoy = Client::start(&program, &lab, at, "spiffe://cluster.local/ns/vms/sa/somebody-else").await;
    let refusal = envoy.get("h1").await.unwrap_err();
    assert!(refusal.contains("503"), "{refusal}");
    // TLS 1.3 with an alert, or it just leaves.
    let told = |w: &we_agent::status::WorkloadReport| !w.inbound[0].refused.is_empty();
    let told = agent.until("payments", "told", told).await;
    assert_eq!(told.inbound[0].handshakes.count, 0, "{:?}", told.inbound[0]);
    // Another client is not disturbed by it.
    let pod = Pod::new(&lab, WEB);
    assert!(pod.echo(at, b"GET / HTTP/1.0\r\n\r\n").await.starts_with(b"HTTP/1.0 200"));
    agent.stop().await;
}
