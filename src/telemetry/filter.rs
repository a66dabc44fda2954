//! Which records are written.

use std::str::FromStr;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{LevelFilter, Targets};

/// What our targets begin with.
const OURS: &str = "we_agent";

/// Which records are written.
///
/// A bare level is for us alone; the libraries below us then say errors only: their traces show what goes over the wire,
/// and whoever reaches a socket of ours can make them warn without end. `target=level` pairs are taken as they are.
#[derive(Debug, Clone, PartialEq)]
pub struct LogFilter {
    pub(super) all: Targets,
    /// The pairs alone.
    named: Targets,
}

impl Default for LogFilter {
    fn default() -> Self {
        Self { all: ours(LevelFilter::INFO), named: Targets::new() }
    }
}

impl FromStr for LogFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || "write error, warn, info, debug, trace or off, or target=level pairs".to_owned();
        // To the parser, a single word that is no level is a target that may say everything.
        if !text.split(',').all(|item| item.contains('=') || item.parse::<LevelFilter>().is_ok()) {
            return Err(wrong());
        }
        let given: Targets = text.parse().map_err(|_| wrong())?;
        let level = given.default_level().unwrap_or(LevelFilter::INFO);
        let pairs = given.iter().map(|(target, level)| (target.to_owned(), level));
        let pairs = pairs.filter(|(target, _)| !target.is_empty()).collect::<Vec<_>>();
        Ok(Self { all: ours(level).with_targets(pairs.clone()), named: Targets::new().with_targets(pairs) })
    }
}

impl LogFilter {
    /// Whether the operator asked for this line in particular, by its target or with a level that says everything; then
    /// each is written.
    pub(super) fn asks_for(&self, line: &Metadata<'_>) -> bool {
        *line.level() > Level::INFO || self.named.would_enable(line.target(), line.level())
    }
}

/// Whether a target is one of ours.
pub(super) fn is_ours(target: &str) -> bool {
    target.starts_with(OURS)
}

fn ours(level: LevelFilter) -> Targets {
    Targets::new().with_target(OURS, level).with_default(level.min(LevelFilter::ERROR))
}
