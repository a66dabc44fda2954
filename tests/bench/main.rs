//! `make bench`: what the release build costs, and how fast it is there, measured from outside. Against `we-lab`, or
//! (`make bench CONTROL=rig BENCH_BUNDLE=DIR`) against an istiod that somebody else has started.
//!
//! A program of its own, not a `cargo bench` target: those build the agent with the features of its tests, and that is
//! not the binary which is shipped.

mod control;
mod inbound;
mod process;
mod relay;
mod sds;
mod soak;
mod table;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use control::{Bundle, Lab, application, group};
use process::{Agent, Sample};
use relay::Relay;
use std::{
    fs,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};
use table::Table;

/// For anything that should happen at once.
const SOON: Duration = Duration::from_secs(30);
/// From a start to the state at rest: the membership is known, and what only a start needs is gone.
const SETTLED: Duration = Duration::from_secs(15);
/// What the relay adds to one way when round trips are counted: much more than all else takes.
const LATE: Duration = Duration::from_millis(200);
/// Lifetime of the certificates whose renewals are counted; they are renewed at about half of it.
const SHORT: &str = "3s";

/// Measures a release build of we-agent.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// The agent
    #[arg(long, global = true, default_value = "target/release/we-agent")]
    agent: PathBuf,
    /// The miniature control plane, for --control lab
    #[arg(long, global = true, default_value = "target/release/we-lab")]
    lab: PathBuf,
    /// Against what to measure
    #[arg(long, value_enum, default_value_t, env = "CONTROL")]
    control: Control,
    /// A bundle for an istiod that runs already, with --control rig; one group, one VM, not in use by another agent.
    /// The application that its probe asks is answered by this program
    #[arg(long, env = "BENCH_BUNDLE", required_if_eq("control", "rig"))]
    bundle: Option<PathBuf>,
    /// How many starts are timed
    #[arg(long, default_value_t = 20, env = "BENCH_STARTS")]
    starts: u32,
    /// How many seconds the rest is observed
    #[arg(long, default_value_t = 60, env = "BENCH_REST")]
    rest: u64,
    /// How many consumers of secret discovery are connected
    #[arg(long, default_value_t = 1000, env = "BENCH_CONSUMERS")]
    consumers: usize,
    /// Measure nothing but these consumers
    #[arg(long)]
    consumers_only: bool,
    /// How many renewals are counted
    #[arg(long, default_value_t = 20, env = "BENCH_ROTATIONS")]
    rotations: u32,
    /// Where the figures go as JSON lines, beside the table
    #[arg(long, global = true, default_value = "target/bench")]
    out: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Nothing but inbound mTLS: the agent, Envoy and ghostunnel side by side
    Inbound(inbound::Args),
    /// A month in minutes: what grows over many rotations, reconnects, probes and hooks (`make soak`)
    Soak(soak::Args),
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Control {
    /// we-lab, started here
    #[default]
    Lab,
    /// An istiod that runs already
    Rig,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let work = tempfile::tempdir()?;
    // Of a file that was built just now, the kernel would count mapped pages as dirty.
    fs::File::open(&args.agent).and_then(|file| file.sync_all()).with_context(|| args.agent.display().to_string())?;
    match &args.part {
        Some(Part::Inbound(inbound)) => return inbound::run(inbound, &args, work.path()),
        Some(Part::Soak(soak)) => return soak::run(soak, &args, work.path()),
        None => {}
    }
    let (lab, bundle) = match (args.control, &args.bundle) {
        (Control::Rig, Some(given)) => {
            let bundle = Bundle::read(given)?;
            application(bundle.probe_port.context("the bundle has no HTTP probe (mesh.yaml, readinessProbe)")?)?;
            (None, bundle)
        }
        _ => {
            let lab = Lab::start(&args.lab, &work.path().join("lab"), &group(8080, application(0)?, 10), &[])?;
            let bundle = lab.bundle(&work.path().join("bundle"), "127.0.0.1")?;
            (Some(lab), bundle)
        }
    };
    let mut table = Table::new(&args.out, if lab.is_some() { "we-lab" } else { "istiod" })?;
    let bench = Bench { args: &args, work: work.path(), bundle: &bundle };
    if args.consumers_only {
        return bench.consumers(&mut table);
    }
    table.row("binary", mib(fs::metadata(&args.agent)?.len()), "MiB", None, "")?;
    bench.starts(&mut table)?;
    bench.wire(&mut table, lab.as_ref())?;
    bench.rotations(&mut table)?;
    bench.consumers(&mut table)?;
    bench.rest(&mut table)?;
    Ok(())
}

/// What all measurements share.
struct Bench<'a> {
    args: &'a Args,
    work: &'a Path,
    bundle: &'a Bundle,
}

impl Bench<'_> {
    /// An agent on a host of its own, where nothing is kept; `settings` are lines below `defaults`.
    fn start(&self, name: &str, settings: &str) -> anyhow::Result<Agent> {
        Agent::start(&self.args.agent, &self.work.join(name), self.bundle, settings)
    }

    /// From the start of the process, with nothing kept, to what a consumer and the mesh can see.
    fn starts(&self, table: &mut Table) -> anyhow::Result<()> {
        let (mut certificate, mut registered, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..self.args.starts {
            let agent = self.start(&format!("start-{i}"), "")?;
            agent.until(SOON, "a certificate in a file", |agent| Ok(agent.certificate().is_some()))?;
            certificate.push(ms(agent.started.elapsed()));
            agent.until(SOON, "the registration", Agent::is_registered)?;
            registered.push(ms(agent.started.elapsed()));
            cpu.push(ms(Sample::of(agent.pid())?.cpu));
            agent.stop()?;
        }
        // The lab is no measure of istiod.
        let aim = matches!(self.args.control, Control::Rig).then_some(35.0);
        table.times("start to certificate", &mut certificate, aim, "exec until the file pair is in place")?;
        table.times("start to registered", &mut registered, None, "exec until status says so")?;
        table.times("CPU for a start", &mut cpu, None, "until registered")
    }

    /// What a start puts on the wire, through a relay that counts and is late.
    fn wire(&self, table: &mut Table, lab: Option<&Lab>) -> anyhow::Result<()> {
        let through = |relay: &Relay, more: &str| {
            let (address, name) = (relay.address, &self.bundle.host);
            format!(
                "  controlPlane: {{discoveryAddress: \"{address}\", caAddress: \"{address}\", serverName: {name}}}\n{more}"
            )
        };
        // The question whether the mesh lists us is no part of registering.
        let relay = Relay::start(self.bundle.address, LATE)?;
        let agent = self.start("wire-registration", &through(&relay, "  membership: {enabled: false}\n"))?;
        // TCP's own round trip is with the relay, which is not late.
        let trips = |agent: &Agent| 1.0 + (ms(agent.started.elapsed()) / ms(2 * LATE)).floor();
        agent.until(SOON, "a certificate in a file", |agent| Ok(agent.certificate().is_some()))?;
        let certificate = trips(&agent);
        agent.until(SOON, "the registration", Agent::is_registered)?;
        let (registration, seen) = (trips(&agent), relay.traffic());
        agent.stop()?;
        let note = "TCP, TLS, and the requests together";
        table.row("round trips to certificate", certificate, "", Some(3.0), note)?;
        table.row("round trips to register", registration, "", Some(3.0), note)?;
        table.row(
            "bytes sent to register",
            seen.sent as f64,
            "bytes",
            None,
            "on the wire, TLS and certificate included",
        )?;
        table.row(
            "bytes received",
            seen.received as f64,
            "bytes",
            None,
            "on the wire, TLS and certificate included",
        )?;

        let relay = Relay::start(self.bundle.address, Duration::ZERO)?;
        let before = lab.map(|lab| lab.counter("requests")).transpose()?;
        let agent = self.start("wire", &through(&relay, ""))?;
        agent.until(SOON, "the registration", Agent::is_registered)?;
        sleep(SETTLED);
        let seen = relay.traffic();
        let calls =
            lab.map(|lab| lab.counter("requests")).transpose()?.zip(before).map(|(after, before)| after - before);
        agent.stop()?;
        let note = format!("until {} s after the registration", SETTLED.as_secs());
        table.row("connections opened", f64::from(seen.connections), "", Some(1.0), &note)?;
        match calls {
            Some(calls) => table.row("calls and streams", calls as f64, "", None, &note),
            None => Ok(()), // Nobody but istiod could count them.
        }
    }

    /// CPU of the whole process from one certificate to the next.
    fn rotations(&self, table: &mut Table) -> anyhow::Result<()> {
        let settings = format!("  identity: {{ttl: {SHORT}}}\n  renewal: {{minInterval: 100ms}}\n");
        let agent = self.start("rotations", &settings)?;
        agent.until(SOON, "the registration", Agent::is_registered)?;
        let rotated = |last: &mut Option<PathBuf>| {
            let limit = Instant::now() + SOON;
            while agent.certificate() == *last {
                anyhow::ensure!(Instant::now() < limit, "no renewal within {SOON:?}");
                sleep(Duration::from_millis(10));
            }
            *last = agent.certificate();
            Ok(())
        };
        // The first ones are not counted: something is always done for the first time.
        let mut last = agent.certificate();
        (0..3).try_for_each(|_| rotated(&mut last))?;
        let before = Sample::of(agent.pid())?;
        (0..self.args.rotations).try_for_each(|_| rotated(&mut last))?;
        let after = Sample::of(agent.pid())?;
        let each = ms(after.cpu - before.cpu) / f64::from(self.args.rotations);
        let note = format!("{} renewals: key, request, store, files, handshake, stream", self.args.rotations);
        table.row("CPU for a rotation", each, "ms", None, &note)?;
        let grown = kib(after.private_dirty) - kib(before.private_dirty);
        table.row("private dirty grown", grown, "KiB", None, "over these renewals")?;
        agent.stop()
    }

    /// Envoys on one socket, half of them and all: the same for each, or it does not grow as it should.
    fn consumers(&self, table: &mut Table) -> anyhow::Result<()> {
        let settings = "  identity: {ttl: 20s}\n  renewal: {minInterval: 100ms}\n";
        for count in [self.args.consumers / 2, self.args.consumers] {
            let agent = self.start(&format!("consumers-{count}"), settings)?;
            agent.until(SOON, "the registration", Agent::is_registered)?;
            let socket = self.work.join(format!("consumers-{count}/run/we-agent/payments/agent.sock"));
            let before = Sample::of(agent.pid())?;
            let consumers = sds::Consumers::connect(&socket, count)?;
            let held = Sample::of(agent.pid())?;
            let spread = consumers.spread()?;
            let pushed = Sample::of(agent.pid())?;
            let each = |after: &Sample| (kib(after.private_dirty) - kib(before.private_dirty)) / count as f64;
            let note = format!("{count} connections with two streams each");
            table.row("memory for a consumer", each(&held), "KiB", Some(32.0), &note)?;
            table.row("the same after a push", each(&pushed), "KiB", Some(32.0), &note)?;
            table.row("push to all", ms(spread), "ms", None, &format!("{note}; from the first to the last"))?;
            let cpu = ms(pushed.cpu - held.cpu);
            table.row("CPU for that push", cpu, "ms", None, "with the renewal and two answers of each")?;
            agent.stop()?;
        }
        Ok(())
    }

    /// With nothing to do but the probe.
    fn rest(&self, table: &mut Table) -> anyhow::Result<()> {
        let agent = self.start("rest", "")?;
        agent.until(SOON, "the registration", Agent::is_registered)?;
        sleep(SETTLED);
        let (before, began) = (Sample::of(agent.pid())?, Instant::now());
        sleep(Duration::from_secs(self.args.rest));
        let (after, time) = (Sample::of(agent.pid())?, began.elapsed().as_secs_f64());
        let period = self.bundle.probe_period.unwrap_or(10);
        let note = format!("observed for {time:.0} s, a probe each {period} s");
        table.row("resident at rest", mib(after.resident), "MiB", Some(9.0), "")?;
        table.row("private dirty at rest", mib(after.private_dirty), "MiB", Some(1.3), "")?;
        table.row("threads", after.threads as f64, "", None, "")?;
        let cpu = (after.cpu - before.cpu).as_secs_f64() / time * 100.0;
        table.row("CPU at rest", cpu, "% of a core", None, &note)?;
        table.row(
            "context switches at rest",
            (after.switches - before.switches) as f64 / time,
            "a second",
            None,
            &note,
        )?;
        agent.stop()
    }
}

fn mib(bytes: u64) -> f64 {
    kib(bytes) / 1024.0
}

fn kib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
