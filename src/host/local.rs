//! A place on this host alone where a program listens.

use super::raw;
use nix::sys::socket::{MsgFlags, recv};
use std::{
    fmt, io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    net::{TcpStream, UnixStream},
    time::sleep,
};
use tokio_util::either::Either;

/// From one attempt at a full unix socket to the next: the first pause, which doubles, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(64));

/// Where a program listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Local {
    /// On a loopback address.
    Tcp(SocketAddr),
    /// On a socket in the file system.
    Unix(PathBuf),
}

/// A connection to such a place.
pub type LocalStream = Either<TcpStream, UnixStream>;

impl Local {
    /// Connects. Waits while more connections wait there already than the program lets (its backlog); whoever calls bounds
    /// that.
    ///
    /// # Errors
    /// When nobody listens there, or we may not.
    pub async fn connect(&self) -> io::Result<LocalStream> {
        Ok(match self {
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Either::Left(stream)
            }
            Self::Unix(path) => Either::Right(unix(path).await?),
        })
    }
}

/// A TCP connection waits in the kernel for a place in the backlog; one by a unix socket that does not block fails at once
/// (EAGAIN, connect(2)), and nothing tells when there is room.
async fn unix(path: &Path) -> io::Result<UnixStream> {
    let (mut pause, longest) = PAUSE;
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(pause).await,
            connected => return connected,
        }
        pause = (pause * 2).min(longest);
    }
}

/// How many bytes were written and have not reached the kernel of the far end: a reset would take them away. Once it is gone,
/// none will.
pub fn undelivered(stream: &TcpStream) -> usize {
    match stream.peer_addr() {
        Ok(_) => raw::unacknowledged(stream.as_fd()).unwrap_or_default(),
        Err(_) => 0,
    }
}

/// Whether something has come that nobody has read, or the end of it. The kernel is asked, and not who waits for it: that one
/// may not have been told yet.
pub fn unread(stream: &TcpStream) -> bool {
    recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT).is_ok()
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use nix::sys::socket::{Backlog, listen};
    use std::{io::Write as _, os::unix::net::UnixListener};
    use tokio::time::timeout;

    #[tokio::test]
    async fn what_has_come_is_known_before_anybody_is_told() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (ours, mut theirs) = {
            let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (listener.accept().unwrap().0, theirs)
        };
        ours.set_nonblocking(true).unwrap();
        let ours = TcpStream::from_std(ours).unwrap();
        assert!(!unread(&ours));
        // On loopback it is there when the call returns; no turn of the event loop comes between.
        theirs.write_all(b"ping").unwrap();
        assert!(unread(&ours));
        ours.readable().await.unwrap();
        assert_eq!(ours.try_read(&mut [0; 9]).unwrap(), 4);
        assert!(!unread(&ours));
    }

    #[tokio::test]
    async fn a_full_backlog_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.sock");
        let busy = UnixListener::bind(&path).unwrap();
        listen(&busy, Backlog::new(1).unwrap()).unwrap();
        let mut waiting = Vec::new();
        let full = loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
            assert!(waiting.len() < 10);
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let local = Local::Unix(path);
        let connect = local.connect();
        tokio::pin!(connect);
        assert!(timeout(4 * PAUSE.0, &mut connect).await.is_err(), "it does not wait");
        let _taken = busy.accept().unwrap();
        timeout(Duration::from_secs(20), connect).await.unwrap().unwrap();
    }
}
