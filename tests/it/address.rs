//! The address loop in a network of its own: addresses come, go and change under it.

#![allow(clippy::unwrap_used)]

use std::{env, net::IpAddr, process::Command, time::Duration};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use we_agent::{address, host::Resolver, status::Addresses};

const INSIDE: &str = "WE_AGENT_TEST_IN_OWN_NETWORK";
const NAME: &str = "address::a_moved_host_is_noticed";

fn ip(arguments: &str) {
    assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
}

/// The test runs itself again in a new network namespace, where this host has no address but those that it is given.
#[tokio::test(start_paused = true)]
async fn a_moved_host_is_noticed() {
    if env::var_os(INSIDE).is_some() {
        return moving().await;
    }
    let unshare = |program: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", program]);
        command
    };
    if !unshare("ip").arg("link").output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: needs `unshare` (user namespaces allowed) and `ip`");
        return;
    }
    let itself = env::current_exe().unwrap();
    let output = unshare(itself.to_str().unwrap()).args([NAME, "--exact"]).env(INSIDE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// The loopback interface serves as any other: what counts is the kind of an address, not of its interface.
async fn moving() {
    ip("link set lo up");
    let (fact, mut seen) = watch::channel(Addresses::default());
    let shutdown = CancellationToken::new();
    let control_plane = ("10.99.0.1".to_owned(), 15012);
    let looking = tokio::spawn(address::run(vec![], control_plane, Resolver::default(), fact, shutdown.clone()));
    let addresses = |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<IpAddr>>();

    // Nothing usable, then an address that no route to the control plane starts from, then one that does.
    wait(&mut seen, |a| !a.candidates.is_empty() && a.primary.is_none()).await;
    ip("addr add 192.0.2.5/24 dev lo");
    wait(&mut seen, |a| a.all == addresses(&["192.0.2.5"])).await;
    ip("addr add 10.99.0.5/24 dev lo");
    ip("addr add fd99::5/64 dev lo nodad");
    wait(&mut seen, |a| a.all == addresses(&["10.99.0.5", "192.0.2.5", "fd99::5"])).await;
    // The lease is lost: IPv4 first, then all of it.
    ip("addr del 10.99.0.5/24 dev lo");
    ip("addr del 192.0.2.5/24 dev lo");
    wait(&mut seen, |a| a.primary == Some("fd99::5".parse().unwrap())).await;
    ip("link set lo down");
    wait(&mut seen, |a| a.primary.is_none()).await;
    shutdown.cancel();
    looking.await.unwrap();
}

async fn wait(seen: &mut watch::Receiver<Addresses>, condition: impl Fn(&Addresses) -> bool) {
    let found = timeout(Duration::from_secs(30), seen.wait_for(|addresses| condition(addresses))).await;
    if !matches!(found, Ok(Ok(_))) {
        drop(found);
        panic!("{:?}", seen.borrow());
    }
}
