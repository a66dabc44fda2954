//! One connection from beginning to end.

use super::{
    Phase, Shared,
    admission::Ticket,
    deadlines::{Deadlines, End, Next, quiet},
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
/// From the last sign of life to the first question whether the peer is there, and from one to the next; then it is gone.
const KEEPALIVE: (u32, u32, u32) = (60, 10, 6);
/// For what has come to be heard, before a quiet connection is ended.
const SHORTLY: Duration = Duration::from_millis(10);

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
    use InboundRefusal::{Application, Evicted, NoIdentity, TooMany};
    if matches!(refusal.kind, NoIdentity | Application | Evicted | TooMany) {
        let _ = peer.set_zero_linger(); // it may be gone already
    }
}

async fn forward(peer: TcpStream, from: SocketAddr, welcome: Welcome, shared: &Arc<Shared>) {
    let settings = &shared.settings;
    let Some(_share) = shared.shares.take(&welcome.caller, settings.max_per_identity) else {
        let who = welcome.caller.as_ref().map_or("clients without TLS have".to_owned(), |id| format!("{id} has"));
        let text = format!("{who} {} connections open already (maxConnectionsPerIdentity)", settings.max_per_identity);
        return refuse(peer, from, &Refusal::new(InboundRefusal::TooMany, text), shared);
    };
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
    let mut pump = Pump::new(peer, welcome.tls, application, welcome.said, shared.budget.clone());
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

/// Moves bytes until the end.
async fn pumped(pump: &mut Pump, shared: &Shared) -> End {
    let settings = &shared.settings;
    let age = settings.max_age.map(|age| between(age.mul_f64(0.9), age.mul_f64(1.1)));
    let mut deadlines = Deadlines::new(settings, age, Instant::now());
    let mut phase = shared.phase.clone();
    let mut wake = pin!(sleep_until(Instant::now().into()));
    loop {
        deadlines.stop = ending(*phase.borrow_and_update());
        match deadlines.next(Instant::now(), pump.moved, pump.doing()) {
            Next::Look(at) => wake.as_mut().reset(at.into()),
            // A request that is here already is not to be lost to the order in which we hear of it and of the end.
            Next::End(End::Quiet) if pump.is_called() => wake.as_mut().reset((Instant::now() + SHORTLY).into()),
            Next::End(end) => return end,
        }
        tokio::select! {
            biased;
            turn = poll_fn(|cx| pump.poll(cx, &shared.counters)) => if let Some(end) = turn { return end },
            changed = phase.changed() => if changed.is_err() { return End::Broken },
            () = &mut wake => {}
        }
    }
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
}
