//! Noticing that a file was replaced.

use nix::sys::stat::FileStat;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// What tells one version of a file from another. The time is that of the last change of content, owner or mode: a file
/// that we may read by now is news, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

/// Which versions of a few files are there. To look costs a system call a file, and needs no descriptor that could run out
/// (inotify has a limit for each user). Files that several wait for are a fact: one looks at each beat, and all read it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Versions(Vec<(PathBuf, Option<Stamp>)>);

impl Versions {
    /// Of these files, which may not exist yet, as they are now.
    pub fn of(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        let stamped = |path: PathBuf| (path.clone(), Stamp::of(&path));
        Self(paths.into_iter().map(|path| stamped(path.into())).collect())
    }

    /// Looks again: whether one of the files is another than at the last look.
    pub fn have_changed(&mut self) -> bool {
        let now = Self::of(self.0.iter().map(|(path, _)| path));
        now != std::mem::replace(self, now.clone())
    }

    /// Whether each of the files was there at the last look.
    pub fn are_there(&self) -> bool {
        self.0.iter().all(|(_, stamp)| stamp.is_some())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn appearing_changing_and_vanishing_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("istio-token");
        let mut versions = Versions::of([&file]);
        assert!(!versions.have_changed());
        let mode = |mode| fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        let changes: [&dyn Fn(); 4] =
            [&|| fs::write(&file, "one").unwrap(), &|| fs::write(&file, "longer").unwrap(), &|| mode(0o640), &|| {
                fs::remove_file(&file).unwrap()
            }];
        for change in changes {
            change();
            assert_eq!([versions.have_changed(), versions.have_changed()], [true, false]);
            assert_eq!(versions.are_there(), file.exists());
        }
    }
}
