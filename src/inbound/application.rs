//! The application: where it listens on this host, and a connection to it.

use std::{
    fmt, io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    time::timeout,
};

/// Bound on connecting. On this host it takes no time, or the application takes no connections.
const CONNECT: Duration = Duration::from_secs(3);

/// Where the application listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forward {
    /// On a loopback address.
    Tcp(SocketAddr),
    /// On a socket in the file system.
    Unix(PathBuf),
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Forward {
    /// Connects, or says why not.
    pub(super) async fn connect(&self) -> Result<Application, String> {
        let connecting = async {
            Ok(match self {
                Self::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Application::Tcp(stream)
                }
                Self::Unix(path) => Application::Unix(UnixStream::connect(path).await?),
            })
        };
        match timeout(CONNECT, connecting).await {
            Ok(connected) => connected.map_err(|error: io::Error| crate::system::words(&error)),
            Err(_) => Err(format!("not taken within {}", humantime::format_duration(CONNECT))),
        }
    }
}

/// A connection to the application.
#[derive(Debug)]
pub(super) enum Application {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Application {
    /// Closes it as something that broke.
    pub(super) fn reset(self) {
        if let Self::Tcp(stream) = self {
            let _ = stream.set_zero_linger(); // it may be gone already
        }
    }
}

impl AsyncRead for Application {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, to),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, to),
        }
    }
}

impl AsyncWrite for Application {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // sockets hold nothing back
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
