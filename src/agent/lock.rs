//! One daemon alone uses a state directory. The lock is a file in it: a socket can be removed, and another be made.

use crate::files::Root;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag, open},
    sys::stat::Mode,
};
use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

/// Below the root. No workload has such a name.
const PATH: &str = "/var/lib/we-agent/.lock";

/// The state directory is another daemon's.
#[derive(Debug, thiserror::Error)]
#[error(
    "{}: another we-agent runs here; stop it first, or give this one its own --root",
    .0.parent().unwrap_or(.0).display()
)]
pub struct Locked(PathBuf);

/// The lock, as long as it lives.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    held: Option<Flock<File>>,
}

impl Lock {
    /// Takes it. Where there can be no file, all goes on without: the store will say what is wrong.
    ///
    /// # Errors
    /// When another has it.
    pub(super) fn take(root: &Root) -> Result<Self, Locked> {
        let path = root.path(PATH);
        match take(&path) {
            Ok(held) => Ok(Self { path, held: Some(held) }),
            Err(error) if error.raw_os_error() == Some(Errno::EWOULDBLOCK as i32) => Err(Locked(path)),
            Err(error) => {
                tracing::warn!(file = %path.display(), cause = %error, "no lock on the state directory");
                Ok(Self { path, held: None })
            }
        }
    }

    /// Makes it anew when somebody has removed it.
    pub(super) fn look(&mut self) {
        let held = self.held.as_ref().and_then(|held| held.metadata().ok());
        let there = fs::metadata(&self.path).ok();
        if held.map(|m| (m.dev(), m.ino())) == there.map(|m| (m.dev(), m.ino())) && self.held.is_some() {
            return;
        }
        let again = take(&self.path);
        match (&again, self.held.is_some()) {
            (Ok(_), true) => {
                tracing::warn!(file = %self.path.display(), "the lock was removed by somebody, so it is made anew")
            }
            (Ok(_), false) => {}
            (Err(error), true) => {
                tracing::error!(file = %self.path.display(), cause = %error, "the lock was removed by somebody, and is not to be had")
            }
            (Err(_), false) => {} // told already
        }
        self.held = again.ok();
    }
}

fn take(path: &Path) -> io::Result<Flock<File>> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(open(path, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_has_it_and_goes_on_having_it() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        let mut lock = Lock::take(&root).unwrap();
        let refused = Lock::take(&root).unwrap_err().to_string();
        assert!(refused.contains("another we-agent runs here; stop it first"), "{refused}");
        fs::remove_dir_all(root.path("/var/lib/we-agent")).unwrap();
        lock.look();
        assert!(root.path(PATH).exists());
        assert!(Lock::take(&root).is_err());
        drop(lock);
        Lock::take(&root).unwrap();
    }
}
