//! gRPC's framing of a stream (the gRPC over HTTP/2 protocol), for consumers that are many and silent for hours.
//!
//! tonic keeps, for each stream, a buffer as large as the largest message so far. An Envoy begins each of its streams
//! with some 60 kB about itself, of which its name is all that matters. Here nothing is kept between two messages.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::StreamBody;
use hyper::body::{Body as _, Frame, Incoming};
use prost::Message;
use std::{
    convert::Infallible,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Status, body::Body, metadata::GRPC_CONTENT_TYPE};
use zeroize::Zeroizing;

/// Before each message: whether it is compressed (one byte), and its length (four).
const HEAD: usize = 5;
/// Envoy's first message is some 60 kB, for it lists its extensions.
const MAX_MESSAGE: usize = 1 << 20;

/// The requests in the body of a call.
pub(super) struct Requests<R> {
    body: Incoming,
    partial: Partial,
    kind: PhantomData<fn() -> R>,
}

impl<R: Message + Default> Requests<R> {
    pub(super) fn new(body: Incoming) -> Self {
        Self { body, partial: Partial::default(), kind: PhantomData }
    }

    /// The next request; none when the consumer has ended its side, or has gone: then nobody asks for more answers. After
    /// an error or the end there is nothing to read.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<R, Status>>> {
        loop {
            if let Some(request) = self.partial.take().transpose() {
                return Poll::Ready(Some(request));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.partial.0.extend_from_slice(data);
                    }
                }
                None if !self.partial.0.is_empty() => {
                    let left = self.partial.0.len();
                    return Poll::Ready(Some(Err(Status::internal(format!(
                        "the last message ends after {left} bytes"
                    )))));
                }
                Some(Err(_)) | None => return Poll::Ready(None),
            }
        }
    }
}

/// What has come of a message; nothing is allocated between two of them.
#[derive(Default)]
struct Partial(Vec<u8>);

impl Partial {
    /// Takes the first message, if all of it is there.
    fn take<R: Message + Default>(&mut self) -> Result<Option<R>, Status> {
        let Some((&[compressed, a, b, c, d], rest)) = self.0.split_first_chunk::<HEAD>() else { return Ok(None) };
        if compressed != 0 {
            return Err(Status::unimplemented("a compressed message; send it as it is (grpc-encoding: identity)"));
        }
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_MESSAGE {
            return Err(Status::out_of_range(format!("a message of {length} bytes; {MAX_MESSAGE} are read at most")));
        }
        let Some(message) = rest.get(..length) else {
            self.0.reserve_exact(HEAD + length - self.0.len());
            return Ok(None);
        };
        let request = R::decode(message).map_err(|error| Status::invalid_argument(format!("no request: {error}")))?;
        // What is left is a copy, so that the large buffer goes.
        self.0 = rest.get(length..).unwrap_or_default().to_vec();
        Ok(Some(request))
    }
}

/// The response whose body are `answers`, ended by an error, or in order when they end.
pub(super) fn response<A: Message>(answers: impl Stream<Item = Result<A, Status>> + Send + 'static) -> Response<Body> {
    let frames = answers.map(|answer| answer.map_or_else(|status| trailers(&status), |answer| data(&answer)));
    // Made at the end: a map of headers is half a kilobyte.
    let frames = frames.chain(tokio_stream::iter(std::iter::once_with(|| trailers(&Status::ok("")))));
    let mut response = Response::new(Body::new(StreamBody::new(frames.map(Ok::<_, Infallible>))));
    response.headers_mut().insert(http::header::CONTENT_TYPE, GRPC_CONTENT_TYPE);
    response
}

/// A message may hold a key, so it is wiped when it is sent.
fn data(message: &impl Message) -> Frame<Bytes> {
    let length = message.encoded_len();
    let mut bytes = Zeroizing::new(Vec::with_capacity(HEAD + length));
    bytes.push(0);
    // Far below the 4 GiB that a head can say.
    bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    // A vector has room for all.
    let _ = message.encode(&mut *bytes);
    Frame::data(Bytes::from_owner(bytes))
}

fn trailers(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        // Its message is no header.
        trailers.insert("grpc-status", HeaderValue::from(i32::from(status.code())));
    }
    Frame::trailers(trailers)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::proto::envoy::service::secret::v3::{Consumer, SecretRequest};
    use proptest::prelude::*;
    use tonic::Code;

    fn request(id: usize, size: usize) -> SecretRequest {
        SecretRequest { node: Some(Consumer { id: format!("{id}{}", "x".repeat(size)) }), ..SecretRequest::default() }
    }

    proptest! {
        #[test]
        fn messages_are_whole_however_they_come(
            sizes in proptest::collection::vec(0..70_000_usize, 0..5),
            cuts in proptest::collection::vec(1..20_000_usize, 1..9),
        ) {
            let sent: Vec<_> = sizes.iter().enumerate().map(|(i, size)| request(i, *size)).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(|m| data(m).into_data().unwrap()).collect();
            let (mut partial, mut seen, mut rest) = (Partial::default(), Vec::new(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (fresh, later) = rest.split_at((*cut).min(rest.len()));
                partial.0.extend_from_slice(fresh);
                while let Some(message) = partial.take::<SecretRequest>().unwrap() {
                    seen.push(message);
                }
                rest = later;
            }
            prop_assert!(seen == sent);
            prop_assert_eq!(partial.0.capacity(), 0, "nothing is kept");
        }
    }

    #[test]
    fn what_is_no_request_is_refused_before_it_is_there() {
        for (head, code) in [
            ([1, 0, 0, 0, 9], Code::Unimplemented),
            ([0, 0, 16, 0, 1], Code::OutOfRange),
            ([0, 255, 255, 255, 255], Code::OutOfRange),
        ] {
            let refused = Partial(head.to_vec()).take::<SecretRequest>().map(|_| ());
            assert_eq!(refused.err().map(|status| status.code()), Some(code), "{head:?}");
        }
        let broken = Partial([&[0, 0, 0, 0, 1][..], &[0x0a]].concat()).take::<SecretRequest>().map(|_| ());
        assert_eq!(broken.err().map(|status| status.code()), Some(Code::InvalidArgument));
    }
}
