//! `kill -9` of the real program at random moments while it rotates: what is on the disk is always a pair that can be
//! used, and the next start uses it. (`crash` does the same at each system call of one save.)
#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    published,
    rotation::{ID, TOKEN, host, issued, lab},
    support::{Host, SOON},
};
use std::{
    fs,
    process::Stdio,
    time::{Duration, SystemTime},
};
use tokio::{
    net::UnixDatagram,
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use we_agent::{files::Root, identity::Store};
use we_lab::Lab;

const STORE: &str = "/var/lib/we-agent/payments";

fn run(host: &Host) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_we-agent"));
    command.env_clear().arg("run").arg("--root").arg(host.path("/")).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Waits for a pair on the disk that is another than `serial`.
async fn rotated(host: &Host, serial: Option<&str>) {
    let dir = published::dir(host, "payments");
    let end = Instant::now() + SOON;
    loop {
        match published::pair(&dir, ID).map(|pair| pair.svid.serial().to_owned()) {
            Some(now) if Some(now.as_str()) != serial => return,
            _ => assert!(Instant::now() < end, "no new pair after a kill"),
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Kills it: half of the time while a certificate that was just issued is saved and published.
async fn kill(daemon: &mut Child, lab: &Lab, round: u32) {
    if round.is_multiple_of(2) {
        lab.until_since(lab.mark(), SOON, |e| issued(e).is_some()).await.expect("it does not rotate");
        sleep(Duration::from_micros(fastrand::u64(0..12_000))).await;
    } else {
        sleep(Duration::from_micros(fastrand::u64(0..1_500_000))).await;
    }
    daemon.kill().await.unwrap();
}

async fn rounds(lab: &Lab, rounds: u32) {
    let host = host(lab).config("admin: {address: off}\ndefaults: {renewal: {minInterval: 100ms}}\n");
    let mut daemon = run(&host).spawn().unwrap();
    rotated(&host, None).await;
    for round in 0..rounds {
        kill(&mut daemon, lab, round).await;
        // Each read of the published pair checks that it matches; the store must hold one of its generations, too.
        let here = published::pair(&published::dir(&host, "payments"), ID).unwrap();
        let store = Store::open(&Root::new(host.path("/")), STORE).unwrap();
        let stored = store.load(&ID.parse().unwrap(), here.received).unwrap();
        assert!(stored.current.is_some(), "the store has nothing to start with: {:?}", stored.passed_over);
        daemon = run(&host).spawn().unwrap();
        rotated(&host, Some(here.svid.serial())).await;
    }
    daemon.kill().await.unwrap();
    let left = fs::read_dir(host.path(STORE)).unwrap().count();
    assert!(left <= 4, "{left} files are left in the store");
}

#[tokio::test]
async fn at_any_moment() {
    let lab = lab().ttl(Duration::from_secs(4)).spawn().await.unwrap();
    // Four at a time, each on a VM of its own.
    let five = || rounds(&lab, 5);
    tokio::join!(five(), five(), five(), five());
}

#[tokio::test]
async fn a_boot_without_a_control_plane_is_degraded_not_blocked() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab).config("admin: {address: off}\nstartup: {readyTimeout: 300ms}\n");
    let mut agent = host.start().await;
    let before = agent.ready("payments").await.identity.serial;
    agent.stop().await;
    fs::remove_file(host.path(TOKEN)).unwrap();
    fs::remove_dir_all(host.path("/run/we-agent/payments")).unwrap();
    lab.stop().await;

    let socket = host.path("/notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    let mut daemon = run(&host).env("NOTIFY_SOCKET", &socket).spawn().unwrap();
    let mut told = String::new();
    while !told.contains("READY=1\nSTATUS=degraded: 0 of 1 workload ready; payments: ") {
        let mut buffer = [0; 4096];
        let heard = timeout(SOON, manager.recv(&mut buffer)).await;
        let size = heard.unwrap_or_else(|_| panic!("not READY: {told:?}")).unwrap();
        told.push_str(std::str::from_utf8(&buffer[..size]).unwrap());
    }
    assert!(told.contains("cannot be reached"), "{told}");
    let pair = published::pair(&published::dir(&host, "payments"), ID).unwrap();
    assert_eq!(Some(pair.svid.serial()), before.as_deref());
    assert!(pair.svid.is_valid(SystemTime::now()));
    daemon.kill().await.unwrap();
}
