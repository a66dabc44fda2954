//! The figures: a table for people, JSON lines for programs.

use anyhow::Context;
use serde_json::{Map, Value, json};
use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

/// Where the figures go.
pub(crate) struct Table {
    control: &'static str,
    file: File,
}

impl Table {
    /// Figures measured against `control`; they replace those of the last run in `dir`.
    pub(crate) fn new(dir: &Path, control: &'static str) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let path = dir.join(format!("{control}.jsonl"));
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        say(&format!("\nwe-agent {} against {control}; as JSON in {}\n", env!("CARGO_PKG_VERSION"), path.display()))?;
        Ok(Self { control, file })
    }

    /// One figure. `aim` is the most that it shall be.
    pub(crate) fn row(
        &mut self,
        name: &str,
        value: f64,
        unit: &str,
        aim: Option<f64>,
        note: &str,
    ) -> anyhow::Result<()> {
        self.write(name, &format!("{} {unit}", short(value)), &[("value", value)], unit, aim, note)
    }

    /// Many figures of one kind, in milliseconds; the aim is for the median.
    pub(crate) fn times(&mut self, name: &str, all: &mut [f64], aim: Option<f64>, note: &str) -> anyhow::Result<()> {
        all.sort_by(f64::total_cmp);
        // The nearest rank.
        let rank = |share: f64| all.get((all.len() as f64 * share).ceil() as usize - 1).copied().unwrap_or(f64::NAN);
        anyhow::ensure!(!all.is_empty(), "{name}: nothing was measured");
        let (median, p90) = (rank(0.5), rank(0.9));
        let text = format!("{} ms median, {} ms p90", short(median), short(p90));
        let values =
            [("value", median), ("p90", p90), ("min", rank(0.0001)), ("max", rank(1.0)), ("n", all.len() as f64)];
        self.write(name, &text, &values, "ms", aim, &format!("{note}; {} starts", all.len()))
    }

    fn write(
        &mut self,
        name: &str,
        text: &str,
        values: &[(&str, f64)],
        unit: &str,
        aim: Option<f64>,
        note: &str,
    ) -> anyhow::Result<()> {
        let kept = aim.map(|aim| values.iter().all(|(name, value)| *name != "value" || *value <= aim));
        let verdict = match (aim, kept) {
            (Some(aim), Some(true)) => format!("aim {}: kept", short(aim)),
            (Some(aim), _) => format!("aim {}: MISSED", short(aim)),
            _ => String::new(),
        };
        say(&format!("  {name:<26} {text:<32} {verdict:<18} {note}").trim_end().to_owned())?;
        let mut record = Map::from_iter([
            ("control".to_owned(), json!(self.control)),
            ("measure".to_owned(), json!(name)),
            ("unit".to_owned(), json!(unit)),
            ("note".to_owned(), json!(note)),
            ("aim".to_owned(), json!(aim)),
        ]);
        record.extend(values.iter().map(|(name, value)| ((*name).to_owned(), json!(value))));
        writeln!(self.file, "{}", Value::Object(record))?;
        Ok(())
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// Three digits that count.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}
