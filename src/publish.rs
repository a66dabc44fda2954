//! How an SVID leaves the daemon.

mod authority;
mod consumers;
mod files;
mod policy;
mod sds;
mod socket;
mod workload_api;

pub use files::{Content, Files, FilesError, Folder, Layout, Outcome, SingleFile, run};
pub use policy::{Denied, Policy};
pub use socket::{Place, serve};
