//! `make bench`: what the release build costs, and how fast it is there. Against `we-lab`, or (`CONTROL=rig`) against a
//! control plane that somebody else has started, with the bundle in `BENCH_BUNDLE`.
//!
//! `BENCH_STARTS` (20) starts are timed, the rest lasts `BENCH_REST` (30) seconds, `BENCH_ROTATIONS` (20) are counted.

#![allow(clippy::print_stdout)]

mod control;
mod process;

use anyhow::{Context, ensure};
use control::{Lab, application};
use process::{Agent, Sample};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// For anything that should happen at once.
const SOON: Duration = Duration::from_secs(30);

fn main() -> anyhow::Result<()> {
    let binary = Path::new(env!("CARGO_BIN_EXE_we-agent"));
    let work = tempfile::tempdir()?;
    let port = application()?;
    let (lab, bundle) = match std::env::var("CONTROL").as_deref() {
        Ok("rig") => {
            let given = std::env::var_os("BENCH_BUNDLE").context("BENCH_BUNDLE: name a directory with a bundle")?;
            (None, PathBuf::from(given))
        }
        _ => {
            let lab = Lab::start(binary, &work.path().join("lab"), port, None)?;
            let bundle = lab.bundle(&work.path().join("bundle"))?;
            (Some(lab), bundle)
        }
    };
    println!("\nwe-agent {} against {}\n", env!("CARGO_PKG_VERSION"), if lab.is_some() { "we-lab" } else { "the rig" });
    row("binary", format!("{:.2} MiB", mib(fs::metadata(binary)?.len())), "");
    starts(binary, work.path(), &bundle, lab.as_ref())?;
    rest(binary, work.path(), &bundle)?;
    if lab.is_some() {
        rotations(binary, work.path(), port)?;
    }
    Ok(())
}

/// From the start of the process, with nothing kept, to what a consumer and the mesh can see.
fn starts(binary: &Path, work: &Path, bundle: &Path, lab: Option<&Lab>) -> anyhow::Result<()> {
    let (mut certificate, mut registered) = (Vec::new(), Vec::new());
    for i in 0..number("BENCH_STARTS", 20) {
        let before = lab.map(Lab::counters).transpose()?;
        let root = work.join(format!("start-{i}"));
        let began = Instant::now();
        let agent = Agent::start(binary, &root, bundle, "")?;
        agent.until(SOON, "a certificate in a file", |agent| Ok(agent.has_certificate()))?;
        certificate.push(began.elapsed());
        agent.until(SOON, "the registration", Agent::is_registered)?;
        registered.push(began.elapsed());
        agent.stop()?;
        if let (0, Some(lab), Some(before)) = (i, lab, before) {
            let after = lab.counters()?;
            let used =
                |name: &str| after[name].as_u64().unwrap_or_default() - before[name].as_u64().unwrap_or_default();
            row("connections opened", used("connections").to_string(), "aim: 1");
            row("calls and streams", used("requests").to_string(), "");
            row("bytes to register", format!("{} sent, {} received", used("received"), used("sent")), "inside TLS");
        }
    }
    row("start to certificate", times(&mut certificate), "aim: 35 ms against istiod");
    row("start to registered", times(&mut registered), "");
    Ok(())
}

/// With nothing to do but one probe each ten seconds.
fn rest(binary: &Path, work: &Path, bundle: &Path) -> anyhow::Result<()> {
    let agent = Agent::start(binary, &work.join("rest"), bundle, "")?;
    agent.until(SOON, "the registration", Agent::is_registered)?;
    std::thread::sleep(Duration::from_secs(5));
    let (before, began) = (Sample::of(agent.pid())?, Instant::now());
    std::thread::sleep(Duration::from_secs(number("BENCH_REST", 30)));
    let (after, time) = (Sample::of(agent.pid())?, began.elapsed().as_secs_f64());
    row("resident at rest", format!("{:.2} MiB", mib(after.resident)), "aim: 9 MiB");
    row("private dirty at rest", format!("{:.2} MiB", mib(after.private_dirty)), "aim: 1.3 MiB");
    row("threads", after.threads.to_string(), "");
    let cpu = (after.cpu - before.cpu).as_secs_f64() / time * 100.0;
    row("CPU at rest", format!("{cpu:.4} % of a core"), "");
    let switches = (after.switches - before.switches) as f64 / time;
    row("context switches at rest", format!("{switches:.2} a second"), "");
    agent.stop()
}

/// CPU of the whole process between two certificates, with certificates that live a few seconds.
fn rotations(binary: &Path, work: &Path, port: u16) -> anyhow::Result<()> {
    let lab = Lab::start(binary, &work.join("lab-short"), port, Some("3s"))?;
    let bundle = lab.bundle(&work.join("bundle-short"))?;
    let agent = Agent::start(binary, &work.join("rotations"), &bundle, "  renewal: {minInterval: 100ms}\n")?;
    agent.until(SOON, "the registration", Agent::is_registered)?;
    let (before, issued) = (Sample::of(agent.pid())?, lab.issued());
    let wanted = number("BENCH_ROTATIONS", 20);
    agent.until(SOON * 10, "rotations", |_| Ok(lab.issued() - issued >= wanted))?;
    let spent = Sample::of(agent.pid())?.cpu - before.cpu;
    let each = spent.as_secs_f64() * 1000.0 / (lab.issued() - issued) as f64;
    row("CPU for a rotation", format!("{each:.2} ms"), "sign, store, publish, prove by a handshake");
    agent.stop()
}

fn row(name: &str, value: String, note: &str) {
    println!("  {name:<26} {value:<34} {note}");
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn times(all: &mut [Duration]) -> String {
    all.sort();
    let ms = |time: Option<&Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0);
    format!("{:.1} ms median, {:.1} ms at most", ms(all.get(all.len() / 2)), ms(all.last()))
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Copies the files of a bundle.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for file in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let file = file?;
        fs::copy(file.path(), to.join(file.file_name()))?;
    }
    ensure!(to.join("cluster.env").exists(), "{}: no cluster.env, so no bundle", from.display());
    Ok(())
}
