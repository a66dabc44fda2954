//! Which records are written.

use std::str::FromStr;
use tracing_subscriber::filter::{LevelFilter, Targets};

/// Which records are written.
///
/// A bare level is for us alone; the libraries below us then say warnings only, for their traces show what goes over
/// the wire. `target=level` pairs are taken as they are.
#[derive(Debug, Clone, PartialEq)]
pub struct LogFilter(pub(super) Targets);

impl Default for LogFilter {
    fn default() -> Self {
        Self(ours(Targets::new(), LevelFilter::INFO))
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
        let pairs = given.iter().map(|(target, level)| (target.to_owned(), level)).collect::<Vec<_>>();
        let named = pairs.into_iter().filter(|(target, _)| !target.is_empty());
        Ok(Self(ours(Targets::new(), level).with_targets(named)))
    }
}

fn ours(targets: Targets, level: LevelFilter) -> Targets {
    targets.with_target("we_agent", level).with_default(level.min(LevelFilter::WARN))
}
