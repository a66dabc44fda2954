#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use crate::{
    authority::{Authority, Leaf},
    proto::spiffe_workload_api_server::SpiffeWorkloadApiServer,
    publish::authority::Adapter,
    spiffe::{KeyKind, PrivateKey},
    status::{self, Trouble},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use spiffe::BundleSource as _;
use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::UnixListener,
    process::{Child, ChildStdout, Command},
    task::{JoinHandle, JoinSet},
    time::{Instant, timeout},
};
use tokio_stream::StreamExt;
use tonic::Code;
use tower::ServiceExt;
use x509_parser::prelude::{FromDer, X509Certificate};

const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";
/// How long a thing may take that should take milliseconds, or a client's back-off.
const SOON: Duration = Duration::from_secs(30);

/// A control plane and an identity fact, and what is left of the agent.
struct Story {
    fact: watch::Sender<Identity>,
    mesh: Authority,
    consumers: watch::Sender<status::Consumers>,
    clock: Clock,
}

impl Story {
    fn new() -> Self {
        let mesh = Authority::root("root").intermediate("intermediate");
        let (fact, consumers) = (watch::Sender::new(Identity::default()), watch::Sender::new(Default::default()));
        Self { fact, mesh, consumers, clock: Clock::simulated(SystemTime::now()) }
    }

    fn api(&self) -> WorkloadApi {
        WorkloadApi::new(self.fact.subscribe(), Consumers::new(self.consumers.clone()).of(1000, Some(4711)), self.clock)
    }

    /// A certificate for an hour, with the roots of `others`, too.
    fn issue(&self, others: &[&Authority]) -> Arc<X509Context> {
        let now = self.clock.now();
        let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
        let mut answer = self.mesh.issue(key.pem(), &Leaf::new(&[ID], now));
        for other in others {
            answer.last_mut().unwrap().push_str(other.root_pem());
        }
        X509Context::from_answer(&ID.parse().unwrap(), key, &answer, now).unwrap()
    }

    fn rotate(&self) -> Arc<X509Context> {
        self.publish(self.issue(&[]))
    }

    fn publish(&self, context: Arc<X509Context>) -> Arc<X509Context> {
        self.fact.send_modify(|fact| fact.current = Some(Arc::clone(&context)));
        context
    }
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(SECURITY_HEADER, "true".parse().unwrap());
    request
}

async fn svid_stream(api: &WorkloadApi) -> Updates<X509svidResponse> {
    api.fetch_x509svid(request(X509svidRequest {})).await.unwrap().into_inner()
}

async fn next<M>(stream: &mut Updates<M>) -> Result<M, Status> {
    timeout(SOON, stream.next()).await.unwrap().unwrap()
}

/// Whether the stream has nothing to say at present.
async fn silent<M>(stream: &mut Updates<M>) -> bool {
    tokio::select! { biased; _ = stream.next() => false, () = std::future::ready(()) => true }
}

#[tokio::test]
async fn an_svid_is_complete_and_as_clients_need_it() {
    let story = Story::new();
    let context = story.rotate();
    let answer = next(&mut svid_stream(&story.api()).await).await.unwrap();
    let [svid] = &answer.svids[..] else { panic!("{} SVIDs", answer.svids.len()) };
    assert_eq!((svid.spiffe_id.as_str(), svid.hint.as_str()), (ID, ""));
    let (rest, leaf) = X509Certificate::from_der(&svid.x509_svid).unwrap();
    assert_eq!(leaf.raw_serial_as_string().replace(':', ""), context.svid.serial());
    let (rest, intermediate) = X509Certificate::from_der(rest).unwrap();
    assert!(intermediate.is_ca() && rest.is_empty());
    let pem = rcgen::KeyPair::try_from(svid.x509_svid_key.as_slice()).unwrap().serialize_pem();
    assert_eq!(PrivateKey::from_pem(&pem).unwrap().public(), context.svid.key().public());
    let (rest, root) = X509Certificate::from_der(&svid.bundle).unwrap();
    assert!(root.subject() == root.issuer() && rest.is_empty());
}

#[tokio::test]
async fn a_call_is_held_until_there_is_a_certificate_and_gets_one_message_per_change() {
    let story = Story::new();
    let (api, trouble) = (story.api(), Trouble::met(None, "x", "y".into(), story.clock.now()));
    let mut stream = svid_stream(&api).await;
    assert!(silent(&mut stream).await);
    story.fact.send_modify(|fact| fact.trouble = Some(trouble));
    assert!(silent(&mut stream).await, "an error on the way is not the end of it");
    let first = story.rotate();
    assert_eq!(next(&mut stream).await.unwrap().svids[0].x509_svid[..], der(first.svid.chain().iter().cloned()));
    story.fact.send_modify(|fact| fact.trouble = None);
    assert!(silent(&mut stream).await, "the SVID is the same");
    for _ in 0..3 {
        let newest = story.rotate();
        let answer = next(&mut stream).await.unwrap();
        assert_eq!(answer.svids[0].x509_svid[..], der(newest.svid.chain().iter().cloned()));
        assert!(silent(&mut stream).await);
    }
}

#[tokio::test]
async fn bundles_are_sent_when_they_change() {
    let story = Story::new();
    let (api, next_mesh) = (story.api(), Authority::root("next"));
    let mut stream = api.fetch_x509_bundles(request(X509BundlesRequest {})).await.unwrap().into_inner();
    assert!(silent(&mut stream).await);
    let first = story.rotate();
    let answer = next(&mut stream).await.unwrap();
    assert_eq!(answer.bundles, [("spiffe://cluster.local".to_owned(), der(first.bundle.roots()))].into());
    story.rotate();
    assert!(silent(&mut stream).await, "the roots are the same");
    let second = story.publish(story.issue(&[&next_mesh]));
    let bundle = next(&mut stream).await.unwrap().bundles.remove("spiffe://cluster.local").unwrap();
    assert_eq!(bundle, der(second.bundle.roots()));
    assert_eq!(second.bundle.roots().count(), 2);
}

#[tokio::test]
async fn who_takes_what_is_kept_until_the_stream_ends() {
    let story = Story::new();
    let api = story.api();
    let seen = || {
        let all = story.consumers.borrow();
        all.iter().map(|((_, takes), c)| (*takes, c.sent.clone(), c.accepted.clone())).collect::<Vec<_>>()
    };
    let bare = api.fetch_x509svid(Request::new(X509svidRequest {})).await;
    assert_eq!(bare.err().map(|status| status.code()), Some(Code::InvalidArgument));
    assert_eq!(seen(), [], "who is turned away takes nothing");

    let mut svids = svid_stream(&api).await;
    let mut roots = api.fetch_x509_bundles(request(X509BundlesRequest {})).await.unwrap().into_inner();
    assert_eq!(seen(), [("FetchX509SVID", None, None), ("FetchX509Bundles", None, None)]);
    let first = story.rotate();
    svids.next().await.unwrap().unwrap();
    roots.next().await.unwrap().unwrap();
    let serial: Arc<str> = first.svid.serial().into();
    let all = seen();
    assert_eq!(all[0], ("FetchX509SVID", Some(serial.clone()), Some(serial.clone())));
    assert!(all[1].1.is_some() && all[1].1 != Some(serial), "{all:?}");
    let who = story.consumers.borrow().values().map(|c| (c.protocol, c.uid, c.pid)).collect::<Vec<_>>();
    assert_eq!(who, [("workload_api", 1000, Some(4711)); 2]);

    let next = story.rotate();
    svids.next().await.unwrap().unwrap();
    assert_eq!(seen()[0].1.as_deref(), Some(next.svid.serial()));
    assert_eq!(seen()[1], all[1], "the roots are the same");
    drop((svids, roots));
    assert_eq!(seen(), []);
}

#[tokio::test(start_paused = true)]
async fn only_dead_credentials_are_a_refusal() {
    let story = Story::new();
    let api = story.api();
    let (mut early, mut open) = (svid_stream(&api).await, svid_stream(&api).await);
    let context = story.rotate();
    next(&mut open).await.unwrap();
    tokio::time::advance(Duration::from_secs(3601)).await;
    assert!(!context.svid.is_valid(story.clock.now()));
    assert!(silent(&mut early).await, "an expired certificate is none");
    let cause = "the token has expired; write a new one".to_owned();
    story.fact.send_modify(|fact| {
        fact.credentials_dead = true;
        fact.trouble = Some(Trouble::met(None, "credentials_dead", cause, story.clock.now()));
    });
    let refusal = next(&mut early).await.err().unwrap();
    assert_eq!(refusal.code(), Code::PermissionDenied);
    assert!(refusal.message().ends_with("write a new one"), "{refusal}");
    assert!(early.next().await.is_none());
    assert!(silent(&mut open).await, "what a client has is not taken away");
}

#[tokio::test]
async fn a_stopping_agent_says_so() {
    let story = Story::new();
    story.rotate();
    let mut stream = svid_stream(&story.api()).await;
    next(&mut stream).await.unwrap();
    drop(story);
    assert_eq!(next(&mut stream).await.err().unwrap().code(), Code::Unavailable);
    assert!(stream.next().await.is_none());
}

/// What a call is answered without the security header, with another value, and as it should be.
async fn codes<M: Default, R>(call: impl AsyncFn(Request<M>) -> Result<R, Status>) -> [Code; 3] {
    let mut wrong = Request::new(M::default());
    wrong.metadata_mut().insert(SECURITY_HEADER, "True".parse().unwrap());
    let code = async |request| call(request).await.map_or_else(|status| status.code(), |_| Code::Ok);
    [code(Request::new(M::default())).await, code(wrong).await, code(request(M::default())).await]
}

#[tokio::test]
async fn every_call_needs_the_security_header_and_jwt_is_not_offered() {
    use Code::{InvalidArgument, Ok, Unimplemented};
    let story = Story::new();
    let api = story.api();
    for x509 in
        [codes(async |r| api.fetch_x509svid(r).await).await, codes(async |r| api.fetch_x509_bundles(r).await).await]
    {
        assert_eq!(x509, [InvalidArgument, InvalidArgument, Ok]);
    }
    for jwt in [
        codes(async |r| api.fetch_jwtsvid(r).await).await,
        codes(async |r| api.fetch_jwt_bundles(r).await).await,
        codes(async |r| api.validate_jwtsvid(r).await).await,
    ] {
        assert_eq!(jwt, [InvalidArgument, InvalidArgument, Unimplemented]);
    }
}

/// The socket, as small as it can be; dropping it ends every connection, as a crash does.
struct Server(JoinHandle<()>);

impl Server {
    fn start(path: &Path, api: WorkloadApi) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        Self(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let server = SpiffeWorkloadApiServer::new(api.clone());
                let service = hyper::service::service_fn(move |request| server.clone().oneshot(request));
                let stream = TokioIo::new(Adapter::new(stream));
                let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                connections.spawn(async move {
                    let _ = http.serve_connection(stream, service).await;
                });
            }
        }))
    }

    async fn crash(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[tokio::test]
async fn the_spiffe_crate_follows_rotations_and_a_restart() {
    let story = Story::new();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let server = Server::start(&socket, story.api());
    let endpoint = format!("unix:{}", socket.display());
    let build = spiffe::X509Source::builder().endpoint(endpoint.clone()).build();
    let (first, source) = timeout(SOON, async { tokio::join!(async { story.rotate() }, build) }).await.unwrap();
    let source = source.unwrap();
    let mut updates = source.updated();
    let has = |context: &X509Context| {
        let leaf = source.svid().is_ok_and(|svid| svid.leaf().as_bytes() == context.svid.chain()[0].as_ref());
        let roots = source.bundle_for_trust_domain(&"cluster.local".parse().unwrap());
        leaf && roots.is_ok_and(|roots| roots.is_some_and(|r| r.authorities().len() == context.bundle.roots().count()))
    };
    assert!(has(&first));
    let next_mesh = Authority::root("next");
    let mut rotations = vec![story.issue(&[]), story.issue(&[]), story.issue(&[&next_mesh]), story.issue(&[])];
    let last = rotations.pop().unwrap();
    for context in rotations {
        story.publish(Arc::clone(&context));
        timeout(SOON, async {
            while !has(&context) {
                updates.changed().await.unwrap();
            }
        })
        .await
        .unwrap();
    }
    server.crash().await;
    story.publish(Arc::clone(&last));
    let _server = Server::start(&socket, story.api());
    timeout(SOON, async {
        while !has(&last) {
            updates.changed().await.unwrap();
        }
    })
    .await
    .unwrap();

    let client = spiffe::WorkloadApiClient::connect_to(&endpoint).await.unwrap();
    let bundles = client.fetch_x509_bundles().await.unwrap();
    assert_eq!(bundles.iter().map(|(domain, _)| domain.to_string()).collect::<Vec<_>>(), ["cluster.local"]);
    let refusal = format!("{:?}", client.fetch_jwt_bundles().await.unwrap_err());
    assert!(refusal.contains("JWT-SVIDs are not offered"), "{refusal}");
    source.shutdown().await;
}

/// The Python library, if it is installed.
fn python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/venv/bin/python");
    let there = std::process::Command::new(&python).args(["-c", "import spiffe"]).stderr(Stdio::null()).status();
    there.is_ok_and(|status| status.success()).then_some(python)
}

/// Waits for a line of the client that is as `wanted`.
async fn told(lines: &mut Lines<BufReader<ChildStdout>>, wanted: impl Fn(&serde_json::Value) -> bool) -> Duration {
    let start = Instant::now();
    loop {
        let line = timeout(SOON, lines.next_line()).await.expect("the client says nothing").unwrap();
        let line = serde_json::from_str(&line.expect("the client has ended")).unwrap();
        if wanted(&line) {
            return start.elapsed();
        }
    }
}

fn is(context: &X509Context) -> impl Fn(&serde_json::Value) -> bool {
    let serial = context.svid.serial().trim_start_matches('0').to_owned();
    let roots = context.bundle.roots().count();
    move |line| line["serial"] == serial.as_str() && line["roots"] == roots
}

#[tokio::test]
#[allow(clippy::print_stdout)]
async fn a_client_on_the_c_core_of_grpc_follows_rotations_and_a_restart() {
    let Some(python) = python() else {
        return println!("skipped: no PyPI spiffe; tests/peers/setup installs it");
    };
    let story = Story::new();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let server = Server::start(&socket, story.api());
    let mut client: Child = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers/spiffe_client.py"))
        .args([format!("unix:{}", socket.display()).as_str(), "cluster.local"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    let first = story.rotate();
    told(&mut lines, |line| {
        assert_eq!((&line["id"], &line["chain"], &line["calls"]), (&ID.into(), &2.into(), &300.into()), "{line}");
        assert_eq!(line["bundles"], serde_json::json!(["cluster.local"]), "{line}");
        for call in ["jwt_svid", "jwt_bundles", "jwt_validate"] {
            assert!(line[call].as_str().unwrap().contains("JWT-SVIDs are not offered"), "{line}");
        }
        true
    })
    .await;
    told(&mut lines, is(&first)).await;
    let next_mesh = Authority::root("next");
    for context in [story.issue(&[]), story.issue(&[]), story.issue(&[&next_mesh])] {
        story.publish(Arc::clone(&context));
        println!("rotation seen after {:?}", told(&mut lines, is(&context)).await);
    }
    server.crash().await;
    let context = story.rotate();
    let _server = Server::start(&socket, story.api());
    println!("restart and rotation seen after {:?}", told(&mut lines, is(&context)).await);
    drop(client.stdin.take());
    assert!(timeout(SOON, client.wait()).await.unwrap().unwrap().success());
}
