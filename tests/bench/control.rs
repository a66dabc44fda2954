//! The other ends: `we-lab` as a process, and an application that is always well.

use anyhow::Context;
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

/// A running lab; killed when dropped.
pub(crate) struct Lab {
    child: Child,
    program: PathBuf,
    dir: PathBuf,
    orders: std::cell::RefCell<ChildStdin>,
    counters: mpsc::Receiver<Value>,
    issued: Arc<AtomicU64>,
}

impl Lab {
    /// Starts `we-lab serve`, which stands beside the `agent`, with state in `dir` and one group, whose probe asks the
    /// application on `port`.
    pub(crate) fn start(agent: &Path, dir: &Path, port: u16, ttl: Option<&str>) -> anyhow::Result<Self> {
        let program = agent.with_file_name("we-lab");
        fs::create_dir_all(dir)?;
        fs::write(dir.join("group.yaml"), group(port))?;
        let mut command = Command::new(&program);
        command.args(["serve", "--service", "payments.example.com:80:8080:app=payments", "--dir"]).arg(dir);
        command.arg("--group-file").arg(dir.join("group.yaml"));
        if let Some(ttl) = ttl {
            command.args(["--ttl", ttl]);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}; cargo build --release -p we-lab", program.display()))?;
        let orders = child.stdin.take().context("stdin of the lab")?.into();
        let mut lines = BufReader::new(child.stdout.take().context("stdout of the lab")?).lines();
        // The first line is its address: it is up.
        lines.next().context("the lab says nothing")??;
        let issued = Arc::new(AtomicU64::new(0));
        let (sender, counters) = mpsc::channel();
        let count = issued.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
                if event["event"] == "csr" && event["outcome"].get("issued").is_some() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
                if let Some(counters) = event.get("counters") {
                    let _ = sender.send(counters.clone());
                }
            }
        });
        Ok(Self { child, program, dir: dir.to_owned(), orders, counters, issued })
    }

    /// Writes a bundle for the group to `to`.
    pub(crate) fn bundle(&self, to: &Path) -> anyhow::Result<PathBuf> {
        let mut command = Command::new(&self.program);
        command.args(["bundle", "--internalIP", "127.0.0.1", "--dir"]).arg(&self.dir).arg("--output").arg(to);
        let status = command.arg("--group-file").arg(self.dir.join("group.yaml")).status()?;
        anyhow::ensure!(status.success(), "we-lab bundle: {status}");
        Ok(to.to_owned())
    }

    /// Connections, requests and bytes until now.
    pub(crate) fn counters(&self) -> anyhow::Result<Value> {
        writeln!(self.orders.borrow_mut(), "counters")?;
        self.counters.recv_timeout(Duration::from_secs(5)).context("the lab tells no counters")
    }

    /// Certificates issued until now.
    pub(crate) fn issued(&self) -> u64 {
        self.issued.load(Ordering::Relaxed)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn group(port: u16) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\n\
         kind: WorkloadGroup\n\
         metadata: {{name: payments, namespace: vms}}\n\
         spec:\n\
         \x20 metadata: {{labels: {{app: payments}}}}\n\
         \x20 template: {{serviceAccount: payments-sa, ports: {{http: 8080}}}}\n\
         \x20 probe: {{periodSeconds: 10, httpGet: {{path: /healthz, port: {port}}}}}\n"
    )
}

/// Answers every connection with 200, for as long as the process lives.
pub(crate) fn application() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let mut request = BufReader::new(&stream).lines().map_while(Result::ok);
            let _ = request.find(String::is_empty);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    Ok(port)
}
