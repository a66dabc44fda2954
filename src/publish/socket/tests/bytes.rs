//! Calls of which every byte is ours.
use super::*;
use ::bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;

pub(super) const STREAM_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";

/// Speaks HTTP/2; a stream that is not read takes `window` bytes.
pub(super) async fn speak(stream: UnixStream, window: u32) -> Channel {
    let mut client = http2::Builder::new(TokioExecutor::new());
    client.initial_stream_window_size(window);
    let (sender, connection) = client.handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    Channel(sender)
}

impl Channel {
    /// A call whose whole input is `bytes`: how many messages come, and how it ends.
    pub(super) async fn call(&mut self, path: &str, bytes: Vec<u8>) -> (usize, Code) {
        ended(self.open(path, Full::new(Bytes::from(bytes))).await).await
    }

    /// The beginning of the answer to a call.
    pub(super) async fn open<B>(&mut self, path: &str, input: B) -> http::Response<Incoming>
    where
        B: hyper::body::Body<Data = Bytes, Error = std::convert::Infallible> + Send + 'static,
    {
        let request = http::Request::post(format!("http://localhost{path}")).header("workload.spiffe.io", "true");
        let request = request.body(tonic::body::Body::new(input)).unwrap();
        timeout(SOON, self.0.send_request(request)).await.unwrap().unwrap()
    }
}

/// The rest of an answer: how many messages come, and how it ends.
pub(super) async fn ended(answer: http::Response<Incoming>) -> (usize, Code) {
    if let Some(status) = Status::from_header_map(answer.headers()) {
        return (0, status.code());
    }
    let answer = timeout(SOON, answer.into_body().collect()).await.expect("no end in time").unwrap();
    let end = Status::from_header_map(answer.trailers().unwrap()).unwrap().code();
    let bytes = answer.to_bytes();
    let (mut bytes, mut messages) = (&bytes[..], 0);
    while let [_, a, b, c, d, rest @ ..] = bytes {
        bytes = &rest[u32::from_be_bytes([*a, *b, *c, *d]) as usize..];
        messages += 1;
    }
    (messages, end)
}

/// A message as it is sent.
pub(super) fn framed(message: &impl Message) -> Vec<u8> {
    [&[0], &u32::try_from(message.encoded_len()).unwrap().to_be_bytes()[..], &message.encode_to_vec()].concat()
}
