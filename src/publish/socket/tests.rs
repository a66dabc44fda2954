//! A client of both forms of secret discovery, on a real socket.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod bounds;
mod bytes;
mod ends;
mod window;

use self::bytes::speak;
use super::*;
use crate::{
    authority::{Authority, Leaf},
    files::Root,
    proto::{
        envoy::{
            extensions::transport_sockets::tls::v3::{Secret, data_source::Specifier, secret::Type},
            service::secret::v3::{Consumer, DeltaSecretRequest, DeltaSecretResponse, SecretRequest, SecretResponse},
        },
        google::rpc,
    },
    spiffe::{KeyKind, PrivateKey, X509Context},
    systemd::Units,
};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use std::{
    fs::{self, Permissions},
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::{Path, PathBuf},
    time::SystemTime,
};
use tokio::{io::AsyncReadExt as _, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, client::Grpc};
use tonic_prost::ProstCodec;

const ISTIO: &str = "/var/run/secrets/workload-spiffe-uds/socket";
const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";
const SOON: Duration = Duration::from_secs(20);
const SERVICE: &str = "/envoy.service.secret.v3.SecretDiscoveryService";

/// A served socket.
struct Host {
    socket: PathBuf,
    _dir: tempfile::TempDir,
    identity: watch::Sender<Identity>,
    fact: watch::Receiver<Publication>,
    consumers: watch::Receiver<status::Consumers>,
    stop: CancellationToken,
}

impl Host {
    fn serve() -> Self {
        Self::serve_at(tempfile::tempdir().unwrap(), |root| Place::new(root, "/run/we-agent/payments", None))
    }

    /// Where Istio's own agent has its socket.
    fn serve_for_istio(dir: tempfile::TempDir) -> Self {
        Self::serve_at(dir, |root| Place::also(root, Path::new(ISTIO), None).unwrap())
    }

    fn serve_at(dir: tempfile::TempDir, place: impl FnOnce(&Root) -> Place) -> Self {
        let (root, stop) = (Root::new(dir.path()), CancellationToken::new());
        let (identity, identities) = watch::channel(Identity::default());
        let (told, fact) = watch::channel(Publication::default());
        let (seen, consumers) = watch::channel(status::Consumers::default());
        let place = place(&root);
        let policy = Policy::new("payments", Vec::new(), Units::new(&root));
        let socket = place.path();
        tokio::spawn(serve(place, policy, identities, told, seen, Clock::Wall, stop.clone()));
        Self { socket, _dir: dir, identity, fact, consumers, stop }
    }

    fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    fn issue(&self) -> Arc<X509Context> {
        let now = SystemTime::now();
        let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
        let answer = Authority::root("mesh").intermediate("istiod").issue(key.pem(), &Leaf::new(&[ID], now));
        let context = X509Context::from_answer(&ID.parse().unwrap(), key, &answer, now).unwrap();
        self.identity.send_replace(Identity { current: Some(Arc::clone(&context)), ..Identity::default() });
        context
    }

    /// A new connection; waits until the socket is there.
    async fn connect(&self) -> Grpc<Channel> {
        Grpc::with_origin(self.channel().await, "http://localhost".parse().unwrap())
    }

    async fn channel(&self) -> Channel {
        // A stream that nobody reads is full after some certificates.
        speak(self.stream().await, 16 << 10).await
    }

    async fn stream(&self) -> UnixStream {
        let end = tokio::time::Instant::now() + SOON;
        loop {
            match UnixStream::connect(self.socket()).await {
                Ok(stream) => return stream,
                Err(error) => assert!(tokio::time::Instant::now() < end, "no socket: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn until(&mut self, wanted: impl Fn(&status::Consumers) -> bool) {
        let seen = timeout(SOON, self.consumers.wait_for(|consumers| wanted(consumers))).await.map(|seen| seen.is_ok());
        assert_eq!(seen, Ok(true), "{:?}", self.consumers.borrow());
    }
}

#[derive(Clone)]
struct Channel(http2::SendRequest<tonic::body::Body>);

impl tower::Service<http::Request<tonic::body::Body>> for Channel {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// An open stream.
struct Talk<Q, A> {
    ask: mpsc::Sender<Q>,
    answers: Streaming<A>,
}

impl<Q: Message + Default + 'static, A: Message + Default + 'static> Talk<Q, A> {
    async fn open(grpc: &mut Grpc<Channel>, method: &str, first: Q) -> Result<Self, Status> {
        let (ask, asked) = mpsc::channel(8);
        ask.send(first).await.unwrap();
        grpc.ready().await.unwrap();
        let path = format!("{SERVICE}/{method}").parse().unwrap();
        let asked = tonic::Request::new(ReceiverStream::new(asked));
        let answers = grpc.streaming(asked, path, ProstCodec::default()).await?.into_inner();
        Ok(Self { ask, answers })
    }

    async fn answer(&mut self) -> Result<A, Status> {
        Ok(timeout(SOON, self.answers.message()).await.expect("no answer in time")?.expect("the stream has ended"))
    }
}

fn first(name: &str) -> SecretRequest {
    SecretRequest {
        node: Some(Consumer { id: format!("node\n{}", "x".repeat(60_000)) }),
        resource_names: vec![name.to_owned()],
        type_url: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret".to_owned(),
        ..SecretRequest::default()
    }
}

fn ack(name: &str, nonce: &str, error_detail: Option<rpc::Status>) -> SecretRequest {
    SecretRequest {
        resource_names: vec![name.to_owned()],
        response_nonce: nonce.to_owned(),
        error_detail,
        ..SecretRequest::default()
    }
}

/// Name, and what is in it.
fn read(any: &[u8]) -> (String, Vec<Vec<u8>>) {
    let any = prost_types::Any::decode(any).unwrap();
    assert_eq!(any.type_url, "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret");
    let secret = Secret::decode(&*any.value).unwrap();
    let sources = match secret.r#type.unwrap() {
        Type::TlsCertificate(pair) => vec![pair.certificate_chain, pair.private_key],
        Type::ValidationContext(context) => vec![context.trusted_ca],
    };
    let bytes = sources.into_iter().map(|source| match source.unwrap().specifier.unwrap() {
        Specifier::InlineBytes(bytes) => bytes,
    });
    (secret.name, bytes.collect())
}

#[tokio::test]
async fn a_stream_is_held_then_told_each_certificate_and_its_verdicts_are_kept() {
    let mut host = Host::serve();
    let mut grpc = host.connect().await;
    let mut talk = Talk::<_, SecretResponse>::open(&mut grpc, "StreamSecrets", first("default")).await.unwrap();
    host.until(|all| all.values().any(|c| c.sent.is_none() && c.node.len() == 128 && c.node.starts_with("node x")))
        .await;

    let context = host.issue();
    let answer = talk.answer().await.unwrap();
    assert_eq!(answer.version_info, context.svid.serial());
    let pair = vec![context.svid.chain_pem().into_bytes(), context.svid.key().pem().as_bytes().to_vec()];
    assert_eq!(read(&answer.resources[0]), ("default".to_owned(), pair));
    talk.ask.send(ack("default", &answer.nonce, None)).await.unwrap();
    let serial = context.svid.serial().to_owned();
    host.until(|all| all.values().any(|c| c.accepted.as_deref() == Some(serial.as_str()))).await;
    assert_eq!(host.fact.borrow().serial.as_deref(), Some(serial.as_str()));

    let next = host.issue();
    let answer = talk.answer().await.unwrap();
    assert_eq!(answer.version_info, next.svid.serial());
    let no = rpc::Status { code: 13, message: "KEY_VALUES_MISMATCH".to_owned() };
    talk.ask.send(ack("default", &answer.nonce, Some(no))).await.unwrap();
    host.until(|all| {
        let refused = |c: &status::Consumer| c.refusal.as_deref() == Some("KEY_VALUES_MISMATCH");
        all.values().any(|c| refused(c) && c.accepted.as_deref() == Some(serial.as_str()))
    })
    .await;
    drop(talk);
    drop(grpc);
    host.until(|all| all.is_empty()).await;
}

#[tokio::test]
async fn both_forms_give_roots_and_share_a_connection() {
    let host = Host::serve();
    let context = host.issue();
    let mut grpc = host.connect().await;
    let mut sotw = Talk::<_, SecretResponse>::open(&mut grpc, "StreamSecrets", first("ROOTCA")).await.unwrap();
    let ask = DeltaSecretRequest { resource_names_subscribe: vec!["ROOTCA".to_owned()], ..Default::default() };
    let mut delta = Talk::<_, DeltaSecretResponse>::open(&mut grpc, "DeltaSecrets", ask).await.unwrap();
    let (one, two) = (sotw.answer().await.unwrap(), delta.answer().await.unwrap());
    let expected = ("ROOTCA".to_owned(), vec![context.bundle.pem().into_bytes()]);
    assert_eq!(read(&one.resources[0]), expected);
    assert_eq!(read(&two.resources[0].resource), expected);
    assert_eq!((two.resources[0].name.as_str(), &two.resources[0].version), ("ROOTCA", &one.version_info));
}

#[tokio::test]
async fn what_is_not_served_is_refused_with_the_reason() {
    let host = Host::serve();
    host.issue();
    let mut grpc = host.connect().await;
    for (request, code) in [
        (first("other"), Code::NotFound),
        (first("file-cert:/a~/b"), Code::Unimplemented),
        (first("file-root:system"), Code::Unimplemented),
        (SecretRequest { type_url: "type.googleapis.com/x".to_owned(), ..first("default") }, Code::InvalidArgument),
        (SecretRequest { resource_names: vec!["default".to_owned(); 17], ..first("") }, Code::InvalidArgument),
        (SecretRequest { version_info: "x".repeat(1 << 20), ..first("default") }, Code::OutOfRange),
    ] {
        let mut talk = Talk::<_, SecretResponse>::open(&mut grpc, "StreamSecrets", request).await.unwrap();
        assert_eq!(talk.answer().await.err().map(|status| status.code()), Some(code));
    }
    let fetch = Talk::<_, SecretResponse>::open(&mut grpc, "FetchSecrets", first("default")).await;
    assert_eq!(fetch.err().map(|status| status.code()), Some(Code::Unimplemented));
}

#[tokio::test]
async fn a_consumer_that_does_not_read_holds_nobody_up_and_later_has_the_newest() {
    let host = Host::serve();
    host.issue();
    let mut slow = host.connect().await;
    let mut idle = Talk::<_, SecretResponse>::open(&mut slow, "StreamSecrets", first("default")).await.unwrap();
    let mut quick = host.connect().await;
    let mut awake = Talk::<_, SecretResponse>::open(&mut quick, "StreamSecrets", first("default")).await.unwrap();
    awake.answer().await.unwrap();
    let mut newest = None;
    // Far more than fits into the window of a stream that nobody reads.
    for _ in 0..60 {
        let context = host.issue();
        assert_eq!(awake.answer().await.unwrap().version_info, context.svid.serial());
        newest = Some(context.svid.serial().to_owned());
    }
    let mut read = 0;
    while Some(idle.answer().await.unwrap().version_info) != newest {
        read += 1;
    }
    assert!(read < 60, "it was sent all that it missed");
}

#[tokio::test]
async fn the_socket_is_for_a_group_and_its_directory_is_passed_not_listed() {
    let mut host = Host::serve();
    drop(host.connect().await);
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(host.socket()), mode(host.socket().parent().unwrap().to_owned())), (0o660, 0o711));

    // What is no socket is not replaced; the cause is told, and it is tried again.
    host.stop.cancel();
    let other = Host::serve();
    std::fs::create_dir_all(other.socket().parent().unwrap()).unwrap();
    std::fs::write(other.socket(), "").unwrap();
    host.fact = other.fact.clone();
    let told = timeout(SOON, host.fact.wait_for(|fact| fact.trouble.is_some())).await.unwrap().unwrap().clone();
    assert_eq!(told.trouble.as_ref().map(|trouble| trouble.kind), Some("in_the_way"));
    std::fs::remove_file(other.socket()).unwrap();
    timeout(SOON, host.fact.wait_for(|fact| fact.trouble.is_none())).await.unwrap().unwrap();
    drop(other.connect().await);
}

/// A host whose `/var/run` is a link, as on every distribution of today.
fn with_run() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("var")).unwrap();
    fs::create_dir_all(dir.path().join("run")).unwrap();
    symlink("../run", dir.path().join("var/run")).unwrap();
    dir
}

#[tokio::test]
async fn the_path_of_istio_is_served_and_the_mode_of_its_directory_is_kept() {
    let dir = with_run();
    let secrets = dir.path().join("run/secrets/workload-spiffe-uds");
    fs::create_dir_all(&secrets).unwrap();
    fs::set_permissions(&secrets, Permissions::from_mode(0o750)).unwrap();
    // A socket whose owner has gone is replaced.
    drop(StdListener::bind(secrets.join("socket")).unwrap());

    let host = Host::serve_for_istio(dir);
    let context = host.issue();
    let mut grpc = host.connect().await;
    let mut talk = Talk::<_, SecretResponse>::open(&mut grpc, "StreamSecrets", first("default")).await.unwrap();
    assert_eq!(talk.answer().await.unwrap().version_info, context.svid.serial());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&secrets), mode(&secrets.join("socket"))), (0o750, 0o660));
}

#[tokio::test]
async fn a_path_that_another_serves_or_could_redirect_is_not_taken() {
    let dir = with_run();
    let secrets = dir.path().join("run/secrets/workload-spiffe-uds");
    fs::create_dir_all(&secrets).unwrap();
    let other = StdListener::bind(secrets.join("socket")).unwrap();
    let mut host = Host::serve_for_istio(dir);
    let told = |fact: &Publication, kind| fact.trouble.as_ref().is_some_and(|trouble| trouble.kind == kind);
    let seen =
        timeout(SOON, host.fact.wait_for(|fact| told(fact, "served_by_another"))).await.unwrap().unwrap().clone();
    assert!(seen.trouble.unwrap().cause.contains("another program listens on"));
    other.set_nonblocking(true).unwrap();
    assert!(other.accept().is_ok(), "it was asked");
    StdStream::connect(host.socket()).unwrap();
    assert!(other.accept().is_ok(), "it is reached as before");

    drop(other);
    fs::set_permissions(&secrets, Permissions::from_mode(0o777)).unwrap();
    timeout(SOON, host.fact.wait_for(|fact| told(fact, "unsafe_path"))).await.unwrap().unwrap();
    fs::set_permissions(&secrets, Permissions::from_mode(0o755)).unwrap();
    timeout(SOON, host.fact.wait_for(|fact| fact.trouble.is_none())).await.unwrap().unwrap();
}
