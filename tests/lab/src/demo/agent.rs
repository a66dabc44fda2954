//! The agent as its users have it: a program with files, a status and signals.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    process::{Child, Command},
    time::timeout,
};

/// For the agent to end after SIGTERM; it promises five seconds.
const END: Duration = Duration::from_secs(10);

/// A running `we-agent`. Dropping it kills it.
pub(super) struct Agent {
    program: PathBuf,
    /// Where it runs. Its root is named from here: the path of a unix socket has 107 bytes at most.
    dir: PathBuf,
    child: Child,
    id: Pid,
}

impl Agent {
    /// Starts it on the root `host` in `dir`; it logs to `agent.log` there.
    pub(super) fn start(program: &Path, dir: &Path) -> anyhow::Result<Self> {
        let program = program.canonicalize().with_context(|| format!("{}: no such program", program.display()))?;
        let log = File::create(dir.join("agent.log"))?;
        let mut command = Command::new(&program);
        command.args(["run", "--root", "host", "--log-format", "text"]).current_dir(dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // Ctrl-C in the terminal is for us; we end the agent then.
        command.process_group(0).kill_on_drop(true);
        let child = command.spawn().with_context(|| format!("{} did not start", program.display()))?;
        let id = child.id().and_then(|id| i32::try_from(id).ok()).context("the agent has no process id")?;
        Ok(Self { program, dir: dir.to_owned(), child, id: Pid::from_raw(id) })
    }

    pub(super) fn id(&self) -> Pid {
        self.id
    }

    /// What `we-agent status` prints; an error while the agent does not answer.
    pub(super) async fn status_text(&self, json: bool) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command.args(["status", "--root", "host"]).args(json.then_some("--json")).current_dir(&self.dir);
        let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The one workload of `we-agent status --json`; null until there is an answer.
    pub(super) async fn workload(&self) -> Value {
        let text = self.status_text(true).await.unwrap_or_default();
        let report: Value = serde_json::from_str(&text).unwrap_or_default();
        report["workloads"][0].clone()
    }

    /// An error once it has ended although nobody told it to.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("the agent ended by itself: {status}"),
            None => Ok(()),
        }
    }

    pub(super) fn signal_to_end(&self) -> anyhow::Result<()> {
        kill(self.id, Signal::SIGTERM).context("SIGTERM could not be sent to the agent")
    }

    /// Waits until it has ended.
    pub(super) async fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        timeout(END, self.child.wait())
            .await
            .context("the agent did not end in time after SIGTERM")?
            .map_err(Into::into)
    }

    /// Ends it whatever it does; nothing if it has ended.
    pub(super) async fn end(&mut self) {
        let runs = matches!(self.child.try_wait(), Ok(None));
        if runs && (self.signal_to_end().is_err() || self.ended().await.is_err()) {
            _ = self.child.kill().await;
        }
    }

    /// The end of its log.
    pub(super) fn last_words(&self, lines: usize) -> String {
        let log = fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}
