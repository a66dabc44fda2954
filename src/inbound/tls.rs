//! The TLS of one connection, without buffers of its own: what arrives and what is to be sent lie in buffers of the thread,
//! so that a connection on which nothing moves costs next to nothing.

use rustls::{
    Error, ServerConfig,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic},
};
use std::{cell::RefCell, fmt, sync::Arc};

/// How many bytes are moved at once, in each direction. Each batch wakes both ends, which costs as much as its TLS: with
/// 64 KiB a sixth less was moved. It is also the most that is held in each direction for an end that does not take it; the
/// kernel holds some megabytes more.
pub(super) const BATCH: usize = 256 * 1024;
/// The most that may lie unprocessed, in bytes: a record that is not whole, or a message of a handshake in several.
pub(super) const MOST_TAIL: usize = 64 * 1024;
/// The longest record, in bytes (RFC 5246, section 6.2.3): what may lie unprocessed after the handshake.
pub(super) const MOST_RECORD: usize = 5 + RECORD + 2048;
/// What a record adds to its bytes, at most (RFC 5246, section 6.2.3: 2048; what we negotiate adds less than 64).
const OVERHEAD: usize = 64;
/// The bytes that a record carries at most; ours carry a little less.
const RECORD: usize = 16 * 1024;

/// The buffers that all connections of a thread use in turn.
pub(super) struct Buffers {
    /// As it came from the network, behind what was left from before.
    pub(super) wire: Box<[u8]>,
    /// Without TLS.
    pub(super) plain: Vec<u8>,
    /// From the application.
    pub(super) answer: Box<[u8]>,
    /// With TLS, to be sent.
    pub(super) sealed: Box<[u8]>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::new(Buffers {
        wire: vec![0; MOST_TAIL + BATCH].into(),
        plain: Vec::with_capacity(BATCH),
        answer: vec![0; BATCH].into(),
        sealed: vec![0; BATCH + (BATCH / RECORD + 3) * OVERHEAD].into(),
    });
}

/// Lends the buffers of this thread; only the threads of the data path ask, so no other has any.
pub(super) fn with_buffers<T>(f: impl FnOnce(&mut Buffers) -> T) -> T {
    BUFFERS.with_borrow_mut(f)
}

/// One end of a TLS connection.
pub(super) struct Tls {
    connection: UnbufferedServerConnection,
    /// What has arrived and cannot be processed yet, as the library left it.
    pub(super) tail: Vec<u8>,
    /// The peer has said that no more will come.
    pub(super) peer_closed: bool,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("tail", &self.tail.len()).field("peer_closed", &self.peer_closed).finish()
    }
}

impl Tls {
    pub(super) fn new(config: Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self { connection: UnbufferedServerConnection::new(config)?, tail: Vec::new(), peer_closed: false })
    }

    /// The library's view of the connection.
    pub(super) fn state(&self) -> &UnbufferedServerConnection {
        &self.connection
    }

    /// Takes in all whole records of `wire`. Their bytes are added to `plain`; what must be answered is added to `out`,
    /// also when it fails. Returns how many bytes of `wire` are done with; the rest must come again, before what follows.
    pub(super) fn take_in(&mut self, wire: &mut [u8], plain: &mut Vec<u8>, out: &mut Vec<u8>) -> Result<usize, Error> {
        let mut done = 0;
        loop {
            let UnbufferedStatus { mut discard, state } = self.connection.process_tls_records(&mut wire[done..]);
            let mut more = true;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        plain.extend_from_slice(record.payload);
                    }
                }
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, out),
                Ok(ConnectionState::TransmitTlsData(sent)) => sent.done(), // it is in `out`
                Ok(ConnectionState::PeerClosed) => self.peer_closed = true,
                Ok(_) => more = false, // nothing whole is left
                Err(error) => {
                    self.alert(&mut wire[done + discard..], out);
                    return Err(error);
                }
            }
            done += discard;
            if !more {
                return Ok(done);
            }
        }
    }

    /// After an error the library has one more thing to say. It must not be asked twice: it would read on.
    fn alert(&mut self, wire: &mut [u8], out: &mut Vec<u8>) {
        if let Ok(ConnectionState::EncodeTlsData(data)) = self.connection.process_tls_records(wire).state {
            encode(data, out);
        }
    }

    /// Makes records of `bytes`, at most [`BATCH`] of them, in `sealed`; returns their length.
    pub(super) fn seal(&mut self, bytes: &[u8], sealed: &mut [u8]) -> Result<usize, Error> {
        self.write(sealed, |traffic, sealed| traffic.encrypt(bytes, sealed))
    }

    /// Says that no more will come.
    pub(super) fn seal_end(&mut self, sealed: &mut [u8]) -> Result<usize, Error> {
        self.write(sealed, |traffic, sealed| traffic.queue_close_notify(sealed))
    }

    fn write(
        &mut self,
        sealed: &mut [u8],
        put: impl FnOnce(&mut WriteTraffic<'_, ServerConnectionData>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<usize, Error> {
        let mut at = 0;
        loop {
            // The same bytes as ever: nothing whole is among them, so nothing is taken from them.
            match self.connection.process_tls_records(&mut self.tail).state? {
                ConnectionState::WriteTraffic(mut traffic) => {
                    let written = put(&mut traffic, &mut sealed[at..]);
                    return written.map(|n| at + n).map_err(|error| Error::General(error.to_string()));
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    at += data.encode(&mut sealed[at..]).map_err(|error| Error::General(error.to_string()))?;
                }
                ConnectionState::TransmitTlsData(sent) => sent.done(),
                state => return Err(Error::General(format!("nothing can be sent now: {state:?}"))),
            }
        }
    }
}

/// Adds what the library wants to send.
fn encode(mut data: EncodeTlsData<'_, ServerConnectionData>, out: &mut Vec<u8>) {
    if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) {
        let at = out.len();
        out.resize(at + size.required_size, 0);
        let _ = data.encode(&mut out[at..]); // it has the room that it asked for
    }
}
