//! Noticing that a file was replaced.

use nix::sys::stat::FileStat;
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// From one look to the next. Looking costs a system call a file, needs no descriptor that could run out (inotify has a
/// limit per user), and is done only while somebody waits for a change.
const EVERY: Duration = Duration::from_secs(2);

/// What tells one version of a file from another. The time is that of the last change of content, owner or mode: a file
/// that we may read by now is news, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    inode: u64,
    size: u64,
    written: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Of what `path` leads to; none when there is nothing that we can see.
    pub fn of(path: &Path) -> Option<Self> {
        let m = fs::metadata(path).ok()?;
        let (written, changed) = ((m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec()));
        Some(Self { inode: m.ino(), size: m.len(), written, changed })
    }

    /// When content, owner or mode were changed last, as far as the clock was right.
    pub fn changed_at(&self) -> SystemTime {
        let (seconds, nanos) = self.changed;
        UNIX_EPOCH
            + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
            + Duration::from_nanos(u64::try_from(nanos).unwrap_or_default())
    }

    /// Whether it is that of the same content; owner and mode may be others by now.
    pub(super) fn is_content_of(&self, stat: &FileStat) -> bool {
        let size = u64::try_from(stat.st_size);
        (self.inode, Ok(self.size), self.written) == (stat.st_ino, size, (stat.st_mtime, stat.st_mtime_nsec))
    }
}

/// Watches a few files by looking at them.
#[derive(Debug, Clone)]
pub struct FileWatch {
    paths: Vec<PathBuf>,
    seen: Vec<Option<Stamp>>,
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

fn stamps(paths: &[PathBuf]) -> Vec<Option<Stamp>> {
    paths.iter().map(|path| Stamp::of(path)).collect()
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
        let mode = |mode| fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        let changes: [&dyn Fn(); 4] =
            [&|| fs::write(&file, "one").unwrap(), &|| fs::write(&file, "longer").unwrap(), &|| mode(0o640), &|| {
                fs::remove_file(&file).unwrap()
            }];
        for change in changes {
            change();
            tokio::time::timeout(limit, watch.changed()).await.unwrap();
        }
        assert!(tokio::time::timeout(limit, watch.changed()).await.is_err());
    }
}
