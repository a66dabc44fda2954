//! The machine and its kernel: who knocks, what names and routes mean, signals, limits, and what only `unsafe` gives.

mod limit;
mod local;
mod orphans;
mod peer;
pub(crate) mod raw;
mod resolver;
mod route;
mod signal;

pub use limit::{descriptor_limit, raise_descriptor_limit};
pub use local::{Local, LocalStream, undelivered};
pub use orphans::reap_orphans;
pub use peer::{Account, Allow, Peer, user_name};
pub use resolver::Resolver;
pub use route::{is_of_this_host, source_of_route};
pub use signal::{hangups, shutdown};

/// Prefers little memory over few system calls, for a process that rests most of the time. To be called before there is
/// another thread.
pub fn spare_memory() {
    raw::spare_memory();
}
