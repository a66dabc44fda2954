//! A month in minutes: one agent with dozens of workloads, whose certificates live for seconds. Each rotation is a new
//! connection and a hook, too, and every so often the control plane breaks with everybody at once. What the process holds
//! once it has settled and at the end must be the same.

use crate::{
    SOON,
    control::{ASKED, Lab, application, group},
    kib,
    process::{Agent, Sample},
    table::say,
};
use anyhow::{Context, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::Ordering::Relaxed,
    thread::sleep,
    time::{Duration, Instant},
};

/// So many rotations are looked at first.
const FIRST: u64 = 1_000;
/// After so many of each workload the process has settled: until then the heap, which several threads share, still finds its
/// shape, and grows by less and less.
const SETTLED: u64 = 300;
/// What memory may grow from then on, in bytes.
const AIM: u64 = 128 << 10;
/// For how long the least is looked for: work comes and goes, and what is held remains.
const LOOK: Duration = Duration::from_secs(10);
/// From one break of the control plane to the next.
const BREAK: Duration = Duration::from_secs(20);
const BREAKS: [&str; 3] = ["inject goaway", "inject drop-connections", "inject drop-streams"];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many rotations
    #[arg(long, default_value_t = 100_000, env = "SOAK_ROTATIONS")]
    rotations: u64,
    /// How many workloads: each rotates a little more often than once a second
    #[arg(long, default_value_t = 64, env = "SOAK_WORKLOADS")]
    workloads: u8,
}

pub(crate) fn run(args: &Args, all: &super::Args, work: &Path) -> anyhow::Result<()> {
    let settled = FIRST.max(SETTLED * u64::from(args.workloads));
    ensure!(args.rotations > settled, "more than {settled} rotations for so many workloads");
    let more = ["--ttl", "2s", "--fault", "admission=100000"];
    let lab = Lab::start(&all.lab, &work.join("lab"), &group(8080, application(0)?, 1), &more)?;
    let (root, hooks) = (work.join("host"), work.join("hooks"));
    let bundle = work.join("bundle");
    for n in 1..=args.workloads {
        lab.bundle(&bundle, &format!("127.0.1.{n}"))?.copy(&root.join(format!("etc/we-agent/w{n}")))?;
    }
    let hook = format!("  hooks: [{{command: [/bin/sh, -c, 'echo >>{}']}}]\n", hooks.display());
    let settings = format!("  identity: {{ttl: 2s}}\n  renewal: {{minInterval: 100ms}}\n{hook}log: {{level: warn}}\n");
    let soak = Soak { agent: Agent::spawn(&all.agent, &root, &settings)?, lab, hooks };
    soak.reach(FIRST)?;
    let first = soak.reach(settled)?;
    for tenth in (1..10).filter(|tenth| args.rotations * tenth / 10 > settled) {
        soak.reach(args.rotations * tenth / 10)?;
    }
    let last = soak.reach(args.rotations)?;
    soak.agent.stop()?;
    let log = fs::read_to_string(root.join("log"))?;
    let faults: Vec<_> = log.lines().filter(|line| line.contains(" ERROR ")).take(10).collect();
    ensure!(faults.is_empty(), "the log says\n{}", faults.join("\n"));
    first.same(&last, args.workloads.into())
}

struct Soak {
    agent: Agent,
    lab: Lab,
    hooks: PathBuf,
}

/// What the process holds, at the least.
struct Held {
    resident: u64,
    private: u64,
    threads: u64,
    descriptors: u64,
    tasks: u64,
    children: u64,
}

impl Soak {
    /// Goes on until there were so many rotations, and then looks.
    fn reach(&self, rotations: u64) -> anyhow::Result<Held> {
        let (mut seen, mut moved, mut broken) = (0, Instant::now(), Instant::now());
        while self.lab.issued() < rotations {
            if self.lab.issued() != seen {
                (seen, moved) = (self.lab.issued(), Instant::now());
            }
            ensure!(moved.elapsed() < 4 * SOON, "no rotation since {} s, after {seen}", moved.elapsed().as_secs());
            if broken.elapsed() > BREAK {
                let order = BREAKS[usize::try_from(seen)? % BREAKS.len()];
                self.lab.order(order)?;
                broken = Instant::now();
            }
            sleep(Duration::from_millis(50));
        }
        let mut held = self.held()?;
        let begun = Instant::now();
        while begun.elapsed() < LOOK {
            sleep(Duration::from_millis(100));
            held = held.least(&self.held()?);
        }
        let hooks = fs::metadata(&self.hooks).map_or(0, |file| file.len());
        let (connections, probes) = (self.lab.counter("connections")?, ASKED.load(Relaxed));
        say(&format!(
            "{:7} rotations, {connections} connections, {probes} probes, {hooks} hooks: {:.0} KiB resident, {:.0} KiB private dirty, \
             {} threads, {} descriptors, {} tasks, {} children",
            self.lab.issued(),
            kib(held.resident),
            kib(held.private),
            held.threads,
            held.descriptors,
            held.tasks,
            held.children,
        ))?;
        Ok(held)
    }

    fn held(&self) -> anyhow::Result<Held> {
        let pid = self.agent.pid();
        let Sample { resident, private_dirty: private, threads, .. } = Sample::of(pid)?;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        let children =
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?.split_whitespace().count() as u64;
        let metrics = self.agent.told("/metrics")?;
        let tasks = metrics.lines().find_map(|line| line.strip_prefix("we_agent_tasks "));
        let tasks = tasks.context("no we_agent_tasks in the metrics")?.parse::<f64>()? as u64;
        Ok(Held { resident, private, threads, descriptors, tasks, children })
    }
}

impl Held {
    fn least(&self, other: &Self) -> Self {
        Self {
            resident: self.resident.min(other.resident),
            private: self.private.min(other.private),
            threads: self.threads.min(other.threads),
            descriptors: self.descriptors.min(other.descriptors),
            tasks: self.tasks.min(other.tasks),
            children: self.children.min(other.children),
        }
    }

    /// Whether nothing has grown until `later`, with `workloads` that each may be in the middle of something.
    fn same(&self, later: &Self, workloads: u64) -> anyhow::Result<()> {
        let rows = [
            ("resident memory (bytes)", self.resident, later.resident, AIM),
            ("private dirty memory (bytes)", self.private, later.private, AIM),
            ("threads", self.threads, later.threads, 8),
            ("descriptors", self.descriptors, later.descriptors, workloads),
            ("tasks", self.tasks, later.tasks, workloads),
            ("children", self.children, later.children, 8),
        ];
        let grown: Vec<_> = rows
            .iter()
            .filter(|(_, before, after, slack)| *after > before + slack)
            .map(|(what, before, after, _)| format!("{what}: {before} and then {after}"))
            .collect();
        if grown.is_empty() { say("nothing has grown") } else { bail!("it has grown: {}", grown.join("; ")) }
    }
}
