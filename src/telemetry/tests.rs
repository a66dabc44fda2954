#![allow(clippy::unwrap_used)]
use super::*;
use std::{os::unix::net::UnixDatagram, time::Duration};
use tracing::{info, info_span, warn};

/// What the journal receives while `say` runs, one entry a datagram.
fn entries(filter: &str, say: impl FnOnce()) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let journal = UnixDatagram::bind(&path).unwrap();
    journal.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let filter: LogFilter = filter.parse().unwrap();
    let form = Form::Journal(Journal::at(&path).unwrap());
    let sink = Sink { form, coloured: false, stderr: Stderr::of(io::stderr().as_fd()).unwrap() };
    let log: &Log = Box::leak(Box::new(Log::new(sink)));
    tracing::subscriber::with_default(tracing_subscriber::registry().with(output(log, filter)), || {
        say();
        tracing::error!(target: "we_agent", "end");
    });
    let mut entries = Vec::new();
    loop {
        let mut buffer = vec![0; 64 * 1024];
        let size = journal.recv(&mut buffer).unwrap();
        let entry = String::from_utf8_lossy(&buffer[..size]).into_owned();
        if entry.starts_with("MESSAGE=end\n") {
            return entries;
        }
        entries.push(entry);
    }
}

#[test]
fn what_a_journal_that_hangs_does_not_take_is_a_plain_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let _journal = UnixDatagram::bind(&path).unwrap();
    let others = UnixDatagram::unbound().unwrap();
    others.set_nonblocking(true).unwrap();
    while others.send_to(b"MESSAGE=full\n", &path).is_ok() {}
    let file = tempfile::NamedTempFile::new().unwrap();
    let form = Form::Journal(Journal::at(&path).unwrap());
    let sink = Sink { form, coloured: false, stderr: Stderr::of(file.as_fd()).unwrap() };
    let log: &Log = Box::leak(Box::new(Log::new(sink)));
    let output = output(log, LogFilter::default());
    tracing::subscriber::with_default(tracing_subscriber::registry().with(output), || {
        (0..3).for_each(|n| warn!(n, "said"));
    });
    log.queue.flush(Duration::from_secs(60));
    let text = std::fs::read_to_string(file.path()).unwrap();
    let said: Vec<_> = text.lines().filter_map(|line| line.split_once("WARN  ")).map(|(_, words)| words).collect();
    assert_eq!(said, ["said  n=0", "said  n=1", "said  n=2"]);
}

fn has(entry: &str, line: &str) {
    assert!(entry.lines().any(|l| l == line), "{line} is not in\n{entry}");
}

#[test]
fn the_journal_gets_a_sentence_and_every_field() {
    let entries = entries("info", || {
        let span = info_span!("workload", workload = "payments", spiffe_id = "spiffe://td/ns/a/sa/b", serial = "old");
        span.in_scope(|| info!(serial = "1f", attempts = 3, "certificate issued"));
        warn!(workload = "orders", cause = %"stream closed\nby peer", "registration lost");
    });
    has(&entries[0], "MESSAGE=payments: certificate issued  serial=1f attempts=3");
    has(&entries[0], "PRIORITY=6");
    has(&entries[0], "SYSLOG_IDENTIFIER=we-agent");
    has(&entries[0], "WORKLOAD=payments");
    has(&entries[0], "SPIFFE_ID=spiffe://td/ns/a/sa/b");
    has(&entries[0], "SERIAL=1f");
    has(&entries[0], "ATTEMPTS=3");
    has(&entries[1], "PRIORITY=4");
    has(&entries[1], "MESSAGE=orders: registration lost: stream closed by peer");
    has(&entries[1], "CAUSE=stream closed by peer");
}

#[test]
fn a_bare_level_opens_our_targets_only() {
    let say = || {
        tracing::trace!("ours");
        tracing::debug!(target: "h2::codec", "frame");
        tracing::warn!(target: "rustls::conn", "odd");
        tracing::error!(target: "tonic::status", "bad");
    };
    let heard = |filter: &str| {
        entries(filter, say).iter().filter_map(|e| Some(e.split_once('\n')?.0.to_owned())).collect::<Vec<_>>()
    };
    assert_eq!(heard("trace"), ["MESSAGE=ours", "MESSAGE=bad"]);
    assert_eq!(heard("info"), ["MESSAGE=bad"]);
    assert_eq!(heard("we_agent=info,tonic=off"), [""; 0]);
    assert_eq!(heard("info,h2=debug,rustls=warn"), ["MESSAGE=frame", "MESSAGE=odd", "MESSAGE=bad"]);
    assert_eq!(heard("we_agent=trace"), ["MESSAGE=ours", "MESSAGE=bad"]);
    assert!("loud".parse::<LogFilter>().is_err());
}

#[test]
fn a_long_text_is_cut_and_a_field_has_a_legal_name() {
    let long = "ä".repeat(100_000);
    let entries = entries("info", || warn!(_we.odd = 1, cause = long.as_str(), "long"));
    assert!(entries[0].len() < 20_000, "{}", entries[0].len());
    has(&entries[0], "WE_ODD=1");
    let cause = entries[0].lines().find_map(|line| line.strip_prefix("CAUSE=")).unwrap();
    assert!(cause.len() > 8_000 && cause.trim_end_matches('…').chars().all(|c| c == 'ä'));
}

/// The lines of text that are written while `say` runs, without their times.
fn lines(filter: &str, say: impl FnOnce()) -> Vec<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sink = Sink { form: Form::Text, coloured: false, stderr: Stderr::of(file.as_fd()).unwrap() };
    let log: &Log = Box::leak(Box::new(Log::new(sink)));
    let output = output(log, filter.parse().unwrap());
    tracing::subscriber::with_default(tracing_subscriber::registry().with(output), say);
    log.throttle.flush(&log.queue);
    let text = std::fs::read_to_string(file.path()).unwrap();
    text.lines().map(|line| line.split_once(' ').unwrap().1.trim_start().to_owned()).collect()
}

#[test]
fn nobody_makes_us_say_the_same_without_end() {
    let say = || {
        for n in 0..100 {
            tracing::error!(target: "h2::proto", n, "a ping that we never sent");
            let _of = info_span!("workload", workload = if n % 2 == 0 { "orders" } else { "payments" }).entered();
            warn!(cause = "no route", "registration lost");
            info!(n, "another each time");
            tracing::debug!("asked for");
        }
    };
    let count = |lines: &[String], words: &str| lines.iter().filter(|line| line.contains(words)).count();
    let heard = lines("debug", say);
    assert_eq!(count(&heard, "never sent"), 11, "{heard:#?}");
    assert_eq!(count(&heard, "never sent; 90 times more in the minute before  n=10 before=90"), 1, "{heard:#?}");
    for workload in ["orders", "payments"] {
        assert_eq!(count(&heard, &format!("WARN  {workload}: registration lost")), 11, "{heard:#?}");
        let told = format!("{workload}: registration lost; 40 times more in the minute before: no route  before=40");
        assert_eq!(count(&heard, &told), 1, "{heard:#?}");
    }
    assert_eq!((count(&heard, "another each time"), count(&heard, "asked for")), (100, 100));
    // Whoever names a target hears all of it.
    assert_eq!(count(&lines("info,h2=error", say), "never sent"), 100);
}

fn record() -> Record {
    let mut own = Fields::default();
    let mut inherited = Fields::default();
    let span = info_span!("unused");
    let metadata = span.metadata().unwrap_or_else(|| panic!("spans need a subscriber"));
    own.extend(&Fields::of(&[
        ("message", "registration lost"),
        ("entry", "vms/a b"),
        ("cause", "closed\x1b[2J\nby\u{202e}peer"),
    ]));
    inherited.extend(&Fields::of(&[("workload", "payments"), ("spiffe_id", "spiffe://td/x")]));
    Record::new(metadata, std::time::UNIX_EPOCH, own, inherited)
}

fn with_subscriber<T>(f: impl FnOnce() -> T) -> T {
    tracing::subscriber::with_default(tracing_subscriber::registry(), f)
}

#[test]
fn text_is_one_line_that_nobody_can_break() {
    let record = with_subscriber(record);
    let text = record.text(false);
    assert_eq!(text, "1970-01-01T00:00:00Z INFO  payments: registration lost: closed [2J by peer  entry=\"vms/a b\"\n");
    assert_eq!(anstream::adapter::strip_str(&record.text(true)).to_string(), text);
}

#[test]
fn json_has_every_field_at_the_top() {
    let json: serde_json::Value = serde_json::from_str(&with_subscriber(record).json()).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "time": "1970-01-01T00:00:00.000000Z", "level": "info", "target": "we_agent::telemetry::tests",
            "message": "registration lost", "workload": "payments", "spiffe_id": "spiffe://td/x",
            "entry": "vms/a b", "cause": "closed [2J by peer",
        })
    );
}
