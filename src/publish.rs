//! How an SVID leaves the daemon.

mod files;
mod policy;

pub use files::{Files, FilesError, Layout, Outcome, run};
pub use policy::{Denied, Policy};
