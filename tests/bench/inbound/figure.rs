//! A row of the comparison, and where all of them are written.

use super::contestant::{Kind, Program};
use crate::table::{rank, say, short};
use anyhow::Context;
use serde_json::json;
use std::{
    fmt::Display,
    fs::{self, File},
    io::Write,
    path::Path,
};

/// How many times better than the others we want to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Aim {
    pub(crate) envoy: f64,
    pub(crate) ghostunnel: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Text<'a> {
    pub(crate) name: &'a str,
    pub(crate) unit: &'a str,
    pub(crate) note: &'a str,
}

/// One row; a column for each contestant.
#[derive(Debug)]
pub(crate) struct Figure<'a> {
    text: Text<'a>,
    better: Better,
    aim: Aim,
    columns: Vec<Column>,
}

#[derive(Debug, Clone, Default)]
struct Column {
    rounds: Vec<f64>,
    /// How many exchanges there were in all of them.
    exchanges: u64,
    /// The part of a core that was used in each.
    busy: Vec<f64>,
    /// The first error; it makes the column void.
    error: Option<String>,
}

impl<'a> Figure<'a> {
    pub(crate) fn new(text: Text<'a>, better: Better, aim: Aim, contestants: usize) -> Self {
        Self { text, better, aim, columns: vec![Column::default(); contestants] }
    }

    /// A round of the contestant `at`.
    pub(crate) fn add<E: Display>(&mut self, at: usize, round: Result<f64, E>) {
        let Some(column) = self.columns.get_mut(at) else { return };
        match round {
            Ok(value) => column.rounds.push(value),
            Err(error) => column.error = column.error.take().or_else(|| Some(format!("{error:#}"))),
        }
    }

    /// Of that round.
    pub(crate) fn counted(&mut self, at: usize, exchanges: u64, busy: f64) {
        if let Some(column) = self.columns.get_mut(at) {
            column.exchanges += exchanges;
            column.busy.push(busy);
        }
    }
}

impl Column {
    /// None if it is void.
    fn median(&self) -> Option<f64> {
        (self.error.is_none() && !self.rounds.is_empty()).then(|| median(&self.rounds))
    }

    fn text(&self) -> String {
        let Some(median) = self.median() else { return "void".to_owned() };
        let (least, most) = self.rounds.iter().fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
        format!("{} ({} to {})", short(median), short(least), short(most))
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    rank(&sorted, 50)
}

/// How many times better `ours` is. None if a difference of two figures was lost in the noise.
fn times(better: Better, ours: f64, theirs: f64) -> Option<f64> {
    let (ours, theirs) = if better == Better::More { (ours, theirs) } else { (theirs, ours) };
    (ours > 0.0 && theirs > 0.0).then(|| ours / theirs)
}

/// Where the rows go: a table for people, JSON lines for programs.
pub(crate) struct Report<'a> {
    programs: &'a [Program],
    file: File,
}

impl<'a> Report<'a> {
    /// Replaces the rows of the last run in `dir`.
    pub(crate) fn new(dir: &Path, programs: &'a [Program]) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let path = dir.join("inbound.jsonl");
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').next().unwrap_or_default();
        say(&format!("\ninbound mTLS; load before {load}; as JSON in {}", path.display()))?;
        say(
            "TLS 1.3, P-256 certificates on both sides, nothing resumed; a core and a worker thread for each contestant",
        )?;
        say("median of the rounds (least to most); one error, of any exchange, makes a figure void\n")?;
        let names = programs.iter().map(|program| format!("{} {}", program.name(), program.version));
        line("", "", names)?;
        Ok(Self { programs, file })
    }

    pub(crate) fn figure(&mut self, figure: &Figure<'_>) -> anyhow::Result<()> {
        let Text { name, unit, note } = figure.text;
        line(name, unit, figure.columns.iter().map(Column::text))?;
        let of = |kind| {
            let at = self.programs.iter().position(|program| program.kind == kind)?;
            figure.columns.get(at)?.median()
        };
        let verdict = |kind, name: &str, aim: f64| {
            let (ours, theirs) = (of(Kind::WeAgent)?, of(kind)?);
            let Some(times) = times(figure.better, ours, theirs) else { return Some(format!("{name}: lost in noise")) };
            let kept = if times >= aim { "kept" } else { "MISSED" };
            Some(format!("{} x as good as {name}, aim {}: {kept}", short(times), short(aim)))
        };
        let verdicts = [
            verdict(Kind::Envoy, "Envoy", figure.aim.envoy),
            verdict(Kind::Ghostunnel, "ghostunnel", figure.aim.ghostunnel),
        ];
        let verdicts: Vec<_> = verdicts.into_iter().flatten().collect();
        say(&format!("      {}", [&[note.to_owned()], &verdicts[..]].concat().join("; ")))?;
        for (program, column) in self.programs.iter().zip(&figure.columns) {
            if let Some(error) = &column.error {
                say(&format!("      {}: {error}", program.name()))?;
            }
            let record = json!({
                "measure": name, "unit": unit, "note": note, "contestant": program.name(), "version": program.version,
                "value": column.median(), "rounds": column.rounds, "exchanges": column.exchanges, "busy": column.busy,
                "error": column.error, "aim": {"envoy": figure.aim.envoy, "ghostunnel": figure.aim.ghostunnel},
            });
            writeln!(self.file, "{record}")?;
        }
        self.busy(figure)
    }

    /// How much of its core each has used, where that is known.
    fn busy(&self, figure: &Figure<'_>) -> anyhow::Result<()> {
        let columns = self.programs.iter().zip(&figure.columns).filter(|(_, column)| !column.busy.is_empty());
        let parts = columns.map(|(program, column)| {
            format!("{} {} at {:.0} %", program.name(), column.exchanges, median(&column.busy) * 100.0)
        });
        let parts: Vec<_> = parts.collect();
        if parts.is_empty() { Ok(()) } else { say(&format!("      exchanges, of a core used: {}", parts.join(", "))) }
    }
}

fn line(name: &str, unit: &str, columns: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let columns: String = columns.map(|column| format!("{column:<30}")).collect();
    say(format!("  {name:<30} {unit:<16} {columns}").trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn better_is_more_than_one() {
        assert_eq!(times(Better::More, 30.0, 20.0), Some(1.5));
        assert_eq!(times(Better::Less, 20.0, 30.0), Some(1.5));
        assert_eq!(times(Better::Less, -1.0, 30.0), None);
    }

    #[test]
    fn an_error_makes_a_column_void() {
        let text = Text { name: "requests", unit: "/s", note: "" };
        let mut figure = Figure::new(text, Better::More, Aim { envoy: 1.0, ghostunnel: 2.0 }, 2);
        for round in [3.0, 1.0, 2.0] {
            figure.add::<&str>(0, Ok(round));
            figure.add::<&str>(1, Ok(round));
        }
        figure.add(1, Err("reset"));
        figure.add::<&str>(1, Ok(9.0));
        assert_eq!(figure.columns[0].median(), Some(2.0));
        assert_eq!(figure.columns[0].text(), "2 (1 to 3)");
        assert_eq!(figure.columns[1].median(), None);
    }
}
