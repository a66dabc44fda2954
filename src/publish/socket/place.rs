//! Where the socket is: finding the place, making a socket there, and giving it to its group. All of it may block.

use crate::{
    files::{Dir, DirError, Root, SocketId, group_number_aside},
    host::Account,
    systemd::{Listeners, listen},
};
use std::{
    io,
    os::unix::net::UnixListener as StdListener,
    path::{Path, PathBuf},
    pin::Pin,
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
pub struct Place {
    pub(super) site: Site,
    pub(super) state: State,
    pub(super) looks: Option<watch::Receiver<Instant>>,
    pub(super) heir: Option<Heir>,
}

/// What there is at a place.
pub(super) enum State {
    /// Nothing of ours; a listener is to be made.
    Absent(Work),
    /// What we have made, now or before a restart; after one it is to be given to the group that is configured now.
    Ours(Held, Option<Work>),
    /// A socket unit's, whose modes and name it has.
    Given(Held),
    /// The same when its name is gone: it is not ours to make anew.
    Removed(UnixListener),
}

/// A listener, and the name that leads to it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) listener: UnixListener,
    /// What was at the path when the listener came; none when that could not be told.
    pub(super) id: Option<SocketId>,
}

/// What is to be done about a place. It outlives the future that waits for it.
pub(super) enum Work {
    Due(Instant),
    /// Aside: the name service may hang, and everything else goes on.
    Busy(Pin<Box<dyn Future<Output = Result<Done, PlaceError>> + Send>>),
}

/// Where the listener is handed on at the end.
#[derive(Debug)]
pub(super) struct Heir {
    listeners: Listeners,
    /// What a socket unit calls it.
    workload: String,
}

impl Heir {
    pub(super) fn hand_on(self, site: &Site, state: State) {
        let path = site.path();
        let (name, held) = match state {
            State::Ours(held, _) => (path.to_str(), held),
            State::Given(held) => (Some(self.workload.as_str()), held),
            // What nobody finds under its name is of no use.
            State::Absent(_) | State::Removed(_) => return,
        };
        if let (Some(name), Ok(listener)) = (name, held.listener.into_std()) {
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
        Self::of(site)
    }

    /// The same at `path`, beside others: say where Istio's own agent has its socket. While another program listens
    /// there, it is left alone. None when that is no path of a file.
    pub fn also(root: &Root, path: &Path, group: Option<Account>) -> Option<Self> {
        let (dir, name) = (path.parent()?.to_owned(), path.file_name()?.to_str()?.to_owned());
        let site = Site { root: root.clone(), dir, name, own: false, group };
        Some(Self::of(site))
    }

    fn of(site: Site) -> Self {
        Self { site, state: State::Absent(Work::now()), looks: None, heir: None }
    }

    /// Serves a listener of the service manager instead of a new one: of a socket unit, whose name for it is
    /// `workload` (its own place alone), else the one that a process before us has asked it to keep, or that the one before us
    /// has handed on. At the end it is handed on there. To be called within the runtime.
    #[must_use]
    pub fn inherit(self, workload: &str, listeners: &Listeners) -> Self {
        let path = self.path();
        let passed = if self.site.own { listeners.take(workload) } else { None };
        let state = match passed.or_else(|| listeners.take_kept(&path)) {
            Some(listener) => {
                let ours = listen::is_made_by_us(&path, &listener);
                let held = Held::at(&path, listener);
                if ours { State::Ours(held, Some(Work::now())) } else { State::Given(held) }
            }
            None => self.state,
        };
        let heir = Some(Heir { listeners: listeners.clone(), workload: workload.to_owned() });
        Self { state, heir, ..self }
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

impl Held {
    pub(super) fn at(path: &Path, listener: UnixListener) -> Self {
        Self { listener, id: SocketId::at(path).ok().flatten() }
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
        Ok(Done::Made(dir.listen(&self.name, group)?))
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
            Err(_) => Ok(Done::Made(dir.listen(&self.name, group)?)),
        }
    }

    pub(super) fn failed(&self, error: &io::Error) -> PlaceError {
        DirError::refused("listen on", &self.path(), error).into()
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
