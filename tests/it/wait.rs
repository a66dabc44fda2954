//! `we-agent wait`: what other units order themselves after.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    daemon::{Daemon, we_agent},
    rotation::{TOKEN, host, lab},
    support::{Host, SOON},
};
use std::{fs, process::Stdio};
use tokio::time::timeout;

/// Exit status, and the one line that was said.
async fn wait(host: &Host, arguments: &[&str]) -> (i32, String) {
    let mut command = we_agent(host);
    let output = timeout(SOON, command.arg("wait").args(arguments).output()).await.expect("it hangs").unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    assert_eq!(said.lines().count(), 1, "{said}");
    (output.status.code().unwrap_or(-1), said)
}

#[tokio::test]
async fn it_returns_when_the_workloads_are_ready() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let token = fs::read(host.path(TOKEN)).unwrap();
    fs::remove_file(host.path(TOKEN)).unwrap();

    let (code, said) = wait(&host, &["--timeout", "0s"]).await;
    assert!(code == 69 && said.contains("does not answer"), "{code}: {said}");
    // The daemon comes while it waits, and the token while both do.
    let mut waiting = we_agent(&host);
    let mut waiting = waiting.args(["wait", "payments"]).stdout(Stdio::null()).spawn().unwrap();
    let daemon = Daemon::start(&host, &[], &[]);
    daemon.until("payments", |w| w.identity.cause.is_some()).await;
    let (code, said) = wait(&host, &["--timeout", "10ms"]).await;
    assert!(code == 75 && said.contains("not ready within 10ms: 0 of 1 workload ready; payments: "), "{code}: {said}");
    let (code, said) = wait(&host, &["--timeout", "0s", "payments", "cart"]).await;
    assert!(code == 75 && said.contains("0s: payments: no credential is left"), "{code}: {said}");
    assert!(waiting.try_wait().unwrap().is_none(), "it did not wait");

    fs::write(host.path(TOKEN), token).unwrap();
    assert!(timeout(SOON, waiting.wait()).await.expect("it does not return").unwrap().success());
    assert_eq!(wait(&host, &[]).await, (0, "1 of 1 workload ready\n".to_owned()));
    let (code, said) = wait(&host, &["--timeout", "0s", "payments", "cart"]).await;
    assert!(code == 75 && said.contains("there is no workload cart"), "{code}: {said}");
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.ended().await;

    // The next start, without a control plane: the certificate was kept.
    lab.stop().await;
    fs::remove_dir_all(host.path("/run/we-agent/payments")).unwrap();
    let daemon = Daemon::start(&host, &[], &[]);
    let (code, said) = wait(&host, &["--for", "identity", "--timeout", "30s"]).await;
    assert!(code == 0 && said.starts_with("0 of 1 workload ready; payments: "), "{code}: {said}");
    assert!(host.path("/run/we-agent/payments/key.pem").exists());
    let (code, said) = wait(&host, &["--timeout", "0s"]).await;
    assert!(code == 75, "{code}: {said}");
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.ended().await;
}
