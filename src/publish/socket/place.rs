//! Where the socket is: finding the place, making a socket there, and giving it to its group. All of it may block.

use crate::{
    files::{Dir, DirError, Root, SocketId, group_number_aside},
    host::Account,
    systemd::{Listeners, listen},
};
use nix::errno::Errno;
use std::{
    io,
    os::unix::net::UnixListener as StdListener,
    path::{Path, PathBuf},
};
use tokio::{net::UnixListener, sync::watch, time::Instant};

/// The name in the workload's directory.
const NAME: &str = "agent.sock";

/// Why there is no socket, or not for its group.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlaceError {
    /// The file system refused, the path is not safe, or there is no such group.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// A living program has the path; it would lose its consumers.
    #[error("another program listens on {}; stop it, or take the path out of socket.also", .0.display())]
    Served(PathBuf),
    /// The name of a socket unit's socket is gone, and the socket is not ours to make.
    #[error(
        "{} was removed or replaced, so nobody reaches the socket that systemd holds: stop we-agent, restart the socket \
         unit, and start we-agent",
        .0.display()
    )]
    Removed(PathBuf),
}

impl PlaceError {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Dir(error) => error.kind(),
            Self::Served(_) => "served_by_another",
            Self::Removed(_) => "removed",
        }
    }
}

/// Where a workload's socket is.
#[derive(Debug)]
pub struct Place {
    pub(super) site: Site,
    pub(super) held: Option<Held>,
    pub(super) looks: Option<watch::Receiver<Instant>>,
    pub(super) heir: Option<Heir>,
}

/// Where the listener is handed on at the end.
#[derive(Debug)]
pub(super) struct Heir {
    listeners: Listeners,
    /// What a socket unit calls it.
    workload: String,
}

impl Heir {
    pub(super) fn hand_on(self, site: &Site, held: Held) {
        let path = site.path();
        let name = if held.ours { path.to_str() } else { Some(self.workload.as_str()) };
        // What nobody finds under its name is of no use.
        if let (Some(name), false, Ok(listener)) = (name, held.removed, held.listener.into_std()) {
            self.listeners.hand_on(name, listener);
        }
    }
}

/// The path, and whom it is for.
#[derive(Debug, Clone)]
pub(super) struct Site {
    root: Root,
    dir: PathBuf,
    name: String,
    /// Whether the directory is the workload's, so that nobody else has a socket in it.
    own: bool,
    group: Option<Account>,
}

/// A listener, and the name that leads to it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) listener: UnixListener,
    /// What was at the path when the listener came; none when that could not be told.
    pub(super) id: Option<SocketId>,
    /// Whether we have made it, now or before a restart. Otherwise a socket unit has, whose modes and name it has.
    pub(super) ours: bool,
    /// Whether its name is gone, and it is not ours to make anew.
    pub(super) removed: bool,
}

/// What came of putting the socket in place.
#[derive(Debug)]
pub(super) enum Done {
    /// There is a new one.
    Made(StdListener),
    /// The one of the process before us is as it should be.
    Kept,
    /// The name leads to somebody else's.
    Lost,
}

impl Place {
    /// `agent.sock` in `dir`, below `root`, for a group; none stands for the group that we run as.
    pub fn new(root: &Root, dir: impl Into<PathBuf>, group: Option<Account>) -> Self {
        let site = Site { root: root.clone(), dir: dir.into(), name: NAME.to_owned(), own: true, group };
        Self { site, held: None, looks: None, heir: None }
    }

    /// The same at `path`, beside others: say where Istio's own agent has its socket. While another program listens
    /// there, it is left alone. None when that is no path of a file.
    pub fn also(root: &Root, path: &Path, group: Option<Account>) -> Option<Self> {
        let (dir, name) = (path.parent()?.to_owned(), path.file_name()?.to_str()?.to_owned());
        let site = Site { root: root.clone(), dir, name, own: false, group };
        Some(Self { site, held: None, looks: None, heir: None })
    }

    /// Serves a listener of the service manager instead of a new one: of a socket unit, whose name for it is
    /// `workload` (its own place alone), else the one that a process before us has asked it to keep, or that the one before us
    /// has handed on. At the end it is handed on there. To be called within the runtime.
    #[must_use]
    pub fn inherit(self, workload: &str, listeners: &Listeners) -> Self {
        let path = self.path();
        let passed = if self.site.own { listeners.take(workload) } else { None };
        let held = passed.or_else(|| listeners.take_kept(&path)).map(|listener| {
            let ours = listen::is_made_by_us(&path, &listener);
            Held { listener, id: SocketId::at(&path).ok().flatten(), ours, removed: false }
        });
        let heir = Some(Heir { listeners: listeners.clone(), workload: workload.to_owned() });
        Self { held, heir, ..self }
    }

    /// Looks at each of these moments whether its name is still there, and makes the socket anew when it is not. They
    /// should be such at which the process is awake anyway.
    #[must_use]
    pub fn looked_after(self, moments: watch::Receiver<Instant>) -> Self {
        Self { looks: Some(moments), ..self }
    }

    /// Of the socket, on this host.
    pub fn path(&self) -> PathBuf {
        self.site.path()
    }
}

impl Site {
    pub(super) fn path(&self) -> PathBuf {
        self.root.path(&self.dir).join(&self.name)
    }

    /// Puts a new socket there.
    pub(super) fn listen(&self, group: Option<u32>) -> Result<Done, PlaceError> {
        let dir = self.dir()?;
        if !self.own && dir.is_served(&self.name) {
            return Err(PlaceError::Served(self.path()));
        }
        Ok(Done::Made(self.listener(&dir, group)?))
    }

    /// Gives the socket of the process before us to the group that is configured now.
    pub(super) fn restore(&self, group: Option<u32>) -> Result<Done, PlaceError> {
        let dir = self.dir()?;
        if !dir.has_own_socket(&self.name)? {
            return Ok(Done::Lost);
        }
        match dir.open_socket_to(&self.name, group) {
            Ok(()) => Ok(Done::Kept),
            // Without SystemCallFilter=@chown it cannot be taken from a group that it had; a new one never had it.
            Err(_) => Ok(Done::Made(self.listener(&dir, group)?)),
        }
    }

    fn listener(&self, dir: &Dir, group: Option<u32>) -> Result<StdListener, PlaceError> {
        let listener = dir.listen(&self.name, group)?;
        listener.set_nonblocking(true).map_err(|error| self.failed(&error))?;
        Ok(listener)
    }

    pub(super) fn failed(&self, error: &io::Error) -> PlaceError {
        let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        DirError::Io { doing: "listen on", path: self.path(), errno }.into()
    }

    /// The number of its group.
    pub(super) async fn group(&self) -> Result<Option<u32>, DirError> {
        match &self.group {
            None => Ok(None),
            Some(Account::Id(gid)) => Ok(Some(*gid)),
            Some(Account::Name(name)) => group_number_aside(name).await.map(Some),
        }
    }

    fn dir(&self) -> Result<Dir, DirError> {
        if self.own { Dir::passable(&self.root, &self.dir) } else { Dir::shared(&self.root, &self.dir) }
    }
}
