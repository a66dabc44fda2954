//! One event with everything around it, and how it reads.

use crate::text::line;
use anstyle::{AnsiColor, Style};
use serde_json::{Map, Value};
use std::{
    fmt::{self, Write},
    hash::{Hash, Hasher},
    time::SystemTime,
};
use tracing::{
    Level, Metadata,
    field::{Field, Visit},
};

/// Fields in the order in which they came; a later value of the same name replaces the earlier. A text is one line.
#[derive(Debug, Clone, Default, Hash)]
pub(super) struct Fields(Vec<(&'static str, Value)>);

impl Fields {
    fn put(&mut self, name: &'static str, value: Value) {
        match self.0.iter_mut().find(|(n, _)| *n == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(n, _)| *n == name)?;
        Some(plain(&self.0.remove(at).1))
    }

    #[cfg(test)]
    pub(super) fn of(fields: &[(&'static str, &str)]) -> Self {
        Self(fields.iter().map(|(name, value)| (*name, Value::from(line(*value)))).collect())
    }

    pub(super) fn extend(&mut self, other: &Self) {
        other.0.iter().for_each(|(name, value)| self.put(name, value.clone()));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field.name(), line(format_args!("{value:?}")).into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), line(value).into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field.name(), line(value).into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field.name(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field.name(), value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field.name(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field.name(), value.into());
    }
}

/// What is written.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) time: SystemTime,
    pub(super) level: Level,
    pub(super) target: &'static str,
    /// Source file and line.
    pub(super) place: Option<(&'static str, u32)>,
    message: String,
    workload: Option<String>,
    cause: Option<String>,
    own: Fields,
    inherited: Fields,
}

impl Record {
    pub(super) fn new(metadata: &Metadata<'static>, time: SystemTime, mut own: Fields, mut inherited: Fields) -> Self {
        let outer = inherited.take("workload");
        let message = own.take("message").unwrap_or_default();
        let workload = own.take("workload").or(outer);
        let cause = own.take("cause");
        let place = metadata.file().zip(metadata.line());
        let (level, target) = (*metadata.level(), metadata.target());
        Self { time, level, target, place, message, workload, cause, own, inherited }
    }

    /// A warning of the log itself.
    pub(super) fn note(message: String) -> Self {
        Self {
            time: SystemTime::now(),
            level: Level::WARN,
            target: module_path!(),
            place: None,
            message,
            workload: None,
            cause: None,
            own: Fields::default(),
            inherited: Fields::default(),
        }
    }

    /// What makes it the same as another: all but its time.
    pub(super) fn hash_words(&self, hasher: &mut impl Hasher) {
        (&self.message, &self.workload, &self.cause, &self.own, &self.inherited).hash(hasher);
    }

    /// `payments: registration lost: the stream was closed`.
    pub(super) fn sentence(&self) -> String {
        let mut sentence = String::new();
        if let Some(workload) = &self.workload {
            let _ = write!(sentence, "{workload}: ");
        }
        sentence.push_str(&self.message);
        if let Some(cause) = &self.cause {
            let _ = write!(sentence, ": {cause}");
        }
        sentence
    }

    /// The sentence, then the event's own fields: `payments: certificate issued  serial=1f expires=…`.
    pub(super) fn words(&self) -> String {
        let mut words = self.sentence();
        for (i, (name, value)) in self.own.0.iter().enumerate() {
            let gap = if i == 0 { "  " } else { " " };
            let value = plain(value);
            let quoted = value.is_empty() || value.contains(|c: char| c.is_whitespace() || c == '"');
            let _ = if quoted { write!(words, "{gap}{name}={value:?}") } else { write!(words, "{gap}{name}={value}") };
        }
        // Each is short, but not all together.
        line(words)
    }

    /// The same, told for so many that were left out.
    pub(super) fn again(mut self, times: u64) -> Self {
        self.time = SystemTime::now();
        self.message = format!("{}; {times} times more in the minute before", self.message);
        self.own.put("before", times.into());
        self
    }

    /// One line, with colours or without.
    pub(super) fn text(&self, coloured: bool) -> String {
        let (word, colour) = match self.level {
            Level::ERROR => ("ERROR", AnsiColor::Red),
            Level::WARN => ("WARN ", AnsiColor::Yellow),
            Level::INFO => ("INFO ", AnsiColor::Green),
            Level::DEBUG => ("DEBUG", AnsiColor::Blue),
            _ => ("TRACE", AnsiColor::Magenta),
        };
        let styles = (Style::new().fg_color(Some(colour.into())), Style::new().dimmed());
        let (level, dim) = if coloured { styles } else { <(Style, Style)>::default() };
        let time = humantime::format_rfc3339_seconds(self.time);
        format!("{dim}{time}{dim:#} {level}{word}{level:#} {}\n", self.words())
    }

    /// One line of JSON, every field at the top level.
    pub(super) fn json(&self) -> String {
        let mut object = Map::new();
        for (name, value) in self.fields() {
            object.insert(name.to_owned(), value);
        }
        object.insert("time".to_owned(), humantime::format_rfc3339_micros(self.time).to_string().into());
        object.insert("level".to_owned(), self.level.as_str().to_lowercase().into());
        object.insert("target".to_owned(), self.target.into());
        object.insert("message".to_owned(), self.message.clone().into());
        format!("{}\n", Value::Object(object))
    }

    /// Every field but the message, the inherited ones first.
    pub(super) fn fields(&self) -> impl Iterator<Item = (&'static str, Value)> {
        let named = [("workload", &self.workload), ("cause", &self.cause)];
        let named = named.into_iter().filter_map(|(name, value)| Some((name, Value::from(value.clone()?))));
        let mut rest = self.inherited.clone();
        rest.extend(&self.own);
        named.chain(rest.0)
    }
}

/// A value as text, strings without quotes.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
