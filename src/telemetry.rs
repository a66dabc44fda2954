//! What the daemon says: to the journal with fields, to a terminal as text, or as JSON lines.
//!
//! One record, three renderings. The workload leads the message in all of them, because `journalctl -u we-agent` shows
//! nothing but the message; `cause` ends it. An event takes `workload`, `spiffe_id`, `serial` and the like from its own
//! fields or from the spans around it.
//!
//! A thread of its own writes, so that a reader that has stopped stops nobody else.

mod journal;
mod queue;
mod record;

pub use queue::dropped;

use journal::Journal;
use queue::{Next, Queue};
use record::{Fields, Record};
use std::{
    io::{self, Write},
    str::FromStr,
    thread,
    time::Duration,
};
use tracing::{
    Event, Level, Subscriber,
    span::{Attributes, Id},
};
use tracing_subscriber::{
    Layer,
    filter::{LevelFilter, Targets},
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

/// How records are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// Journald when stderr is connected to the journal, else text
    #[default]
    Auto,
    /// Lines for people, on stderr
    Text,
    /// One JSON object a line, on stderr
    Json,
    /// Structured entries, sent to the journal
    Journald,
}

/// Which records are written.
///
/// A bare level is for us alone; the libraries below us then say warnings only, for their traces show what goes over
/// the wire. `target=level` pairs are taken as they are.
#[derive(Debug, Clone, PartialEq)]
pub struct LogFilter(Targets);

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

/// How long the end, or a panic, waits for its last lines to be written.
const LAST_LINES: Duration = Duration::from_secs(1);
/// Of the thread that writes: it renders one record at a time.
const STACK: usize = 128 * 1024;

/// What is to be written.
static QUEUE: Queue = Queue::new();

/// Starts writing records that pass `filter`; a panic is a record, too. To be called once.
///
/// # Errors
/// When the thread that writes cannot be started.
pub fn init(format: LogFormat, filter: LogFilter) -> io::Result<()> {
    let sink = match format {
        LogFormat::Text => Sink::Text,
        LogFormat::Json => Sink::Json,
        LogFormat::Journald => Journal::system().map_or(Sink::Text, Sink::Journal),
        LogFormat::Auto if journal::is_stderr() => Journal::system().map_or(Sink::Text, Sink::Journal),
        LogFormat::Auto => Sink::Text,
    };
    thread::Builder::new().name("log".to_owned()).stack_size(STACK).spawn(move || write(&QUEUE, &sink))?;
    // It fails when there is a subscriber already, which then is what the caller wants.
    let _ = tracing_subscriber::registry().with(Output(&QUEUE).with_filter(filter.0)).try_init();
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let payload = panic.payload();
        let words = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        let cause = words.unwrap_or("a panic without words");
        tracing::error!(place, cause, "this is a bug in we-agent");
        flush();
    }));
    Ok(())
}

/// Before the end: waits until everything is written, as far as somebody takes it.
pub fn flush() {
    QUEUE.flush(LAST_LINES);
}

/// The writer's life.
fn write(queue: &Queue, sink: &Sink) {
    loop {
        match queue.next() {
            Next::Record(record) => sink.write(&record),
            Next::Gap(missing) => sink.write(&Record::note(format!(
                "{missing} lines of the log are missing here, for whoever reads it did not keep up"
            ))),
        }
    }
}

enum Sink {
    Text,
    Json,
    Journal(Journal),
}

/// The one layer: collects fields of spans, writes events.
struct Output(&'static Queue);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Output {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &tracing::span::Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut inherited = Fields::default();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(fields) = span.extensions().get::<Fields>() {
                inherited.extend(fields);
            }
        }
        let mut own = Fields::default();
        event.record(&mut own);
        self.0.put(Record::new(event.metadata(), std::time::SystemTime::now(), own, inherited));
    }
}

impl Sink {
    fn write(&self, record: &Record) {
        match self {
            Self::Text => to_stderr(&record.text()),
            Self::Json => to_stderr(&record.json()),
            // The journal is gone: better a plain line than none.
            Self::Journal(journal) => {
                if journal.send(record).is_err() {
                    to_stderr(&record.text());
                }
            }
        }
    }
}

/// One write for each line; colours are taken out where nobody sees them. Whether stderr is open is not our business.
fn to_stderr(line: &str) {
    let _ = anstream::stderr().lock().write_all(line.as_bytes());
}

/// The syslog severity of a level.
fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

#[cfg(test)]
mod tests;
