//! What the daemon says: to the journal with fields, to a terminal as text, or as JSON lines.
//!
//! One record, three renderings. The workload leads the message in all of them, because `journalctl -u we-agent` shows
//! nothing but the message; `cause` ends it. An event takes `workload`, `spiffe_id`, `serial` and the like from its own
//! fields or from the spans around it.
//!
//! Whoever speaks writes, as far as that takes no waiting: a reader that has stopped stops nobody else.

mod filter;
mod journal;
mod queue;
mod record;
mod sink;
mod stderr;

pub use filter::LogFilter;

use journal::Journal;
use queue::Queue;
use record::{Fields, Record};
use sink::{Form, Sink};
use std::{io, os::fd::AsFd, sync::OnceLock, time::Duration};
use stderr::Stderr;
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

/// What is to be written, once there is somewhere to write it.
static QUEUE: OnceLock<Queue> = OnceLock::new();

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
    let queue = QUEUE.get_or_init(|| Queue::new(sink));
    // It fails when there is a subscriber already, which then is what the caller wants.
    let _ = tracing_subscriber::registry().with(Output(queue).with_filter(filter.0)).try_init();
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
    if let Some(queue) = QUEUE.get() {
        queue.flush(LAST_LINES);
    }
}

/// How many lines of the log were dropped because nobody took them.
pub fn dropped() -> u64 {
    QUEUE.get().map_or(0, Queue::dropped)
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
