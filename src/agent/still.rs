//! When a bundle is to be read: when its files are others than those that were read, and rest.

use crate::{bundle::BundleDir, config::WorkloadConfig, files::Stamp};
use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// A bundle that is being copied is not judged: its files must have been still for this long.
const STILL: Duration = Duration::from_secs(2);

/// Which files there are, and which settings go with them; not what is in them. The token is followed by those who use it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Version {
    files: Vec<(PathBuf, Option<Stamp>)>,
    settings: WorkloadConfig,
    newest: Option<SystemTime>,
    gone: bool,
}

impl Version {
    /// As it is now.
    pub(super) fn of(dir: &BundleDir, settings: &WorkloadConfig) -> Self {
        let token: Vec<_> = dir.token.paths().collect();
        let files: Vec<_> = dir.files().filter(|file| !token.contains(file)).map(Path::to_owned).collect();
        let files: Vec<_> = files.into_iter().map(|file| (file.clone(), Stamp::of(&file))).collect();
        // A name that came or went is told by its directory.
        let above = dir.env.iter().filter_map(|file| Stamp::of(file.parent()?));
        let newest = files.iter().filter_map(|(_, stamp)| *stamp).chain(above).map(|stamp| stamp.changed_at()).max();
        let gone = dir.files().all(|file| Stamp::of(file).is_none());
        Self { files, settings: settings.clone(), newest, gone }
    }

    fn same_files(&self, other: &Self) -> bool {
        self.files == other.files
    }
}

/// Follows the files of one bundle.
#[derive(Debug, Default)]
pub(super) struct Still {
    read: Option<Version>,
    seen: Option<(Version, Instant)>,
}

/// What a look has shown.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    Now,
    /// When, if nothing changes until then.
    At(Instant),
    Never,
}

impl Still {
    /// Whether this `version` is to be read. `hasty`: without waiting until it rests.
    pub(super) fn look(&mut self, version: Version, hasty: bool, now: Instant, wall: SystemTime) -> Due {
        let since = match &self.seen {
            Some((seen, since)) if seen.same_files(&version) => *since,
            _ => now,
        };
        let age = version.newest.and_then(|newest| wall.duration_since(newest).ok()).unwrap_or_default();
        // Other settings alone are no copy in progress. A file's own time is good if the clock is.
        let rests = |read: &Version| read.same_files(&version);
        let left = match &self.read {
            Some(read) if rests(read) && read.settings == version.settings => None,
            Some(read) if rests(read) => Some(Duration::ZERO),
            _ if version.gone => None, // it is left, not judged
            _ if hasty => Some(Duration::ZERO),
            _ => Some(STILL.saturating_sub(age.max(now - since))),
        };
        self.seen = Some((version.clone(), since));
        match left {
            None => Due::Never,
            Some(Duration::ZERO) => {
                self.read = Some(version);
                Due::Now
            }
            Some(left) => Due::At(now + left),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs;

    #[test]
    fn a_bundle_is_read_when_it_rests_and_when_it_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = BundleDir::directory(dir.path());
        let (start, wall) = (Instant::now(), SystemTime::now());
        let mut still = Still::default();
        let mut settings = WorkloadConfig::default();
        let mut look = |settings: &WorkloadConfig, after: Duration, wall: SystemTime| {
            still.look(Version::of(&bundle, settings), false, start + after, wall)
        };
        let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3600));
        fs::write(&bundle.mesh, "a").unwrap();
        // Whatever the wall clock says: it has an hour less, so that no file seems to rest.
        assert_eq!(look(&settings, second, wall - hour), Due::At(start + second + STILL));
        assert_eq!(look(&settings, second * 2, wall - hour), Due::At(start + second + STILL));
        fs::write(&bundle.env[0], "a").unwrap();
        assert_eq!(look(&settings, second * 3, wall - hour), Due::At(start + second * 3 + STILL));
        assert_eq!(look(&settings, second * 5, wall - hour), Due::Now);
        assert_eq!(look(&settings, second * 6, wall - hour), Due::Never);
        // The token is not ours to follow.
        fs::write(&bundle.token.file, "a").unwrap();
        assert_eq!(look(&settings, second * 7, wall + hour), Due::Never);
        // Settings need no rest; files that have rested already are read at once.
        settings.network = Some("other".to_owned());
        assert_eq!(look(&settings, second * 8, wall - hour), Due::Now);
        fs::write(&bundle.mesh, "other").unwrap();
        assert_eq!(look(&settings, second * 9, wall + hour), Due::Now);
        fs::remove_file(&bundle.mesh).unwrap();
        fs::remove_file(&bundle.env[0]).unwrap();
        fs::remove_file(&bundle.token.file).unwrap();
        assert_eq!(look(&settings, second * 20, wall + hour), Due::Never, "it is not judged but left");
    }
}
