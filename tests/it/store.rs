//! The disk of the store: full, read-only, emptied, hanging; and well again.
#![allow(clippy::print_stdout)]

use crate::{
    daemon::Daemon,
    rotation::{lab, next_issue},
    support::{Host, SOON},
};
use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};
use we_agent::status::WorkloadReport;
use we_lab::{Lab, What};

const STATE: &str = "/var/lib/we-agent";
const STORE: &str = "/var/lib/we-agent/payments";

fn vm(lab: &Lab) -> Host {
    Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
        .config("admin: {address: off}\n")
}

fn csrs(lab: &Lab) -> usize {
    lab.events().iter().filter(|e| matches!(e.what, What::Csr { .. })).count()
}

fn durable(w: &WorkloadReport) -> bool {
    w.ready && w.identity.store.durable && w.identity.store.cause.is_none()
}

fn fails(w: &WorkloadReport, words: &str) -> bool {
    w.identity.store.cause.as_ref().is_some_and(|cause| cause.contains(words))
}

/// Whether this user may have mounts of its own.
fn may_mount() -> bool {
    let tried = Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    let may = tried.is_ok_and(|output| output.status.success());
    if !may {
        println!("skipped: no mount namespaces here; run as root, with unshare (util-linux)");
    }
    may
}

/// The daemon with a state directory of its own file system, in a mount namespace, made by this shell command.
fn on_a_disk<'a>(host: &'a Host, make: &str) -> Daemon<'a> {
    let state = host.path(STATE);
    fs::create_dir_all(&state).unwrap();
    let state = state.display();
    let script =
        format!("set -e; mount -t tmpfs -o size=128k,mode=755 none {state}; cd {state}; {make}; cd /; exec \"$@\"");
    Daemon::start_by(host, &["unshare", "-m", "sh", "-c", &script, "sh"])
}

/// Where that daemon sees a path of its host.
fn seen_by(daemon: &Daemon<'_>, host: &Host, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{}", daemon.id(), host.path(path).display()))
}

#[tokio::test]
async fn a_full_disk_at_the_first_certificate_is_made_up_for() {
    if !may_mount() {
        return;
    }
    let lab = lab().spawn().await.unwrap();
    let host = vm(&lab);
    let daemon = on_a_disk(&host, "dd if=/dev/zero of=filler bs=4k 2>/dev/null || true");
    let w = daemon.until("payments", |w| w.ready && fails(w, "a restart would lose it")).await;
    assert!(fails(&w, "free some space there"), "{w:#?}");
    assert_eq!((w.identity.cause, w.identity.store.durable), (None, false));
    let log = daemon.log();
    assert!(!log.contains("no new certificate") && log.contains("the store fails"), "{log}");
    fs::remove_file(seen_by(&daemon, &host, "/var/lib/we-agent/filler")).unwrap();
    let healed = Instant::now();
    let w = daemon.until("payments", durable).await;
    assert!(healed.elapsed() < Duration::from_secs(15));
    assert_eq!(csrs(&lab), 1, "{w:#?}");
    assert_eq!(fs::read_dir(seen_by(&daemon, &host, STORE)).unwrap().count(), 1);
    daemon.kill().await;
}

#[tokio::test]
async fn a_disk_that_was_read_only_and_one_that_was_emptied_get_it_anew() {
    if !may_mount() {
        return;
    }
    let lab = lab().spawn().await.unwrap();
    let host = vm(&lab);
    let state = host.path(STATE);
    let daemon = on_a_disk(&host, &format!("cd /; mount -o remount,ro {}", state.display()));
    daemon.until("payments", |w| w.ready && fails(w, "a restart would lose it")).await;
    let inside = ["-t", &daemon.id().to_string(), "-m", "mount", "-o", "remount,rw"].map(str::to_owned);
    assert!(Command::new("nsenter").args(inside).arg(&state).status().unwrap().success());
    daemon.until("payments", durable).await;

    let store = seen_by(&daemon, &host, STORE);
    fs::remove_dir_all(&store).unwrap();
    let end = Instant::now() + SOON;
    while fs::read_dir(&store).map_or(0, Iterator::count) == 0 {
        assert!(Instant::now() < end, "the store stays empty\n{}", daemon.log());
        tokio::task::yield_now().await;
    }
    daemon.until("payments", durable).await;
    assert!(daemon.log().contains("is saved anew"), "{}", daemon.log());
    assert_eq!(csrs(&lab), 1);
    daemon.kill().await;
}

/// strace lets each sync of the store's directory take a minute.
#[tokio::test]
async fn a_disk_that_hangs_keeps_no_certificate_from_anybody() {
    let works = Command::new("strace").args(["-o", "/dev/null", "true"]).output().is_ok_and(|o| o.status.success());
    if !works {
        println!("skipped: strace is not installed, or may not trace here");
        return;
    }
    let lab = lab().ttl(Duration::from_secs(8)).spawn().await.unwrap();
    let host = vm(&lab);
    fs::create_dir_all(host.path(STORE)).unwrap();
    let store = host.path(STORE);
    let slow =
        ["strace", "-f", "-o", "/dev/null", "-P", store.to_str().unwrap(), "-e", "inject=fsync:delay_enter=60000000"];
    let daemon = Daemon::start_by(&host, &slow);
    // Each is published long before the disk has it, and each is another.
    let mut mark = 0;
    for _ in 0..3 {
        let serial = next_issue(&lab, mark).await;
        mark = lab.mark();
        daemon.until("payments", |w| w.files[0].serial.as_deref() == Some(&serial)).await;
    }
    let w = daemon.until("payments", |w| w.ready && fails(w, "does not answer within 2s")).await;
    assert!(!w.identity.store.durable);
    // One save waits, and nothing piles up behind it.
    let traced = fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.id())).unwrap();
    let threads = fs::read_dir(format!("/proc/{}/task", traced.trim())).unwrap().count();
    assert!(threads < 8, "{threads} threads");
    daemon.signal(nix::sys::signal::Signal::SIGKILL);
}
