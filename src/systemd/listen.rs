//! Sockets that outlive the process: the service manager holds them, from a socket unit or because we asked it to (its
//! descriptor store), and gives them to the next process. Who connects in between waits and is not refused.

use crate::{
    files::{Dir, DirError, Root, beside},
    host::raw,
};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockType, SockaddrLike, SockaddrStorage, UnixAddr, getsockname, getsockopt, shutdown,
    sockopt::{AcceptConn, SockType as TypeOf},
};
use sd_notify::NotifyState;
use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::FileTypeExt, net::UnixListener as StdListener},
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::net::UnixListener;

/// How the names of kept TCP listeners begin.
pub const INBOUND: &str = "inbound-";

/// The sockets that the service manager has given us and nobody has taken yet, or that their owner has handed on. Clones are
/// the same set.
#[derive(Debug, Clone, Default)]
pub struct Listeners(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    sockets: Vec<(String, OwnedFd)>,
    closed: bool,
}

impl Listeners {
    /// Takes them over (`LISTEN_FDS`, sd_listen_fds(3)): the first call has them all, later ones have none. To be called
    /// first of all, before anything opens a descriptor.
    ///
    /// # Errors
    /// When the environment says what cannot be, or a descriptor is not open.
    pub fn from_service_manager() -> io::Result<Self> {
        Ok(raw::inherited()?.into_iter().collect())
    }

    /// Hands a listener on to whoever takes it under that name: connections to it wait meanwhile. When all is ending there
    /// is nobody, and it is closed.
    pub fn hand_on(&self, name: &str, listener: impl Into<OwnedFd>) {
        let mut held = self.held();
        if !held.closed {
            held.sockets.push((name.to_owned(), listener.into()));
        }
    }

    /// From now on nobody takes what is handed on.
    pub fn close(&self) {
        self.held().closed = true;
    }

    /// Lets go of what was handed on under that name, here and at the service manager. The name of a unix socket that we
    /// have made goes, too; what a socket unit has made is left for who may come.
    pub fn retire(&self, root: &Root, name: &str) {
        let mut held = self.held();
        held.sockets.retain(|(other, fd)| {
            if other != name {
                return true;
            }
            if is_made_by_us(Path::new(name), fd) {
                let_go(root, name, fd);
            } else {
                forget(name);
            }
            false
        });
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next listener of that name (`FileDescriptorName=` of a socket unit); none when there is none left. To be
    /// called within the runtime.
    ///
    /// What is no listening unix stream socket is closed, with a warning: one that listens on a network, for instance,
    /// cannot say who connects.
    pub fn take(&self, name: &str) -> Option<UnixListener> {
        while let Some(fd) = self.next(name) {
            match listener(fd) {
                Ok(listener) => return Some(listener),
                Err(error) => {
                    tracing::warn!(name, cause = %error, "a descriptor of the service manager is of no use");
                    forget(name);
                }
            }
        }
        None
    }

    /// The listener on `path` that a process before us has asked to [`keep`]. None, too, when somebody has removed the
    /// path: then nobody would find it. To be called within the runtime.
    pub fn take_kept(&self, path: &Path) -> Option<UnixListener> {
        let name = name_of(path)?;
        let kept = self.take(name)?;
        if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            return Some(kept);
        }
        forget(name);
        None
    }

    /// The TCP listener that is bound to an address that `is_wanted`, whatever its name; it does not block. None when there
    /// is none left.
    pub fn take_tcp(&self, is_wanted: impl Fn(SocketAddr) -> bool) -> Option<TcpListener> {
        let mut held = self.held();
        let at = held.sockets.iter().position(|(_, fd)| tcp_address(fd).is_some_and(&is_wanted))?;
        let listener = TcpListener::from(held.sockets.remove(at).1);
        listener.set_nonblocking(true).ok()?;
        Some(listener)
    }

    /// Lets go of the TCP listeners that a process before us has asked to keep and that nobody has taken: who connects
    /// there would wait for ever.
    pub fn drop_kept_tcp(&self) {
        let mut held = self.held();
        held.sockets.retain(|(name, fd)| {
            let stale = name.starts_with(INBOUND) && tcp_address(fd).is_some();
            if stale {
                tracing::info!(name, "nobody wants this listener any more");
                forget(name);
            }
            !stale
        });
    }

    /// Lets go of the unix sockets that a process before us has asked to [`keep`], that nobody has taken and whose path is
    /// not `awaited`: who connects there would wait for ever. Its name goes, too, unless another program has it by now.
    pub fn drop_kept(&self, root: &Root, awaited: impl Fn(&Path) -> bool) {
        let mut held = self.held();
        held.sockets.retain(|(name, fd)| {
            let path = Path::new(name);
            if !is_made_by_us(path, fd) || awaited(path) {
                return true;
            }
            let_go(root, name, fd);
            false
        });
    }

    fn next(&self, name: &str) -> Option<OwnedFd> {
        let mut held = self.held();
        let at = held.sockets.iter().position(|(held, _)| held == name)?;
        Some(held.sockets.remove(at).1)
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.held().sockets.is_empty()
    }

    /// The names of those that nobody has taken yet, and where they listen if that is on a network.
    pub fn left(&self) -> Vec<(String, Option<SocketAddr>)> {
        self.held().sockets.iter().map(|(name, fd)| (name.clone(), tcp_address(fd))).collect()
    }
}

/// Descriptors with their names.
impl FromIterator<(String, OwnedFd)> for Listeners {
    fn from_iter<T: IntoIterator<Item = (String, OwnedFd)>>(passed: T) -> Self {
        Self(Arc::new(Mutex::new(Held { sockets: passed.into_iter().collect(), closed: false })))
    }
}

/// A listener that tokio can serve, or why it is none.
fn listener(fd: OwnedFd) -> io::Result<UnixListener> {
    let unix = getsockname::<SockaddrStorage>(fd.as_raw_fd())?.family() == Some(AddressFamily::Unix);
    if !unix || getsockopt(&fd, TypeOf)? != SockType::Stream || !getsockopt(&fd, AcceptConn)? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no listening unix stream socket"));
    }
    let listener = StdListener::from(fd);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Whether the listener on `path` was made by [`Dir::listen`], which binds it beside that name. That of a socket unit is
/// bound to the name itself.
pub fn is_made_by_us(path: &Path, listener: impl AsFd) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    let bound = getsockname::<UnixAddr>(listener.as_fd().as_raw_fd()).ok();
    let listens = getsockopt(&listener.as_fd(), AcceptConn) == Ok(true);
    listens && bound.as_ref().and_then(UnixAddr::path).is_some_and(|bound| bound.ends_with(beside(name)))
}

/// Ends a unix socket of ours that nobody serves any more.
fn let_go(root: &Root, name: &str, socket: &OwnedFd) {
    // Of the socket itself: the service manager has a descriptor of it, too, and whoever connects from now on is refused. Then
    // a name that still answers is somebody else's.
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
    forget(name);
    match remove(root, Path::new(name)) {
        Ok(_) => tracing::info!(socket = name, "nobody wants this socket any more, so it is gone"),
        Err(error) => tracing::warn!(cause = %error, "nobody wants this socket any more, but its name stays"),
    }
}

/// Removes the socket at `path`, which is named as it is for us: only one below the root is ours.
fn remove(root: &Root, path: &Path) -> Result<bool, DirError> {
    let dir = path.parent().and_then(|dir| root.name(dir));
    match (dir, path.file_name().and_then(|name| name.to_str())) {
        (Some(dir), Some(name)) => Dir::open(root, &dir)?.remove_dead_socket(name),
        _ => Ok(false),
    }
}

/// Where a TCP socket listens; none for anything else.
fn tcp_address(fd: &OwnedFd) -> Option<SocketAddr> {
    let listens = getsockopt(fd, TypeOf) == Ok(SockType::Stream) && getsockopt(fd, AcceptConn) == Ok(true);
    let address = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().filter(|_| listens)?;
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from((v4.ip(), v4.port())));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::from((v6.ip(), v6.port()))))
}

/// Asks the service manager to hold a TCP listener for the next process, which finds it with [`Listeners::take_tcp`]. The
/// name begins with [`INBOUND`].
pub fn keep_tcp(name: &str, listener: impl AsFd) {
    if name.len() > 255 {
        return;
    }
    forget(name);
    tell(sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[listener.as_fd()]));
}

/// Asks the service manager to hold the listener on `path` for the next process, which finds it with
/// [`Listeners::take_kept`]. It lets go of one that it holds for that path already: whoever was bound before is not on the
/// path any more. Nothing happens without a service manager, or when the unit does not allow it
/// (`FileDescriptorStoreMax=`).
pub fn keep(path: &Path, listener: impl AsFd) {
    let Some(name) = name_of(path) else { return };
    forget(name);
    tell(sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[listener.as_fd()]));
}

/// What is kept has its path as its name, as far as that can be one (sd_pid_notify_with_fds(3)).
fn name_of(path: &Path) -> Option<&str> {
    path.to_str().filter(|name| name.len() <= 255 && name.bytes().all(|b| matches!(b, b' '..=b'~') && b != b':'))
}

/// Asks the service manager to let go of the listener that it holds for `path`: nobody finds it there any more.
pub fn forget_kept(path: &Path) {
    if let Some(name) = name_of(path) {
        forget(name);
    }
}

/// Asks the service manager to let go of what it holds under that name.
pub fn forget(name: &str) {
    tell(sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]));
}

fn tell(sent: io::Result<()>) {
    if let Err(error) = sent {
        tracing::debug!(cause = %error, "the service manager was not told");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::{io::ErrorKind, os::unix::net::UnixStream};

    /// A listener of ours and what the service manager holds of it, with its path.
    fn kept(root: &Root, dir: &str) -> (String, OwnedFd, OwnedFd) {
        let listener = Dir::passable(root, Path::new(dir)).unwrap().listen("a.sock", None).unwrap();
        let path = root.path(dir).join("a.sock").to_str().unwrap().to_owned();
        (path, listener.try_clone().unwrap().into(), listener.into())
    }

    #[test]
    fn a_kept_socket_that_nobody_wants_refuses_and_its_name_goes() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        let (retired, ours, _held) = kept(&root, "/run/retired");
        let (awaited, its, _held_too) = kept(&root, "/run/awaited");
        // A program that waits since before.
        let waits = UnixStream::connect(&retired).unwrap();
        let listeners: Listeners = [(retired.clone(), ours), (awaited.clone(), its)].into_iter().collect();
        listeners.drop_kept(&root, |path| path == Path::new(&awaited));
        assert_eq!(UnixStream::connect(&retired).unwrap_err().kind(), ErrorKind::NotFound);
        UnixStream::connect(&awaited).unwrap();
        assert_eq!(listeners.left(), [(awaited, None)]);
        drop(waits);
    }

    #[test]
    fn what_is_handed_on_waits_for_its_successor_or_goes() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        let (path, ours, _held) = kept(&root, "/run/a");
        let listeners = Listeners::default();
        listeners.hand_on(&path, ours);
        UnixStream::connect(&path).unwrap();
        listeners.retire(&root, "another");
        assert!(!listeners.is_empty());
        listeners.retire(&root, &path);
        assert_eq!(UnixStream::connect(&path).unwrap_err().kind(), ErrorKind::NotFound);
        // Nobody takes it any more when all is ending.
        listeners.close();
        listeners.hand_on("inbound-a-80", TcpListener::bind("127.0.0.1:0").unwrap());
        assert!(listeners.is_empty());
    }

    #[test]
    fn a_name_that_another_program_has_by_now_stays_and_a_socket_unit_is_not_touched() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        let (path, ours, _held) = kept(&root, "/run/taken");
        std::fs::remove_file(&path).unwrap();
        let other = StdListener::bind(&path).unwrap();
        let unit = host.path().join("unit.sock");
        let name = unit.to_str().unwrap().to_owned();
        let passed = StdListener::bind(&unit).unwrap().into();
        let listeners: Listeners = [(path.clone(), ours), (name.clone(), passed)].into_iter().collect();
        listeners.drop_kept(&root, |_| false);
        UnixStream::connect(&path).unwrap();
        assert!(other.accept().is_ok());
        assert_eq!(listeners.left(), [(name, None)]);
        UnixStream::connect(&unit).unwrap();
    }
}
