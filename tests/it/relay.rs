//! A wire between agent and control plane that does what wires do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};

/// What the wire does at present.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wire {
    /// How long each byte takes, one way.
    pub(crate) delay: Duration,
    /// The connection is reset when the server has sent so many bytes on it.
    pub(crate) cut: Option<usize>,
    /// On so many connections, the first ones, nothing passes, and nobody is told.
    pub(crate) silent: usize,
}

/// A relay on a port of loopback.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    pub(crate) wire: watch::Sender<Wire>,
    /// How many connections it has taken.
    pub(crate) taken: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Relay {
    /// In front of `server`.
    pub(crate) async fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (wire, taken) = (watch::Sender::new(Wire::default()), Arc::new(AtomicUsize::new(0)));
        let (state, count) = (wire.clone(), taken.clone());
        let task = tokio::spawn(async move {
            let mut lines = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::Relaxed);
                lines.spawn(line(client, server, state.subscribe(), number));
                while lines.try_join_next().is_some() {}
            }
        });
        Self { address, wire, taken, task: task.abort_handle() }
    }

    pub(crate) fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn line(client: TcpStream, server: SocketAddr, wire: watch::Receiver<Wire>, number: usize) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    for end in [&client, &server] {
        let _ = end.set_nodelay(true);
    }
    let _ = client.set_zero_linger();
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::select! {
        () = pass(from_client, to_server, wire.clone(), number, false) => {}
        () = pass(from_server, to_client, wire, number, true) => {}
    }
}

/// Passes bytes on, each after the delay, in order.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    wire: watch::Receiver<Wire>,
    number: usize,
    counted: bool,
) {
    let (queue, mut queued) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let state = wire.clone();
    let read = async move {
        let mut passed = 0;
        loop {
            let mut bytes = vec![0; 16 * 1024];
            let Ok(n @ 1..) = from.read(&mut bytes).await else { return };
            bytes.truncate(n);
            let now = *state.borrow();
            let left = now.cut.filter(|_| counted).map_or(n, |cut| cut.saturating_sub(passed).min(n));
            passed += left;
            bytes.truncate(left);
            let _ = queue.send((Instant::now() + now.delay, bytes));
            if left < n {
                return;
            }
        }
    };
    let write = async move {
        while let Some((at, bytes)) = queued.recv().await {
            sleep_until(at).await;
            if number < wire.borrow().silent {
                continue;
            }
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read, write);
}
