//! What an application answers to a probe.

use super::{grpc, http, tls};
use ::http::{HeaderMap, Request};
use bytes::Bytes;
use http_body_util::Empty;
use rustls::ClientConfig;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    time::timeout,
};
use url::Url;

/// Longer than any probe here takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// An application that answers `bytes` to whatever it is asked, once it is, and hangs up.
fn application(bytes: &[u8]) -> DuplexStream {
    let (ours, mut theirs) = tokio::io::duplex(1 << 20);
    let bytes = bytes.to_vec();
    tokio::spawn(async move {
        let _ = theirs.read_u8().await;
        let _ = theirs.write_all(&bytes).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(theirs);
    });
    ours
}

/// An answer to the HTTP probe, and where it leads.
pub(crate) async fn http(bytes: &[u8]) {
    let stream = application(bytes);
    let answer = timeout(PATIENCE, http::send(stream, Request::new(Empty::<Bytes>::new()))).await;
    let (Ok(Ok(answer)), Ok(from)) = (answer, Url::parse("https://10.0.0.1:8080/ready")) else { return };
    if let Some(location) = http::redirect(&answer) {
        drop(http::follow(&from, &location, &mut HeaderMap::new()));
    }
}

/// An answer to the gRPC probe.
pub(crate) async fn grpc(bytes: &[u8]) {
    let stream = application(bytes);
    let _ = timeout(PATIENCE, grpc::check(stream, "127.0.0.1:8080", "", PATIENCE)).await;
}

/// A client that takes any server, as a probe does.
pub(crate) fn anybody() -> Option<ClientConfig> {
    tls::connector(false).ok().map(|connector| ClientConfig::clone(connector.config()))
}
