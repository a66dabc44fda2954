//! The real program, run as a service manager runs it: on a host of the tests, its output kept.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use crate::support::{Host, SOON};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use std::{
    fs::File,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    process::{Child, Command},
    time::{Instant, interval, timeout},
};
use we_agent::status::{Report, WorkloadReport};

/// From one look at `status` to the next.
const LOOK: Duration = Duration::from_millis(50);

/// The program on this host.
pub(crate) fn we_agent(host: &Host) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_we-agent"));
    command.env_clear().env("WE_AGENT_ROOT", host.path("/")).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Whether we may look into a daemon's own files in `/proc`; said aloud when not.
pub(crate) fn may_look() -> bool {
    let may = geteuid().is_root();
    if !may {
        println!("skipped: what /proc has of the daemon is for root alone");
    }
    may
}

/// A running daemon; killed when dropped.
pub(crate) struct Daemon<'a> {
    host: &'a Host,
    child: Child,
    log: PathBuf,
}

impl<'a> Daemon<'a> {
    /// Starts it with these arguments after `run`, and this environment.
    pub(crate) fn start(host: &'a Host, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let log = host.path("/daemon.log");
        let output = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = we_agent(host);
        command.arg("run").args(arguments).envs(environment.iter().copied());
        command.stdout(output.try_clone().unwrap()).stderr(output);
        Self::spawn(host, command)
    }

    /// Starts it by another program, which takes its name and arguments as its own last ones and becomes it.
    pub(crate) fn start_by(host: &'a Host, program: &[&str]) -> Self {
        let log = host.path("/daemon.log");
        let output = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new(program[0]);
        command.env_clear().env("WE_AGENT_ROOT", host.path("/")).env("PATH", std::env::var_os("PATH").unwrap());
        command.args(&program[1..]).args([env!("CARGO_BIN_EXE_we-agent"), "run"]);
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output).kill_on_drop(true);
        Self::spawn(host, command)
    }

    /// Starts it as `command` says, which is also where it writes to.
    pub(crate) fn spawn(host: &'a Host, mut command: Command) -> Self {
        Self { host, child: command.spawn().unwrap(), log: host.path("/daemon.log") }
    }

    /// The number of its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id().expect("it has ended already")
    }

    /// Everything that it has written so far, and those before it on the same host.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What `we-agent status` prints, errors included.
    pub(crate) async fn status(&self, arguments: &[&str]) -> String {
        let output = we_agent(self.host).arg("status").args(arguments).output().await.unwrap();
        [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat()
    }

    /// Waits until `wanted` holds for the workload.
    pub(crate) async fn until(&self, name: &str, wanted: impl Fn(&WorkloadReport) -> bool) -> WorkloadReport {
        let end = Instant::now() + SOON;
        let mut look = interval(LOOK);
        loop {
            look.tick().await;
            let said = self.status(&["--json"]).await;
            let report = serde_json::from_str::<Report>(&said).ok();
            let found = report.and_then(|r| r.workloads.into_iter().find(|w| w.name == name && wanted(w)));
            match found {
                Some(workload) => return workload,
                None => assert!(Instant::now() < end, "{name}: not in time, but {said}\n{}", self.log()),
            }
        }
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.id()).unwrap()), signal).unwrap();
    }

    /// Waits for its end, which is to be a success.
    pub(crate) async fn ended(mut self) {
        let status = timeout(SOON, self.child.wait()).await.expect("the daemon does not end").unwrap();
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// Waits for its end, whichever that is.
    pub(crate) async fn died(&mut self) -> ExitStatus {
        self.child.wait().await.unwrap()
    }

    /// Kills it, and waits until it is gone.
    pub(crate) async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}
