//! How an SVID leaves the daemon, and how programs learn of it.

mod files;
mod hook;

pub use files::{Files, FilesError, Layout, Outcome, run};
pub use hook::{Action, Hook, StartTls, Switches, Verify};
