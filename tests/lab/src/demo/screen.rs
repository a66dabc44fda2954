//! What the demo says: a line a step, with its time, and what is to be seen below it.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use anstyle::{AnsiColor, Style};

const GOOD: Style = AnsiColor::Green.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();
const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();

/// Somebody watches. A closed pipe ends nothing: the evidence is still written.
pub(super) struct Screen<W> {
    out: W,
    /// A terminal: a step is announced when it begins, and the line replaced when it ends.
    live: bool,
    began: Instant,
    steps: u32,
    step: Option<(&'static str, Instant)>,
}

impl<W: Write> Screen<W> {
    pub(super) fn new(out: W, live: bool) -> Self {
        Self { out, live, began: Instant::now(), steps: 0, step: None }
    }

    /// A line by itself.
    pub(super) fn say(&mut self, text: &str) {
        _ = writeln!(self.out, "{text}");
    }

    pub(super) fn heading(&mut self, text: &str) {
        self.say(&format!("{BOLD}{text}{BOLD:#}"));
    }

    /// `label` in a column of its own.
    pub(super) fn row(&mut self, label: &str, text: &str) {
        self.say(&format!("  {DIM}{label:<14}{DIM:#}{text}"));
    }

    pub(super) fn begin(&mut self, step: &'static str) {
        self.step = Some((step, Instant::now()));
        if self.live {
            _ = write!(self.out, "  · {step}").and_then(|()| self.out.flush());
        }
    }

    /// The step that began has succeeded.
    pub(super) fn done(&mut self, seen: &str) {
        if let Some((step, began)) = self.step.take() {
            self.steps += 1;
            self.ended(GOOD, "✓", step, began.elapsed());
        }
        for line in seen.lines() {
            self.say(&format!("      {DIM}{line}{DIM:#}"));
        }
    }

    /// The step that began has failed; its name.
    pub(super) fn failed(&mut self, cause: &str) -> &'static str {
        let (step, began) = self.step.take().unwrap_or(("between two steps", Instant::now()));
        self.ended(BAD, "✗", step, began.elapsed());
        self.say(&format!("      {BAD}{cause}{BAD:#}"));
        step
    }

    /// How many steps succeeded, and the time since the beginning.
    pub(super) fn total(&self) -> (u32, Duration) {
        (self.steps, self.began.elapsed())
    }

    fn ended(&mut self, style: Style, mark: &str, step: &str, took: Duration) {
        let back = if self.live { "\r" } else { "" };
        let seconds = took.as_secs_f64();
        self.say(&format!("{back}  {style}{mark}{style:#} {BOLD}{step:<60}{BOLD:#} {DIM}{seconds:>6.2} s{DIM:#}"));
    }
}
