//! What happened, in order: a log that a test can read, and await.

use std::{
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use serde::Serialize;
use tokio::sync::watch;

/// One thing that happened, and when.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// Wall-clock time, RFC 3339 in JSON.
    #[serde(serialize_with = "rfc3339")]
    pub at: SystemTime,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What can happen. `connection` and `stream` are numbers of this lab, from 1; `entry` is `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum What {
    /// The port is open.
    Listening { address: SocketAddr },
    /// The port is closed and every connection is gone: stopped, or a fault.
    Down,
    /// A TLS handshake was completed. `certificate` is the serial number (hex) of the client certificate, if one came.
    ConnectionOpened { connection: u64, peer: SocketAddr, certificate: Option<String> },
    /// A TLS handshake failed, or was refused.
    HandshakeRefused { peer: SocketAddr, cause: String },
    /// A connection ended. Bytes are those inside TLS.
    ConnectionClosed { connection: u64, received: u64, sent: u64 },
    /// A certificate signing request was answered. `identity` is the authenticated caller's.
    Csr { connection: u64, identity: Option<String>, credential: Credential, outcome: Outcome },
    /// An ADS stream sent its first request and was accepted. Without a group it is an observer.
    StreamOpened { connection: u64, stream: u64, node: String, observer: bool, type_url: String, identity: String },
    /// An ADS stream was refused, before or after its first request.
    StreamRefused { connection: u64, stream: u64, code: i32, message: String },
    /// An accepted ADS stream ended.
    StreamClosed { connection: u64, stream: u64 },
    /// A WorkloadEntry was created by a registration.
    EntryCreated { entry: String, uid: String },
    /// A registration found its entry and took it (over).
    EntryConnected { entry: String, uid: String },
    /// The last stream of an entry ended: it carries `disconnectedAt`.
    EntryDisconnected { entry: String, uid: String },
    /// An entry was deleted: grace over, or its group removed.
    EntryDeleted { entry: String, uid: String },
    /// A health report arrived. `lost`: it was not written (no entry, not the controller, API server down).
    Health { entry: Option<String>, stream: u64, healthy: bool, message: String, lost: bool },
    /// A connection was told to go away.
    Goaway { connection: u64, reason: String },
    /// Resources went out on an ADS stream.
    Pushed { stream: u64, type_url: String, resources: Vec<String>, bytes: usize },
    /// A client rejected what it got.
    Nack { stream: u64, type_url: String, message: String },
    /// A client sent what crashes a real istiod: everything is cut, and down until [`restart`](crate::Lab::restart).
    Crashed { cause: String },
}

/// By what a caller authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Credential {
    /// Client certificate; it beats a token.
    Certificate,
    /// Bearer token.
    Token,
    /// Nothing that was accepted.
    None,
}

/// How a signing request ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Outcome {
    /// A certificate with this serial number (hex).
    Issued { serial: String, not_after: i64 },
    /// A gRPC status.
    Refused { code: i32, message: String },
    /// No answer, on purpose.
    Hung,
}

/// The log of one lab, and its counters.
#[derive(Debug)]
pub(crate) struct Log {
    events: Mutex<Vec<Event>>,
    length: watch::Sender<usize>,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self { events: Mutex::default(), length: watch::Sender::new(0) }
    }

    pub(crate) fn push(&self, what: What) {
        let mut events = self.lock();
        events.push(Event { at: SystemTime::now(), what });
        self.length.send_replace(events.len());
    }

    pub(crate) fn since(&self, mark: usize) -> Vec<Event> {
        self.lock().get(mark..).map(<[Event]>::to_vec).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    pub(crate) fn lengths(&self) -> watch::Receiver<usize> {
        self.length.subscribe()
    }

    pub(crate) async fn until(
        &self,
        mut mark: usize,
        limit: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Option<Event> {
        let mut lengths = self.length.subscribe();
        let search = async {
            loop {
                lengths.borrow_and_update();
                let new = self.since(mark);
                mark += new.len();
                if let Some(event) = new.into_iter().find(&mut wanted) {
                    return Some(event);
                }
                lengths.changed().await.ok()?;
            }
        };
        tokio::time::timeout(limit, search).await.ok().flatten()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rfc3339<S: serde::Serializer>(at: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_micros(*at))
}
