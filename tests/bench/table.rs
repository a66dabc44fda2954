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
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').next().unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        say(&format!("\nagainst {control}; {cores} cores, load before {load}; as JSON in {}\n", path.display()))?;
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
        anyhow::ensure!(!all.is_empty(), "{name}: nothing was measured");
        all.sort_by(f64::total_cmp);
        let (median, p90) = (rank(all, 50), rank(all, 90));
        let text = format!("{} ms median, {} ms p90", short(median), short(p90));
        let values =
            [("value", median), ("p90", p90), ("min", rank(all, 0)), ("max", rank(all, 100)), ("n", all.len() as f64)];
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
        say(format!("  {name:<26} {text:<32} {verdict:<18} {note}").trim_end())?;
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

pub(crate) fn say(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// Three digits that count.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// The percentile of sorted figures by its nearest rank.
pub(crate) fn rank(sorted: &[f64], percent: usize) -> f64 {
    let place = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(place).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_figures_that_were_measured() {
        let ten: Vec<f64> = (1..=10).map(f64::from).collect();
        assert_eq!([0, 50, 90, 91, 100].map(|percent| rank(&ten, percent)), [1.0, 5.0, 9.0, 10.0, 10.0]);
        assert_eq!(rank(&[7.0], 50), 7.0);
        assert!(rank(&[], 50).is_nan());
    }

    #[test]
    fn three_digits_count() {
        assert_eq!(
            [109.16, 18.31, 6.77, 0.0125, 1.0, 5845.0].map(short),
            ["109", "18.3", "6.77", "0.0125", "1", "5845"]
        );
    }
}
