//! The host: where its files are, how they are written and watched, what its names mean, who knocks, how its commands are
//! run, its signals and its service manager.

mod access;
mod bus;
mod command;
mod dir;
mod limit;
pub mod listen;
mod local;
pub mod notify;
mod peer;
mod power;
mod raw;
mod reload;
mod resolver;
mod route;
mod signal;
mod unit;
mod watch;

pub use access::{Access, Grant, group_number};
pub use command::{CommandError, Commands, RunnerError, Why, serve_command, words};
pub use dir::{Dir, DirError, Removal, SocketId};
pub use limit::raise_descriptor_limit;
pub use listen::Listeners;
pub use local::{Local, LocalStream};
pub use peer::{Account, Allow, Peer, user_name};
pub use power::going_down;
pub use reload::{ReloadError, consents_to_reload, reload_unit, reload_units};
pub use resolver::Resolver;
pub use route::{is_of_this_host, source_of_route};
pub use signal::shutdown;
pub use unit::{UnitError, Units};
pub use watch::{FileWatch, Stamp};

use std::path::{Path, PathBuf};

/// Prefers little memory over few system calls, for a process that rests most of the time. To be called before there is
/// another thread.
pub fn spare_memory() {
    raw::spare_memory();
}

/// The VM as a directory: every absolute path of the agent is looked up below it. Production has `/`; a test, the demo
/// and a run without privileges have a folder.
#[derive(Debug, Clone)]
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
