//! One connection: HTTP/2, on which both services answer.

use crate::{
    host::Peer,
    proto::spiffe_workload_api_server::{self as workload_api, SpiffeWorkloadApiServer},
    publish::{
        authority::Adapter,
        budget::{self, Budget, Share},
        consumers::Consumers,
        policy::Policy,
        sds::{self, Sds, Secrets},
        workload_api::{SECURITY_HEADER, WorkloadApi},
    },
    status::Identity,
    time::Clock,
};
use http::{HeaderValue, Request, Response};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{net::UnixStream, sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, codegen::Service as _};
use tracing::debug;

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
/// The Workload API's requests are empty, or hold an audience and a token.
const MAX_WORKLOAD_REQUEST: usize = 8 << 10;
/// Until the first request; who has one may be silent for as long as it likes.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// For a peer that is refused, to ask and to be told.
const REFUSAL: Duration = Duration::from_secs(2);

/// What every connection of a socket shares.
#[derive(Clone)]
pub(super) struct Services {
    pub(super) policy: Arc<Policy>,
    pub(super) secrets: watch::Receiver<Secrets>,
    pub(super) identity: watch::Receiver<Identity>,
    pub(super) consumers: Consumers,
    pub(super) clock: Clock,
    /// Cancelled when the agent stops.
    pub(super) shutdown: CancellationToken,
}

/// A connection that was accepted.
pub(super) struct Connection {
    stream: UnixStream,
    peer: Peer,
    policy: Arc<Policy>,
    offered: Offered,
    shutdown: CancellationToken,
}

/// What a peer that is let in may ask.
struct Offered {
    sds: Sds,
    workload_api: SpiffeWorkloadApiServer<WorkloadApi>,
}

/// What a request is answered with.
enum Answer {
    Offered(Offered),
    Refused(Status),
}

impl Connection {
    pub(super) fn new(stream: UnixStream, peer: Peer, budget: Budget, services: &Services) -> Self {
        let Services { policy, secrets, identity, consumers, clock, shutdown } = services.clone();
        let consumers = consumers.of(peer.uid, peer.pid);
        let offered = Offered {
            workload_api: SpiffeWorkloadApiServer::new(WorkloadApi::new(identity, consumers.clone(), clock))
                .max_decoding_message_size(MAX_WORKLOAD_REQUEST),
            sds: Sds { secrets, consumers, budget, clock },
        };
        Self { stream, peer, policy, offered, shutdown }
    }

    /// Serves it to its end. The policy has told the journal of a refusal; the peer is told, too, by the status that
    /// the Workload API has for it.
    pub(super) async fn run(self) {
        let Self { stream, peer, policy, offered, shutdown } = self;
        let admitted = policy.admit(&peer).await;
        // Holds a descriptor; with one more for each connection they would run out before the bounds are reached.
        drop(peer);
        match admitted {
            Ok(()) => answer(stream, Answer::Offered(offered), &shutdown).await,
            Err(denied) => {
                let refused = Answer::Refused(Status::permission_denied(denied.to_string()));
                let _ = timeout(REFUSAL, answer(stream, refused, &shutdown)).await;
            }
        }
    }
}

async fn answer(stream: UnixStream, answer: Answer, shutdown: &CancellationToken) {
    let asked = AtomicBool::new(false);
    let service = service_fn(|request: Request<Incoming>| {
        asked.store(true, Ordering::Relaxed);
        answer.to(request)
    });
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_send_buf_size(MAX_UNREAD);
    let mut connection = pin!(server.serve_connection(TokioIo::new(Adapter::new(stream)), service));
    let mut served = pin!(async {
        tokio::select! {
            ended = &mut connection => return ended,
            () = shutdown.cancelled() => {
                // Who has asked nothing has nothing to be told.
                if !asked.load(Ordering::Relaxed) {
                    return Ok(());
                }
                connection.as_mut().graceful_shutdown();
            }
        }
        connection.await
    });
    let ended = match timeout(FIRST_REQUEST, &mut served).await {
        Err(_) if !asked.load(Ordering::Relaxed) => return debug!("a connection without a request is closed"),
        Err(_) => served.await,
        Ok(ended) => ended,
    };
    if let Err(error) = ended {
        debug!(cause = %error, "a connection of a consumer");
    }
}

impl Answer {
    /// The response to a request.
    fn to(&self, request: Request<Incoming>) -> impl Future<Output = Result<Response<Body>, Infallible>> + use<> {
        enum Called<A> {
            WorkloadApi(A, Share),
            Answered(Response<Body>),
        }
        let called = match self {
            Self::Refused(status) => Called::Answered(status.clone().into_http()),
            Self::Offered(offered) => match offered.service(&request) {
                Ok((Service::Sds, room)) => Called::Answered(offered.sds.answer(request, room)),
                Ok((Service::WorkloadApi, room)) => {
                    Called::WorkloadApi(offered.workload_api.clone().call(bare(request)), room)
                }
                Err(status) => Called::Answered(status.into_http()),
            },
        };
        async {
            match called {
                // The room is taken until all of the answer has gone.
                Called::WorkloadApi(response, room) => Ok(response.await?.map(|body| {
                    Body::new(body.map_frame(move |frame| {
                        let _ = &room;
                        frame
                    }))
                })),
                Called::Answered(response) => Ok(response),
            }
        }
    }
}

/// What is offered.
enum Service {
    Sds,
    WorkloadApi,
}

impl Offered {
    /// The service in the path of a request, with the room for a call.
    fn service(&self, request: &Request<Incoming>) -> Result<(Service, Share), Status> {
        let service = match request.uri().path().split('/').nth(1).unwrap_or_default() {
            sds::SERVICE => Service::Sds,
            workload_api::SERVICE_NAME => Service::WorkloadApi,
            other => {
                return Err(Status::unimplemented(format!(
                    "{other:.64}: here are {} and {}",
                    sds::SERVICE,
                    workload_api::SERVICE_NAME
                )));
            }
        };
        let Sds { budget, consumers, .. } = &self.sds;
        let room = budget.take(budget::CALL).inspect_err(|status| consumers.turned_away("socket", "", status))?;
        Ok((service, room))
    }
}

/// The request with nothing in it but what is read: what a peer writes beside would be kept until its message has come.
fn bare(request: Request<Incoming>) -> Request<Incoming> {
    let (parts, body) = request.into_parts();
    let mut bare = Request::new(body);
    *bare.method_mut() = parts.method;
    if let Ok(path) = parts.uri.path().parse() {
        *bare.uri_mut() = path;
    }
    for name in [SECURITY_HEADER, "grpc-encoding"] {
        let short = parts.headers.get(name).filter(|value| value.len() < 64);
        if let Some(Ok(value)) = short.map(|value| HeaderValue::from_bytes(value.as_bytes())) {
            bare.headers_mut().insert(name, value);
        }
    }
    bare
}
