//! The local face of the daemon: `status` on a unix socket, readiness and metrics on loopback. Everything is rendered
//! from [`Status`]. The one thing that can be asked for, on the socket, is to read our configuration again.

#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod metrics;
mod supervisor;

pub use supervisor::supervise;

use crate::{
    files::{Access, Dir, DirError, Root, SocketId},
    status::Status,
    telemetry,
};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::{either::Either, sync::CancellationToken};

/// The socket of `we-agent status`, below the root.
pub const SOCKET: &str = "/run/we-agent/admin.sock";
/// Its directory, and its name there.
const PLACE: (&str, &str) = ("/run/we-agent", "admin.sock");
/// The longest path of it, in bytes: that of any unix socket is 107 (unix(7)), and it is bound as `admin.sock.new`.
const MAX_PATH: usize = 103;
/// What is asked for there (POST) to have the configuration read again.
pub const RELOAD: &str = "/reload";
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
    /// Something else is in the way, the path is not safe, or the system refuses.
    #[error("no socket for we-agent status: {0}")]
    Socket(#[from] DirError),
}

/// What is to be said of a path that is too long for a unix socket: cause and fix.
pub fn too_long(path: &Path) -> Option<String> {
    let length = path.as_os_str().len();
    (length > MAX_PATH)
        .then(|| format!("the path of this socket may have {MAX_PATH} bytes and has {length}; take a shorter --root"))
}

/// A wish that our configuration is read again, and where to the answer: what is in force now, or every mistake.
pub type Reload = oneshot::Sender<Result<String, String>>;

/// Bound listeners that do not serve yet.
#[derive(Debug)]
pub struct Admin {
    face: Face,
    socket: UnixListener,
    root: Root,
    loopback: Option<TcpListener>,
}

/// What is shown, and to whom.
#[derive(Debug, Clone)]
struct Face {
    status: Status,
    /// Where wishes go; none on the loopback address.
    reload: Option<mpsc::Sender<Reload>>,
    /// Whether it is the socket: its owners may see all.
    owners: bool,
}

enum Listener {
    Socket(UnixListener),
    Loopback(TcpListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Either<UnixStream, TcpStream>> {
        match self {
            Self::Socket(socket) => socket.accept().await.map(|(stream, _)| Either::Left(stream)),
            Self::Loopback(tcp) => tcp.accept().await.map(|(stream, _)| Either::Right(stream)),
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
        let socket = bind_socket(root)?;
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
        Ok(Self { face: Face { status, reload: None, owners: true }, socket, root: root.clone(), loopback })
    }

    /// Passes wishes for a reload on.
    #[must_use]
    pub fn with_reload(mut self, reload: mpsc::Sender<Reload>) -> Self {
        self.face.reload = Some(reload);
        self
    }

    /// The loopback address that is served; none when it is off or was in use.
    pub fn address(&self) -> Option<SocketAddr> {
        self.loopback.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Serves until `stop`, then takes the socket away. At each of the `looks` its name is looked at: a socket that somebody
    /// has removed is made anew.
    pub async fn run(self, mut looks: watch::Receiver<Instant>, stop: CancellationToken) {
        let Self { face, socket, root, loopback } = self;
        let path = root.path(SOCKET);
        let local = async {
            let mut socket = Some(socket);
            loop {
                let ours = SocketId::at(&path).ok().flatten();
                let serving = async {
                    match socket.take() {
                        Some(socket) => serve(Listener::Socket(socket), &face).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = serving => {}
                    () = removed(&path, ours, &mut looks) => {}
                }
                match bind_socket(&root) {
                    Ok(new) => {
                        tracing::warn!(socket = %path.display(), "the socket was removed by somebody, so it is made anew");
                        socket = Some(new);
                    }
                    Err(error) => {
                        tracing::warn!(socket = %path.display(), cause = %error, "the socket was removed by somebody, and cannot be made anew");
                    }
                }
            }
        };
        let remote = async {
            match loopback {
                Some(tcp) => {
                    serve(Listener::Loopback(tcp), &Face { reload: None, owners: false, ..face.clone() }).await
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = local => {}
            () = remote => {}
        }
        // A socket without a listener only refuses; leaving it behind would be harmless.
        let _ = fs::remove_file(&path);
    }
}

/// Waits for a look that does not find our socket.
async fn removed(path: &Path, ours: Option<SocketId>, looks: &mut watch::Receiver<Instant>) {
    loop {
        if looks.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        // What cannot be looked at may be there.
        if SocketId::at(path).is_ok_and(|found| found.is_none() || found != ours) {
            return;
        }
    }
}

/// For the user and the group that we run as alone.
fn bind_socket(root: &Root) -> Result<UnixListener, DirError> {
    let dir = Dir::open_or_create(root, Path::new(PLACE.0), Access::EVERYBODY)?;
    let listener = UnixListener::from_std(dir.listen(PLACE.1, None)?);
    listener.map_err(|error| DirError::refused("listen on", &root.path(SOCKET), &error))
}

/// Accepts for ever, a bounded number at a time.
async fn serve(listener: Listener, face: &Face) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok(stream) => {
                    connections.spawn(tokio::time::timeout(DEADLINE, connection(stream, face.clone())));
                }
                // Out of descriptors: they come back when others close theirs.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(stream: Either<UnixStream, TcpStream>, face: Face) {
    let service = service_fn(|request: Request<Incoming>| {
        let face = &face;
        async move { Ok::<_, Infallible>(respond(request.method(), request.uri().path(), face, SystemTime::now()).await) }
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

async fn respond(method: &Method, path: &str, face: &Face, now: SystemTime) -> Response<Full<Bytes>> {
    let Face { status, reload, owners } = face;
    match (method, path, reload) {
        (&Method::POST, RELOAD, Some(reload)) => return reloaded(reload).await,
        (&Method::GET | &Method::HEAD, ..) => {}
        _ => return answer(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET here\n".to_owned()),
    }
    match path {
        "/status" if *owners => match serde_json::to_string(&status.report(now)) {
            Ok(json) => answer(StatusCode::OK, "application/json", json),
            Err(error) => answer(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
        },
        "/healthz/ready" => {
            let report = status.report(now);
            let code = if report.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            answer(code, "text/plain; charset=utf-8", format!("{}\n", report.summary()))
        }
        "/metrics" => {
            let tasks = Handle::current().metrics().num_alive_tasks();
            answer(
                StatusCode::OK,
                metrics::CONTENT_TYPE,
                metrics::render(&status.report(now), telemetry::dropped(), tasks),
            )
        }
        _ => answer(StatusCode::NOT_FOUND, "text/plain", "here are /healthz/ready and /metrics\n".to_owned()),
    }
}

/// Has the configuration read again. A mistake in it is the client's.
async fn reloaded(reload: &mpsc::Sender<Reload>) -> Response<Full<Bytes>> {
    let (reply, told) = oneshot::channel();
    let said = match reload.send(reply).await {
        Ok(()) => told.await.ok(),
        Err(_) => None,
    };
    let (code, said) = match said {
        Some(Ok(said)) => (StatusCode::OK, said),
        Some(Err(mistakes)) => (StatusCode::UNPROCESSABLE_ENTITY, mistakes),
        None => (StatusCode::SERVICE_UNAVAILABLE, "it is stopping".to_owned()),
    };
    answer(code, "text/plain; charset=utf-8", said)
}

fn answer(code: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}
