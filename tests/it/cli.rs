//! The real program: exit statuses, the service manager's socket, signals, pipes.

#![allow(clippy::unwrap_used, clippy::expect_used)]
use std::{
    io::{BufRead, BufReader, Read},
    os::unix::net::{UnixDatagram, UnixStream},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

const SOON: Duration = Duration::from_secs(10);

fn we_agent(root: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_we-agent"));
    command.env_clear().env("WE_AGENT_ROOT", root).stdin(Stdio::null());
    command
}

fn output(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

fn configure(root: &Path, text: &str) {
    std::fs::create_dir_all(root.join("etc/we-agent")).unwrap();
    std::fs::write(root.join("etc/we-agent/we-agent.yaml"), text).unwrap();
}

/// A running daemon; killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Its exit status, within a deadline.
    fn ended(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + SOON;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            std::thread::yield_now();
        }
        panic!("the daemon does not end");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_wrong_configuration_is_78_and_tells_every_mistake() {
    let dir = tempfile::tempdir().unwrap();
    configure(dir.path(), "adminn: {}\nstartup: {readyTimeout: soon}\n");
    let (code, _, said) = output(we_agent(dir.path()).arg("run"));
    assert_eq!(code, 78, "{said}");
    assert!(said.contains("etc/we-agent/we-agent.yaml:1:1: unknown key \"adminn\""), "{said}");
    assert!(said.contains("etc/we-agent/we-agent.yaml:2:25: startup.readyTimeout: \"soon\""), "{said}");
    let (code, _, said) = output(we_agent(dir.path()).args(["run", "--config", "/nowhere.yaml"]));
    assert_eq!(code, 78, "{said}");
}

#[test]
fn a_wrong_command_line_is_64_and_help_is_none() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(output(we_agent(dir.path()).arg("jump")).0, 64);
    assert_eq!(output(we_agent(dir.path()).args(["run", "--log-level", "loud"])).0, 64);
    let (code, help, _) = output(we_agent(dir.path()).arg("--help"));
    assert!(code == 0 && help.contains("status") && help.contains("78  the configuration is wrong"), "{help}");
    let (code, version, _) = output(we_agent(dir.path()).arg("--version"));
    assert_eq!((code, version), (0, format!("we-agent {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn status_without_a_daemon_is_69_and_says_how_to_start_it() {
    let dir = tempfile::tempdir().unwrap();
    let (code, _, said) = output(we_agent(dir.path()).arg("status"));
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("run/we-agent/admin.sock") && said.contains("start it with \"we-agent run\""), "{said}");
}

/// One life of the daemon, as systemd sees it.
#[test]
fn systemd_is_told_the_truth_and_signals_end_it() {
    let dir = tempfile::tempdir().unwrap();
    configure(dir.path(), "startup: {readyTimeout: 200ms}\nadmin: {address: off}\n");
    let manager = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let mut command = we_agent(dir.path());
    command.args(["run", "--log-format", "json"]).stderr(Stdio::piped());
    command.env("NOTIFY_SOCKET", dir.path().join("notify")).env("WATCHDOG_USEC", "100000");
    let mut daemon = Daemon(command.spawn().unwrap());
    let mut told = String::new();
    let mut hear = |wanted: &str| {
        let deadline = Instant::now() + SOON;
        while !told.contains(wanted) {
            // The watchdog's pings never end: silence is not what a missing line looks like.
            assert!(Instant::now() < deadline, "{wanted} not in {told:?}");
            let mut buffer = [0; 4096];
            let size = manager.recv(&mut buffer).unwrap_or_else(|e| panic!("{wanted} not in {told:?}: {e}"));
            told.push_str(std::str::from_utf8(&buffer[..size]).unwrap());
        }
    };
    let place = dir.path().join("etc/we-agent").display().to_string();
    hear(&format!("STATUS=starting: no bundle in {place}: copy"));
    hear(&format!("READY=1\nSTATUS=degraded: no bundle in {place}: copy"));
    hear("WATCHDOG=1\nWATCHDOG=1\nWATCHDOG=1\n");

    let (code, text, _) = output(we_agent(dir.path()).arg("status"));
    assert!(code == 0 && text.contains(&format!("no bundle in {place}")), "{text}");
    let (code, json, _) = output(we_agent(dir.path()).args(["status", "--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(code == 0 && json["ready"] == false && json["workloads"] == serde_json::json!([]), "{json}");
    let (code, _, said) = output(we_agent(dir.path()).arg("run"));
    assert!(code == 69 && said.contains("another we-agent runs here"), "{said}");

    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    hear("STOPPING=1");
    assert!(daemon.ended().success());
    assert!(!dir.path().join("run/we-agent/admin.sock").exists());
    let mut log = String::new();
    daemon.0.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    let messages: Vec<_> = log
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|record| record["message"].as_str().unwrap().to_owned())
        .collect();
    let begins: Vec<_> = messages.iter().filter_map(|m| m.split(':').next()).collect();
    let bundle = format!("no bundle in {place}");
    assert_eq!(begins, ["starting", &bundle, "degraded", "stopping", "stopped"]);
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    configure(dir.path(), "admin: {address: off}\n");
    let mut command = we_agent(dir.path());
    let mut daemon = Daemon(command.args(["run", "--log-level", "debug"]).stderr(Stdio::piped()).spawn().unwrap());
    let mut log = BufReader::new(daemon.0.stderr.take().unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    assert!(line.contains("INFO  starting"), "{line}");
    // Its log has no reader any more; it goes on.
    drop(log);
    let deadline = Instant::now() + SOON;
    let path = dir.path().join("run/we-agent/admin.sock");
    while UnixStream::connect(&path).is_err() {
        assert!(Instant::now() < deadline, "no admin socket");
        std::thread::yield_now();
    }
    let mut status = we_agent(dir.path()).args(["status", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(status.stdout.take());
    assert!(status.wait().unwrap().success());
    daemon.signal(nix::sys::signal::Signal::SIGINT);
    assert!(daemon.ended().success());
}

/// The admin socket cannot be had: one cause, once, and a fix that fits it.
#[test]
fn a_socket_that_cannot_be_had_is_told_once_with_its_fix() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("a".repeat(100));
    let (code, _, said) = output(we_agent(&deep).arg("run"));
    assert_eq!(code, 1, "{said}");
    let reason = "the path of this socket may have 103 bytes and has ";
    assert_eq!(said.matches(reason).count(), 1, "{said}");
    assert!(said.ends_with("; take a shorter --root\n") && said.lines().count() == 2, "{said}");
    let (code, _, said) = output(we_agent(&deep).arg("status"));
    assert_eq!((code, said.matches(reason).count(), said.contains("start it")), (69, 1, false), "{said}");

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("run"), "").unwrap();
    let (code, _, said) = output(we_agent(dir.path()).arg("run"));
    assert_eq!(code, 1, "{said}");
    let fix = "/run is in the way: it was not made by we-agent; move it away\n";
    assert_eq!((said.matches("is in the way").count(), said.ends_with(fix)), (1, true), "{said}");
}
