//! A real Envoy as a child, whose addresses are all sockets in one directory: no port to choose.

use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";
const HTTP: &str = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Envoy's program: `WE_AGENT_ENVOY`, or where `make test` puts the one from PyPI.
pub(super) fn program() -> Option<PathBuf> {
    let given = std::env::var_os("WE_AGENT_ENVOY").map(PathBuf::from);
    let installed = || {
        let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/venv/lib");
        let versions = fs::read_dir(lib).ok()?.flatten();
        versions.map(|version| version.path().join("site-packages/envoy/_bin/envoy")).find(|path| path.exists())
    };
    given.or_else(installed)
}

/// Which form of the protocol Envoy speaks.
#[derive(Clone, Copy)]
pub(super) enum Api {
    Sotw,
    Delta,
}

/// A running Envoy: on `plain` it takes HTTP and sends it as `client` over mTLS to its own listener `tls`, where it is
/// `server`. Each request has a connection of its own.
pub(super) struct Envoy {
    child: Child,
    dir: PathBuf,
}

/// Who Envoy is on one of its sides: whose socket it asks, and whom it expects at the other end.
pub(super) struct Side<'a> {
    pub(super) socket: &'a Path,
    pub(super) expects: &'a str,
}

impl Envoy {
    pub(super) fn start(program: &Path, dir: &Path, api: Api, server: &Side<'_>, client: &Side<'_>) -> Self {
        let config = dir.join("envoy.json");
        fs::write(&config, serde_json::to_vec_pretty(&bootstrap(dir, api, server, client)).unwrap()).unwrap();
        let log = fs::File::create(dir.join("envoy.log")).unwrap();
        let mut command = Command::new(program);
        command.arg("-c").arg(&config).args(["--disable-hot-restart", "--concurrency", "1", "-l", "warning"]);
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Self { child: command.spawn().unwrap(), dir: dir.to_owned() }
    }

    /// Where it takes TLS.
    pub(super) fn tls(&self) -> PathBuf {
        self.dir.join("tls")
    }

    /// Its listener for HTTP.
    pub(super) fn plain(&self) -> PathBuf {
        self.dir.join("plain")
    }

    /// Waits until both listeners have their secrets and a request goes through.
    pub(super) fn until_it_works(&self) {
        let end = Instant::now() + Duration::from_secs(40);
        while Http::open(&self.plain()).and_then(|mut http| http.get("/")).is_err() {
            assert!(Instant::now() < end, "Envoy does not work:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A figure of its statistics; zero while there is none.
    pub(super) fn figure(&self, name: &str) -> u64 {
        let all = Http::open(&self.dir.join("admin")).and_then(|mut http| http.get("/stats")).unwrap();
        let line = all.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.map_or(0, |value| value.parse().unwrap())
    }

    /// What it has written.
    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("envoy.log")).unwrap_or_default()
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A kept HTTP/1.1 connection.
pub(crate) struct Http(BufReader<UnixStream>);

impl Http {
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(path).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|e| e.to_string())?;
        Ok(Self(BufReader::new(stream)))
    }

    /// The body of a 200; anything else is an error.
    pub(crate) fn get(&mut self, path: &str) -> Result<String, String> {
        let text = |e: std::io::Error| e.to_string();
        self.0.get_mut().write_all(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes()).map_err(text)?;
        let (mut head, mut length, mut chunked) = (String::new(), 0, false);
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).map_err(text)? == 0 {
                return Err("closed".to_owned());
            }
            if line == "\r\n" {
                break;
            }
            let lower = line.to_lowercase();
            length = lower.strip_prefix("content-length: ").map_or(length, |n| n.trim().parse().unwrap());
            chunked |= lower.starts_with("transfer-encoding: chunked");
            head += &line;
        }
        let body = if chunked { self.chunks()? } else { self.bytes(length)? };
        if head.starts_with("HTTP/1.1 200") { Ok(body) } else { Err(format!("{head}{body}")) }
    }

    fn bytes(&mut self, length: usize) -> Result<String, String> {
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).map_err(|e| e.to_string())?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    fn chunks(&mut self) -> Result<String, String> {
        let mut body = String::new();
        loop {
            let mut size = String::new();
            self.0.read_line(&mut size).map_err(|e| e.to_string())?;
            let size = usize::from_str_radix(size.trim(), 16).map_err(|e| e.to_string())?;
            body += &self.bytes(size)?;
            self.bytes(2)?;
            if size == 0 {
                return Ok(body);
            }
        }
    }
}

/// As istiod writes it, but for the addresses.
fn bootstrap(dir: &Path, api: Api, server: &Side<'_>, client: &Side<'_>) -> Value {
    let pipe = |name: &str| json!({"pipe": {"path": dir.join(name)}});
    let sds = |name: &str, cluster: &str| {
        let api = match api {
            Api::Sotw => "GRPC",
            Api::Delta => "DELTA_GRPC",
        };
        json!({"name": name, "sds_config": {"initial_fetch_timeout": "0s", "resource_api_version": "V3",
            "api_config_source": {"api_type": api, "transport_api_version": "V3", "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {"cluster_name": cluster}}]}}})
    };
    let common = |cluster: &str, expects: &str| {
        json!({"tls_certificate_sds_secret_configs": [sds("default", cluster)],
            "combined_validation_context": {
                "default_validation_context": {
                    "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": expects}}]},
                "validation_context_sds_secret_config": sds("ROOTCA", cluster)}})
    };
    let manager = |route: Value| {
        json!({"name": "http", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "http", "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
            "http_filters": [{"name": "router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}})
    };
    let hello = json!({"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {
        "inline_string": "hello\n"}}, "response_headers_to_add": []});
    let cluster = |name: &str, address: Value, options: Value| {
        json!({"name": name, "type": "STATIC", "connect_timeout": "5s", "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}})
    };
    let h2 = json!({"@type": HTTP, "explicit_http_config": {"http2_protocol_options": {}}});
    let once = json!({"@type": HTTP, "explicit_http_config": {"http_protocol_options": {}},
        "common_http_protocol_options": {"max_requests_per_connection": 1}});
    let agent = |name: &str, socket: &Path| cluster(name, json!({"pipe": {"path": socket}}), h2.clone());
    let mut mtls = cluster("mtls", pipe("tls"), once);
    mtls["transport_socket"] = json!({"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": format!("{TLS}.UpstreamTlsContext"), "max_session_keys": 0,
        "common_tls_context": common("sds-client", client.expects)}});
    let downstream = json!({"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": format!("{TLS}.DownstreamTlsContext"), "require_client_certificate": true,
        "disable_stateless_session_resumption": true,
        "common_tls_context": common("sds-server", server.expects)}});
    json!({
    "node": {"id": "sidecar~10.0.0.9~vm-1.vms~vms.svc.cluster.local", "cluster": "payments.vms"},
    "admin": {"address": pipe("admin")},
    "static_resources": {
        "listeners": [
            {"name": "tls", "address": pipe("tls"), "filter_chains": [
                {"transport_socket": downstream, "filters": [manager(hello)]}]},
            {"name": "plain", "address": pipe("plain"), "filter_chains": [
                {"filters": [manager(json!({"match": {"prefix": "/"}, "route": {"cluster": "mtls"}}))]}]},
        ],
        "clusters": [agent("sds-server", server.socket), agent("sds-client", client.socket), mtls],
    }})
}
