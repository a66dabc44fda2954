//! What the host gives runs out: descriptors, memory. The limits of a running daemon are set from outside.

use crate::{
    daemon::{Daemon, may_look},
    rotation::{host, issued, lab},
    support::SOON,
};
use nix::sys::signal::Signal;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use std::{fs, time::Duration};
use we_agent::status::WorkloadReport;
use we_lab::{Fault, What};

const LIFE: Duration = Duration::from_secs(6);
/// More than one renewal.
const A_WHILE: Duration = Duration::from_secs(5);
const CONFIG: &str = "admin: {address: off}\ndefaults: {renewal: {minInterval: 1s}}\n";

fn pid(daemon: &Daemon<'_>) -> Pid {
    Pid::from_raw(i32::try_from(daemon.id()).unwrap()).unwrap()
}

fn limit(daemon: &Daemon<'_>, resource: Resource, soft: Option<u64>) {
    let hard = getrlimit(resource).maximum;
    prlimit(Some(pid(daemon)), resource, Rlimit { current: soft, maximum: hard }).unwrap();
}

/// A number from the process's `status`, in KiB.
fn memory(daemon: &Daemon<'_>, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_matches([':', '\t', ' ', 'k', 'B']).trim().parse().unwrap()
}

/// The files have the certificate that is in use.
fn published(w: &WorkloadReport) -> bool {
    w.ready && w.files.iter().all(|p| p.serial.is_some() && p.serial == w.identity.serial)
}

/// With no room, or with a little of it, the daemon lives and says nothing wrong; and when there is room again it goes on.
#[tokio::test]
async fn a_daemon_without_descriptors_lives_and_recovers() {
    if !may_look() {
        return;
    }
    let lab = lab().ttl(LIFE).spawn().await.unwrap();
    let host = host(&lab).config(CONFIG);
    let daemon = Daemon::start(&host, &[], &[]);
    daemon.until("payments", published).await;
    for room in [0, 1, 2, 4, 8] {
        let open = fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap().count() as u64;
        limit(&daemon, Resource::Nofile, Some(open + room));
        let mark = lab.mark();
        // It may or may not get one.
        let _ = lab.until_since(mark, A_WHILE, |e| issued(e).is_some()).await;
        limit(&daemon, Resource::Nofile, Some(1024));
        let mark = lab.mark();
        assert!(lab.until_since(mark, SOON, |e| issued(e).is_some()).await.is_some(), "{}", daemon.log());
        daemon.until("payments", published).await;
    }
    assert!(!daemon.log().contains("this is a bug"), "{}", daemon.log());
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;
}

/// Without memory it may die, at whatever it does; what it leaves behind is a pair that the next start uses, without a token.
async fn without_memory(room: u64) {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab).config(CONFIG);
    let mut daemon = Daemon::start(&host, &[], &[]);
    daemon.until("payments", published).await;
    limit(&daemon, Resource::As, Some((memory(&daemon, "VmSize") + room) * 1024));
    let mark = lab.mark();
    // A new connection takes memory.
    lab.inject(Fault::DropConnections);
    let resumed = lab.until_since(mark, A_WHILE, |e| matches!(e.what, What::EntryConnected { .. }));
    let lives = tokio::select! {
        _ = daemon.died() => false,
        _ = resumed => true,
    };
    if lives {
        daemon.kill().await;
    }
    let mark = lab.mark();
    let daemon = Daemon::start(&host, &[], &[]);
    daemon.until("payments", published).await;
    for event in lab.events_since(mark) {
        assert!(!matches!(event.what, What::ConnectionOpened { certificate: None, .. }), "{event:?}\n{}", daemon.log());
    }
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;
}

#[tokio::test]
async fn a_daemon_without_memory_leaves_a_pair_that_can_be_used() {
    tokio::join!(without_memory(0), without_memory(64), without_memory(512));
}
