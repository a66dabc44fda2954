//! The gRPC probe: `grpc.health.v1.Health/Check` over plaintext HTTP/2.

use super::{
    Unhealthy,
    dial::{Source, dial},
};
use crate::proto::grpc::health::v1::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use http::{HeaderValue, Request, Uri, header::USER_AGENT};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    pin, select,
    time::{Instant, timeout_at},
};
use tokio_util::io::InspectReader;
use tonic::{Code, Status};

/// An answer is one number; this many bytes are taken.
const ANSWER: usize = 4096;

/// Asks whether `service` (empty: the whole server) is SERVING, from connecting to the answer within `bound`.
pub(super) async fn probe(host: &str, port: u16, service: &str, bound: Duration) -> Result<(), Unhealthy> {
    let deadline = Instant::now() + bound;
    let unreached =
        |cause: &str| Unhealthy::new(format!("failed to connect health check grpc service on port {port}: {cause}"));
    let stream = match timeout_at(deadline, dial(host, port, Source::Ordinary)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(cause)) => return Err(unreached(&cause)),
        Err(_) => return Err(unreached("context deadline exceeded")),
    };
    // HTTP/2 lets us send before the server has said a word; whether it ever did tells a stranger from a slow friend.
    let heard = Arc::new(AtomicBool::new(false));
    let ear = Arc::clone(&heard);
    let stream = InspectReader::new(stream, move |bytes: &[u8]| {
        ear.fetch_or(!bytes.is_empty(), Ordering::Relaxed);
    });
    match timeout_at(deadline, check(stream, &authority(host, port), service, bound)).await {
        Ok(Ok(status)) => verdict(status, service),
        Ok(Err(status)) if heard.load(Ordering::Relaxed) => Err(failed(&status, port, bound)),
        Ok(Err(status)) => Err(unreached(status.message())),
        Err(_) if heard.load(Ordering::Relaxed) => {
            Err(failed(&Status::deadline_exceeded("context deadline exceeded"), port, bound))
        }
        Err(_) => Err(unreached("context deadline exceeded")),
    }
}

async fn check(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    authority: &str,
    service: &str,
    bound: Duration,
) -> Result<ServingStatus, Status> {
    let broken = |e: hyper::Error| Status::unavailable(e.to_string());
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(broken)?;
    let transport = tower::service_fn(move |mut request: Request<tonic::body::Body>| {
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(super::http::USER_AGENT));
        let mut sender = sender.clone();
        async move { sender.send_request(request).await }
    });
    let origin = Uri::builder().scheme("http").authority(authority).path_and_query("/").build();
    let origin = origin.map_err(|e| Status::invalid_argument(e.to_string()))?;
    let mut client = HealthClient::with_origin(transport, origin).max_decoding_message_size(ANSWER);
    let mut request = tonic::Request::new(HealthCheckRequest { service: service.to_owned() });
    request.set_timeout(bound);
    let answer = client.check(request);
    pin!(answer);
    let answer = select! {
        biased;
        answer = &mut answer => answer?,
        _ = connection => answer.await?,
    };
    Ok(answer.into_inner().status())
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn verdict(status: ServingStatus, service: &str) -> Result<(), Unhealthy> {
    match status {
        ServingStatus::Serving => Ok(()),
        other => Err(Unhealthy::new(format!("health rpc probe: service {service:?} is {}", other.as_str_name()))),
    }
}

fn failed(status: &Status, port: u16, bound: Duration) -> Unhealthy {
    let cause = format!("rpc error: code = {:?} desc = {}", status.code(), status.message());
    Unhealthy::new(match status.code() {
        Code::Unimplemented => {
            format!("service on port {port} doesn't implement the grpc health protocol grpc.health.v1.Health: {cause}")
        }
        Code::DeadlineExceeded => {
            format!("health rpc probe timed out after {}: {cause}", humantime::format_duration(bound))
        }
        code => format!("health rpc probe failed with status {code:?}: {cause}"),
    })
}
