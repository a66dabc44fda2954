//! The lab against recordings of the real thing: istioctl's bundles, istiod's answers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

#[path = "golden/bundle.rs"]
mod bundle;

use std::{fs, path::PathBuf};

/// A recording.
fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden").join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(golden(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}
