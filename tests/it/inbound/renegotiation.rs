//! A peer of TLS 1.2 asks for new keys in the middle of a connection, as only openssl can: it is told that there are none.
#![allow(clippy::print_stdout)]

use super::{Echo, Pod, WEB, started, vm};
use crate::{rotation::lab, support::SOON};
use std::{
    process::Stdio,
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::Command,
    time::timeout,
};

#[tokio::test]
async fn a_renegotiation_is_refused_and_nobody_else_feels_it() {
    if Command::new("openssl").arg("version").stdout(Stdio::null()).status().await.is_err() {
        println!("skipped: openssl is not installed");
        return;
    }
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, "")).await;
    let dir = tempfile::tempdir().unwrap();
    let (key, chain) = lab.ca().pod(&[WEB], SystemTime::now(), Duration::from_secs(3600)).unwrap();
    std::fs::write(dir.path().join("key.pem"), key).unwrap();
    std::fs::write(dir.path().join("chain.pem"), chain).unwrap();
    let mut other = Pod::tls12(&lab, WEB).connect(at).await.unwrap();

    let mut client = Command::new("openssl")
        .args(["s_client", "-tls1_2", "-connect", &at.to_string()])
        .args(["-cert", "chain.pem", "-cert_chain", "chain.pem", "-key", "key.pem"])
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let (mut to, mut from) = (client.stdin.take().unwrap(), BufReader::new(client.stdout.take().unwrap()));
    to.write_all(b"hello\n").await.unwrap();
    let mut line = String::new();
    while line != "hello\n" {
        line.clear();
        let read = timeout(SOON, from.read_line(&mut line)).await.expect("no answer").unwrap();
        assert!(read > 0, "it ended: {}", said(&mut client).await);
    }
    // A ClientHello in a record of the session.
    to.write_all(b"R\n").await.unwrap();
    let said = said(&mut client).await;
    assert!(said.contains("RENEGOTIATING") && said.contains("no renegotiation"), "{said}");
    agent.until("payments", "closed", |w| w.inbound[0].open == 1).await;

    other.write_all(b"other").await.unwrap();
    timeout(SOON, other.read_exact(&mut [0; 5])).await.unwrap().unwrap();
    drop(other);
    assert_eq!(Pod::new(&lab, WEB).echo(at, b"honest").await, b"honest");
    agent.stop().await;
}

/// What it says of errors, until its end.
async fn said(client: &mut tokio::process::Child) -> String {
    let mut said = String::new();
    let mut errors = client.stderr.take().unwrap();
    timeout(SOON, errors.read_to_string(&mut said)).await.expect("it goes on").unwrap();
    said
}
