//! Taking connections in, and handing each to a thread.

use super::{
    Shared,
    connection::{self, Open},
    refusal::{Refusal, Throttle},
    threads::Threads,
};
use crate::status::InboundRefusal;
use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// When the system has no descriptor or memory left for one more.
const SHORT: Duration = Duration::from_millis(100);

/// Takes connections until `stop`. What is not taken by then waits for who listens next on the same socket.
pub(super) async fn run(listener: TcpListener, shared: Arc<Shared>, threads: Threads, stop: CancellationToken) {
    let accepting = async {
        let listener = match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => return tracing::error!(cause = %error, "the listener cannot be waited for"),
        };
        let mut warnings = Throttle::default();
        loop {
            threads.vacancy().await;
            // The connection leaves this thread's runtime again: most of them live on another.
            match listener.accept().await.and_then(|(stream, from)| Ok((stream.into_std()?, from))) {
                Ok((stream, from)) => admit(stream, from, &shared, &threads),
                Err(error) if is_the_peers(&error) => {}
                Err(error) => {
                    if let Some(more) = warnings.due(Instant::now()) {
                        tracing::warn!(cause = %error, more, "connections cannot be taken at present");
                    }
                    tokio::time::sleep(SHORT).await;
                }
            }
        }
    };
    stop.run_until_cancelled(accepting).await;
}

fn admit(stream: TcpStream, from: SocketAddr, shared: &Arc<Shared>, threads: &Threads) {
    let most = shared.settings.max_connections;
    // Who has not shaken hands yet gives way to who might: strangers must not use up what the mesh needs. The evicted goes in
    // a moment, so there is one more until then.
    let full = shared.counters.open.load(Relaxed) >= most || threads.are_full();
    if full && !shared.admission.evict() {
        let open = shared.counters.open.load(Relaxed);
        let refusal = Refusal::new(
            InboundRefusal::TooMany,
            format!("{open} connections are open already (maxConnections, or the limit on open files); closed at once"),
        );
        shared.counters.refused(refusal.kind, &refusal.to_string());
        shared.journal.refused(&refusal, from);
        return;
    }
    let (open, ticket) = (Open::new(shared), shared.admission.enter(from.ip()));
    threads.spawn(|load| async move {
        connection::serve(stream, from, open, ticket).await;
        drop(load);
    });
}

/// Errors of a connection that was gone before it was taken (accept(2)).
fn is_the_peers(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionReset, HostUnreachable, Interrupted, NetworkDown, NetworkUnreachable,
    };
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted | HostUnreachable | NetworkDown | NetworkUnreachable
    )
}
