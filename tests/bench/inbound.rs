//! `we-bench inbound`: the agent's listener beside others that do the same, in one run.
//!
//! The contestants have a core of their own, one at a time, and what is counted is work for a second of it that the
//! kernel says they used: on a machine that does something else, that is disturbed least. They take turns in rounds,
//! and the median of the rounds counts. A row in which a contestant made an error is void for it.

mod application;
mod client;
mod contestant;
mod cores;
mod figure;
mod measure;

use crate::table::{rank, say};
use client::Target;
use contestant::{Contestant, Kind, Program, Stage};
use figure::{Aim, Better, Figure, Report, Text};
use measure::{DOWN, Load, SMALL, UP};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::runtime::Runtime;

/// Not slower than Envoy, twice ghostunnel.
const SPEED: Aim = Aim { envoy: 1.0, ghostunnel: 2.0 };
/// Half of either.
const SIZE: Aim = Aim { envoy: 2.0, ghostunnel: 2.0 };

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Envoy; by default the one that `make test` uses, if it is there
    #[arg(long, env = "WE_AGENT_ENVOY")]
    envoy: Option<PathBuf>,
    /// ghostunnel; by default the one on PATH, if there is one
    #[arg(long, env = "BENCH_GHOSTUNNEL")]
    ghostunnel: Option<PathBuf>,
    /// How often each is measured
    #[arg(long, default_value_t = 7, env = "BENCH_ROUNDS")]
    rounds: usize,
    /// How long each time, in seconds
    #[arg(long, default_value_t = 2, env = "BENCH_SECONDS")]
    seconds: u64,
    /// How many connections are idle
    #[arg(long, default_value_t = 1000)]
    idle: usize,
    /// Only these rows
    #[arg(long, value_enum, value_delimiter = ',')]
    rows: Vec<Row>,
    /// Only these contestants
    #[arg(long, value_enum, value_delimiter = ',')]
    contestants: Vec<Kind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Row {
    Memory,
    Handshakes,
    Requests,
    Up,
    Down,
    Latency,
}

impl Args {
    fn has(&self, row: Row) -> bool {
        self.rows.is_empty() || self.rows.contains(&row)
    }

    /// Who takes part.
    fn programs(&self, agent: &Path) -> anyhow::Result<Vec<Program>> {
        let installed = || {
            let lib = fs::read_dir("target/peers/venv/lib").ok()?.flatten();
            lib.map(|version| version.path().join("site-packages/envoy/_bin/envoy")).find(|path| path.exists())
        };
        let all = [
            (Kind::WeAgent, Some(agent.to_owned())),
            (Kind::Envoy, self.envoy.clone().or_else(installed)),
            (Kind::Ghostunnel, self.ghostunnel.clone().or_else(|| on_path("ghostunnel"))),
        ];
        let mut programs = Vec::new();
        for (kind, path) in all {
            if !self.contestants.is_empty() && !self.contestants.contains(&kind) {
                continue;
            }
            match path {
                Some(path) => programs.push(Program::new(kind, &path)?),
                None => say(&format!("  {kind:?} is not at hand; see CONTRIBUTING.md, Measuring"))?,
            }
        }
        Ok(programs)
    }
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Load whose exchanges are counted.
const LOADS: [(Row, Text, f64, Load); 4] = [
    (
        Row::Handshakes,
        Text { name: "handshakes", unit: "/s per core", note: "new connections, one small request each, 16 at once" },
        1.0,
        Load { exchange: SMALL, clients: 16, kept: false },
    ),
    (
        Row::Requests,
        Text { name: "requests", unit: "/s per core", note: "128 bytes, answered by 512, on 32 kept connections" },
        1.0,
        Load { exchange: SMALL, clients: 32, kept: true },
    ),
    (
        Row::Up,
        Text { name: "to the application", unit: "Gbit/s per core", note: "1 MiB each, on 4 kept connections" },
        GBIT_IN_MIB,
        Load { exchange: UP, clients: 4, kept: true },
    ),
    (
        Row::Down,
        Text { name: "from the application", unit: "Gbit/s per core", note: "1 MiB each, on 4 kept connections" },
        GBIT_IN_MIB,
        Load { exchange: DOWN, clients: 4, kept: true },
    ),
];
const GBIT_IN_MIB: f64 = 8.0 * 1_048_576.0 / 1e9;
const MIB: f64 = 1_048_576.0;

/// Measures all rows.
pub(crate) fn run(args: &Args, all: &crate::Args, work: &Path) -> anyhow::Result<()> {
    // Two descriptors for each connection that is forwarded.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let programs = args.programs(&all.agent)?;
    let stage = Stage::new(&all.agent, &all.lab, work)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut report = Report::new(&all.out, &programs)?;
    let bench = Bench { args, programs: &programs, stage: &stage, runtime: &runtime };
    if args.has(Row::Memory) {
        bench.memory(&mut report)?;
    }
    let contestants = programs.iter().map(|program| stage.start(program, &runtime)).collect::<Result<Vec<_>, _>>()?;
    for (program, contestant) in programs.iter().zip(&contestants) {
        say(&format!("  {} is process {}; {}", program.name(), contestant.pid(), contestant.agreed))?;
    }
    say("")?;
    for (row, text, factor, load) in LOADS {
        if args.has(row) {
            report.figure(&bench.rate(text, factor, load, &contestants))?;
        }
    }
    if args.has(Row::Latency) {
        bench.latency(&mut report, &contestants)?;
    }
    Ok(())
}

struct Bench<'a> {
    args: &'a Args,
    programs: &'a [Program],
    stage: &'a Stage,
    runtime: &'a Runtime,
}

impl Bench<'_> {
    fn rate<'a>(&self, text: Text<'a>, factor: f64, load: Load, contestants: &[Contestant]) -> Figure<'a> {
        let mut figure = Figure::new(text, Better::More, SPEED, contestants.len());
        for round in 0..self.args.rounds {
            for turn in 0..contestants.len() {
                // Nobody is always the first.
                let at = (turn + round) % contestants.len();
                let rate = self.runtime.block_on(load.put(&contestants[at], Duration::from_secs(self.args.seconds)));
                figure.add(at, rate.as_ref().map(|rate| rate.per_core * factor));
                if let Ok(rate) = rate {
                    figure.counted(at, rate.exchanges, rate.busy);
                }
            }
        }
        figure
    }

    /// What a contestant adds to an exchange with the application itself.
    fn latency(&self, report: &mut Report, contestants: &[Contestant]) -> anyhow::Result<()> {
        const TURNS: usize = 20;
        let note = "one at a time on a kept connection; less what the application itself takes without TLS";
        let text = |name| Text { name, unit: "us", note };
        let mut median = Figure::new(text("added latency, p50"), Better::Less, SPEED, contestants.len());
        let mut p99 = Figure::new(text("added latency, p99"), Better::Less, SPEED, contestants.len());
        let direct = Target { address: self.stage.application, tls: None };
        let targets: Vec<_> = [direct].into_iter().chain(contestants.iter().map(|c| c.target.clone())).collect();
        let mut alone = Vec::new();
        for _ in 0..self.args.rounds {
            let mut delays = match self.runtime.block_on(measure::delays(&targets, TURNS)) {
                Ok(delays) => delays,
                Err(error) => {
                    // They take turns: whose it is, it is void for all.
                    (0..contestants.len()).for_each(|at| {
                        median.add(at, Err(&error));
                        p99.add(at, Err(&error));
                    });
                    continue;
                }
            };
            delays.iter_mut().for_each(|delays| delays.sort_by(f64::total_cmp));
            let at = |i: usize, percent| rank(&delays[i], percent);
            alone.push(at(0, 50));
            for i in 0..contestants.len() {
                median.add::<&str>(i, Ok(at(i + 1, 50) - at(0, 50)));
                p99.add::<&str>(i, Ok(at(i + 1, 99) - at(0, 99)));
            }
        }
        alone.sort_by(f64::total_cmp);
        say(&format!("  the application itself answers within {:.0} us (p50)", rank(&alone, 50)))?;
        report.figure(&median)?;
        report.figure(&p99)
    }

    /// Each measurement has a process of its own: what was freed does not count.
    fn memory(&self, report: &mut Report) -> anyhow::Result<()> {
        const ROUNDS: usize = 3;
        let note = format!("{} idle connections, each used once", self.args.idle);
        let figure =
            |name| Figure::new(Text { name, unit: "MiB", note: &note }, Better::Less, SIZE, self.programs.len());
        let names = ["private, for the connections", "resident, for them", "private, all", "resident, all"];
        let mut figures = names.map(figure);
        for _ in 0..ROUNDS.min(self.args.rounds) {
            for (at, program) in self.programs.iter().enumerate() {
                let contestant = self.stage.start(program, self.runtime)?;
                let memory = self.runtime.block_on(measure::idle(&contestant, self.args.idle));
                for (i, figure) in figures.iter_mut().enumerate() {
                    figure.add(at, memory.as_ref().map(|memory| memory[i] / MIB));
                }
            }
        }
        figures.iter().try_for_each(|figure| report.figure(figure))
    }
}
