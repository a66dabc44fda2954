//! A place on this host alone where a program listens.

use std::{fmt, io, net::SocketAddr, path::PathBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

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
    /// Connects.
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
            Self::Unix(path) => Either::Right(UnixStream::connect(path).await?),
        })
    }
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}
