//! Where the files of this host are.

use std::path::{Path, PathBuf};

/// The VM as a directory: every absolute path of the agent is looked up below it. Production has `/`; a test, the demo
/// and a run without privileges have a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root(PathBuf);

impl Root {
    /// A root at `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// Where `path`, as configuration and bundles name it, is for us.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The other way round: the name of what is at `path` for us; none outside of the root.
    pub fn name(&self, path: &Path) -> Option<PathBuf> {
        path.strip_prefix(&self.0).ok().map(|rest| Path::new("/").join(rest))
    }
}

impl Default for Root {
    fn default() -> Self {
        Self::new("/")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_looked_up_below_the_root() {
        let root = Root::new("/tmp/vm");
        assert_eq!(root.path("/etc/we-agent"), Path::new("/tmp/vm/etc/we-agent"));
        assert_eq!(root.path("./etc/certs"), Path::new("/tmp/vm/./etc/certs"));
        // A name that looks like the root's is a name all the same.
        assert_eq!(root.path("/tmp/vm/run"), Path::new("/tmp/vm/tmp/vm/run"));
        assert_eq!(root.name(Path::new("/tmp/vm/tmp/vm/run")).as_deref(), Some(Path::new("/tmp/vm/run")));
        assert_eq!(root.name(Path::new("/run/we-agent")), None);
        assert_eq!(Root::default().name(Path::new("/run/we-agent")).as_deref(), Some(Path::new("/run/we-agent")));
        assert_eq!(Root::default().path("/run/we-agent"), Path::new("/run/we-agent"));
    }
}
