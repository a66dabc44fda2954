//! One connection.
//!
//! ```text
//!  socket ─► authority ─► h2 ─► a table of methods ─► for each call, a task:  grpc ◄─► call ◄─ offer
//!                                  sds: StreamSecrets, DeltaSecrets
//!                                  workload_api: FetchX509SVID, FetchX509Bundles
//!                                  UNIMPLEMENTED: all others
//! ```
//!
//! What comes in on a call are messages (`grpc`), which its method (`sds`, `workload_api`) hears; whenever there is
//! something new to be said (`offer`) and room for it, the method says it (`call`).

use crate::{
    host::Peer,
    proto::envoy::service::secret::v3::{DeltaSecretRequest, SecretRequest},
    publish::{
        authority::Adapter,
        budget::{self, Budget},
        call::{self, Method},
        consumers::Consumers,
        grpc::{self, Answers, Requests},
        offer::Offer,
        policy::Policy,
        sds::{self, Sds},
        workload_api::{self, Updates},
    },
    time::Clock,
};
use bytes::Bytes;
use h2::{
    RecvStream,
    server::{self, SendResponse},
};
use http::{Request, request::Parts};
use std::{sync::Arc, time::Duration};
use tokio::{net::UnixStream, sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{Instrument as _, debug};

/// Streams at a time on one connection. Envoy has one for each secret that it is configured with.
const MAX_STREAMS: u32 = 16;
/// Of all headers of a request, decoded.
const MAX_HEADERS: u32 = 16 << 10;
/// What a peer may send before we have read it, in bytes: every peer may send as much before it is told anything (RFC 9113
/// section 6.9.2), so less cannot be had. Calls read at once, so it is there for a moment. One stream has no less, either:
/// `h2` does not look again whether to give room when a smaller one comes into force, and a peer whose first message was
/// large, as Envoy's is, could wait forever for room for its next.
const WINDOW: u32 = (64 << 10) - 1;
/// What is kept for a stream that does not read, in bytes; another answer may begin below it.
const MAX_UNREAD: usize = 4 << 10;
/// Until the first request; who has one may be silent for as long as it likes.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// For a peer that is refused, to ask and to be told.
const REFUSAL: Duration = Duration::from_secs(2);

/// What every connection of a socket shares.
#[derive(Clone)]
pub(in crate::publish) struct Services {
    pub(in crate::publish) policy: Arc<Policy>,
    pub(in crate::publish) offers: watch::Receiver<Offer>,
    pub(in crate::publish) consumers: Consumers,
    pub(in crate::publish) clock: Clock,
    /// Cancelled when the agent stops.
    pub(in crate::publish) shutdown: CancellationToken,
}

/// A connection that was accepted.
pub(in crate::publish) struct Connection {
    stream: UnixStream,
    peer: Peer,
    budget: Budget,
    services: Services,
}

type Http2 = server::Connection<Adapter<UnixStream>, Bytes>;
/// A call as it begins.
type Call = (Request<RecvStream>, SendResponse<Bytes>);

impl Connection {
    pub(in crate::publish) fn new(stream: UnixStream, peer: Peer, budget: Budget, services: &Services) -> Self {
        let consumers = services.consumers.of(peer.uid, peer.pid);
        Self { stream, peer, budget, services: Services { consumers, ..services.clone() } }
    }

    /// Serves it to its end. The policy has told the journal of a refusal; the peer is told, too, by the status that
    /// the Workload API has for it.
    pub(in crate::publish) async fn run(self) {
        let Self { stream, peer, budget, services } = self;
        // What it takes to begin is needed no more afterwards, and consumers are many: it has an allocation of its own.
        let admitted = Box::pin(services.policy.admit(&peer)).await;
        // Holds a descriptor; with one more for each connection they would run out before the bounds are reached.
        drop(peer);
        let ended = match admitted {
            Ok(()) => serve(stream, &services.shutdown, |call| services.answer(call, &budget)).await,
            Err(denied) => {
                let status = denied.status();
                let refused = serve(stream, &services.shutdown, |(_, call)| grpc::refuse(call, status.clone()));
                timeout(REFUSAL, Box::pin(refused)).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            debug!(cause = %error, "a connection of a consumer");
        }
    }
}

/// HTTP/2 on `stream`, up to the first call.
async fn begin(stream: UnixStream) -> Result<Option<(Box<Http2>, Call)>, h2::Error> {
    let connection = server::Builder::new()
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_send_buffer_size(MAX_UNREAD)
        .handshake(Adapter::new(stream));
    let mut connection = Box::new(connection.await?);
    let call = connection.accept().await.transpose()?;
    Ok(call.map(|call| (connection, call)))
}

/// Speaks HTTP/2 on `stream` and gives each call to `answer`.
async fn serve(stream: UnixStream, shutdown: &CancellationToken, answer: impl Fn(Call)) -> Result<(), h2::Error> {
    let begun = tokio::select! {
        begun = timeout(FIRST_REQUEST, Box::pin(begin(stream))) => begun.unwrap_or(Ok(None))?,
        // Who has asked nothing has nothing to be told.
        () = shutdown.cancelled() => None,
    };
    let Some((mut connection, call)) = begun else {
        debug!("a connection without a request is closed");
        return Ok(());
    };
    answer(call);
    let mut stopping = false;
    loop {
        tokio::select! {
            call = connection.accept() => match call.transpose()? {
                Some(call) => answer(call),
                None => return Ok(()),
            },
            () = shutdown.cancelled(), if !stopping => {
                stopping = true;
                connection.graceful_shutdown();
            }
        }
    }
}

impl Services {
    /// The methods.
    fn method(&self, head: &Parts) -> Result<Box<dyn Method + Send>, Status> {
        grpc::demand_plain(&head.headers)?;
        let seat = |protocol| self.consumers.seat(protocol);
        match head.uri.path().trim_start_matches('/').split_once('/').unwrap_or_default() {
            (sds::SERVICE, "StreamSecrets") => Ok(Box::new(Sds::<SecretRequest>::new(seat("sds")))),
            (sds::SERVICE, "DeltaSecrets") => Ok(Box::new(Sds::<DeltaSecretRequest>::new(seat("sds")))),
            (workload_api::SERVICE, name) => Ok(Box::new(Updates::new(name, &head.headers, seat("workload_api"))?)),
            (service, name) => Err(Status::unimplemented(format!(
                "{service:.64}/{name:.64}: here are StreamSecrets and DeltaSecrets of {} and {}",
                sds::SERVICE,
                workload_api::SERVICE
            ))),
        }
    }

    /// Begins a call on a task of its own, which ends with its stream, if it is to one of them and there is room for it.
    fn answer(&self, (request, call): Call, budget: &Budget) {
        let (head, body) = request.into_parts();
        let (method, room) = match self.method(&head).and_then(|method| Ok((method, budget.take(budget::CALL)?))) {
            Ok(begun) => begun,
            Err(status) => {
                self.consumers.turned_away("socket", "", &status);
                return grpc::refuse(call, status);
            }
        };
        let Ok(answers) = Answers::begin(call) else { return };
        let requests = Requests::new(body, method.max_request(), budget.clone());
        let held = call::hold(method, requests, answers, self.offers.clone(), self.clock, room);
        tokio::spawn(held.in_current_span());
    }
}
