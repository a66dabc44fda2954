//! How an SVID leaves the daemon, and how programs learn of it.

mod authority;
mod budget;
mod call;
mod consumers;
mod files;
mod grpc;
mod hook;
mod offer;
mod policy;
mod refusals;
mod sds;
mod socket;
mod workload_api;

pub use files::{Content, Files, FilesError, Folder, Layout, Outcome, Output, SingleFile, run};
pub use hook::{Action, Hook, HookSettings, StartTls, Switches, Verify};
pub use policy::{Denied, Policy};
#[cfg(feature = "fuzz")]
pub(crate) use socket::fuzz;
pub use socket::{Place, serve};
