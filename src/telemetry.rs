//! What the daemon says: to the journal with fields, to a terminal as text, or as JSON lines.
//!
//! One record, three renderings. The workload leads the message in all of them, because `journalctl -u we-agent` shows
//! nothing but the message; `cause` ends it. An event takes `workload`, `spiffe_id`, `serial` and the like from its own
//! fields or from the spans around it.
//!
//! Whoever speaks writes, as far as that takes no waiting: a reader that has stopped stops nobody else. What is said again
//! and again is counted.

mod filter;
mod journal;
mod queue;
mod record;
mod sink;
mod stderr;
mod throttle;

pub use filter::LogFilter;

use journal::Journal;
use queue::Queue;
use record::{Fields, Record};
use sink::{Form, Sink};
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::fd::AsFd,
    sync::OnceLock,
    time::{Duration, SystemTime},
};
use stderr::Stderr;
use throttle::{Key, Throttle};
use tracing::{
    Event, Level, Subscriber,
    span::{Attributes, Id},
};
use tracing_subscriber::{
    Layer,
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

/// How long the end, or a panic, waits for its last lines to be written.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The log, once there is somewhere to write it.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    throttle: Throttle,
    queue: Queue,
}

/// Starts writing records that pass `filter`; a panic is a record, too. To be called once.
///
/// # Errors
/// When stderr cannot be had.
pub fn init(format: LogFormat, filter: LogFilter) -> io::Result<()> {
    let journal = || Journal::system().map_or(Form::Text, Form::Journal);
    let form = match format {
        LogFormat::Text => Form::Text,
        LogFormat::Json => Form::Json,
        LogFormat::Journald => journal(),
        LogFormat::Auto if journal::is_stderr() => journal(),
        LogFormat::Auto => Form::Text,
    };
    let stderr = io::stderr();
    let coloured = anstream::AutoStream::choice(&stderr) != anstream::ColorChoice::Never;
    let sink = Sink { form, coloured, stderr: Stderr::of(stderr.as_fd())? };
    let log = LOG.get_or_init(|| Log::new(sink));
    // It fails when there is a subscriber already, which then is what the caller wants.
    let _ = tracing_subscriber::registry().with(output(log, filter)).try_init();
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let payload = panic.payload();
        let words = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        let cause = words.unwrap_or("a panic without words");
        if cause.starts_with("OS can't spawn worker thread") {
            return; // no bug, and told by who has asked (see `aside`)
        }
        tracing::error!(place, cause, "this is a bug in we-agent");
        log.queue.flush(LAST_LINES);
    }));
    Ok(())
}

/// Before the end: waits until everything is written, as far as somebody takes it.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.throttle.flush(&log.queue);
        log.queue.flush(LAST_LINES);
    }
}

/// How many lines of the log were dropped because nobody took them.
pub fn dropped() -> u64 {
    LOG.get().map_or(0, |log| log.queue.dropped())
}

impl Log {
    fn new(sink: Sink) -> Self {
        Self { throttle: Throttle::new(), queue: Queue::new(sink) }
    }
}

/// The one layer: collects fields of spans, writes events.
struct Output {
    log: &'static Log,
    filter: LogFilter,
}

fn output<S: Subscriber + for<'a> LookupSpan<'a>>(log: &'static Log, filter: LogFilter) -> impl Layer<S> {
    let all = filter.all.clone();
    Output { log, filter }.with_filter(all)
}

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
        let (line, Log { throttle, queue }) = (event.metadata(), self.log);
        let record = || record(event, &context);
        if self.filter.asks_for(line) {
            return queue.put(record());
        }
        let mut hasher = DefaultHasher::new();
        line.callsite().hash(&mut hasher);
        let site = hasher.finish();
        if filter::is_ours(line.target()) {
            let record = record();
            record.hash_words(&mut hasher);
            throttle.put(Key { site, line: hasher.finish() }, || record, queue);
        } else {
            // Only its place counts: what it says is what others make it say.
            throttle.put(Key { site, line: site }, record, queue);
        }
    }
}

fn record<S: Subscriber + for<'a> LookupSpan<'a>>(event: &Event<'_>, context: &Context<'_, S>) -> Record {
    let mut inherited = Fields::default();
    for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
        if let Some(fields) = span.extensions().get::<Fields>() {
            inherited.extend(fields);
        }
    }
    let mut own = Fields::default();
    event.record(&mut own);
    Record::new(event.metadata(), SystemTime::now(), own, inherited)
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
