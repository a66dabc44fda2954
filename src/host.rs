//! The machine and its kernel: who knocks, what names and routes mean, signals, limits, memory, and what only `unsafe` gives.

mod limit;
mod local;
mod memory;
mod orphans;
mod peer;
pub(crate) mod raw;
mod resolver;
mod route;
mod signal;

pub(crate) use raw::LARGE;

pub use limit::{descriptor_limit, raise_descriptor_limit};
pub use local::{Local, LocalStream, undelivered, unread};
pub use memory::{hide_memory, spare_memory};
pub use orphans::reap_orphans;
pub use peer::{Account, Allow, Peer, user_name};
pub use raw::Wiping;
pub use resolver::Resolver;
pub use route::{is_of_this_host, source_of_route};
pub use signal::{hangups, shutdown};
