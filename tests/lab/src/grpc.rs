//! gRPC on HTTP/2, as grpc-go's server speaks it: headers only with the first message, refusals as one HEADERS frame.

use std::fmt::Write;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Response};
use prost::Message;

/// The numbers of gRPC's status codes that the lab gives.
pub(crate) mod code {
    pub(crate) const OK: i32 = 0;
    pub(crate) const UNKNOWN: i32 = 2;
    pub(crate) const INVALID_ARGUMENT: i32 = 3;
    pub(crate) const PERMISSION_DENIED: i32 = 7;
    pub(crate) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(crate) const FAILED_PRECONDITION: i32 = 9;
    pub(crate) const UNIMPLEMENTED: i32 = 12;
    pub(crate) const INTERNAL: i32 = 13;
    pub(crate) const UNAVAILABLE: i32 = 14;
    pub(crate) const UNAUTHENTICATED: i32 = 16;
}

/// The largest message that istiod takes.
const LARGEST: usize = 4 << 20;

/// How a call ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) code: i32,
    pub(crate) message: String,
}

impl Status {
    pub(crate) fn new(code: i32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// What comes after a message.
#[derive(Debug)]
pub(crate) enum End {
    /// The client closed its side.
    Half,
    /// The stream or the connection is gone.
    Lost,
    /// The client sent what cannot be taken.
    Refused(Status),
}

/// The messages of the client.
pub(crate) struct Reader {
    body: RecvStream,
    buffer: BytesMut,
}

impl Reader {
    pub(crate) fn new(body: RecvStream) -> Self {
        Self { body, buffer: BytesMut::new() }
    }

    /// The next message. May be dropped while it waits without losing a byte.
    pub(crate) async fn next<M: Message + Default>(&mut self) -> Result<M, End> {
        loop {
            if let Some(message) = self.take()? {
                let refuse =
                    |e| End::Refused(Status::new(code::INTERNAL, format!("grpc: error unmarshalling request: {e}")));
                return M::decode(message).map_err(refuse);
            }
            let data = match self.body.data().await {
                Some(Ok(data)) => data,
                Some(Err(_)) => return Err(End::Lost),
                None => return Err(End::Half),
            };
            _ = self.body.flow_control().release_capacity(data.len());
            self.buffer.extend_from_slice(&data);
        }
    }

    fn take(&mut self) -> Result<Option<Bytes>, End> {
        let Some((prefix, rest)) = self.buffer.split_first_chunk::<5>() else { return Ok(None) };
        let [compressed, a, b, c, d] = *prefix;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > LARGEST {
            let message = format!("grpc: received message larger than max ({length} vs. {LARGEST})");
            return Err(End::Refused(Status::new(code::RESOURCE_EXHAUSTED, message)));
        }
        if compressed != 0 {
            return Err(End::Refused(Status::new(
                code::UNIMPLEMENTED,
                "grpc: Decompressor is not installed for grpc-encoding",
            )));
        }
        if rest.len() < length {
            return Ok(None);
        }
        self.buffer.advance(5);
        Ok(Some(self.buffer.split_to(length).freeze()))
    }
}

/// The answering side of a call.
pub(crate) struct Writer {
    respond: SendResponse<Bytes>,
    stream: Option<SendStream<Bytes>>,
}

impl Writer {
    pub(crate) fn new(respond: SendResponse<Bytes>) -> Self {
        Self { respond, stream: None }
    }

    /// Sends a message and gives its length; the stream may be gone, which the reader will notice.
    pub(crate) fn send(&mut self, message: &impl Message) -> usize {
        if self.stream.is_none() {
            self.stream = self.respond.send_response(head(), false).ok();
        }
        let length = message.encoded_len();
        let mut frame = BytesMut::with_capacity(5 + length);
        frame.put_u8(0);
        frame.put_u32(length as u32);
        if let (Some(stream), Ok(())) = (&mut self.stream, message.encode(&mut frame)) {
            _ = stream.send_data(frame.freeze(), false);
        }
        length
    }

    /// Ends the call: trailers after messages, else one HEADERS frame for all.
    pub(crate) fn finish(mut self, status: &Status) {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from(status.code));
        if let Some(message) =
            Some(percent(&status.message)).filter(|m| !m.is_empty()).and_then(|m| HeaderValue::try_from(m).ok())
        {
            trailers.insert("grpc-message", message);
        }
        match &mut self.stream {
            Some(stream) => _ = stream.send_trailers(trailers),
            None => {
                let mut head = head();
                head.headers_mut().extend(trailers);
                _ = self.respond.send_response(head, true);
            }
        }
    }

    /// Waits until the client resets the stream, or the connection ends.
    pub(crate) async fn given_up(mut self) {
        _ = std::future::poll_fn(|cx| self.respond.poll_reset(cx)).await;
    }

    /// Ends the call with RST_STREAM.
    pub(crate) fn reset(mut self) {
        match &mut self.stream {
            Some(stream) => stream.send_reset(Reason::CANCEL),
            None => self.respond.send_reset(Reason::CANCEL),
        }
    }
}

fn head() -> Response<()> {
    let mut head = Response::new(());
    head.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    head
}

/// `grpc-message`: everything but printable ASCII is percent-encoded, and `%` itself.
fn percent(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => out.push(char::from(byte)),
            _ => _ = write!(out, "%{byte:02X}"),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_percent_encoded() {
        assert_eq!(percent("100% \u{a0}\n"), "100%25 %C2%A0%0A");
    }
}
