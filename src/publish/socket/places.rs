//! Where the socket is, and getting it there.

use crate::{
    status::{Publication, Trouble},
    system::{Account, Dir, DirError, Listeners, Root, listen},
    time::{Backoff, Clock},
};
use nix::unistd::Group;
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tracing::{info, warn};

/// The name in the workload's directory.
const NAME: &str = "agent.sock";

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
enum PlaceError {
    /// The file system refused, or the path is not safe.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The system knows no such group, or not yet.
    #[error("there is no group {0} on this host; create it, or change socket.group")]
    NoGroup(String),
    /// A living program has the path; it would lose its consumers.
    #[error("another program listens on {}; stop it, or take the path out of socket.also", .0.display())]
    Served(PathBuf),
}

impl PlaceError {
    fn kind(&self) -> &'static str {
        match self {
            Self::Dir(error) => error.kind(),
            Self::NoGroup(_) => "no_group",
            Self::Served(_) => "served_by_another",
        }
    }
}

/// Where a workload's socket is.
#[derive(Debug)]
pub struct Place {
    root: Root,
    dir: PathBuf,
    name: String,
    /// Whether the directory is the workload's, so that nobody else has a socket in it.
    own: bool,
    group: Option<Account>,
    inherited: Option<UnixListener>,
}

impl Place {
    /// `agent.sock` in `dir`, below `root`, for a group; none stands for the group that we run as.
    pub fn new(root: &Root, dir: impl Into<PathBuf>, group: Option<Account>) -> Self {
        Self { root: root.clone(), dir: dir.into(), name: NAME.to_owned(), own: true, group, inherited: None }
    }

    /// The same at `path`, beside others: say where Istio's own agent has its socket. While another program listens
    /// there, it is left alone. None when that is no path of a file.
    pub fn also(root: &Root, path: &Path, group: Option<Account>) -> Option<Self> {
        let (dir, name) = (path.parent()?.to_owned(), path.file_name()?.to_str()?.to_owned());
        Some(Self { root: root.clone(), dir, name, own: false, group, inherited: None })
    }

    /// Serves a listener of the service manager instead of a new one: of a socket unit, whose name for it is
    /// `workload` (its own place alone), else the one that a process before us has asked it to keep. To be called within the runtime.
    #[must_use]
    pub fn inherit(self, workload: &str, listeners: &Listeners) -> Self {
        let passed = if self.own { listeners.take(workload) } else { None };
        let inherited = passed.or_else(|| listeners.take_kept(&self.path()));
        Self { inherited, ..self }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.root.path(&self.dir).join(&self.name)
    }

    fn listen(&self) -> Result<UnixListener, PlaceError> {
        let group = match &self.group {
            None => None,
            Some(Account::Id(gid)) => Some(*gid),
            Some(Account::Name(name)) => {
                let found = Group::from_name(name).ok().flatten();
                Some(found.ok_or_else(|| PlaceError::NoGroup(name.clone()))?.gid.as_raw())
            }
        };
        let dir = if self.own { Dir::passable(&self.root, &self.dir)? } else { Dir::shared(&self.root, &self.dir)? };
        if !self.own && dir.is_served(&self.name) {
            return Err(PlaceError::Served(self.path()));
        }
        let listener = dir.listen(&self.name, group)?;
        let failed = |error: io::Error| DirError::Io {
            doing: "listen on",
            path: dir.path().join(&self.name),
            errno: error.raw_os_error().map_or(nix::errno::Errno::EIO, nix::errno::Errno::from_raw),
        };
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(UnixListener::from_std(listener).map_err(failed)?)
    }
}

/// The socket, once it is there.
pub(super) struct Places {
    place: Place,
    listener: Option<UnixListener>,
    backoff: Backoff,
}

impl Places {
    pub(super) fn new(mut place: Place) -> Self {
        let listener = place.inherited.take();
        Self { place, listener, backoff: Backoff::new(Duration::from_millis(500), Duration::from_secs(60)) }
    }

    /// The next connection; puts the socket in place first, for as long as that takes. Dropping the future loses
    /// nothing but the wait between two attempts.
    pub(super) async fn accept(&mut self, fact: &watch::Sender<Publication>, clock: Clock) -> io::Result<UnixStream> {
        loop {
            if let Some(listener) = &self.listener {
                return listener.accept().await.map(|(stream, _)| stream);
            }
            match self.place.listen() {
                Ok(listener) => {
                    info!(socket = %self.place.path().display(), "listening");
                    listen::keep(&self.place.path(), &listener);
                    self.listener = Some(listener);
                    fact.send_modify(|known| known.trouble = None);
                }
                Err(error) => {
                    let (kind, cause) = (error.kind(), error.to_string());
                    fact.send_modify(|known| {
                        let old = known.trouble.take().filter(|old| old.kind == kind);
                        if old.is_none() {
                            warn!(cause, "no socket for consumers, tried again");
                        }
                        let since = old.map_or_else(|| clock.now(), |old| old.since);
                        known.trouble = Some(Trouble { since, kind, cause });
                    });
                    tokio::time::sleep(self.backoff.next_wait()).await;
                }
            }
        }
    }
}
