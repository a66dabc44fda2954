//! The real Envoy takes its identity from the socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

pub(crate) mod envoy;

use crate::authority::{Authority, Leaf};
use envoy::{Api, Envoy, Http, Side};
use rustls::pki_types::CertificateDer;
use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use we_agent::{
    files::Root,
    publish::{self, Place, Policy},
    spiffe::{KeyKind, PrivateKey, X509Context},
    status::{Consumers, Identity, Publication},
    systemd::Units,
    time::Clock,
};

const PAYMENTS: &str = "spiffe://cluster.local/ns/vms/sa/payments";
const ORDERS: &str = "spiffe://cluster.local/ns/vms/sa/orders";

/// The program, or says why the test is passed over.
pub(crate) fn program() -> Option<PathBuf> {
    let found = envoy::program();
    if found.is_none() {
        println!("skipped: no Envoy; tests/peers/setup installs it");
    }
    found
}

pub(crate) fn issue(authority: &Authority, id: &str, roots: &[&Authority]) -> Arc<X509Context> {
    let now = SystemTime::now();
    let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
    let mut chain = authority.issue(key.pem(), &Leaf::new(&[id], now));
    chain.pop();
    let roots: String = roots.iter().map(|root| root.root_pem()).collect();
    X509Context::from_pem(&id.parse().unwrap(), key, &chain.concat(), &roots, now, now).unwrap()
}

/// One workload's socket, and the identity behind it.
struct Workload {
    id: &'static str,
    identity: watch::Sender<Identity>,
    consumers: watch::Receiver<Consumers>,
    socket: PathBuf,
    stop: CancellationToken,
}

impl Workload {
    fn serve(host: &Path, name: &str, id: &'static str) -> Self {
        let (root, stop) = (Root::new(host), CancellationToken::new());
        let (identity, identities) = watch::channel(Identity::default());
        let (told, consumers) = watch::channel(Consumers::default());
        let dir = Path::new("/run/we-agent").join(name);
        let place = Place::new(&root, &dir, None);
        let policy = Policy::new(name, Vec::new(), Units::new(&root));
        let fact = watch::Sender::new(Publication::default());
        tokio::spawn(publish::serve(place, policy, identities, fact, told, Clock::Wall, stop.clone()));
        Self { id, identity, consumers, socket: root.path(dir).join("agent.sock"), stop }
    }

    fn is(&self, context: Arc<X509Context>) {
        self.identity.send_replace(Identity { current: Some(context), ..Identity::default() });
    }

    /// Waits until every consumer of `resource`, and there are some, uses `version`.
    async fn until_used(&mut self, resource: &str, version: &str) {
        let all = |consumers: &Consumers| {
            let mut of = consumers.iter().filter(|((_, takes), _)| *takes == resource).peekable();
            of.peek().is_some() && of.all(|(_, consumer)| consumer.accepted.as_deref() == Some(version))
        };
        let used = tokio::time::timeout(Duration::from_secs(40), self.consumers.wait_for(all)).await;
        used.unwrap_or_else(|_| panic!("{}: {resource} {version} is not used", self.id)).unwrap();
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Requests without a pause in a thread of its own, each with a new handshake in Envoy.
struct Load {
    stop: Arc<AtomicBool>,
    done: watch::Receiver<u32>,
    thread: thread::JoinHandle<Vec<String>>,
}

impl Load {
    fn start(plain: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let (good, done) = watch::channel(0);
        let thread = thread::spawn(move || {
            let mut errors = Vec::new();
            let mut http = Http::open(&plain).unwrap();
            while !told.load(Ordering::Relaxed) {
                match http.get("/") {
                    Ok(_) => good.send_modify(|good| *good += 1),
                    Err(error) => {
                        errors.push(error);
                        http = Http::open(&plain).unwrap();
                    }
                }
            }
            errors
        });
        Self { stop, done, thread }
    }

    /// Waits for `more` requests.
    async fn goes_on(&mut self, more: u32) {
        let goal = *self.done.borrow() + more;
        let reached = tokio::time::timeout(Duration::from_secs(40), self.done.wait_for(|good| *good >= goal)).await;
        reached.expect("requests do not go on").unwrap();
    }

    /// How many requests succeeded; fails when one did not.
    fn stop(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        let (errors, good) = (self.thread.join().unwrap(), *self.done.borrow());
        assert!(errors.is_empty(), "{} of {} requests failed: {:?}", errors.len(), errors.len() as u32 + good, errors);
        good
    }
}

/// The serial number of the certificate that is served on a new connection to `tls`, to a client with `as_whom`.
fn served(tls: &Path, as_whom: &X509Context) -> String {
    use rustls::{ClientConfig, ClientConnection, client::danger::ServerCertVerifier};

    /// Takes any certificate: Envoy's own checks are what is tried here, ours are elsewhere.
    #[derive(Debug)]
    struct Any(Arc<rustls::crypto::CryptoProvider>);
    impl ServerCertVerifier for Any {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &rustls::pki_types::ServerName<'_>,
            _: &[u8],
            _: rustls::pki_types::UnixTime,
        ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
            Ok(rustls::client::danger::ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            m: &[u8],
            c: &CertificateDer<'_>,
            d: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls12_signature(m, c, d, &self.0.signature_verification_algorithms)
        }
        fn verify_tls13_signature(
            &self,
            m: &[u8],
            c: &CertificateDer<'_>,
            d: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls13_signature(m, c, d, &self.0.signature_verification_algorithms)
        }
        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config =
        ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions().unwrap();
    let config = config.dangerous().with_custom_certificate_verifier(Arc::new(Any(provider)));
    let svid = &as_whom.svid;
    let config = config.with_client_auth_cert(svid.chain().to_vec(), svid.key().pkcs8().clone_key()).unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), "payments".try_into().unwrap()).unwrap();
    let mut stream = UnixStream::connect(tls).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    while connection.is_handshaking() {
        connection.complete_io(&mut stream).unwrap();
    }
    let leaf = connection.peer_certificates().unwrap().first().unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf).unwrap();
    leaf.raw_serial_as_string().replace(':', "")
}

async fn mtls_both_ways(api: Api, rotations: u32) {
    let Some(program) = program() else { return };
    let host = tempfile::tempdir().unwrap();
    let mesh = Authority::root("mesh").intermediate("istiod");
    let mut payments = Workload::serve(host.path(), "payments", PAYMENTS);
    let mut orders = Workload::serve(host.path(), "orders", ORDERS);
    let server = Side { socket: &payments.socket.clone(), expects: ORDERS };
    let client = Side { socket: &orders.socket.clone(), expects: PAYMENTS };
    // Envoy comes first: its answer is held until there is a certificate. It warms its clusters before its listeners.
    let envoy = Envoy::start(&program, host.path(), api, &server, &client);
    let asked = |consumers: &Consumers| consumers.len() == 2;
    let waits = tokio::time::timeout(Duration::from_secs(40), orders.consumers.wait_for(asked)).await;
    waits.unwrap_or_else(|_| panic!("Envoy does not ask:\n{}", envoy.log())).unwrap();
    let issued = |workload: &Workload| issue(&mesh, workload.id, &[&mesh]);
    payments.is(issued(&payments));
    let mut as_whom = issued(&orders);
    orders.is(Arc::clone(&as_whom));
    let envoy = blocking(move || {
        envoy.until_it_works();
        envoy
    })
    .await;
    let mut load = Load::start(envoy.plain());
    let mut slowest = Duration::ZERO;
    for turn in 0..rotations {
        let (workload, other) =
            if turn.is_multiple_of(4) { (&mut orders, None) } else { (&mut payments, Some(&as_whom)) };
        let next = issued(workload);
        let began = Instant::now();
        workload.is(Arc::clone(&next));
        workload.until_used("default", next.svid.serial()).await;
        slowest = slowest.max(began.elapsed());
        match other {
            Some(as_whom) => {
                let (tls, as_whom) = (envoy.tls(), Arc::clone(as_whom));
                assert_eq!(blocking(move || served(&tls, &as_whom)).await, next.svid.serial(), "turn {turn}");
            }
            None => as_whom = next,
        }
        load.goes_on(10).await;
    }
    let good = load.stop();
    println!(
        "{rotations} rotations, the slowest used after {slowest:?}; {good} requests, each with a handshake, 0 errors"
    );
    assert!(envoy.figure("cluster.mtls.ssl.handshake") >= u64::from(good), "connections were used twice");
    assert_eq!(envoy.figure("sds.default.update_rejected"), 0);
    assert_eq!(payments.consumers.borrow().len(), 2);
    drop(envoy);
    let gone = tokio::time::timeout(Duration::from_secs(20), payments.consumers.wait_for(Consumers::is_empty)).await;
    gone.expect("consumers that are gone are still counted").unwrap();
}

/// The real program, killed and started again; each time Envoy asks again, and it serves in between what it has.
#[tokio::test]
async fn the_agent_is_killed_and_nobody_notices() {
    let Some(program) = program() else { return };
    let lab = crate::rotation::lab().spawn().await.unwrap();
    let host = crate::rotation::host(&lab).config("admin: {address: off}\n");
    let start = || {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_we-agent"));
        command.env_clear().arg("run").arg("--root").arg(host.path("/")).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut agent = start();
    let socket = host.path("/run/we-agent/payments/agent.sock");
    let side = Side { socket: &socket, expects: crate::rotation::ID };
    let envoy = Envoy::start(&program, &host.path("/"), Api::Sotw, &side, &side);
    let envoy = blocking(move || {
        envoy.until_it_works();
        envoy
    })
    .await;
    let mut load = Load::start(envoy.plain());
    for _ in 0..3 {
        load.goes_on(50).await;
        let asked = envoy.figure("sds.default.update_attempt");
        let taken = envoy.figure("sds.default.update_success");
        agent.kill().await.unwrap();
        load.goes_on(50).await;
        agent = start();
        // Envoy's own back-off decides when; it can be seconds.
        let end = Instant::now() + Duration::from_secs(60);
        while envoy.figure("sds.default.update_attempt") == asked || envoy.figure("sds.default.update_success") == taken
        {
            assert!(Instant::now() < end, "Envoy does not come back:\n{}", envoy.log());
            load.goes_on(20).await;
        }
    }
    println!("the agent was killed 3 times; {} requests, each with a handshake, 0 errors", load.stop());
    agent.kill().await.unwrap();
}

/// First both roots, then certificates of the new one, then the new root alone.
#[tokio::test]
async fn the_mesh_gets_a_new_root() {
    let Some(program) = program() else { return };
    let host = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::root("old").intermediate("istiod"), Authority::root("new").intermediate("istiod"));
    let mut payments = Workload::serve(host.path(), "payments", PAYMENTS);
    let mut orders = Workload::serve(host.path(), "orders", ORDERS);
    payments.is(issue(&old, PAYMENTS, &[&old]));
    orders.is(issue(&old, ORDERS, &[&old]));
    let server = Side { socket: &payments.socket.clone(), expects: ORDERS };
    let client = Side { socket: &orders.socket.clone(), expects: PAYMENTS };
    let envoy = Envoy::start(&program, host.path(), Api::Sotw, &server, &client);
    let envoy = blocking(move || {
        envoy.until_it_works();
        envoy
    })
    .await;
    let mut load = Load::start(envoy.plain());
    let steps: [(&Authority, &[&Authority]); 3] = [(&old, &[&old, &new]), (&new, &[&old, &new]), (&new, &[&new])];
    for (signer, roots) in steps {
        // One after the other, as in a mesh: in between they differ.
        for workload in [&mut payments, &mut orders] {
            let next = issue(signer, workload.id, roots);
            workload.is(Arc::clone(&next));
            workload.until_used("default", next.svid.serial()).await;
            load.goes_on(10).await;
        }
    }
    println!("a new root: {} requests, each with a handshake, 0 errors", load.stop());
    // The old root is no longer enough.
    payments.is(issue(&old, PAYMENTS, &[&old]));
    let end = Instant::now() + Duration::from_secs(40);
    let plain = envoy.plain();
    blocking(move || {
        while Http::open(&plain).and_then(|mut http| http.get("/")).is_ok() {
            assert!(Instant::now() < end, "certificates of the old root are still accepted");
        }
    })
    .await;
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test]
async fn mutual_tls_while_certificates_rotate() {
    mtls_both_ways(Api::Sotw, 100).await;
}

#[tokio::test]
async fn the_incremental_protocol_does_the_same() {
    mtls_both_ways(Api::Delta, 10).await;
}
