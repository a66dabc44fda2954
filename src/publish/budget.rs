//! What one user can make us hold.
//!
//! On all its connections to one socket, what it asks takes [`OF_USER`] at most, 64 MiB: [`CALL`] for each call that is
//! open, and all of each message that has not come as a whole. What does not fit is refused with `RESOURCE_EXHAUSTED`;
//! other users do not notice, for each has as much.
//!
//! Beside that there are the connections themselves, 1,024 of a user at most, with the buffers of `h2`: 29 KiB for an
//! Envoy's, which `make bench` measures; 62 KiB were seen where sixteen calls had been refused, so another 62 MiB. And
//! HTTP/2 lets a peer send 64 KiB on each connection unasked; calls read at once, so these are there for the moment in
//! which they pass through. A thousand connections that began sixteen messages of 60 kB each came to 115 MiB.

use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

/// For one user, in bytes. A thousand Envoys have two calls each, which is half of it.
pub(super) const OF_USER: usize = 64 << 20;
/// What an open call counts, in bytes: its task, a small request, and its own part of answers that the peer does not read. The
/// rest of them, some 6 kB, all calls share.
pub(super) const CALL: usize = 16 << 10;

/// Room for what a user asks. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<Semaphore>);

/// Room that is taken; given back when dropped.
#[derive(Debug)]
pub(super) struct Share(#[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit);

impl Budget {
    /// Room for so many bytes.
    pub(super) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes)))
    }

    /// Takes room for so many bytes.
    ///
    /// # Errors
    /// When there is not enough: `RESOURCE_EXHAUSTED`.
    pub(super) fn take(&self, bytes: usize) -> Result<Share, Status> {
        let taken = u32::try_from(bytes).ok().and_then(|bytes| self.0.clone().try_acquire_many_owned(bytes).ok());
        taken.map(Share).ok_or_else(|| {
            Status::resource_exhausted(format!(
                "no room for {bytes} bytes: this user's open calls and unfinished messages are at their bound; end some"
            ))
        })
    }
}
