//! The local face of the daemon: `status` on a unix socket, readiness and metrics on loopback. Everything is rendered
//! from [`Status`]; nothing can be changed here.

mod metrics;
mod supervisor;

pub use supervisor::supervise;

use crate::{files::Root, status::Status, telemetry};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    task::JoinSet,
};
use tokio_util::{either::Either, sync::CancellationToken};

/// The socket of `we-agent status`, below the root.
pub const SOCKET: &str = "/run/we-agent/admin.sock";
/// The longest path of a unix socket, in bytes (unix(7)).
const MAX_PATH: usize = 107;
/// Connections at a time on each listener; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 32;
/// For a request to arrive and its answer to leave.
const DEADLINE: Duration = Duration::from_secs(10);
/// For the request's head alone.
const HEAD_DEADLINE: Duration = Duration::from_secs(5);

/// Why the socket cannot be served. (A loopback address in use is only a warning.)
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Somebody answers on the socket: two agents on one host would take each other's registrations away.
    #[error("{}: another we-agent runs here; stop it first, or give this one its own --root", .0.display())]
    AnotherAgent(PathBuf),
    /// No socket has a path of this length.
    #[error("{}: {}", .0.display(), too_long(.0).unwrap_or_default())]
    TooLong(PathBuf),
    /// The system refuses.
    #[error("{}: {source}; {}", .path.display(), fix(.source))]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What is to be said of a path that is too long for a unix socket: cause and fix.
pub fn too_long(path: &Path) -> Option<String> {
    let length = path.as_os_str().len();
    (length > MAX_PATH).then(|| {
        format!("the path of a unix socket may have {MAX_PATH} bytes and this one has {length}; take a shorter --root")
    })
}

fn fix(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "run it as a user that may write there, or give it another --root",
        io::ErrorKind::ReadOnlyFilesystem => "have the file system mounted writable, or give it another --root",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "make room there",
        io::ErrorKind::AlreadyExists => "move it away",
        io::ErrorKind::NotADirectory => "something else is in the place of its directory; move that away",
        _ => "see what is wrong with the directory",
    }
}

/// Bound listeners that do not serve yet.
#[derive(Debug)]
pub struct Admin {
    status: Status,
    socket: UnixListener,
    path: PathBuf,
    loopback: Option<TcpListener>,
}

/// Which way a request came in.
#[derive(Clone, Copy)]
enum Face {
    Socket,
    Loopback,
}

enum Listener {
    Socket(UnixListener),
    Loopback(TcpListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<(Either<UnixStream, TcpStream>, Face)> {
        match self {
            Self::Socket(socket) => socket.accept().await.map(|(stream, _)| (Either::Left(stream), Face::Socket)),
            Self::Loopback(tcp) => tcp.accept().await.map(|(stream, _)| (Either::Right(stream), Face::Loopback)),
        }
    }
}

impl Admin {
    /// Binds the socket (mode 0660) below `root` and, if given, the loopback `address`. An address in use is a warning:
    /// Istio's own agent may hold it.
    ///
    /// # Errors
    /// When the socket cannot be had.
    pub async fn bind(root: &Root, address: Option<SocketAddr>, status: Status) -> Result<Self, AdminError> {
        let path = root.path(SOCKET);
        if too_long(&path).is_some() {
            return Err(AdminError::TooLong(path));
        }
        if UnixStream::connect(&path).await.is_ok() {
            return Err(AdminError::AnotherAgent(path));
        }
        let socket = bind_socket(&path).map_err(|source| AdminError::Socket { path: path.clone(), source })?;
        let loopback = match address {
            None => None,
            Some(address) => TcpListener::bind(address)
                .await
                .inspect_err(|error| {
                    let fix = "set admin.address to another port or to off";
                    tracing::warn!(%address, cause = %error, "no metrics and no /healthz/ready here; {fix}");
                })
                .ok(),
        };
        Ok(Self { status, socket, path, loopback })
    }

    /// The loopback address that is served; none when it is off or was in use.
    pub fn address(&self) -> Option<SocketAddr> {
        self.loopback.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Serves until `stop`, then takes the socket away.
    pub async fn run(self, stop: CancellationToken) {
        let Self { status, socket, path, loopback } = self;
        let local = serve(Listener::Socket(socket), &status);
        let remote = async {
            match loopback {
                Some(tcp) => serve(Listener::Loopback(tcp), &status).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = local => {}
            () = remote => {}
        }
        // A socket without a listener only refuses; leaving it behind would be harmless.
        let _ = fs::remove_file(path);
    }
}

/// Binds beside the name and renames: at no moment is the socket there with other rights, and one that a killed daemon
/// left behind is replaced. What is no socket stays.
fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|there| !there.file_type().is_socket()) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "what is there is no socket"));
    }
    let beside = path.with_extension("new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o660))?;
    fs::rename(&beside, path)?;
    Ok(listener)
}

/// Accepts for ever, a bounded number at a time.
async fn serve(listener: Listener, status: &Status) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, face)) => {
                    connections.spawn(tokio::time::timeout(DEADLINE, connection(stream, status.clone(), face)));
                }
                // Out of descriptors: they come back when others close theirs.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(stream: Either<UnixStream, TcpStream>, status: Status, face: Face) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = respond(request.method(), request.uri().path(), &status, face, SystemTime::now());
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let server = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = server.await {
        tracing::debug!(cause = %error, "admin connection");
    }
}

fn respond(method: &Method, path: &str, status: &Status, face: Face, now: SystemTime) -> Response<Full<Bytes>> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return answer(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET here\n".to_owned());
    }
    match (path, face) {
        ("/status", Face::Socket) => match serde_json::to_string(&status.report(now)) {
            Ok(json) => answer(StatusCode::OK, "application/json", json),
            Err(error) => answer(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
        },
        ("/healthz/ready", _) => {
            let report = status.report(now);
            let code = if report.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            answer(code, "text/plain; charset=utf-8", format!("{}\n", report.summary()))
        }
        ("/metrics", _) => {
            answer(StatusCode::OK, metrics::CONTENT_TYPE, metrics::render(&status.report(now), telemetry::dropped()))
        }
        _ => answer(StatusCode::NOT_FOUND, "text/plain", "here are /healthz/ready and /metrics\n".to_owned()),
    }
}

fn answer(code: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}
