//! A file of the store: a disk may have anything on it.

use super::store;
use crate::spiffe::{KeyKind, PrivateKey, SpiffeId};
use std::time::SystemTime;

/// Stands for the lines of a key that is good, for no file here has one.
const KEY: &str = "\"KEY\"";

/// One generation of the workload `id`.
pub(crate) fn generation(text: &str, id: &SpiffeId) {
    let Ok(key) = PrivateKey::generate(KeyKind::EcP256) else { return };
    let lines: Vec<_> = key.pem().lines().map(|line| format!("{line:?}")).collect();
    let text = text.replacen(KEY, &lines.join(","), 1);
    match store::parse(text.as_bytes(), id, SystemTime::now()) {
        Ok(stored) => drop(stored),
        Err(error) => drop((error.is_damage(), error.to_string())),
    }
}
