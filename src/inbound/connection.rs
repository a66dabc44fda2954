//! One connection from beginning to end.

use super::{
    Phase, Shared,
    admission::Ticket,
    handshake::{Welcome, shake},
    header::header,
    pump::Pump,
    refusal::Refusal,
};
use crate::{
    command::words,
    host::{Local, LocalStream},
    status::InboundRefusal,
    time::between,
};
use nix::sys::socket::{setsockopt, sockopt};
use std::{
    future::poll_fn,
    io,
    net::{SocketAddr, TcpStream as StdStream},
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};
use tokio::{
    net::TcpStream,
    time::{sleep_until, timeout},
};

/// Bound on connecting to the application. On this host it takes no time, or the application takes no connections.
const CONNECT: Duration = Duration::from_secs(3);
/// From one look whether a connection that is to end is quiet to the next, at most and at least.
const LOOK: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(10));
/// From the last sign of life to the first question whether the peer is there, and from one to the next; then it is gone.
const KEEPALIVE: (u32, u32, u32) = (60, 10, 6);

/// Counts a connection for as long as it is open.
pub(super) struct Open(Arc<Shared>);

impl Open {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        shared.counters.accepted.fetch_add(1, Relaxed);
        shared.counters.open.fetch_add(1, Relaxed);
        Self(shared.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.counters.open.fetch_sub(1, Relaxed);
    }
}

/// Serves one connection. To be called within the runtime of its thread.
pub(super) async fn serve(stream: StdStream, from: SocketAddr, open: Open, ticket: Ticket) {
    let shared = open.0.clone();
    let Ok(mut peer) = prepared(stream) else { return };
    match welcome(&mut peer, &shared, ticket).await {
        Ok(welcome) => forward(peer, from, welcome, &shared).await,
        Err(refusal) => refuse(peer, from, &refusal, &shared),
    }
}

fn prepared(stream: StdStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    let (idle, interval, count) = KEEPALIVE;
    setsockopt(&stream, sockopt::KeepAlive, &true)?;
    setsockopt(&stream, sockopt::TcpKeepIdle, &idle)?;
    setsockopt(&stream, sockopt::TcpKeepInterval, &interval)?;
    setsockopt(&stream, sockopt::TcpKeepCount, &count)?;
    TcpStream::from_std(stream)
}

async fn welcome(peer: &mut TcpStream, shared: &Arc<Shared>, mut ticket: Ticket) -> Result<Welcome, Refusal> {
    let within = shared.settings.handshake;
    let late = |why: String| Err(Refusal::new(InboundRefusal::Timeout, why));
    let shaken = tokio::select! {
        biased;
        () = ticket.evicted() => None,
        shaken = timeout(within, shake(peer, shared)) => Some(shaken.unwrap_or_else(|_| {
            late(format!("no handshake within {} (handshakeTimeout)", humantime::format_duration(within)))
        })),
        () = stopping(shared) => Some(late("no handshake when the agent stopped".to_owned())),
    };
    match shaken {
        Some(Err(refusal)) => Err(refusal),
        // The room of one that was evicted while it ended is taken already.
        Some(Ok(welcome)) if ticket.give_back() => Ok(welcome),
        _ => Err(Refusal::new(
            InboundRefusal::Evicted,
            "no room was left (maxHandshakes, or maxConnections), and this was the oldest handshake of the busiest address",
        )),
    }
}

/// Returns when the agent stops and has waited for handshakes as long as for quiet connections.
async fn stopping(shared: &Shared) {
    let mut phase = shared.phase.clone();
    let draining = phase.wait_for(|phase| *phase != Phase::Serving).await.map(|phase| *phase);
    if let Ok(Phase::Draining(until)) = draining {
        let now = Instant::now();
        sleep_until((now + quiet(until, now)).into()).await;
    }
}

/// Closes at once. Where TLS has said why, the peer gets to read it: a reset would take it away from the peer.
fn refuse(peer: TcpStream, from: SocketAddr, refusal: &Refusal, shared: &Shared) {
    shared.counters.refused(refusal.kind, &refusal.to_string());
    shared.journal.refused(refusal, from);
    if matches!(refusal.kind, InboundRefusal::NoIdentity | InboundRefusal::Application | InboundRefusal::Evicted) {
        let _ = peer.set_zero_linger(); // it may be gone already
    }
}

async fn forward(peer: TcpStream, from: SocketAddr, welcome: Welcome, shared: &Arc<Shared>) {
    let settings = &shared.settings;
    let application = match connect(&settings.forward).await {
        Ok(application) => application,
        Err(cause) => {
            let text = format!("the application at {} takes no connection: {cause}", settings.forward);
            return refuse(peer, from, &Refusal::new(InboundRefusal::Application, text), shared);
        }
    };
    if welcome.tls.is_none() {
        shared.counters.plain.fetch_add(1, Relaxed);
    }
    shared.counters.bytes_in.fetch_add(welcome.said.len() as u64, Relaxed);
    let local = peer.local_addr().ok().filter(|_| settings.proxy_header);
    let header = local.map(|local| header(from, local, &welcome));
    let mut pump = Pump::new(peer, welcome.tls, application, welcome.said);
    if let Some(header) = header {
        pump.introduce(header);
    }
    match pumped(&mut pump, shared).await {
        End::Said => {}
        End::Quiet => pump.close(),
        End::Broken => pump.reset(),
    }
}

/// Connects to the application, or says why not, and what to do about it.
async fn connect(to: &Local) -> Result<LocalStream, String> {
    match timeout(CONNECT, to.connect()).await {
        Ok(connected) => connected.map_err(|error| format!("{}{}", words(&error), advice(to, error.kind()))),
        Err(_) => Err(format!("not taken within {}; is it overloaded, or stuck?", humantime::format_duration(CONNECT))),
    }
}

fn advice(to: &Local, error: io::ErrorKind) -> &'static str {
    match (to, error) {
        // The sandbox of the service shows as if nothing were there.
        (Local::Unix(path), io::ErrorKind::NotFound) if path.starts_with("/tmp") || path.starts_with("/var/tmp") => {
            "; the service does not see the host's /tmp (PrivateTmp=): let the application have its socket below /run"
        }
        (Local::Unix(path), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound) if path.starts_with("/home") => {
            "; the service does not see /home (ProtectHome=): let the application have its socket below /run"
        }
        (Local::Unix(_), io::ErrorKind::PermissionDenied) => {
            "; the user that we-agent runs as must be allowed to write to the socket and to pass the directories above it: give \
             the service the socket's group (SupplementaryGroups= in a drop-in)"
        }
        (_, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => "; is it running?",
        _ => "",
    }
}

/// How a connection ends.
enum End {
    /// Both ends have said all they had to say.
    Said,
    /// Nothing was moved for as long as that may last.
    Quiet,
    /// An end is gone, or we cannot wait any longer.
    Broken,
}

/// Moves bytes until the end.
async fn pumped(pump: &mut Pump, shared: &Shared) -> End {
    let settings = &shared.settings;
    let born = Instant::now();
    let old = settings.max_age.map(|age| born + between(age.mul_f64(0.9), age.mul_f64(1.1)));
    let mut phase = shared.phase.clone();
    let mut ending = ending(*phase.borrow_and_update());
    let next = |pump: &Pump, ending: Option<Instant>| match ending {
        Some(until) => until.min(Instant::now() + look(until)),
        None => old.into_iter().fold(pump.moved + settings.idle, Instant::min),
    };
    let mut wake = pin!(sleep_until(next(pump, ending).into()));
    loop {
        tokio::select! {
            biased;
            end = poll_fn(|cx| pump.poll(cx, &shared.counters)) => return if end.is_ok() { End::Said } else { End::Broken },
            changed = phase.changed() => match changed {
                Ok(()) => ending = self::ending(*phase.borrow_and_update()),
                Err(_) => return End::Broken,
            },
            () = &mut wake => {
                let now = Instant::now();
                match ending {
                    // What is on its way and not taken would be lost: that is no regular end.
                    None if now >= pump.moved + settings.idle => {
                        return if pump.is_empty() { End::Quiet } else { End::Broken };
                    }
                    None if old.is_some_and(|old| now >= old) => ending = Some(now + settings.drain),
                    // Who was asked and has not answered yet is not quiet, but busy.
                    Some(until) if pump.rests() && now >= pump.moved + quiet(until, now) => return End::Quiet,
                    Some(until) if now >= until => return End::Broken,
                    _ => {}
                }
            }
        }
        wake.as_mut().reset(next(pump, ending).into());
    }
}

/// For how long nothing must have been moved on a connection that is to end at `until` at the latest: a quarter of the time
/// that is left. Bytes do not tell a pause in the middle of an answer from the time between two requests. Who has not called
/// for a while does not hold up the end; and who calls all the time is ended between two calls rather than in one.
fn quiet(until: Instant, now: Instant) -> Duration {
    until.saturating_duration_since(now) / 4
}

/// When to look again: more often towards the end, as less is asked for.
fn look(until: Instant) -> Duration {
    let (most, least) = LOOK;
    (until.saturating_duration_since(Instant::now()) / 4).clamp(least, most)
}

fn ending(phase: Phase) -> Option<Instant> {
    match phase {
        Phase::Serving => None,
        Phase::Draining(until) => Some(until),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn the_advice_is_that_for_the_failure() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("app.sock");
        let cause = async |to: Local| connect(&to).await.unwrap_err();
        assert_eq!(cause(Local::Unix("/nowhere/app.sock".into())).await, "no such file or directory; is it running?");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        assert_eq!(cause(Local::Unix(socket)).await, "connection refused; is it running?");
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_eq!(cause(Local::Tcp(closed)).await, "connection refused; is it running?");
        let tmp = cause(Local::Unix("/tmp/no such directory/app.sock".into())).await;
        assert!(tmp.starts_with("no such file or directory; the service does not see the host's /tmp"), "{tmp}");
        let denied = advice(&Local::Unix("/run/app.sock".into()), io::ErrorKind::PermissionDenied);
        assert!(denied.contains("SupplementaryGroups="), "{denied}");
        assert_eq!(advice(&Local::Tcp(closed), io::ErrorKind::AddrNotAvailable), "");
    }

    #[test]
    fn less_and_less_has_to_be_quiet() {
        const SECOND: Duration = Duration::from_secs(1);
        let now = Instant::now();
        let quiet = |left| quiet(now + left, now);
        assert_eq!(quiet(4 * SECOND), SECOND);
        assert_eq!(quiet(SECOND), SECOND / 4);
        assert_eq!(quiet(Duration::ZERO), Duration::ZERO);
        // It neither spins nor sleeps through.
        assert_eq!((look(now), look(now + 9 * SECOND)), (LOOK.1, LOOK.0));
    }
}
