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
    sync::mpsc,
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
}

impl Lab {
    /// Starts `program serve` with state in `dir` and one group, which announces `port`; its probe asks the application
    /// on `probe`.
    pub(crate) fn start(program: &Path, dir: &Path, port: u16, probe: u16) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("group.yaml"), group(port, probe))?;
        let mut command = Command::new(program);
        command.args(["serve", "--service", "payments.example.com:80:8080:app=payments", "--dir"]).arg(dir);
        command.arg("--group-file").arg(dir.join("group.yaml")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("{}: not started; cargo build --release -p we-lab", program.display()))?;
        let orders = child.stdin.take().context("stdin of the lab")?.into();
        let mut lines = BufReader::new(child.stdout.take().context("stdout of the lab")?).lines();
        // The first line is its address: it is up.
        lines.next().context("the lab says nothing")??;
        let (sender, counters) = mpsc::channel();
        // All lines are read, or the pipe would fill.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some(told) = serde_json::from_str::<Value>(&line).ok().as_ref().and_then(|l| l.get("counters")) {
                    let _ = sender.send(told.clone());
                }
            }
        });
        Ok(Self { child, program: program.to_owned(), dir: dir.to_owned(), orders, counters })
    }

    /// Writes a bundle for the group to `to`.
    pub(crate) fn bundle(&self, to: &Path) -> anyhow::Result<Bundle> {
        let mut command = Command::new(&self.program);
        command.args(["bundle", "--internalIP", "127.0.0.1", "--dir"]).arg(&self.dir).arg("--output").arg(to);
        let status = command.arg("--group-file").arg(self.dir.join("group.yaml")).status()?;
        ensure!(status.success(), "we-lab bundle: {status}");
        Bundle::read(to)
    }

    /// Calls and streams until now.
    pub(crate) fn requests(&self) -> anyhow::Result<u64> {
        writeln!(self.orders.borrow_mut(), "counters")?;
        let counters = self.counters.recv_timeout(Duration::from_secs(5)).context("the lab tells no counters")?;
        counters["requests"].as_u64().context("the lab counts no requests")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn group(port: u16, probe: u16) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\n\
         kind: WorkloadGroup\n\
         metadata: {{name: payments, namespace: vms}}\n\
         spec:\n\
         \x20 metadata: {{labels: {{app: payments}}}}\n\
         \x20 template: {{serviceAccount: payments-sa, ports: {{http: {port}}}}}\n\
         \x20 probe: {{periodSeconds: 10, httpGet: {{path: /healthz, port: {probe}}}}}\n"
    )
}

/// Answers every connection to `port` (0: any) with 200, for as long as the process lives.
pub(crate) fn application(port: u16) -> anyhow::Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", port))
        .with_context(|| format!("port {port} of the probe is taken: stop what answers there"))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = BufReader::new(&stream).lines().map_while(Result::ok);
            let _ = request.find(String::is_empty);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    Ok(port)
}
