//! Who takes part: each a process that takes mTLS on a port and forwards to the same application, with the same
//! certificate and roots and the same rule (who is of our trust domain), on a core of its own with one worker thread.

use super::{
    application,
    client::{Target, connector},
    cores::Cores,
};
use crate::{
    SOON,
    control::{Bundle, Lab, application as healthy, group},
    process::Agent,
};
use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

/// Whose identities may call: the trust domain of the lab.
const TRUST_DOMAIN: &str = "spiffe://cluster.local/";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    WeAgent,
    Envoy,
    Ghostunnel,
}

/// The programs that can be had.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) kind: Kind,
    pub(crate) path: PathBuf,
    /// As it says itself.
    pub(crate) version: String,
}

impl Program {
    /// Asks the program at `path`.
    pub(crate) fn new(kind: Kind, path: &Path) -> anyhow::Result<Self> {
        let output = Command::new(path).arg("--version").output().with_context(|| path.display().to_string())?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned();
        let version = match kind {
            // "we-agent 0.1.0"
            Kind::WeAgent => text.split_whitespace().nth(1),
            // "envoy  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL"
            Kind::Envoy => text.rsplit('/').nth(3),
            // "rev v1.11.1 built with go1.26.8 ..."
            Kind::Ghostunnel => text.split_whitespace().nth(1),
        };
        let version = version.with_context(|| format!("{}: no version in {text:?}", path.display()))?.to_owned();
        Ok(Self { kind, path: path.to_owned(), version })
    }

    pub(crate) fn name(&self) -> &'static str {
        match self.kind {
            Kind::WeAgent => "we-agent",
            Kind::Envoy => "Envoy",
            Kind::Ghostunnel => "ghostunnel",
        }
    }
}

/// What is the same for all of them.
pub(crate) struct Stage {
    work: PathBuf,
    bundle: Bundle,
    /// The port of our listener, which the group announces.
    port: u16,
    pub(crate) application: SocketAddr,
    /// What the agent has published; every contestant and the client use it.
    published: PathBuf,
    cores: Cores,
    /// It signs for each agent that starts.
    _lab: Lab,
}

impl Stage {
    pub(crate) fn new(agent: &Path, lab: &Path, work: &Path) -> anyhow::Result<Self> {
        let cores = Cores::split()?;
        let application = application::start()?;
        let port = free_port()?;
        let lab = Lab::start(lab, &work.join("lab"), &group(port, healthy(0)?, 10), &[])?;
        let bundle = lab.bundle(&work.join("bundle"), "127.0.0.1")?;
        let published = work.join("published");
        fs::create_dir_all(&published)?;
        let first = Agent::start(agent, &work.join("first"), &bundle, "")?;
        first.until(SOON, "a certificate in a file", |agent| Ok(agent.certificate().is_some()))?;
        for name in ["key.pem", "cert-chain.pem", "root-cert.pem"] {
            fs::copy(first.published().join(name), published.join(name))?;
        }
        first.stop()?;
        Ok(Self { work: work.to_owned(), bundle, port, application, published, cores, _lab: lab })
    }

    /// A client of the mesh.
    pub(crate) fn target(&self, address: SocketAddr) -> anyhow::Result<Target> {
        Ok(Target { address, tls: Some(connector(Some(&self.published))?) })
    }

    /// Starts `program` and waits until it forwards; it must refuse who has no certificate.
    pub(crate) fn start(&self, program: &Program, runtime: &Runtime) -> anyhow::Result<Contestant> {
        let dir = self.work.join(format!("{}-{}", program.name(), free_port()?));
        fs::create_dir_all(&dir)?;
        let port = if program.kind == Kind::WeAgent { self.port } else { free_port()? };
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let process = self.cores.apart(|| match program.kind {
            Kind::WeAgent => self.agent(program, &dir, address).map(Process::Agent),
            Kind::Envoy => self.envoy(program, &dir, address).map(Process::Other),
            Kind::Ghostunnel => self.ghostunnel(program, &dir, address).map(Process::Other),
        })?;
        let mut contestant = Contestant { process, target: self.target(address)?, agreed: String::new() };
        let end = Instant::now() + SOON;
        contestant.agreed = loop {
            match runtime.block_on(contestant.target.try_once()) {
                Ok(agreed) => break agreed,
                Err(error) if Instant::now() > end => {
                    let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
                    bail!("{} does not serve: {error:#}; its log says\n{log}", program.name());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        let stranger = Target { address, tls: Some(connector(None)?) };
        if runtime.block_on(stranger.try_once()).is_ok() {
            bail!("{} lets a client without a certificate in", program.name());
        }
        Ok(contestant)
    }

    fn agent(&self, program: &Program, dir: &Path, address: SocketAddr) -> anyhow::Result<Agent> {
        let inbound = json!([{"listen": address, "forward": self.application}]);
        let settings = format!("workloads:\n  payments:\n    inbound: {inbound}\n");
        Agent::start(&program.path, dir, &self.bundle, &settings)
    }

    fn envoy(&self, program: &Program, dir: &Path, address: SocketAddr) -> anyhow::Result<Child> {
        let config = dir.join("envoy.json");
        fs::write(&config, self.bootstrap(address).to_string())?;
        let mut command = Command::new(&program.path);
        command.arg("-c").arg(config).args(["--disable-hot-restart", "--concurrency", "1", "-l", "warning"]);
        spawn(&mut command, dir)
    }

    /// A TCP proxy. As Istio does it, nothing limits the connections to the application. No tickets are sent, as ours
    /// sends none; that spares Envoy work.
    fn bootstrap(&self, address: SocketAddr) -> Value {
        let file = |name: &str| json!({"filename": self.published.join(name)});
        let place = |address: SocketAddr| {
            json!({"socket_address": {
            "address": address.ip(), "port_value": address.port()}})
        };
        let kind = |name: &str| format!("type.googleapis.com/envoy.extensions.{name}");
        let tls = json!({"name": "tls", "typed_config": {
            "@type": kind("transport_sockets.tls.v3.DownstreamTlsContext"),
            "require_client_certificate": true,
            "disable_stateless_session_resumption": true,
            "common_tls_context": {
                "tls_certificates": [{"certificate_chain": file("cert-chain.pem"), "private_key": file("key.pem")}],
                "validation_context": {
                    "trusted_ca": file("root-cert.pem"),
                    "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": TRUST_DOMAIN}}]}}}});
        let proxy = json!({"name": "proxy", "typed_config": {
            "@type": kind("filters.network.tcp_proxy.v3.TcpProxy"), "stat_prefix": "proxy", "cluster": "application"}});
        let endpoint = json!({"endpoint": {"address": place(self.application)}});
        json!({"static_resources": {
            "listeners": [{"name": "inbound", "address": place(address),
                "filter_chains": [{"transport_socket": tls, "filters": [proxy]}]}],
            "clusters": [{"name": "application", "type": "STATIC", "connect_timeout": "5s",
                "circuit_breakers": {"thresholds": [{"max_connections": u32::MAX}]},
                "load_assignment": {"cluster_name": "application", "endpoints": [{"lb_endpoints": [endpoint]}]}}]}})
    }

    fn ghostunnel(&self, program: &Program, dir: &Path, address: SocketAddr) -> anyhow::Result<Child> {
        let mut command = Command::new(&program.path);
        command.args(["server", "--quiet=all", "--allow-uri", &format!("{TRUST_DOMAIN}**")]);
        command.args(["--listen", &address.to_string(), "--target", &self.application.to_string()]);
        for (flag, name) in [("--cert", "cert-chain.pem"), ("--key", "key.pem"), ("--cacert", "root-cert.pem")] {
            command.arg(flag).arg(self.published.join(name));
        }
        spawn(command.env("GOMAXPROCS", "1"), dir)
    }
}

/// One that runs; it ends when dropped.
pub(crate) struct Contestant {
    process: Process,
    pub(crate) target: Target,
    /// In the handshake.
    pub(crate) agreed: String,
}

enum Process {
    Agent(Agent),
    Other(Child),
}

impl Contestant {
    pub(crate) fn pid(&self) -> u32 {
        match &self.process {
            Process::Agent(agent) => agent.pid(),
            Process::Other(child) => child.id(),
        }
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        if let Process::Other(child) = &mut self.process {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn(command: &mut Command, dir: &Path) -> anyhow::Result<Child> {
    let log = fs::File::create(dir.join("log"))?;
    Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?)
}

/// It was free just now.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
