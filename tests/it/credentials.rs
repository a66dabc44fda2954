//! A bundle, or some of its files, as credentials of the service (systemd.exec(5), `LoadCredential=`).

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    daemon::Daemon,
    rotation::{TOKEN, host, lab},
    support::Host,
};
use std::{fs, path::PathBuf, time::Duration};
use we_agent::status::IdentityState;
use we_lab::Fault;

const DIR: &str = "/run/credentials/we-agent.service";

/// Makes credentials of files of the bundle, as `LoadCredential=payments:/etc/we-agent/payments` names them.
fn load(host: &Host, files: &[&str]) -> PathBuf {
    let credentials = host.path(DIR);
    fs::create_dir_all(&credentials).unwrap();
    for file in files {
        let from = host.path("/etc/we-agent/payments").join(file);
        fs::rename(from, credentials.join(format!("payments_{file}"))).unwrap();
    }
    credentials
}

#[tokio::test]
async fn a_whole_bundle_needs_no_directory() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let credentials = load(&host, &["cluster.env", "mesh.yaml", "root-cert.pem", "istio-token", "hosts"]);
    fs::remove_dir(host.path("/etc/we-agent/payments")).unwrap();
    let daemon = Daemon::start(&host, &[], &[("CREDENTIALS_DIRECTORY", credentials.to_str().unwrap())]);
    let w = daemon.until("payments", |w| w.ready).await;
    assert_eq!(w.spiffe_id.as_deref(), Some(crate::rotation::ID));
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.ended().await;
}

#[tokio::test]
async fn a_sealed_token_that_has_expired_names_its_source_and_a_file_beside_it_wins() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let expired = lab.token("vms", "payments-sa", Duration::ZERO).unwrap();
    let good = lab.token("vms", "payments-sa", Duration::from_secs(3600)).unwrap();
    fs::write(host.path(TOKEN), expired).unwrap();
    let credentials = load(&host, &["istio-token"]);
    lab.inject(Fault::CaRefuses(16));
    let mut agent = host.start_with(Some(credentials)).await;
    let w = agent.until("payments", "dead", |w| w.identity.state == IdentityState::Dead).await;
    let cause = w.identity.cause.unwrap();
    let parts =
        ["expired at", "where the credential payments_istio-token is loaded from", "systemctl restart we-agent"];
    assert!(parts.iter().all(|part| cause.contains(part)), "{cause}");
    assert!(cause.contains(&format!("or put it to {}", host.path(TOKEN).display())), "{cause}");
    lab.heal_all();
    fs::write(host.path(TOKEN), good).unwrap();
    agent.ready("payments").await;
    agent.stop().await;
}
