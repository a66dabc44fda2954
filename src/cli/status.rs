//! `we-agent status`: asks the daemon, and says it for people.

use crate::{
    admin,
    files::Root,
    status::{
        ConsumerReport, InboundReport, MembershipReport, MembershipState, Mood, ReloadReport, ReloadState, Report,
        State, Timestamp, TokenState, WorkloadReport,
    },
    text::one_line,
};
use anstyle::{AnsiColor, Style};
use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use std::{error::Error, fmt::Write, path::PathBuf, time::Duration};
use tokio::net::UnixStream;

/// For the daemon to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// What to do about a daemon that answers oddly.
const COMPARE: &str = "restart it, and compare the versions of daemon and command";
/// Of more consumers than this, the rest is only counted; `--json` has them all.
const CROWD: usize = 8;

/// Why the daemon has not told its status.
#[derive(Debug, thiserror::Error)]
#[error("the daemon does not answer on {}: {cause}; {fix}", .socket.display())]
pub(super) struct Unreachable {
    socket: PathBuf,
    cause: String,
    fix: &'static str,
    denied: bool,
}

impl Unreachable {
    fn new(root: &Root, cause: String, fix: &'static str) -> Self {
        Self { socket: root.path(admin::SOCKET), cause, fix, denied: false }
    }

    /// It answers, but not what it was asked.
    pub(super) fn answered(root: &Root, code: StatusCode) -> Self {
        Self::new(root, format!("it says {code}"), COMPARE)
    }

    /// Whether it is there, but not for us to ask.
    pub(super) fn is_denied(&self) -> bool {
        self.denied
    }
}

/// The daemon's report.
pub(super) async fn fetch(root: &Root) -> Result<Report, Unreachable> {
    let (_, body) = ask(root, Method::GET, "/status").await?;
    serde_json::from_slice(&body).map_err(|error| Unreachable::new(root, error.to_string(), COMPARE))
}

/// What the daemon answers on its socket.
pub(super) async fn ask(root: &Root, method: Method, path: &str) -> Result<(StatusCode, Bytes), Unreachable> {
    let socket = root.path(admin::SOCKET);
    if let Some(cause) = admin::too_long(&socket) {
        return Err(Unreachable::new(root, cause, "no daemon runs there"));
    }
    let stream = UnixStream::connect(&socket).await.map_err(|error| {
        let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
        let fix = match denied {
            true => "ask as root, or as a member of the socket's group",
            false => "start it with \"we-agent run\" and the same --root, or start its service",
        };
        Unreachable { denied, ..Unreachable::new(root, error.to_string(), fix) }
    })?;
    match tokio::time::timeout(DEADLINE, exchange(stream, method, path)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Unreachable::new(root, error.to_string(), COMPARE)),
        Err(_) => Err(Unreachable::new(root, "no answer within 5 s".to_owned(), COMPARE)),
    }
}

async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
) -> Result<(StatusCode, Bytes), Box<dyn Error + Send + Sync>> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = http::Request::builder().method(method).uri(path).header("host", "localhost");
    let request = request.body(Empty::<Bytes>::new())?;
    let answer = async {
        let answer = sender.send_request(request).await?;
        Ok::<_, hyper::Error>((answer.status(), answer.collect().await?.to_bytes()))
    };
    // The connection ends when the answer is complete; that it was cut short is the answer's error.
    let (answer, _) = tokio::join!(answer, connection);
    Ok(answer?)
}

const GOOD: Style = AnsiColor::Green.on_default();
const WAIT: Style = AnsiColor::Yellow.on_default();
const BAD: Style = AnsiColor::Red.on_default();
const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();

/// One block for each workload; where something is wrong, a line with cause and fix.
pub(super) fn text(report: &Report) -> String {
    let mut out = String::new();
    if let Some(note) = report.note.as_ref().filter(|_| !report.workloads.is_empty()) {
        let _ = writeln!(out, "{WAIT}{note}{WAIT:#}\n");
    }
    for (i, workload) in report.workloads.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        block(&mut out, workload, report.time);
    }
    if report.workloads.is_empty() {
        let cause = report.cause.as_deref().unwrap_or("there is no workload");
        let _ = writeln!(out, "{WAIT}{cause}{WAIT:#}");
    }
    out
}

fn block(out: &mut String, w: &WorkloadReport, now: Timestamp) {
    let (style, word) = if w.ready { (GOOD, "ready") } else { (BAD, "not ready") };
    let _ = writeln!(out, "{BOLD}{}{BOLD:#}  {style}{word}{style:#}", w.name);
    if let Some(id) = &w.spiffe_id {
        row(out, "spiffe id", DIM, id, "");
    }
    if !w.broken.is_empty() {
        let runs = w.spiffe_id.is_some();
        row(out, "bundle", BAD, if runs { "broken; what ran before goes on as it was" } else { "broken" }, "");
        w.broken.iter().for_each(|mistake| wrong(out, mistake));
        if !runs {
            return;
        }
    }
    identity(out, w, now);
    registration(out, w, now);
    membership(out, &w.membership);
    health(out, w);
    let addresses: Vec<_> = w.address.all.iter().map(ToString::to_string).collect();
    if !addresses.is_empty() {
        row(out, "address", DIM, &addresses.join(", "), "");
    }
    for files in &w.files {
        let style = if files.cause.is_some() { BAD } else { DIM };
        row(out, &files.publisher, style, &files.serial.as_ref().map_or("-".to_owned(), |s| format!("serial {s}")), "");
        files.cause.iter().for_each(|cause| wrong(out, cause));
    }
    consumers(out, &w.consumers);
    w.inbound.iter().for_each(|listener| inbound(out, listener));
    w.reloads.iter().for_each(|hook| reload(out, hook));
    if !w.ignored.is_empty() {
        row(out, "not obeyed", DIM, &w.ignored.join(", "), "");
    }
}

fn identity(out: &mut String, w: &WorkloadReport, now: Timestamp) {
    let mut rest = String::new();
    if let Some(end) = w.identity.not_after {
        let word = if end > now { "expires" } else { "expired" };
        let _ = write!(rest, ", {word} {} ({end})", relative(end, now));
    }
    if let Some(renewal) = w.identity.renew_at {
        let _ = write!(rest, ", renewal {}", relative(renewal, now));
    }
    state(out, "identity", w.identity.state, &rest);
    w.identity.cause.iter().chain(&w.identity.store.cause).for_each(|cause| wrong(out, cause));
    match w.identity.token.state {
        TokenState::Kept => {}
        removed @ TokenState::Removed => state(out, "token", removed, ", it has served"),
        stays @ TokenState::Stays => state(out, "token", stays, ", though it has served"),
    }
    w.identity.token.cause.iter().for_each(|cause| wrong(out, cause));
}

fn registration(out: &mut String, w: &WorkloadReport, now: Timestamp) {
    let mut rest = String::new();
    if let Some(entry) = &w.registration.entry {
        let _ = write!(rest, " as {entry}");
    }
    if let Some(since) = w.registration.since {
        let _ = write!(rest, ", {}", relative(since, now));
    }
    state(out, "registration", w.registration.state, &rest);
    // A refused certificate troubles both; it is told once.
    let news = w.registration.cause.iter().filter(|cause| Some(*cause) != w.identity.cause.as_ref());
    news.for_each(|cause| wrong(out, cause));
}

fn membership(out: &mut String, membership: &MembershipReport) {
    let mut rest = String::new();
    if !membership.services.is_empty() {
        let _ = write!(rest, " for {}", membership.services.join(", "));
    }
    if let Some(tls) = membership.tls {
        let ports: Vec<_> = membership.ports.iter().map(ToString::to_string).collect();
        let speech = if tls { "mutual TLS" } else { "plain text" };
        let _ = write!(rest, "; pods speak {speech} to port {}", ports.join(", "));
    }
    state(out, "membership", membership.state, &rest);
    let news = |cause: &&String| !(membership.state == MembershipState::Unknown && cause.starts_with("not looked"));
    membership.cause.iter().filter(news).for_each(|cause| wrong(out, cause));
}

fn health(out: &mut String, w: &WorkloadReport) {
    state(out, "health", w.health.state, "");
    w.health.message.iter().for_each(|message| wrong(out, message));
}

/// Those in trouble first.
fn consumers(out: &mut String, consumers: &[ConsumerReport]) {
    let mut all: Vec<_> = consumers.iter().collect();
    all.sort_by_key(|consumer| consumer.state.mood());
    for consumer in all.iter().take(CROWD) {
        let ConsumerReport { protocol, resource, node, uid, .. } = consumer;
        let mut rest = format!(", {protocol} {resource} for uid {uid}");
        consumer.pid.iter().for_each(|pid| _ = write!(rest, ", pid {pid}"));
        if !node.is_empty() {
            let _ = write!(rest, ", {node}");
        }
        consumer.version.iter().for_each(|version| _ = write!(rest, ": {version}"));
        state(out, "consumer", consumer.state, &rest);
        consumer.cause.iter().for_each(|cause| wrong(out, cause));
    }
    if let Some(more) = all.len().checked_sub(CROWD).filter(|more| *more > 0) {
        row(out, "", DIM, &format!("and {more} more"), "");
    }
}

fn reload(out: &mut String, hook: &ReloadReport) {
    let mut rest = format!(", {}", hook.hook);
    match (hook.state, &hook.served) {
        (ReloadState::Reloaded, Some(serial)) => _ = write!(rest, ", seen serving {serial}"),
        (ReloadState::Stale, Some(serial)) => _ = write!(rest, ", still serving {serial}"),
        _ => {}
    }
    state(out, "hook", hook.state, &rest);
    hook.cause.iter().for_each(|cause| wrong(out, cause));
}

fn inbound(out: &mut String, i: &InboundReport) {
    let (style, word) = match i.address {
        Some(address) => (GOOD, address.to_string()),
        None => (BAD, "not listening".to_owned()),
    };
    let mut rest = format!(" to {} ({}), {} open of {}", i.forward, i.mode, i.open, i.connections);
    if i.plain > 0 {
        let _ = write!(rest, ", {} without TLS", i.plain);
    }
    let refused: Vec<_> = i.refused.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    if !refused.is_empty() {
        let _ = write!(rest, "; refused: {}", refused.join(", "));
    }
    row(out, "inbound", style, &word, &rest);
    i.cause.iter().chain(&i.notes).for_each(|cause| wrong(out, cause));
    if let Some(last) = &i.last_refusal {
        row(out, "", DIM, "last refusal:", &format!(" {last}"));
    }
}

fn state<S: State>(out: &mut String, label: &str, state: S, rest: &str) {
    let style = match state.mood() {
        Mood::Bad => BAD,
        Mood::Waits => WAIT,
        Mood::Good => GOOD,
        Mood::Plain => DIM,
    };
    row(out, label, style, state.as_str(), rest);
}

fn row(out: &mut String, label: &str, style: Style, word: &str, rest: &str) {
    let _ = writeln!(out, "  {label:<13} {style}{}{style:#}{}", clean(word), clean(rest));
}

fn wrong(out: &mut String, cause: &str) {
    let _ = writeln!(out, "  {:<13} {BAD}!{BAD:#} {}", "", clean(cause));
}

/// Texts from elsewhere do not steer the terminal.
fn clean(text: &str) -> String {
    one_line(text, usize::MAX)
}

/// `in 11h 58m`, `3m 2s ago`: the two largest units.
fn relative(time: Timestamp, now: Timestamp) -> String {
    let (future, distance) = match time.0.duration_since(now.0) {
        Ok(ahead) => (true, ahead),
        Err(behind) => (false, behind.duration()),
    };
    let text = humantime::format_duration(Duration::from_secs(distance.as_secs())).to_string();
    let largest: Vec<_> = text.split(' ').take(2).collect();
    if future { format!("in {}", largest.join(" ")) } else { format!("{} ago", largest.join(" ")) }
}

#[cfg(test)]
mod tests;
