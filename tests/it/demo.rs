//! `make demo`, with the program that was just built.

#![allow(clippy::unwrap_used)]

use we_lab::{DemoError, demo};

const AGENT: &str = env!("CARGO_BIN_EXE_we-agent");

#[tokio::test]
async fn the_demo_shows_what_it_promises() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("demo");
    let mut screen = Vec::new();
    let ended = demo(AGENT.as_ref(), &out, &mut screen, false).await;
    let told = String::from_utf8(screen).unwrap();
    ended.unwrap_or_else(|error| panic!("{error}\n{told}"));
    for words in [
        "apiVersion: networking.istio.io/v1",
        "bad code 503",
        "1 issued by token",
        " 0 mismatched",
        "hello from the VM",
    ] {
        assert!(told.contains(words), "{words:?} is missing from:\n{told}");
    }

    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    for (entry, has, lacks) in [
        ("entry-1-created.yaml", "istio.io/connectedAt", "conditions:"),
        ("entry-2-healthy.yaml", "status: \"True\"", "status: \"False\""),
        ("entry-3-unhealthy.yaml", "status: \"False\"", "status: \"True\""),
        ("entry-4-healed.yaml", "status: \"True\"", "status: \"False\""),
        ("entry-5-after-outage.yaml", "status: \"True\"", "istio.io/disconnectedAt"),
        ("entry-6-disconnected.yaml", "istio.io/disconnectedAt", "istio.io/connectedAt"),
    ] {
        let yaml = read(entry);
        assert!(yaml.contains(has) && !yaml.contains(lacks), "{entry}:\n{yaml}");
    }
    let (first, rotated) = (read("cert-chain-1-first.pem"), read("cert-chain-2-rotated.pem"));
    assert!(first.starts_with("-----BEGIN CERTIFICATE-----") && first != rotated);
    assert!(read("status-5-outage.json").contains("\"state\": \"lost\""));
    assert!(read("events.jsonl").contains("\"event\":\"entry_deleted\""));
    assert!(read("agent.log").contains("stopped"));
}

#[tokio::test]
async fn a_step_that_fails_is_named_and_the_agents_last_words_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("demo");
    let mut screen = Vec::new();
    // A program that complains of its arguments and ends.
    let ended = demo("/bin/sh".as_ref(), &out, &mut screen, false).await;
    let told = String::from_utf8(screen).unwrap();
    assert!(matches!(ended, Err(DemoError::Step("1 Identity issued"))), "{ended:?}\n{told}");
    assert!(told.contains("ended by itself") && told.contains("No such file"), "{told}");
}

#[tokio::test]
async fn a_folder_of_somebody_else_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.tex"), "years of work").unwrap();
    let ended = demo(AGENT.as_ref(), dir.path(), std::io::sink(), false).await;
    assert!(matches!(ended, Err(DemoError::Step(_))), "{ended:?}");
    assert!(dir.path().join("thesis.tex").exists());
}
