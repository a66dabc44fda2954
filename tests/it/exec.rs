//! Commands of probes and hooks, run by the runner: the real program, one process for each connection. The test does
//! what systemd does for a socket unit with `Accept=yes`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use crate::{
    daemon::Daemon,
    golden_probes::every_recorded_command,
    support::{Host, SOON},
};
use nix::{sys::signal::Signal, unistd::geteuid};
use serde_json::json;
use std::{
    fs::{self, Permissions},
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command as StdCommand, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{
    net::UnixListener,
    process::Command,
    sync::watch,
    task::{JoinHandle, yield_now},
    time::timeout,
};
use we_agent::{
    command::{CommandError, Commands, Why},
    status::{HealthState, ReloadState},
};
use we_lab::{Group, Lab};

/// The user that commands run as.
const USER: &str = "4711";

/// A socket, and a process for each of its connections.
struct Runner {
    dir: TempDir,
    socket: PathBuf,
    /// How many processes have been started, and how many have ended.
    count: watch::Receiver<(usize, usize)>,
    task: JoinHandle<()>,
}

impl Runner {
    /// None without root: a runner is another user than who asks.
    fn start() -> Option<Self> {
        if !geteuid().is_root() {
            println!("skipped: a runner of another user takes root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        // Others must find the program, and commands write here.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        let (program, socket) = (dir.path().join("we-agent"), dir.path().join("exec.sock"));
        let original = env!("CARGO_BIN_EXE_we-agent");
        fs::hard_link(original, &program).or_else(|_| fs::copy(original, &program).map(drop)).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let (counter, count) = watch::channel((0, 0));
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let stream = stream.into_std().unwrap();
                stream.set_nonblocking(false).unwrap();
                let mut command = Command::from(runner(&program, stream.into()));
                let mut child = command.kill_on_drop(true).stderr(Stdio::null()).spawn().unwrap();
                // The connection is the process's alone.
                drop(command);
                counter.send_modify(|count| count.0 += 1);
                let counter = counter.clone();
                tokio::spawn(async move {
                    let _ = child.wait().await;
                    counter.send_modify(|count| count.1 += 1);
                });
            }
        });
        Some(Self { dir, socket, count, task })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn run(&self, command: &[&str], bound: Duration) -> Result<(), CommandError> {
        let command: Vec<_> = command.iter().map(ToString::to_string).collect();
        Commands::Runner(self.socket.clone()).run(&command, bound).await
    }

    async fn shell(&self, script: &str, bound: Duration) -> Result<(), CommandError> {
        self.run(&["/bin/sh", "-c", script], bound).await
    }

    /// Waits until every process has ended, and says how many there were.
    async fn all_ended(&mut self) -> usize {
        timeout(SOON, self.count.wait_for(|(started, ended)| started == ended)).await.expect("one lives on").unwrap().0
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The runner as systemd starts it, as a user of its own.
fn runner(program: &Path, connection: OwnedFd) -> StdCommand {
    let mut command = StdCommand::new("setpriv");
    command.args(["--reuid", USER, "--regid", USER, "--clear-groups"]).arg(program);
    // Ours may lead through directories of root.
    command.arg("exec").env_clear().env("PATH", "/usr/bin:/bin");
    command.stdin(connection).stdout(Stdio::null());
    command
}

/// What a command has written to `file`.
async fn written(file: &Path) -> String {
    let end = Instant::now() + SOON;
    loop {
        match fs::read_to_string(file) {
            Ok(text) if text.ends_with('\n') => return text.trim().to_owned(),
            _ => assert!(Instant::now() < end, "{} was not written", file.display()),
        }
        yield_now().await;
    }
}

/// Waits until no process has that number any more; a zombie has left, too.
async fn gone(pid: &str) {
    let (stat, end) = (format!("/proc/{pid}/stat"), Instant::now() + SOON);
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(Instant::now() < end, "{pid} lives");
        yield_now().await;
    }
}

#[tokio::test]
async fn each_command_has_a_process_of_its_own_and_never_root() {
    let Some(mut runner) = Runner::start() else { return };
    let seen = runner.path("seen");
    assert_eq!(runner.shell(&format!("id -u >{}", seen.display()), SOON).await, Ok(()));
    let uid = if geteuid().is_root() { USER.to_owned() } else { geteuid().to_string() };
    assert_eq!(written(&seen).await, uid);
    // The runner is of the same user, and shows nothing of itself.
    assert_eq!(runner.shell(": </proc/self/environ && ! cat /proc/$PPID/environ", SOON).await, Ok(()));
    let error = runner.shell("head -c 3000000 /dev/zero; echo; echo the end >&2; exit 9", SOON).await.unwrap_err();
    assert_eq!((error.why, error.said.as_str()), (Why::Exit(9), "the end"));
    let error = runner.run(&["nosuchcommand"], SOON).await.unwrap_err();
    assert_eq!(error.to_string(), "exec: \"nosuchcommand\": executable file not found in $PATH");
    assert_eq!(runner.all_ended().await, 4);
}

#[tokio::test]
async fn nothing_outlives_the_deadline_or_the_one_who_asked() {
    let Some(mut runner) = Runner::start() else { return };
    let pid = runner.path("pid");
    let script = format!("sleep 33 & echo $! >{}; wait", pid.display());
    let begun = Instant::now();
    let error = runner.shell(&script, Duration::from_millis(500)).await.unwrap_err();
    assert_eq!(error.to_string(), "command timeout exceeded: signal: killed");
    assert!(begun.elapsed() >= Duration::from_millis(500));
    gone(&written(&pid).await).await;
    fs::remove_file(&pid).unwrap();
    let number = tokio::select! {
        ended = runner.shell(&script, SOON) => panic!("{ended:?}"),
        number = written(&pid) => number,
    };
    gone(&number).await;
    assert_eq!(runner.all_ended().await, 2);
}

/// The recordings of Istio's agent hold for commands that somebody else runs, too.
#[tokio::test]
async fn probes_say_the_same_with_a_runner() {
    let Some(mut runner) = Runner::start() else { return };
    let commands = Commands::Runner(runner.socket.clone());
    assert_eq!(every_recorded_command(&commands).await, 6);
    assert!(runner.all_ended().await >= 6);
}

#[test]
fn it_refuses_what_is_not_its_business() {
    let program = Path::new(env!("CARGO_BIN_EXE_we-agent"));
    let said = |command: &mut StdCommand| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let by_hand = said(StdCommand::new(program).arg("exec").stdin(Stdio::null()));
    assert!(by_hand.starts_with("we-agent: standard input is no connection to run a command for"), "{by_hand}");
    assert_eq!(by_hand.lines().count(), 1, "{by_hand}");
    if !geteuid().is_root() {
        println!("skipped: refusing root takes root");
        return;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let root = said(StdCommand::new(program).arg("exec").stdin(OwnedFd::from(theirs)));
    assert!(root.starts_with("we-agent: commands are not run as root: set User= of we-agent-exec@.service"), "{root}");
    assert_eq!(root.lines().count(), 1, "{root}");
    let told = std::io::read_to_string(ours).unwrap();
    assert!(told.contains("commands are not run as root"), "{told}");
}

/// The same with the socket activation of systemd itself.
#[tokio::test]
async fn systemd_starts_it() {
    let Some(place) = Runner::start() else { return };
    let socket = place.path("activated.sock");
    let mut command = Command::new("systemd-socket-activate");
    command.args(["--accept", "--inetd", "--listen"]).arg(&socket);
    command.args(["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"]);
    command.arg(place.path("we-agent")).arg("exec").kill_on_drop(true).stderr(Stdio::null());
    let _activation = command.spawn().expect("systemd-socket-activate is part of systemd");
    let end = Instant::now() + SOON;
    // A socket is there before it listens. Who connects and goes is one more runner without a command.
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < end, "it does not listen");
        yield_now().await;
    }
    let run = |script: &'static str| {
        let command = ["/bin/sh", "-c", script].map(str::to_owned);
        let commands = Commands::Runner(socket.clone());
        async move { commands.run(&command, SOON).await }
    };
    assert_eq!(run("test -n \"$PATH\" && test -z \"$LISTEN_FDS$LISTEN_PID\"").await, Ok(()));
    assert_eq!(run("echo no; exit 5").await.unwrap_err().said, "no");
}

/// The daemon as its unit starts it: probe and hook, with a runner and without.
#[tokio::test]
async fn the_daemon_hands_probe_and_hook_to_the_runner() {
    let Some(mut runner) = Runner::start() else { return };
    let [good, stall, pid] = ["good", "stall", "pid"].map(|name| runner.path(name));
    let probe = format!(
        "if test -e {}; then echo $$ >{}; exec sleep 33; fi; test -e {}",
        stall.display(),
        pid.display(),
        good.display()
    );
    let probe = json!({"periodSeconds": 1, "timeoutSeconds": 9, "exec": {"command": ["/bin/sh", "-c", probe]}});
    let group = Group::new("vms", "payments").port("http", 8080).probe(probe);
    let lab = Lab::builder().group(group).spawn().await.unwrap();
    let hook = format!("echo cannot load the pair; test -e {}", good.display());
    let hook = json!({"command": ["/bin/sh", "-c", hook], "deadline": "9s"});
    let config = format!("admin: {{address: off}}\ndefaults: {{health: {{allowExec: true}}, hooks: [{hook}]}}\n");
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1")).config(&config);
    let socket = runner.socket.display().to_string();
    let elsewhere = runner.path("later.sock");

    // Nobody is there yet: cause and fix in one line, for both.
    fs::rename(&runner.socket, &elsewhere).unwrap();
    let daemon = Daemon::start(&host, &["--exec-socket", &socket], &[]);
    let missing = format!(
        "the runner of commands is not there ({socket}: no such file or directory); start it: systemctl start \
         we-agent-exec.socket"
    );
    let w = daemon.until("payments", |w| w.health.state == HealthState::Unhealthy).await;
    assert_eq!(w.health.message.as_deref(), Some(missing.as_str()));
    let w = daemon.until("payments", |w| w.reloads[0].state == ReloadState::Failed).await;
    assert_eq!(w.reloads[0].cause.as_deref(), Some(missing.as_str()));

    // It comes, and finds the application broken: the hook tells why, the probe does not tell the mesh.
    fs::rename(&elsewhere, &runner.socket).unwrap();
    let w =
        daemon.until("payments", |w| w.reloads[0].cause.as_ref().is_some_and(|cause| !cause.contains("runner"))).await;
    assert_eq!(
        w.reloads[0].cause.as_deref(),
        Some("exit status 1, after it said: cannot load the pair; it was run as the user of we-agent-exec@.service")
    );
    // It heals.
    fs::write(&good, "").unwrap();
    daemon.until("payments", |w| w.health.state == HealthState::Healthy).await;
    let reported = |e: &we_lab::Event| matches!(e.what, we_lab::What::Health { healthy: true, lost: false, .. });
    assert!(lab.until(SOON, reported).await.is_some());
    fs::remove_file(&good).unwrap();
    let w = daemon.until("payments", |w| w.health.state == HealthState::Unhealthy).await;
    assert_eq!(w.health.message.as_deref(), Some("exit status 1"));

    // The daemon is killed while a command runs.
    fs::write(&stall, "").unwrap();
    let number = written(&pid).await;
    daemon.signal(Signal::SIGKILL);
    gone(&number).await;
    runner.all_ended().await;
}
