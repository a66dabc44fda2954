//! The demo: a control plane, an application and the real agent on one machine, told step by step.
//!
//! The agent is driven only through what its users have: files, `we-agent status` and signals.

mod agent;
mod app;
mod pair;
mod pod;
mod screen;
mod stage;
mod story;

use std::{fs, io::Write, path::Path};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::{Credential, Outcome, What};
use screen::Screen;
use stage::Stage;

/// In a folder of ours: what else is in there may be removed.
const MARK: &str = ".we-lab-demo";

/// Why the demo has not come to its end. What happened stands on the screen.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A step did not show what it is there to show.
    #[error("the demo failed at: {0}")]
    Step(&'static str),
    /// SIGINT or SIGTERM.
    #[error("the demo was interrupted")]
    Interrupted,
}

/// Runs the demo with the program `agent`, writes its evidence below `out` and tells the story on `screen`; `live` says
/// that `screen` is a terminal. When it returns, everything that it began has ended, also after SIGINT and SIGTERM.
///
/// `out` is emptied first, if an earlier demo made it.
///
/// # Errors
/// When `out` is somebody else's, and when a step fails.
pub async fn demo(agent: &Path, out: &Path, screen: impl Write, live: bool) -> Result<(), DemoError> {
    let mut screen = Screen::new(screen, live);
    screen.heading(&format!("we-agent, from a bundle to the mesh. Evidence: {}", out.display()));
    screen.begin("Control plane and application up, on loopback");
    let stage = match prepare(out) {
        Ok(()) => Stage::new(agent, out).await,
        Err(error) => Err(error),
    };
    let mut stage = stage.map_err(|error| DemoError::Step(screen.failed(&format!("{error:#}"))))?;
    screen.done(&format!(
        "we-lab as istiod on {}, application with /healthz on port {}",
        stage.lab.address(),
        stage.app.health
    ));
    let told = tokio::select! {
        told = story::tell(&mut stage, &mut screen) => told.map_err(Some),
        () = interrupted() => Err(None),
    };
    let closed = stage.close().await;
    match told.and_then(|()| closed.map_err(Some)) {
        Ok(()) => {
            summary(&stage, &mut screen, out);
            Ok(())
        }
        Err(Some(error)) => {
            let step = screen.failed(&format!("{error:#}"));
            let words = stage.last_words();
            if !words.is_empty() {
                screen.say("\nThe agent's last words:");
                words.lines().for_each(|line| screen.say(&format!("  {line}")));
            }
            screen.say(&format!(
                "\nThe evidence so far is in {0}: begin with {0}/agent.log and {0}/events.jsonl",
                out.display()
            ));
            Err(DemoError::Step(step))
        }
        Err(None) => {
            screen.say("");
            Err(DemoError::Interrupted)
        }
    }
}

fn prepare(out: &Path) -> anyhow::Result<()> {
    if out.exists() {
        let ours = out.join(MARK).exists() || fs::read_dir(out).is_ok_and(|mut names| names.next().is_none());
        anyhow::ensure!(ours, "{}: not empty, and not of an earlier demo; name another folder", out.display());
        fs::remove_dir_all(out).with_context(|| out.display().to_string())?;
    }
    fs::create_dir_all(out).and_then(|()| fs::write(out.join(MARK), "")).with_context(|| out.display().to_string())
}

/// Returns at SIGINT or SIGTERM.
async fn interrupted() {
    let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = int.recv() => {}
        _ = term.recv() => {}
    }
}

fn summary<W: Write>(stage: &Stage, screen: &mut Screen<W>, out: &Path) {
    let (steps, took) = screen.total();
    let (events, tally, wire) = (stage.lab.events(), stage.reader.tally(), stage.lab.counters());
    let issued = |by: Credential| {
        let fits = |what: &What| matches!(what, What::Csr { credential, outcome: Outcome::Issued { .. }, .. } if *credential == by);
        events.iter().filter(|event| fits(&event.what)).count()
    };
    screen.say("");
    screen.heading("Summary");
    screen.row("steps", &format!("{steps}, all as promised, in {:.1} s", took.as_secs_f64()));
    screen.row(
        "certificates",
        &format!("{} issued by token, {} by certificate", issued(Credential::Token), issued(Credential::Certificate)),
    );
    screen.row("reads", &format!("{} while they rotated, {} mismatched", tally.reads, tally.bad));
    screen.row("calls", &format!("{} of a pod to the VM, each by mutual TLS, none failed", stage.calls));
    screen.row("entry", "one, from its creation to its removal");
    screen.row(
        "wire",
        &format!(
            "{} connections, {} kB to istiod, {} kB back",
            wire.connections,
            wire.received / 1024,
            wire.sent / 1024
        ),
    );
    screen.say("");
    screen.heading("Look at");
    let out = out.display();
    for (what, place) in [
        ("the entry", format!("{out}/entry-*.yaml, in the order of the story")),
        ("the agent", format!("{out}/agent.log; {out}/status-*.json: what `we-agent status --json` said")),
        ("istiod's side", format!("{out}/events.jsonl, an event a line")),
        ("certificates", format!("openssl x509 -noout -text -in {out}/cert-chain-1-first.pem")),
        ("the VM", format!("{out}/host: etc/we-agent has the bundle, run/we-agent the files for programs")),
        (
            "your own",
            "README.md: with a real istiod; cargo run -p we-lab -- serve --help: break things by hand".to_owned(),
        ),
    ] {
        screen.row(what, &place);
    }
}
