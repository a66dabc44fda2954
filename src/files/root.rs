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

    /// Where the absolute `path` is on this host. A path that is already below the root is kept.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        match path.strip_prefix(&self.0) {
            Ok(_) if self.0 != Path::new("/") => path.to_owned(),
            _ => self.0.join(path.strip_prefix("/").unwrap_or(path)),
        }
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
        assert_eq!(root.path("/tmp/vm/run"), Path::new("/tmp/vm/run"));
        assert_eq!(Root::default().path("/run/we-agent"), Path::new("/run/we-agent"));
    }
}
