//! What is in the memory of the daemon is seen by nobody but root.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use crate::{
    daemon::Daemon,
    support::{Host, SOON},
};
use nix::{sys::signal::Signal, unistd::geteuid};
use std::{
    os::unix::{fs::chown, process::ExitStatusExt as _},
    process::{Child, Command, Stdio},
    time::Instant,
};
use tokio::task::yield_now;

/// Whom the daemon runs as when the tests run as root, who sees everything.
const USER: u32 = 4711;

/// Begins a command line that is run as that user.
fn as_user() -> Vec<String> {
    let user = USER.to_string();
    let root = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"];
    if geteuid().is_root() { root.map(str::to_owned).to_vec() } else { vec!["env".to_owned()] }
}

/// Whether a process of the same user may open this file about a process.
fn may_open(pid: u32, file: &str) -> bool {
    let [program, arguments @ ..] = &as_user()[..] else { unreachable!() };
    let open = format!(": </proc/{pid}/{file}");
    let opened = Command::new(program).args(arguments).args(["sh", "-c", &open]).stderr(Stdio::null()).status();
    opened.unwrap().success()
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < end, "not in time: {what}");
        yield_now().await;
    }
}

#[tokio::test]
async fn no_process_of_the_same_user_sees_it() {
    const ABOUT: [&str; 3] = ["environ", "maps", "mem"];
    let host = Host::new().config("admin: {address: off}\n");
    if geteuid().is_root() {
        for path in ["/", "/etc", "/etc/we-agent", "/etc/we-agent/we-agent.yaml"] {
            chown(host.path(path), Some(USER), Some(USER)).unwrap();
        }
    }
    let words = as_user();
    let daemon = Daemon::start_by(&host, &words.iter().map(String::as_str).collect::<Vec<_>>());
    until("a daemon that runs", || daemon.log().contains("starting")).await;
    assert_eq!(ABOUT.map(|file| may_open(daemon.id(), file)), [false; 3]);
    // What is its own it still sees, and it ends in order.
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;

    let mut other = Command::new(&words[0]);
    let other = Killed(other.args(&words[1..]).args(["sleep", "600"]).spawn().unwrap());
    // A kernel with Yama lets nobody trace but a parent.
    until("another program that is seen", || ABOUT[..2].iter().all(|file| may_open(other.0.id(), file))).await;
}

#[tokio::test]
async fn a_crash_leaves_no_core() {
    let host = Host::new().config("admin: {address: off}\n");
    let dir = host.path("/").display().to_string();
    let anywhere = format!("ulimit -c unlimited && cd {dir} && exec \"$@\"");
    let crash = format!("ulimit -c unlimited && cd {dir} && kill -ABRT $$");
    if !Command::new("sh").args(["-c", &crash]).status().is_ok_and(|status| status.core_dumped()) {
        println!("skipped: this host writes no core files");
        return;
    }
    let mut daemon = Daemon::start_by(&host, &["sh", "-c", &anywhere, "sh"]);
    until("a daemon that runs", || daemon.log().contains("starting")).await;
    daemon.signal(Signal::SIGABRT);
    let status = daemon.died().await;
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::SIGABRT as i32), false));
}
