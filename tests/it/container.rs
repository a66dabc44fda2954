//! The daemon as the first process of a container.

use crate::{
    daemon::{Daemon, we_agent},
    support::{Host, SOON},
};
use serde_json::json;
use std::{collections::BTreeSet, fs, process::Stdio, time::Duration};
use tokio::{
    process::Command,
    time::{Instant, interval},
};
use we_lab::{Group, Lab};

/// The processes whose parent is `parent`, with their states.
fn children(parent: u32) -> Vec<(u32, String)> {
    let numbers = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let of_it = |number: u32| {
        let stat = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let (state, its_parent) = (fields.next()?.to_owned(), fields.next()?.parse::<u32>().ok()?);
        (its_parent == parent).then_some((number, state))
    };
    numbers.filter_map(of_it).collect()
}

fn zombies(parent: u32) -> BTreeSet<u32> {
    children(parent).into_iter().filter(|(_, state)| state == "Z").map(|(number, _)| number).collect()
}

/// A probe that leaves a process behind each time.
#[tokio::test]
async fn what_others_leave_behind_is_reaped() {
    let inside = ["--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"];
    let works = Command::new("unshare").args(inside).arg("true").output().await;
    if !works.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: needs `unshare` (user namespaces allowed)");
        return;
    }
    let leaves = json!({"periodSeconds": 1, "exec": {"command": ["/bin/sh", "-c", "setsid sleep 0.1 & exit 0"]}});
    let lab = Lab::builder().group(Group::new("vms", "payments").probe(leaves)).spawn().await.unwrap();
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"));
    let host = host.config("admin: {address: off}\ndefaults: {health: {allowExec: true}}\n");
    let agent = we_agent(&host);
    let mut command = Command::new("unshare");
    command.args(inside).arg(agent.as_std().get_program()).arg("run").env_clear();
    command.envs(agent.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
        .env("PATH", "/usr/bin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let daemon = Daemon::spawn(&host, command);
    daemon.until("payments", |w| w.ready).await;
    let first = children(daemon.id())[0].0;

    let (mut seen, mut look) = (BTreeSet::new(), interval(Duration::from_millis(20)));
    let end = Instant::now() + 2 * SOON;
    while seen.len() < 3 || !seen.is_disjoint(&zombies(first)) {
        assert!(Instant::now() < end, "of {seen:?} these are left: {:?}", zombies(first));
        if seen.len() < 3 {
            seen.extend(zombies(first));
        }
        look.tick().await;
    }
    assert!(daemon.until("payments", |w| w.ready).await.health.message.is_none(), "its own are waited for as ever");
}
