//! What the stories are told with: a VM in a temporary directory, the agent on it, and waiting with a deadline.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, SystemTime},
};
use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use we_agent::{
    agent::Agent,
    config::Config,
    files::Root,
    status::{Report, Status, WorkloadReport},
};
use we_lab::BundleOptions;

/// How long a thing may take that should take milliseconds; a busy machine is slow.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A VM: its file system is a temporary directory.
pub(crate) struct Host {
    dir: TempDir,
}

impl Host {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// Where `path` is on it.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches('/'))
    }

    /// Puts a bundle in place.
    pub(crate) fn bundle(self, workload: &str, bundle: &BundleOptions) -> Self {
        bundle.write(self.path("/etc/we-agent").join(workload)).unwrap();
        self
    }

    /// Writes `we-agent.yaml`; the admin address is added.
    pub(crate) fn config(self, yaml: &str) -> Self {
        let file = self.path("/etc/we-agent/we-agent.yaml");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, yaml).unwrap();
        self
    }

    /// Starts the agent, in this process.
    pub(crate) async fn start(&self) -> Running {
        self.start_with(None).await
    }

    /// Starts the agent with a directory of credentials, as systemd gives it.
    pub(crate) async fn start_with(&self, credentials: Option<PathBuf>) -> Running {
        let root = Root::new(self.dir.path());
        let mut config = Config::load(&root, None).unwrap();
        config.admin_address = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        let agent = Agent::bind(&root, config).await.unwrap().with_credentials(credentials);
        let (status, stop) = (agent.status(), CancellationToken::new());
        let admin = agent.admin_address().unwrap();
        Running { status, admin, task: tokio::spawn(agent.run(stop.clone())), stop }
    }
}

/// A running agent. Dropping it is a crash; [`Running::stop`] is a stop.
pub(crate) struct Running {
    pub(crate) status: Status,
    pub(crate) admin: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    /// Everything as it is now.
    pub(crate) fn report(&self) -> Report {
        self.status.report(SystemTime::now())
    }

    /// One workload as it is now; none before its bundle was read.
    pub(crate) fn workload(&self, name: &str) -> Option<WorkloadReport> {
        self.report().workloads.into_iter().find(|w| w.name == name)
    }

    /// Waits until `wanted` holds for the workload; says what it was instead when it takes too long.
    pub(crate) async fn until(
        &mut self,
        name: &str,
        what: &str,
        wanted: impl Fn(&WorkloadReport) -> bool,
    ) -> WorkloadReport {
        let end = Instant::now() + SOON;
        loop {
            if let Some(w) = self.workload(name).filter(|w| wanted(w)) {
                return w;
            }
            assert!(Instant::now() < end, "{name}: not {what} in time, but {:#?}", self.workload(name));
            // A certificate expires, and files are written, without waking the readers of the status.
            let _ = timeout(Duration::from_millis(20), self.status.changed()).await;
        }
    }

    /// Waits until the workload is ready.
    pub(crate) async fn ready(&mut self, name: &str) -> WorkloadReport {
        self.until(name, "ready", |w| w.ready).await
    }

    /// Stops it in order, as SIGTERM does.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        timeout(SOON, self.task).await.expect("the agent did not stop in time").unwrap();
    }

    /// Ends it as a crash would: nothing is said to anybody.
    pub(crate) async fn crash(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// An application on a port of its own whose `/healthz` can be made to fail.
pub(crate) struct App {
    pub(crate) port: u16,
    pub(crate) healthy: watch::Sender<bool>,
    /// How many requests it has answered.
    pub(crate) answered: watch::Receiver<u64>,
    task: JoinHandle<()>,
}

impl App {
    /// Starts it, healthy.
    pub(crate) async fn start() -> Self {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (healthy, state) = watch::channel(true);
        let (count, answered) = watch::channel(0);
        let task = tokio::spawn(async move {
            loop {
                let Ok((mut stream, _)) = listener.accept().await else { return };
                let (state, count) = (state.clone(), count.clone());
                tokio::spawn(async move {
                    let mut request = [0; 2048];
                    let _ = stream.read(&mut request).await;
                    let line = if *state.borrow() { "200 OK" } else { "503 Service Unavailable" };
                    let answer = format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                    let _ = stream.write_all(answer.as_bytes()).await;
                    count.send_modify(|count| *count += 1);
                });
            }
        });
        Self { port, healthy, answered, task }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}
