//! An Envoy that calls as the sidecars of the mesh do, with a certificate that can be changed while it runs.

use crate::{peers_envoy::envoy::Http, support::SOON};
use serde_json::{Value, json};
use std::{
    fs,
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use tokio::time::{Instant, interval};

/// The ways to call: HTTP/1.1, a connection for each request; HTTP/2, on one connection; and bytes, a connection for each
/// that comes in. The last one shows no certificate.
pub(super) const WAYS: [&str; 3] = ["h1", "h2", "tcp"];
pub(super) const BARE: &str = "bare";

/// What it shows and whom it trusts, each in PEM.
pub(super) struct Papers {
    pub(super) key: String,
    pub(super) chain: String,
    pub(super) roots: String,
}

/// An Envoy that takes HTTP on sockets of its directory, each the name of a way to call.
pub(super) struct Client {
    child: Child,
    dir: TempDir,
}

impl Client {
    /// Calls `at`, where it `expects` to find this id.
    pub(super) async fn start(program: &Path, papers: &Papers, at: SocketAddr, expects: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_secrets(dir.path(), papers);
        let config = dir.path().join("envoy.json");
        fs::write(&config, serde_json::to_vec_pretty(&bootstrap(dir.path(), at, expects)).unwrap()).unwrap();
        let log = fs::File::create(dir.path().join("envoy.log")).unwrap();
        let mut command = Command::new(program);
        command.arg("-c").arg(&config).args(["--disable-hot-restart", "--concurrency", "1", "-l", "warning"]);
        let child = command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let client = Self { child, dir };
        client.until("listening", |client| UnixStream::connect(client.dir.path().join(BARE)).is_ok()).await;
        client
    }

    /// Gives it other papers, and waits until it has taken them.
    pub(super) async fn becomes(&self, papers: &Papers) {
        let taken =
            |client: &Self| client.figure("sds.default.update_success") + client.figure("sds.ROOTCA.update_success");
        let before = taken(self);
        write_secrets(self.dir.path(), papers);
        self.until("papers", |client| taken(client) >= before + 2).await;
    }

    async fn until(&self, what: &str, is: impl Fn(&Self) -> bool) {
        let (end, mut look) = (Instant::now() + SOON, interval(Duration::from_millis(20)));
        while !is(self) {
            let log = fs::read_to_string(self.dir.path().join("envoy.log")).unwrap();
            assert!(Instant::now() < end, "{what}: {log}");
            look.tick().await;
        }
    }

    /// A figure of its statistics; zero while there is none.
    pub(super) fn figure(&self, name: &str) -> u64 {
        let stats =
            Http::open(&self.dir.path().join("admin")).and_then(|mut http| http.get("/stats")).unwrap_or_default();
        let line = stats.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.map_or(0, |value| value.parse().unwrap())
    }

    /// One request.
    pub(super) async fn get(&self, way: &str) -> Result<String, String> {
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

/// Envoy looks again when another file is moved into the place of one that it has read.
fn write_secrets(dir: &Path, papers: &Papers) {
    let inline = |text: &String| json!({"inline_string": text});
    for (name, kind, body) in [
        (
            "default",
            "tls_certificate",
            json!({"certificate_chain": inline(&papers.chain), "private_key": inline(&papers.key)}),
        ),
        ("ROOTCA", "validation_context", json!({"trusted_ca": inline(&papers.roots)})),
    ] {
        let secret = json!({"resources": [{
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "name": name, kind: body}]});
        let new = dir.join("new");
        fs::write(&new, secret.to_string()).unwrap();
        fs::rename(new, dir.join(format!("{name}.json"))).unwrap();
    }
}

/// As istiod writes it, but for addresses and secrets.
fn bootstrap(dir: &Path, at: SocketAddr, expects: &str) -> Value {
    let pipe = |name: &str| json!({"pipe": {"path": dir.join(name)}});
    let secret = |name: &str| {
        json!({"name": name, "sds_config": {"resource_api_version": "V3",
            "path_config_source": {"path": dir.join(format!("{name}.json"))}}})
    };
    let cluster = |name: &str, protocols: &[&str], options: Value| {
        let mut cluster = json!({"name": name, "type": "STATIC", "connect_timeout": "5s",
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address":
                {"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}}}}]}]},
            "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": "outbound_.19080_._.payments.vms.svc.cluster.local",
                "common_tls_context": {"alpn_protocols": protocols,
                    "combined_validation_context": {
                        "default_validation_context": {
                            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": expects}}]},
                        "validation_context_sds_secret_config": secret("ROOTCA")}}}}});
        if name != BARE {
            let context = &mut cluster["transport_socket"]["typed_config"]["common_tls_context"];
            context["tls_certificate_sds_secret_configs"] = json!([secret("default")]);
        }
        if !options.is_null() {
            cluster["typed_extension_protocol_options"] = json!({
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options});
        }
        cluster
    };
    let options = |more: Value| {
        let mut options =
            json!({"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    let h1 = || {
        options(json!({"explicit_http_config": {"http_protocol_options": {}},
            "common_http_protocol_options": {"max_requests_per_connection": 1}}))
    };
    let h2 = options(json!({"explicit_http_config": {"http2_protocol_options": {}}}));
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
    let istio = ["istio-http/1.1", "istio", "http/1.1"];
    json!({"node": {"id": "pod", "cluster": "mesh"}, "admin": {"address": pipe("admin")}, "static_resources": {
        "listeners": [http("h1"), http("h2"), tcp, http(BARE)],
        "clusters": [
            cluster("h1", &istio, h1()),
            cluster("h2", &["istio-h2", "istio", "h2"], h2),
            cluster("tcp", &["istio-peer-exchange", "istio"], Value::Null),
            cluster(BARE, &istio, h1()),
        ],
    }})
}
