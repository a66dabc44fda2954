//! What the recordings probed: small servers with odd answers, which write down what they saw in the recordings' form.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full, combinators::WithTrailers};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{LazyConfigAcceptor, rustls::server::Acceptor};

/// All servers of one case. They end when this is dropped.
pub(super) struct Target {
    /// The recorded port, and the one it has here.
    pub(super) ports: Vec<(u16, u16)>,
    seen: Seen,
    _servers: JoinSet<()>,
    _closed: (TcpSocket, TcpListener, Vec<TcpStream>),
}

/// Events in the form of the recordings' `target_saw`, in the order in which they began.
pub(super) type Seen = Arc<Mutex<Vec<Value>>>;

impl Target {
    pub(super) async fn start() -> Self {
        let mut servers = JoinSet::new();
        let seen = Seen::default();
        let tls = Arc::new(certificate("target.invalid").1);
        let mut ports = Vec::new();
        for recorded in 8080..=8085 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            ports.push((recorded, listener.local_addr().unwrap().port()));
            servers.spawn(serve(recorded, listener, Arc::clone(&seen), Arc::clone(&tls)));
        }
        let (closed, full, waiting) = nobody().await;
        ports.push((9, closed.local_addr().unwrap().port()));
        Self { ports, seen, _servers: servers, _closed: (closed, full, waiting) }
    }

    pub(super) fn seen(&self) -> Vec<Value> {
        self.seen.lock().unwrap().clone()
    }
}

/// A port that is closed on 127.0.0.1, and on 127.0.0.99 takes no connection: its queue is full, so the kernel drops
/// what comes, as a host does that is not there.
async fn nobody() -> (TcpSocket, TcpListener, Vec<TcpStream>) {
    for _ in 0..100 {
        let closed = TcpSocket::new_v4().unwrap();
        closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let full = TcpSocket::new_v4().unwrap();
        let address = SocketAddr::new("127.0.0.99".parse().unwrap(), closed.local_addr().unwrap().port());
        let Ok(()) = full.bind(address) else { continue };
        let full = full.listen(1).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
            waiting.push(stream.unwrap());
            assert!(waiting.len() < 100, "the queue does not fill");
        }
        return (closed, full, waiting);
    }
    panic!("no port is free on 127.0.0.1 and 127.0.0.99");
}

/// A root (PEM) and a server configuration with a certificate for `name` signed by it.
pub(super) fn certificate(name: &str) -> (String, ServerConfig) {
    let root_key = rcgen::KeyPair::generate().unwrap();
    let mut root = rcgen::CertificateParams::new([]).unwrap();
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let key = rcgen::KeyPair::generate().unwrap();
    let issuer = rcgen::Issuer::new(root, root_key);
    let leaf = rcgen::CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        .unwrap();
    (root_pem, config)
}

async fn serve(port: u16, listener: TcpListener, seen: Seen, tls: Arc<ServerConfig>) {
    let mut connections = JoinSet::new();
    let turns = Arc::new(Mutex::new(HashMap::new()));
    loop {
        let (stream, peer) = listener.accept().await.unwrap();
        let (seen, tls, turns) = (Arc::clone(&seen), Arc::clone(&tls), Arc::clone(&turns));
        connections.spawn(async move {
            match port {
                8080 => {
                    note(&seen, json!({"ev": "conn_new", "peer": peer.ip()}));
                    http(stream, peer, &seen, &turns).await;
                }
                8081 => https(stream, peer, &seen, &turns, tls).await,
                8082 => closed_by_peer(stream, json!({"ev": "tcp", "peer": peer.ip()}), &seen).await,
                8085 => closed_by_peer(stream, json!({"ev": "blackhole", "peer": peer.ip()}), &seen).await,
                _ => grpc(stream, peer, seen, port == 8083).await,
            }
        });
    }
}

fn note(seen: &Seen, event: Value) -> usize {
    let mut seen = seen.lock().unwrap();
    seen.push(event);
    seen.len() - 1
}

/// Says nothing until the peer closes, which is noted.
async fn closed_by_peer(mut stream: TcpStream, event: Value, seen: &Seen) {
    let at = note(seen, event);
    let mut read = Vec::new();
    let ended = stream.read_to_end(&mut read).await;
    seen.lock().unwrap()[at]["closed"] = json!(ended.is_ok());
    seen.lock().unwrap()[at]["read"] = json!(read.len());
}

async fn https(stream: TcpStream, peer: SocketAddr, seen: &Seen, turns: &Turns, tls: Arc<ServerConfig>) {
    let mut first = [0];
    if stream.peek(&mut first).await.unwrap_or(0) == 1 && first[0] != 0x16 {
        return answer(stream, 400).await; // as a Go server does
    }
    let Ok(hello) = LazyConfigAcceptor::new(Acceptor::default(), stream).await else { return };
    let alpn = hello.client_hello().alpn().is_some();
    let sni = hello.client_hello().server_name().unwrap_or_default().to_owned();
    note(seen, json!({"ev": "https_hello", "peer": peer.ip(), "sni": sni, "alpn": alpn}));
    if let Ok(stream) = hello.into_stream(tls).await {
        http(stream, peer, seen, turns).await;
    }
}

/// How often each path was asked for.
type Turns = Arc<Mutex<HashMap<String, usize>>>;

async fn http<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, peer: SocketAddr, seen: &Seen, turns: &Turns) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) if head.len() < 65536 => head.push(byte),
            _ => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.trim_end().lines();
    let request = lines.next().unwrap();
    let uri = request.strip_prefix("GET ").and_then(|r| r.strip_suffix(" HTTP/1.1")).unwrap_or(request);
    let mut headers = BTreeMap::<_, Vec<_>>::new();
    for line in lines {
        let (name, value) = line.split_once(": ").unwrap();
        headers.entry(canonical(name)).or_default().push(value);
    }
    let host = headers.remove("Host").unwrap_or_default();
    assert_eq!(host.len(), 1, "one Host header: {head}");
    note(seen, json!({"ev": "http", "uri": uri, "host": host[0], "headers": headers, "peer": peer.ip()}));

    let (kind, rest) = uri.trim_start_matches('/').split_once(['/', '?']).unwrap_or((uri.trim_start_matches('/'), ""));
    match kind {
        "seq" => {
            let codes: Vec<u16> = rest.split(',').map(|c| c.parse().unwrap()).collect();
            let turn = {
                let mut turns = turns.lock().unwrap();
                let turn = turns.entry(uri.to_owned()).or_default();
                *turn += 1;
                *turn - 1
            };
            answer(stream, codes[turn.min(codes.len() - 1)]).await;
        }
        "redir" if rest != "0" => found(stream, &format!("/redir/{}", rest.parse::<u32>().unwrap() - 1)).await,
        "redirq" => found(stream, rest.strip_prefix("u=").unwrap()).await,
        "slow" => {
            sleep(Duration::from_millis(rest.parse().unwrap())).await;
            answer(stream, 200).await;
        }
        "bigbody" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").await;
            while stream.write_all(&[b'x'; 8192]).await.is_ok() {}
            note(seen, json!({"ev": "bigbody_done"}));
        }
        "hang" => {}
        "code" => answer(stream, rest.parse().unwrap()).await,
        _ => answer(stream, 200).await,
    }
}

/// `x-lower` as `X-Lower`, as a Go server shows it.
fn canonical(name: &str) -> String {
    let title = |part: &str| part[..1].to_uppercase() + &part[1..].to_lowercase();
    name.split('-').map(title).collect::<Vec<_>>().join("-")
}

async fn found(stream: impl AsyncRead + AsyncWrite + Unpin, location: &str) {
    send(stream, &format!("HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n")).await;
}

async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, code: u16) {
    // A code below 200 is an interim answer; the real one follows.
    let rest = if code < 200 { "HTTP/1.1 200 OK\r\n" } else { "" };
    let interim = if code < 200 { "\r\n" } else { "" };
    send(stream, &format!("HTTP/1.1 {code} X\r\n{interim}{rest}Content-Length: 0\r\nConnection: close\r\n\r\n")).await;
}

async fn send(mut stream: impl AsyncRead + AsyncWrite + Unpin, text: &str) {
    let _ = stream.write_all(text.as_bytes()).await;
    let _ = stream.shutdown().await;
}

async fn grpc(stream: TcpStream, peer: SocketAddr, seen: Seen, has_health: bool) {
    let service = service_fn(move |request| {
        let seen = Arc::clone(&seen);
        async move { Ok::<_, Infallible>(check(request, peer, &seen, has_health).await) }
    });
    let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
}

type Answer = Response<WithTrailers<Full<Bytes>, std::future::Ready<Option<Result<HeaderMap, Infallible>>>>>;

/// `grpc.health.v1.Health/Check`, by hand: the service's name is field 1 of the request, the status field 1 of the answer.
async fn check(request: Request<Incoming>, peer: SocketAddr, seen: &Seen, has_health: bool) -> Answer {
    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
    if !has_health {
        return status(None, 12, "unknown service grpc.health.v1.Health");
    }
    let header = |name| request.headers().get(name).map(|v: &HeaderValue| v.to_str().unwrap().to_owned());
    let event = json!({
        "ev": "grpc", "peer": peer.ip(), "deadline": header("grpc-timeout").is_some(),
        "md": {
            ":authority": [request.uri().authority().unwrap().as_str()],
            "content-type": [header("content-type")],
            "user-agent": [header("user-agent")],
        },
    });
    let at = note(seen, event);
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let service = body.get(7..).map(|name| String::from_utf8(name.to_vec()).unwrap()).unwrap_or_default();
    let said = if service.is_empty() { String::new() } else { format!("service:{service:?}") };
    seen.lock().unwrap()[at]["req"] = json!(said);
    match service.as_str() {
        "" | "ok" => status(Some(1), 0, ""),
        "bad" => status(Some(2), 0, ""),
        "slow" => {
            sleep(Duration::from_secs(3)).await;
            status(Some(1), 0, "")
        }
        _ => status(None, 5, "unknown service"),
    }
}

fn status(serving: Option<u8>, code: u8, message: &'static str) -> Answer {
    let body = serving.map_or_else(Bytes::new, |status| Bytes::copy_from_slice(&[0, 0, 0, 0, 2, 8, status]));
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(u16::from(code)));
    trailers.insert("grpc-message", HeaderValue::from_static(message));
    let body = Full::new(body).with_trailers(std::future::ready(Some(Ok(trailers))));
    Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}
