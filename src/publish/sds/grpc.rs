//! gRPC's framing of a stream (the gRPC over HTTP/2 protocol), for consumers that are many and silent for hours.
//!
//! tonic keeps, for each stream, a buffer as large as the largest message so far. An Envoy begins each of its streams
//! with some 60 kB about itself, of which its name is all that matters. Here nothing is kept between two messages.

use crate::publish::budget::{Budget, Share};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::StreamBody;
use hyper::body::{Body as _, Frame, Incoming};
use prost::Message;
use std::{
    convert::Infallible,
    future::poll_fn,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Status, body::Body, metadata::GRPC_CONTENT_TYPE};
use zeroize::Zeroizing;

/// Before each message: whether it is compressed (one byte), and its length (four).
const HEAD: usize = 5;
/// Envoy's first message is some 60 kB, for it lists its extensions; the most is four times that.
const MAX_MESSAGE: usize = 256 << 10;

/// The requests in the body of a call.
pub(super) struct Requests<R> {
    body: Incoming,
    partial: Partial,
    budget: Budget,
    kind: PhantomData<fn() -> R>,
}

impl<R: Message + Default> Requests<R> {
    /// Those in `body`; a message that has not come as a whole takes its room from `budget`.
    pub(super) fn new(body: Incoming, budget: Budget) -> Self {
        Self { body, partial: Partial::default(), budget, kind: PhantomData }
    }

    /// The next request; none when the consumer has ended its side, or has gone: then nobody asks for more answers.
    /// After an error or the end there is nothing to read. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Option<Result<R, Status>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<R, Status>>> {
        loop {
            if let Some(request) = self.partial.take(&self.budget).transpose() {
                return Poll::Ready(Some(request));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.partial.bytes.extend_from_slice(data);
                    }
                }
                None if !self.partial.bytes.is_empty() => {
                    let left = self.partial.bytes.len();
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
struct Partial {
    bytes: Vec<u8>,
    /// For all of the message, from when its length is known.
    room: Option<Share>,
}

impl Partial {
    /// Takes the first message, if all of it is there.
    fn take<R: Message + Default>(&mut self, budget: &Budget) -> Result<Option<R>, Status> {
        let Some((&[compressed, a, b, c, d], rest)) = self.bytes.split_first_chunk::<HEAD>() else { return Ok(None) };
        if compressed != 0 {
            return Err(Status::unimplemented("a compressed message; send it as it is (grpc-encoding: identity)"));
        }
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_MESSAGE {
            return Err(Status::out_of_range(format!("a message of {length} bytes; {MAX_MESSAGE} are read at most")));
        }
        let Some(message) = rest.get(..length) else {
            if self.room.is_none() {
                self.room = Some(budget.take(HEAD + length)?);
                self.bytes.reserve_exact(HEAD + length - self.bytes.len());
            }
            return Ok(None);
        };
        let request = R::decode(message).map_err(|error| Status::invalid_argument(format!("no request: {error}")))?;
        // What is left is a copy, so that the large buffer goes.
        self.bytes = rest.get(length..).unwrap_or_default().to_vec();
        self.room = None;
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

    fn of(bytes: Vec<u8>) -> Partial {
        Partial { bytes, ..Partial::default() }
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
            let budget = Budget::new(2 * MAX_MESSAGE);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (fresh, later) = rest.split_at((*cut).min(rest.len()));
                partial.bytes.extend_from_slice(fresh);
                while let Some(message) = partial.take::<SecretRequest>(&budget).unwrap() {
                    seen.push(message);
                }
                rest = later;
            }
            prop_assert!(seen == sent);
            prop_assert_eq!(partial.bytes.capacity(), 0, "nothing is kept");
            prop_assert!(budget.take(2 * MAX_MESSAGE).is_ok(), "nothing is taken");
        }
    }

    #[test]
    fn what_is_no_request_is_refused_before_it_is_there() {
        let budget = Budget::new(1000);
        for (head, code) in [
            ([1, 0, 0, 0, 9], Code::Unimplemented),
            ([0, 0, 4, 0, 1], Code::OutOfRange),
            ([0, 255, 255, 255, 255], Code::OutOfRange),
            ([0, 0, 1, 0, 0], Code::ResourceExhausted),
        ] {
            let refused = of(head.to_vec()).take::<SecretRequest>(&budget).map(|_| ());
            assert_eq!(refused.err().map(|status| status.code()), Some(code), "{head:?}");
        }
        let broken = of([&[0, 0, 0, 0, 1][..], &[0x0a]].concat()).take::<SecretRequest>(&budget).map(|_| ());
        assert_eq!(broken.err().map(|status| status.code()), Some(Code::InvalidArgument));
    }
}
