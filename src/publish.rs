//! How an SVID leaves the daemon.

mod authority;
mod files;
mod policy;
mod workload_api;

pub use files::{Content, Files, FilesError, Folder, Layout, Outcome, SingleFile, run};
pub use policy::{Denied, Policy};
