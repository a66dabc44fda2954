//! gRPC's framing of a stream of HTTP/2 (the gRPC over HTTP/2 protocol), for consumers that are many and silent for hours.
//!
//! A gRPC library keeps, for each stream, a buffer as large as the largest message so far. An Envoy begins each of its
//! streams with some 60 kB about itself, of which its name is all that matters. Here nothing is kept between two messages.

use super::budget::{Budget, Share};
use bytes::Bytes;
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Response, header::CONTENT_TYPE};
use prost::Message;
use std::{
    future::poll_fn,
    task::{Context, Poll, ready},
};
use tonic::{
    Status,
    metadata::{GRPC_CONTENT_TYPE, MetadataValue},
};

/// Before each message: whether it is compressed (one byte), and its length (four).
const HEAD: usize = 5;

/// The requests of a call.
pub(super) struct Requests {
    body: RecvStream,
    partial: Partial,
    /// Bytes of one request at most.
    most: usize,
    budget: Budget,
}

impl Requests {
    /// Those in `body`, each of so many bytes at most; one that has not come as a whole takes its room from `budget`.
    pub(super) fn new(body: RecvStream, most: usize, budget: Budget) -> Self {
        Self { body, partial: Partial::default(), most, budget }
    }

    /// The next request; none when the consumer has ended its side. After an error or the end there is nothing to read, and
    /// nothing comes when the consumer has gone, which [`Answers::room`] tells. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Status>> {
        loop {
            if let Some(request) = self.partial.take(self.most, &self.budget)? {
                return Poll::Ready(Ok(Some(request)));
            }
            match ready!(self.body.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.partial.add(&data, self.most, &self.budget)?;
                    // Fails only when more is given back than came.
                    let _ = self.body.flow_control().release_capacity(data.len());
                }
                None if !self.partial.bytes.is_empty() => {
                    let left = self.partial.bytes.len();
                    return Poll::Ready(Err(Status::internal(format!("the last message ends after {left} bytes"))));
                }
                None => return Poll::Ready(Ok(None)),
                Some(Err(_)) => return Poll::Pending,
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
    /// Takes in what has come. A message has one allocation, made as soon as its length is known: a first one, of what has
    /// come of it, would leave a hole behind, which the next connection's buffers fill and keep.
    fn add(&mut self, data: &[u8], most: usize, budget: &Budget) -> Result<(), Status> {
        let (head, rest) = data.split_at(HEAD.saturating_sub(self.bytes.len()).min(data.len()));
        self.bytes.extend_from_slice(head);
        if let Some(length) = self.length(most)?
            && self.bytes.len() + rest.len() < HEAD + length
        {
            self.make_room(length, budget)?;
        }
        self.bytes.extend_from_slice(rest);
        Ok(())
    }

    /// Takes the first message, if all of it is there.
    fn take(&mut self, most: usize, budget: &Budget) -> Result<Option<Bytes>, Status> {
        let Some(length) = self.length(most)? else { return Ok(None) };
        let Some(rest) = self.bytes.get(HEAD + length..) else {
            self.make_room(length, budget)?;
            return Ok(None);
        };
        // What is left is a copy, so that the large buffer goes.
        let rest = rest.to_vec();
        let message = Bytes::from(std::mem::replace(&mut self.bytes, rest)).slice(HEAD..HEAD + length);
        self.room = None;
        Ok(Some(message))
    }

    /// Of the first message, when its head is there.
    fn length(&self, most: usize) -> Result<Option<usize>, Status> {
        let Some((&[compressed, a, b, c, d], _)) = self.bytes.split_first_chunk::<HEAD>() else { return Ok(None) };
        if compressed != 0 {
            return Err(Status::unimplemented("a compressed message; send it as it is (grpc-encoding: identity)"));
        }
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > most {
            return Err(Status::out_of_range(format!("a message of {length} bytes; {most} are read at most")));
        }
        Ok(Some(length))
    }

    /// For the first message, which has not come as a whole.
    fn make_room(&mut self, length: usize, budget: &Budget) -> Result<(), Status> {
        if self.room.is_none() {
            self.room = Some(budget.take(HEAD + length)?);
            self.bytes.reserve_exact((HEAD + length).saturating_sub(self.bytes.len()));
        }
        Ok(())
    }
}

/// A message as it goes out. What many are sent is encoded once for all of them: one message beside another is a message
/// with the fields of both.
pub(super) struct Framed {
    /// The head, and what is for this call alone.
    own: Bytes,
    shared: Vec<Bytes>,
}

impl Framed {
    /// `own` and all of `shared` in one.
    pub(super) fn new(own: &impl Message, shared: Vec<Bytes>) -> Self {
        let length = own.encoded_len() + shared.iter().map(Bytes::len).sum::<usize>();
        let mut bytes = Vec::with_capacity(HEAD + own.encoded_len());
        bytes.push(0);
        // Far below the 4 GiB that a head can say.
        bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        // A vector has room for all.
        let _ = own.encode(&mut bytes);
        Self { own: bytes.into(), shared }
    }

    /// All of it, without its head.
    #[cfg(test)]
    pub(super) fn message(&self) -> Vec<u8> {
        [&self.own[HEAD..], &self.shared.concat()].concat()
    }
}

/// The answers of a call.
pub(super) struct Answers(SendStream<Bytes>);

/// Nobody is there any more to be answered.
pub(super) struct Gone;

impl Answers {
    /// Begins them.
    pub(super) fn begin(mut call: SendResponse<Bytes>) -> Result<Self, Gone> {
        let mut response = Response::new(());
        response.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
        call.send_response(response, false).map(Self).map_err(|_| Gone)
    }

    /// Waits until there is room for an answer, if one is `due`. Room that nothing is sent into would be taken from the other
    /// calls of the connection.
    ///
    /// # Errors
    /// When the consumer has ended the call, whether or not there is room.
    pub(super) async fn room(&mut self, due: bool) -> Result<(), Gone> {
        if due {
            self.0.reserve_capacity(1);
        }
        poll_fn(|cx| self.poll_room(due, cx)).await
    }

    fn poll_room(&mut self, due: bool, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        if self.0.poll_reset(cx).is_ready() {
            return Poll::Ready(Err(Gone));
        }
        while due && self.0.capacity() == 0 {
            match ready!(self.0.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(Err(Gone)),
            }
        }
        if due { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Sends one; what has no room yet is kept.
    pub(super) fn send(&mut self, answer: Framed) -> Result<(), Gone> {
        let mut parts = std::iter::once(answer.own).chain(answer.shared);
        parts.try_for_each(|part| self.0.send_data(part, false)).map_err(|_| Gone)
    }

    /// Ends them.
    pub(super) fn end(mut self, status: &Status) {
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            // Its message is no header.
            trailers.insert("grpc-status", HeaderValue::from(i32::from(status.code())));
        }
        // Who has gone does not miss them.
        let _ = self.0.send_trailers(trailers);
    }
}

/// Refuses messages that are compressed.
pub(super) fn demand_plain(headers: &HeaderMap) -> Result<(), Status> {
    if headers.get("grpc-encoding").is_none_or(|encoding| encoding == "identity") {
        return Ok(());
    }
    let mut refused = Status::unimplemented("compressed messages; send them as they are (grpc-encoding: identity)");
    refused.metadata_mut().insert("grpc-accept-encoding", MetadataValue::from_static("identity"));
    Err(refused)
}

/// Ends a call that has not begun.
pub(super) fn refuse(mut call: SendResponse<Bytes>, status: Status) {
    // Who has gone does not miss it.
    let _ = call.send_response(status.into_http(), true);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::proto::envoy::service::secret::v3::{Consumer, SecretRequest};
    use proptest::prelude::*;
    use tonic::Code;

    const MOST: usize = 256 << 10;

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
            let bytes: Vec<u8> = sent.iter().flat_map(|m| Framed::new(m, Vec::new()).own).collect();
            let (mut partial, mut seen, mut rest) = (Partial::default(), Vec::new(), &bytes[..]);
            let budget = Budget::new(2 * MOST);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (fresh, later) = rest.split_at((*cut).min(rest.len()));
                partial.add(fresh, MOST, &budget).unwrap();
                while let Some(message) = partial.take(MOST, &budget).unwrap() {
                    seen.push(SecretRequest::decode(message).unwrap());
                }
                rest = later;
            }
            prop_assert!(seen == sent);
            prop_assert_eq!(partial.bytes.capacity(), 0, "nothing is kept");
            prop_assert!(budget.take(2 * MOST).is_ok(), "nothing is taken");
        }
    }

    #[test]
    fn a_message_has_one_allocation() {
        let (bytes, budget) = (Framed::new(&request(1, 50_000), Vec::new()).own, Budget::new(MOST));
        let mut partial = Partial::default();
        partial.add(&bytes[..15_000], MOST, &budget).unwrap();
        let first = (partial.bytes.as_ptr(), partial.bytes.capacity());
        assert_eq!(first.1, bytes.len());
        partial.add(&bytes[15_000..], MOST, &budget).unwrap();
        assert_eq!((partial.bytes.as_ptr(), partial.bytes.capacity()), first);
        assert!(partial.take(MOST, &budget).unwrap().is_some());
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
            let refused = of(head.to_vec()).take(MOST, &budget).map(|_| ());
            assert_eq!(refused.err().map(|status| status.code()), Some(code), "{head:?}");
        }
    }
}
