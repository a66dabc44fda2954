//! Programs that take their identity from the Workload API by libraries of others, while the agent rotates, is stopped
//! and is killed: the real program, each time a new process.
#![allow(clippy::print_stdout)]

use crate::{
    daemon::Daemon,
    readme,
    rotation::{ID, host, issued, lab},
    support::{Host, SOON},
};
use nix::sys::signal::Signal;
use rustls::pki_types::CertificateDer;
use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
    sync::watch,
    time::timeout,
};
use we_agent::spiffe::serial_of;
use we_lab::Lab;

/// The back-off of a library comes on top of what takes long.
const WITH_BACK_OFF: Duration = Duration::from_secs(60);

/// A VM whose certificates are renewed every few seconds.
fn rotating(lab: &Lab) -> Host {
    host(lab).config("admin: {address: off}\ndefaults: {identity: {ttl: 6s}, renewal: {minInterval: 100ms}}\n")
}

fn endpoint(host: &Host) -> String {
    format!("unix:{}", host.path("/run/we-agent/payments/agent.sock").display())
}

/// Programs write leading zeros or do not.
fn plain(serial: &str) -> &str {
    serial.trim_start_matches('0')
}

/// Waits until the program holds a certificate that was issued from now on.
async fn follows(lab: &Lab, held: &mut watch::Receiver<String>) {
    let (mark, began) = (lab.mark(), Instant::now());
    let fresh = |held: &String| lab.events_since(mark).iter().filter_map(issued).any(|new| plain(new) == plain(held));
    let followed = timeout(WITH_BACK_OFF, held.wait_for(fresh)).await.is_ok_and(|held| held.is_ok());
    assert!(followed, "it still holds {}", *held.borrow());
    println!("a new certificate after {:?}", began.elapsed());
}

/// The whole story of a program whose newest certificate is in `held`.
async fn outlives(lab: &Lab, host: &Host, mut agent: Daemon<'_>, mut held: watch::Receiver<String>) {
    follows(lab, &mut held).await;
    for end in [Signal::SIGTERM, Signal::SIGKILL] {
        match end {
            Signal::SIGTERM => {
                agent.signal(end);
                agent.ended().await;
            }
            _ => agent.kill().await,
        }
        assert!(!held.borrow().is_empty());
        agent = Daemon::start(host, &[], &[]);
        // The first may be what it finds when it comes back, the second was pushed.
        for _ in 0..2 {
            follows(lab, &mut held).await;
        }
    }
    agent.signal(Signal::SIGTERM);
    agent.ended().await;
}

/// The Python of the programs that `make test` installs.
fn python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/venv/bin/python");
    let there = std::process::Command::new(&python).args(["-c", "import spiffe"]).stderr(Stdio::null()).status();
    let there = there.is_ok_and(|status| status.success());
    if !there {
        println!("skipped: no PyPI spiffe; tests/peers/setup installs it");
    }
    there.then_some(python)
}

#[tokio::test]
async fn the_python_package_outlives_the_agent() {
    let Some(python) = python() else { return };
    let lab = lab().spawn().await.unwrap();
    let host = rotating(&lab);
    let agent = Daemon::start(&host, &[], &[]);
    agent.until("payments", |w| w.ready).await;

    // The README's example, as it stands there.
    let example = Command::new(&python)
        .args(["-c", readme::example(readme::PYTHON)])
        .env("SPIFFE_ENDPOINT_SOCKET", endpoint(&host))
        .output();
    let example = timeout(SOON, example).await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&example.stdout).trim(), ID, "{example:?}");

    let mut client = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers/spiffe_client.py"))
        .args([endpoint(&host).as_str(), "cluster.local"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    let (tell, held) = watch::channel(String::new());
    tokio::spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if let Some(serial) = line["serial"].as_str() {
                tell.send_replace(serial.to_owned());
            }
        }
    });
    outlives(&lab, &host, agent, held).await;
    drop(client.stdin.take());
    assert!(timeout(SOON, client.wait()).await.unwrap().unwrap().success());
}

/// The README's example, but for the socket, and for what is done with what is new.
async fn example(endpoint: String, tell: watch::Sender<String>) -> Result<(), spiffe::X509SourceError> {
    let source = spiffe::X509Source::builder().endpoint(endpoint).build().await?;
    let mut updates = source.updated();
    loop {
        let svid = source.svid()?;
        println!("{}", svid.spiffe_id());
        assert_eq!(svid.spiffe_id().to_string(), ID);
        tell.send_replace(serial_of(&CertificateDer::from(svid.leaf().as_bytes())).unwrap());
        updates.changed().await?;
    }
}

#[tokio::test]
async fn the_rust_crate_outlives_the_agent() {
    let lab = lab().spawn().await.unwrap();
    let host = rotating(&lab);
    let agent = Daemon::start(&host, &[], &[]);
    agent.until("payments", |w| w.ready).await;
    let (tell, held) = watch::channel(String::new());
    let program = tokio::spawn(example(endpoint(&host), tell));
    outlives(&lab, &host, agent, held).await;
    assert!(!program.is_finished(), "{:?}", program.await);
    program.abort();
}

/// What stands in the README is what is run above.
#[test]
fn the_rust_example_is_the_one_that_is_tested() {
    let mut tested = include_str!("peers_spiffe.rs").lines().map(str::trim);
    let endpoint = "\"unix:///run/we-agent/payments/agent.sock\"";
    let ours = |line: &str| line.trim().replace(endpoint, "endpoint");
    for line in readme::example(readme::RUST).lines().map(ours) {
        assert!(tested.any(|tested| tested == line), "not tested, or not in this order: {line}");
    }
}
