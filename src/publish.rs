//! How an SVID leaves the daemon.

mod files;

pub use files::{Files, FilesError, Layout, Outcome, run};
