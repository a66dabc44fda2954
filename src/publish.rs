//! How an SVID leaves the daemon.

mod authority;
mod files;
mod workload_api;

pub use files::{Files, FilesError, Layout, Outcome, run};
