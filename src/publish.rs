//! How an SVID leaves the daemon.

mod files;
mod policy;

pub use files::{Content, Files, FilesError, Folder, Layout, Outcome, SingleFile, run};
pub use policy::{Denied, Policy};
