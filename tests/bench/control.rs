//! The other ends: a bundle and who it leads to, `we-lab` as a process, and an application that is always well.

use anyhow::{Context, ensure};
use serde_json::Value;
use std::{
    cell::RefCell,
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    time::Duration,
};

/// A bundle, and what its `mesh.yaml` says.
#[derive(Debug)]
pub(crate) struct Bundle {
    dir: PathBuf,
    /// The name of the control plane, which its certificate carries.
    pub(crate) host: String,
    /// Where it is.
    pub(crate) address: SocketAddr,
    /// Of an HTTP probe.
    pub(crate) probe_port: Option<u16>,
    /// In seconds.
    pub(crate) probe_period: Option<u64>,
}

impl Bundle {
    /// Reads the bundle in `dir`.
    pub(crate) fn read(dir: &Path) -> anyhow::Result<Self> {
        let mesh = fs::read_to_string(dir.join("mesh.yaml"))
            .with_context(|| format!("{}: no mesh.yaml, so no bundle", dir.display()))?;
        let mesh: Value = serde_yaml::from_str(&mesh)?;
        let config = &mesh["defaultConfig"];
        let discovery = config["discoveryAddress"].as_str().context("mesh.yaml: no discoveryAddress")?;
        let (host, port) = discovery.rsplit_once(':').context("mesh.yaml: discoveryAddress without a port")?;
        let hosts = fs::read_to_string(dir.join("hosts")).unwrap_or_default();
        let named = hosts.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let address = named.filter(|words| words[..].contains(&host)).find_map(|words| words.first().copied());
        let address = (address.unwrap_or(host), port.parse::<u16>()?).to_socket_addrs()?.next();
        let probe = &config["readinessProbe"];
        Ok(Self {
            dir: dir.to_owned(),
            host: host.to_owned(),
            address: address.with_context(|| format!("{host}: no address"))?,
            probe_port: probe["httpGet"]["port"].as_u64().and_then(|port| port.try_into().ok()),
            probe_period: probe["periodSeconds"].as_u64(),
        })
    }

    /// Copies its files.
    pub(crate) fn copy(&self, to: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(to)?;
        for file in fs::read_dir(&self.dir)? {
            let file = file?;
            fs::copy(file.path(), to.join(file.file_name()))?;
        }
        Ok(())
    }
}

/// A running lab; killed when dropped.
pub(crate) struct Lab {
    child: Child,
    program: PathBuf,
    dir: PathBuf,
    orders: RefCell<ChildStdin>,
    counters: mpsc::Receiver<Value>,
    issued: Arc<AtomicU64>,
}

impl Lab {
    /// Starts `program serve` with state in `dir`, one [`group`], and what else it is told.
    pub(crate) fn start(program: &Path, dir: &Path, group: &str, more: &[&str]) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("group.yaml"), group)?;
        let mut command = Command::new(program);
        command.args(["serve", "--service", "payments.example.com:80:8080:app=payments", "--dir"]).arg(dir);
        command.arg("--group-file").arg(dir.join("group.yaml")).args(more);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("{}: not started; cargo build --release -p we-lab", program.display()))?;
        let orders = child.stdin.take().context("stdin of the lab")?.into();
        let mut lines = BufReader::new(child.stdout.take().context("stdout of the lab")?).lines();
        // The first line is its address: it is up.
        lines.next().context("the lab says nothing")??;
        let (sender, counters) = mpsc::channel();
        let issued = Arc::new(AtomicU64::new(0));
        let certificates = issued.clone();
        // All lines are read, or the pipe would fill.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if line.contains("\"issued\"") {
                    certificates.fetch_add(1, Relaxed);
                } else if let Some(told) =
                    serde_json::from_str::<Value>(&line).ok().as_ref().and_then(|l| l.get("counters"))
                {
                    let _ = sender.send(told.clone());
                }
            }
        });
        Ok(Self { child, program: program.to_owned(), dir: dir.to_owned(), orders, counters, issued })
    }

    /// Writes a bundle for a VM of the group to `to`.
    pub(crate) fn bundle(&self, to: &Path, ip: &str) -> anyhow::Result<Bundle> {
        let mut command = Command::new(&self.program);
        command.args(["bundle", "--internalIP", ip, "--dir"]).arg(&self.dir).arg("--output").arg(to);
        let status = command.arg("--group-file").arg(self.dir.join("group.yaml")).status()?;
        ensure!(status.success(), "we-lab bundle: {status}");
        Bundle::read(to)
    }

    /// What it has counted until now: `requests` are calls and streams, `connections` are those with a handshake.
    pub(crate) fn counter(&self, name: &str) -> anyhow::Result<u64> {
        self.order("counters")?;
        let counters = self.counters.recv_timeout(Duration::from_secs(60)).context("the lab tells no counters")?;
        counters[name].as_u64().with_context(|| format!("the lab counts no {name}"))
    }

    /// Has it do something, as `inject goaway`.
    pub(crate) fn order(&self, order: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.orders.borrow_mut(), "{order}")?)
    }

    /// The certificates until now.
    pub(crate) fn issued(&self) -> u64 {
        self.issued.load(Relaxed)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A group that announces `port`; its probe asks the application on `probe` each `period` (seconds).
pub(crate) fn group(port: u16, probe: u16, period: u32) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\n\
         kind: WorkloadGroup\n\
         metadata: {{name: payments, namespace: vms}}\n\
         spec:\n\
         \x20 metadata: {{labels: {{app: payments}}}}\n\
         \x20 template: {{serviceAccount: payments-sa, ports: {{http: {port}}}}}\n\
         \x20 probe: {{periodSeconds: {period}, httpGet: {{path: /healthz, host: 127.0.0.1, port: {probe}}}}}\n"
    )
}

/// How often an application of ours was asked.
pub(crate) static ASKED: AtomicU64 = AtomicU64::new(0);

/// Answers every connection to `port` (0: any) with 200, for as long as the process lives.
pub(crate) fn application(port: u16) -> anyhow::Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", port))
        .with_context(|| format!("port {port} of the probe is taken: stop what answers there"))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = BufReader::new(&stream).lines().map_while(Result::ok);
            let _ = request.find(String::is_empty);
            ASKED.fetch_add(1, Relaxed);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    Ok(port)
}
