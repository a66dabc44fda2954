//! Noticing that a file was replaced.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

/// From one look to the next. Looking costs a system call a file, needs no descriptor that could run out (inotify has a
/// limit per user), and is done only while somebody waits for a change.
const EVERY: Duration = Duration::from_secs(2);

/// What tells one version of a file from another: file, size, time. None when it is not there.
type Stamp = Option<(u64, u64, i64, i64)>;

/// Watches a few files by looking at them.
#[derive(Debug, Clone)]
pub struct FileWatch {
    paths: Vec<PathBuf>,
    seen: Vec<Stamp>,
}

impl FileWatch {
    /// Watches `paths`, which may not exist yet; what they are now counts as seen.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let paths: Vec<_> = paths.into_iter().collect();
        let seen = stamps(&paths);
        Self { paths, seen }
    }

    /// Whether one of the files is another than at the last look that said so, or at the beginning.
    pub fn has_changed(&mut self) -> bool {
        let now = stamps(&self.paths);
        now != std::mem::replace(&mut self.seen, now.clone())
    }

    /// Returns when a file has changed. Safe to cancel.
    pub async fn changed(&mut self) {
        while !self.has_changed() {
            tokio::time::sleep(EVERY).await;
        }
    }
}

fn stamps(paths: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |path| fs::metadata(path).ok().map(|m| (m.ino(), m.len(), m.mtime(), m.mtime_nsec()));
    paths.iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn appearing_changing_and_vanishing_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("istio-token");
        let mut watch = FileWatch::new([file.clone()]);
        let limit = Duration::from_secs(5);
        assert!(tokio::time::timeout(limit, watch.changed()).await.is_err());
        for change in [Some("one"), Some("longer"), None] {
            match change {
                Some(text) => fs::write(&file, text).unwrap(),
                None => fs::remove_file(&file).unwrap(),
            }
            tokio::time::timeout(limit, watch.changed()).await.unwrap();
        }
        assert!(tokio::time::timeout(limit, watch.changed()).await.is_err());
    }
}
