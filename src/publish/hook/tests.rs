#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use crate::{
    authority::{Authority, Leaf},
    spiffe::{KeyKind, PrivateKey},
    status::{Identity, Publication},
};
use rustls::{ServerConfig, crypto::aws_lc_rs};
use std::{fs, path::PathBuf, time::SystemTime};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_rustls::TlsAcceptor;

const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";
const SOON: Duration = Duration::from_secs(20);

fn issue() -> Arc<X509Context> {
    let (now, key) = (SystemTime::now(), PrivateKey::generate(KeyKind::EcP256).unwrap());
    let answer = Authority::root("mesh").issue(key.pem(), &Leaf::new(&[ID], now));
    X509Context::from_answer(&ID.parse().unwrap(), key, &answer, now).unwrap()
}

fn run(command: &[&str]) -> Action {
    Action::Command(command.iter().map(ToString::to_string).collect())
}

/// A workload with one publisher, and hooks that follow it.
struct Stage {
    dir: tempfile::TempDir,
    identity: watch::Sender<Identity>,
    files: watch::Sender<Publication>,
    turn: Arc<Mutex<()>>,
    stop: CancellationToken,
}

impl Stage {
    fn new() -> Self {
        let (identity, files) = (watch::Sender::default(), watch::Sender::default());
        Self {
            dir: tempfile::tempdir().unwrap(),
            identity,
            files,
            turn: Arc::default(),
            stop: CancellationToken::new(),
        }
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn lines(&self) -> Vec<String> {
        fs::read_to_string(self.log()).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// A command that notes when it begins and ends; `script` is run in between.
    fn noting(&self, script: &str) -> Action {
        let log = self.log().display().to_string();
        let script = format!("echo begin >>{log}; {script}; echo end >>{log}");
        run(&["/bin/sh", "-c", &script])
    }

    fn start(&self, action: Action, verify: Option<Verify>) -> (watch::Receiver<Reload>, JoinHandle<()>) {
        let hook = Hook {
            name: "hook".to_owned(),
            settings: HookSettings { action, deadline: SOON, verify },
            commands: Commands::Direct,
            root: Root::new(self.dir.path()),
        };
        let switches = Switches::new(vec![self.files.subscribe()], self.identity.subscribe());
        let fact = watch::Sender::new(Reload::None);
        let seen = fact.subscribe();
        let running = hook.run(switches, self.turn.clone(), fact, Clock::default(), self.stop.clone());
        (seen, tokio::spawn(running))
    }

    /// The identity loop, then the publisher.
    fn switch(&self, context: &Arc<X509Context>) {
        self.identity.send_modify(|identity| identity.current = Some(context.clone()));
        let serial = Some(context.svid.serial().to_owned());
        self.files.send_replace(Publication { serial, trouble: None });
    }
}

async fn until(seen: &mut watch::Receiver<Reload>, wanted: impl Fn(&Reload) -> bool) -> Reload {
    timeout(SOON, seen.wait_for(wanted)).await.expect("not in time").unwrap().clone()
}

fn reloaded(context: &X509Context, verified: bool) -> Reload {
    Reload::Reloaded { serial: context.svid.serial().to_owned(), verified }
}

#[tokio::test]
async fn one_hook_at_a_time_and_switches_meanwhile_count_as_one() {
    let stage = Stage::new();
    let gate = stage.dir.path().join("gate");
    // Begins, and ends when the gate is open.
    let slow = format!("while ! [ -e {} ]; do :; done", gate.display());
    let (mut first, _one) = stage.start(stage.noting(&slow), None);
    let (mut second, _other) = stage.start(stage.noting(":"), None);
    stage.switch(&issue());
    until(&mut first, |reload| matches!(reload, Reload::Running { .. })).await;
    let end = Instant::now() + SOON;
    while stage.lines().last().is_none_or(|line| line != "begin") {
        assert!(Instant::now() < end, "{:?}", stage.lines());
        tokio::task::yield_now().await;
    }
    let mut last = issue();
    for _ in 0..5 {
        last = issue();
        stage.switch(&last);
        tokio::task::yield_now().await;
    }
    fs::write(gate, "").unwrap();
    until(&mut first, |reload| *reload == reloaded(&last, false)).await;
    until(&mut second, |reload| *reload == reloaded(&last, false)).await;
    let lines = stage.lines();
    assert!(lines.chunks(2).all(|pair| pair == ["begin", "end"]), "two at a time: {lines:?}");
    // The slow one for the first switch and for the five; the other for the first, if its turn came then, and the five.
    assert!((6..=8).contains(&lines.len()), "{lines:?}");
}

#[tokio::test]
async fn the_end_of_the_agent_ends_the_hook() {
    let stage = Stage::new();
    let (mut seen, task) = stage.start(stage.noting("while :; do sleep 33; done"), None);
    stage.switch(&issue());
    until(&mut seen, |reload| matches!(reload, Reload::Running { .. })).await;
    stage.stop.cancel();
    timeout(SOON, task).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_fails_is_tried_again_and_says_since_when() {
    let stage = Stage::new();
    let (mut seen, _task) = stage.start(run(&["/nosuch/reload"]), None);
    let context = issue();
    stage.switch(&context);
    let begun = Instant::now();
    let failed = until(&mut seen, |reload| matches!(reload, Reload::Failed { .. })).await;
    let Reload::Failed { serial, trouble } = &failed else { unreachable!() };
    assert_eq!((serial.as_str(), trouble.kind), (context.svid.serial(), "reload_failed"));
    assert!(trouble.cause.starts_with("fork/exec /nosuch/reload: no such file or directory; "), "{}", trouble.cause);
    for times in 2..=4 {
        seen.changed().await.unwrap();
        let same = Reload::Failed { serial: serial.clone(), trouble: Trouble { times, ..trouble.clone() } };
        assert_eq!(*seen.borrow_and_update(), same, "the same trouble since the same time");
    }
    let taken = begun.elapsed();
    assert!(taken >= 3 * RETRY.0 && taken <= 3 * RETRY.1, "{taken:?}");
}

#[tokio::test]
async fn a_unit_is_reloaded_by_who_may() {
    let (stage, context) = (Stage::new(), issue());
    let unit = Action::Unit("nginx.service".to_owned());
    let (mut seen, _task) = stage.start(unit, None);
    stage.switch(&context);
    let request = stage.dir.path().join("run/we-agent/reload.d/nginx.service");
    let end = Instant::now() + SOON;
    while !request.exists() {
        assert!(Instant::now() < end, "nothing was asked for");
        tokio::task::yield_now().await;
    }
    assert!(matches!(*seen.borrow(), Reload::Running { .. }));
    fs::rename(&request, request.with_extension("service.done")).unwrap();
    until(&mut seen, |reload| *reload == reloaded(&context, false)).await;
}

/// A TLS server whose certificate can be changed; it wants one from its clients.
struct Server {
    address: String,
    serves: watch::Sender<Arc<X509Context>>,
    looks: watch::Receiver<usize>,
}

impl Server {
    async fn start(first: &Arc<X509Context>, postgres: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (serves, seen) = watch::channel(first.clone());
        let (count, looks) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                let (mut tcp, _) = listener.accept().await.unwrap();
                if postgres {
                    let mut request = [0; 8];
                    tcp.read_exact(&mut request).await.unwrap();
                    assert_eq!(request, [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f]);
                    tcp.write_all(b"S").await.unwrap();
                }
                let now = seen.borrow().clone();
                // A look that the next switch has made needless is dropped half way.
                let Ok(mut tls) = acceptor(&now).accept(tcp).await else { continue };
                let shown = tls.get_ref().1.peer_certificates().map(<[_]>::len);
                assert_eq!(shown, Some(1), "a client without a certificate");
                assert_eq!(tls.get_ref().1.server_name(), Some("payments.example.com"));
                let _ = tls.read(&mut [0]).await;
                count.send_modify(|n| *n += 1);
            }
        });
        Self { address, serves, looks }
    }

    fn verify(&self, within: Duration, start_tls: Option<StartTls>) -> Option<Verify> {
        let (address, sni) = (self.address.clone(), Some("payments.example.com".to_owned()));
        Some(Verify { address, sni, start_tls, within })
    }
}

fn acceptor(context: &X509Context) -> TlsAcceptor {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(AnyClient(provider.signature_verification_algorithms));
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(context.svid.chain().to_vec(), context.svid.key().pkcs8().clone_key())
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

#[derive(Debug)]
struct AnyClient(rustls::crypto::WebPkiSupportedAlgorithms);

impl rustls::server::danger::ClientCertVerifier for AnyClient {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::server::danger::ClientCertVerified, rustls::Error> {
        Ok(rustls::server::danger::ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.supported_schemes()
    }
}

#[tokio::test]
async fn what_is_served_already_needs_no_hook_after_a_start() {
    let (stage, context) = (Stage::new(), issue());
    let server = Server::start(&context, true).await;
    let verify = server.verify(SOON, Some(StartTls::Postgres));
    let (mut seen, _task) = stage.start(stage.noting(":"), verify);
    stage.switch(&context);
    until(&mut seen, |reload| *reload == reloaded(&context, true)).await;
    assert_eq!(stage.lines(), Vec::<String>::new());
}

#[tokio::test]
async fn the_hook_is_believed_when_the_certificate_is_seen() {
    let (stage, old, new) = (Stage::new(), issue(), issue());
    let mut server = Server::start(&old, false).await;
    let (mut seen, _task) = stage.start(stage.noting(":"), server.verify(SOON, None));
    stage.switch(&new);
    // At the start and at least twice after the hook the old one is seen.
    timeout(SOON, server.looks.wait_for(|looks| *looks >= 3)).await.unwrap().unwrap();
    assert_eq!(*seen.borrow(), Reload::Running { serial: new.svid.serial().to_owned() });
    server.serves.send_replace(new.clone());
    until(&mut seen, |reload| *reload == reloaded(&new, true)).await;
    assert_eq!(stage.lines(), ["begin", "end"]);
}

#[tokio::test]
async fn another_certificate_is_stale_and_the_next_switch_does_not_wait_for_it() {
    let (stage, old, new) = (Stage::new(), issue(), issue());
    let server = Server::start(&old, false).await;
    let (mut seen, task) = stage.start(stage.noting(":"), server.verify(Duration::from_millis(100), None));
    stage.switch(&new);
    let stale = until(&mut seen, |reload| matches!(reload, Reload::Stale { .. })).await;
    let Reload::Stale { serial, served, trouble } = stale else { unreachable!() };
    assert_eq!((serial.as_str(), served.as_deref()), (new.svid.serial(), Some(old.svid.serial())));
    assert_eq!(trouble.kind, "reload_stale");
    assert!(
        trouble.cause.contains(&server.address) && trouble.cause.contains("; look at the log"),
        "{}",
        trouble.cause
    );
    task.abort();

    // With all the time in the world for the first switch, the second comes at once.
    let (mut seen, _task) = stage.start(stage.noting(":"), server.verify(Duration::from_secs(3600), None));
    until(&mut seen, |reload| matches!(reload, Reload::Running { .. })).await;
    let newer = issue();
    server.serves.send_replace(newer.clone());
    stage.switch(&newer);
    until(&mut seen, |reload| *reload == reloaded(&newer, true)).await;
}

#[tokio::test]
async fn who_does_not_answer_is_named_with_the_reason() {
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let verify = Verify { address, sni: None, start_tls: None, within: Duration::ZERO };
    let stale = verify.waits_for(&issue()).await.unwrap_err();
    assert_eq!(stale.served, None);
    assert!(stale.cause.contains("cannot be asked for its certificate: connect: connection refused; "), "{stale:?}");
}
