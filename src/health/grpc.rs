//! The gRPC probe: `grpc.health.v1.Health/Check` over plaintext HTTP/2.

use super::{
    Unhealthy,
    dial::{Detour, Source, dial},
};
use crate::proto::grpc::health::v1::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use http::{HeaderValue, Request, Uri, header::USER_AGENT};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{
    error::Error,
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
pub(super) async fn probe(
    host: &str,
    port: u16,
    service: &str,
    bound: Duration,
    detours: &[Detour],
) -> Result<(), Unhealthy> {
    let deadline = Instant::now() + bound;
    let unreached =
        |cause: &str| Unhealthy::new(format!("failed to connect health check grpc service on port {port}: {cause}"));
    let stream = match timeout_at(deadline, dial(host, port, Source::Ordinary, detours)).await {
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
        Ok(Err(status)) => match status.source().and_then(|e| e.downcast_ref::<hyper::Error>()) {
            Some(broken) => Err(unreached(&no_http2(broken))),
            None => Err(failed(&status, port, bound)),
        },
        Err(_) if heard.load(Ordering::Relaxed) => {
            Err(failed(&Status::deadline_exceeded("context deadline exceeded"), port, bound))
        }
        Err(_) => Err(unreached("context deadline exceeded")),
    }
}

pub(super) async fn check(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    authority: &str,
    service: &str,
    bound: Duration,
) -> Result<ServingStatus, Status> {
    let (sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(|e| Status::from_error(e.into()))?;
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

/// The connection itself broke; most often another protocol is spoken there.
fn no_http2(error: &hyper::Error) -> String {
    match error.source() {
        Some(cause) => format!("the server does not speak HTTP/2, or closed: {cause}"),
        None => error.to_string(),
    }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::{io::AsyncReadExt, net::TcpListener, runtime::Handle, task::yield_now};

    /// HTTP/2 needs tasks of its own: they must end with the probe, or a silent server would fill the agent with them.
    #[tokio::test]
    async fn a_silent_server_leaves_nothing_behind() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = silent.local_addr().unwrap().port();
        let bound = Duration::from_millis(20);
        for _ in 0..20 {
            let (outcome, accepted) = tokio::join!(probe("127.0.0.1", port, "", bound, &[]), silent.accept());
            let expected =
                format!("failed to connect health check grpc service on port {port}: context deadline exceeded");
            assert_eq!(outcome.unwrap_err().to_string(), expected);
            // The server sees the end of the connection.
            accepted.unwrap().0.read_to_end(&mut Vec::new()).await.unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while Handle::current().metrics().num_alive_tasks() > 0 {
            assert!(Instant::now() < deadline, "{} tasks are left", Handle::current().metrics().num_alive_tasks());
            yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_server_of_another_kind_is_named_as_such() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let bound = Duration::from_secs(20);
        let serve = async {
            let mut stream = listener.accept().await.unwrap().0;
            tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
            stream
        };
        let (outcome, _stream) = tokio::join!(probe("127.0.0.1", port, "", bound, &[]), serve);
        let error = outcome.unwrap_err().to_string();
        let expected =
            format!("failed to connect health check grpc service on port {port}: the server does not speak HTTP/2");
        assert!(error.starts_with(&expected), "{error}");
    }
}
