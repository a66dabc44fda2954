//! How an SVID leaves the daemon.

mod files;

pub use files::{Content, Files, FilesError, Folder, Layout, Outcome, SingleFile, run};
