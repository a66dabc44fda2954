//! The admin socket and the loopback address, over real connections.

#![allow(clippy::unwrap_used)]
use std::{net::SocketAddr, os::unix::fs::PermissionsExt, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use we_agent::{
    admin::{self, Admin, AdminError},
    files::Root,
    status::{Report, Status, Workloads},
};

const SOON: Duration = Duration::from_secs(5);

struct Served {
    dir: tempfile::TempDir,
    root: Root,
    address: SocketAddr,
    stop: CancellationToken,
    running: JoinHandle<()>,
    _workloads: watch::Sender<Workloads>,
}

async fn serve() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::new(dir.path());
    let note = Some("no bundle in /etc/we-agent".to_owned());
    let (sender, receiver) = watch::channel(Workloads { list: Vec::new(), note });
    let any = "127.0.0.1:0".parse().unwrap();
    let admin = Admin::bind(&root, Some(any), Status::new(receiver)).await.unwrap();
    let address = admin.address().unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn(admin.run(watch::Sender::new(Instant::now()).subscribe(), stop.clone()));
    Served { dir, root, address, stop, running, _workloads: sender }
}

/// Sends `request` and reads until the other side closes.
async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
}

#[tokio::test]
async fn the_loopback_address_tells_readiness_and_metrics_only() {
    let served = serve().await;
    let ask = async |request: String| exchange(TcpStream::connect(served.address).await.unwrap(), &request).await;
    let ready = ask(get("/healthz/ready")).await;
    assert!(ready.starts_with("HTTP/1.1 503 "), "{ready}");
    assert!(ready.ends_with("\r\n\r\nno bundle in /etc/we-agent\n"), "{ready}");
    let metrics = ask(get("/metrics")).await;
    assert!(metrics.starts_with("HTTP/1.1 200 ") && metrics.contains("application/openmetrics-text"), "{metrics}");
    assert!(metrics.contains("\nwe_agent_ready 0.0\n") && metrics.ends_with("# EOF\n"), "{metrics}");
    assert!(ask(get("/status")).await.starts_with("HTTP/1.1 404 "), "status is for the socket's owners");
    let post = ask("POST /healthz/ready HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".to_owned()).await;
    assert!(post.starts_with("HTTP/1.1 405 "), "{post}");
}

#[tokio::test]
async fn the_socket_tells_status_to_owner_and_group_only() {
    let served = serve().await;
    let path = served.root.path(admin::SOCKET);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    let answer = exchange(UnixStream::connect(&path).await.unwrap(), &get("/status")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("application/json"), "{head}");
    let report: Report = serde_json::from_str(body).unwrap();
    assert_eq!(report.cause.as_deref(), Some("no bundle in /etc/we-agent"));
    served.stop.cancel();
    timeout(SOON, served.running).await.unwrap().unwrap();
    assert_eq!(std::fs::read_dir(served.dir.path().join("run/we-agent")).unwrap().count(), 0, "nothing is left behind");
}

#[tokio::test]
async fn a_living_agent_is_not_displaced_and_a_dead_one_is() {
    let served = serve().await;
    let (_sender, receiver) = watch::channel(Workloads::default());
    let second = Admin::bind(&served.root, None, Status::new(receiver.clone())).await;
    assert!(matches!(second, Err(AdminError::AnotherAgent(_))));
    // Aborted, as by kill -9: the socket stays, nobody listens.
    served.running.abort();
    assert!(served.running.await.unwrap_err().is_cancelled());
    assert!(served.root.path(admin::SOCKET).exists());
    Admin::bind(&served.root, None, Status::new(receiver)).await.unwrap();
}

#[tokio::test]
async fn what_is_no_socket_is_never_removed() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::new(dir.path());
    let path = root.path(admin::SOCKET);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "somebody's").unwrap();
    let (_sender, receiver) = watch::channel(Workloads::default());
    let error = Admin::bind(&root, None, Status::new(receiver)).await.unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "no socket for we-agent status: {} is in the way: it was not made by we-agent; move it away",
            path.display()
        )
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "somebody's");
}

#[tokio::test]
async fn an_address_in_use_is_no_reason_to_fail() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (_sender, receiver) = watch::channel(Workloads::default());
    let address = taken.local_addr().unwrap();
    let admin = Admin::bind(&Root::new(dir.path()), Some(address), Status::new(receiver)).await.unwrap();
    assert_eq!(admin.address(), None);
}

#[tokio::test]
async fn many_silent_clients_do_not_keep_others_out_for_long() {
    let served = serve().await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(served.address).await.unwrap());
    }
    let stream = TcpStream::connect(served.address).await.unwrap();
    let mut stream = stream;
    stream.write_all(get("/healthz/ready").as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(4 * SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    drop(silent);
}
