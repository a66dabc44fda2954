//! Every door through which something from outside comes in, by name. Two drivers give them whatever comes to their mind
//! (`tests/fuzz`): one led by coverage for as long as one likes (`make fuzz`), and one with each `make test`.
//!
//! A room says in its own `fuzz.rs` what its doors are: there it sees what is private. A target returns whatever the bytes
//! are. To panic is a fault, and so is what the drivers measure: a second, or 64 MiB.

use super::authority::{Authority, Leaf};
use crate::{
    admin, bundle, command,
    config::Config,
    control,
    files::Root,
    health,
    host::Peer,
    identity, inbound, publish,
    spiffe::{self, KeyKind, PrivateKey, X509Context},
    systemd::Units,
    workload::token::{self, Expected},
};
use std::{
    borrow::Cow,
    fs, io,
    path::Path,
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};
use tokio::{
    io::AsyncWriteExt as _,
    net::{UnixListener, UnixStream},
    runtime::Builder,
};

/// What is done with an input.
pub type Door = fn(&[u8]);

/// All of them.
pub const DOORS: &[(&str, Door)] = &[
    // Files.
    ("cluster-env", |bytes| bundle::fuzz::env(&text(bytes))),
    ("mesh-yaml", |bytes| bundle::fuzz::mesh(&text(bytes))),
    ("hosts", |bytes| bundle::fuzz::hosts(&text(bytes))),
    ("bundle", |bytes| settled(bundle::fuzz::bundle(&text(bytes)))),
    ("token", |bytes| token(&text(bytes))),
    ("roots", |bytes| spiffe::fuzz::roots(&text(bytes))),
    ("configuration", |bytes| configuration(&text(bytes))),
    ("store", |bytes| identity::fuzz::generation(&text(bytes), IDENTITY.svid.id())),
    // The control plane.
    ("chain", |bytes| spiffe::fuzz::chain(&text(bytes))),
    ("ca-answer", |bytes| {
        control::fuzz::certificate(bytes).into_iter().for_each(|elements| spiffe::fuzz::chain(&elements.concat()));
    }),
    ("ads-answers", control::fuzz::answers),
    ("refusal", control::fuzz::refused),
    ("control-connection", |bytes| run(control::fuzz::connection(bytes))),
    // Consumers.
    ("socket-frames", |bytes| settled(run(publish::fuzz::frames(&IDENTITY, bytes)))),
    ("socket-calls", |bytes| settled(run(publish::fuzz::calls(&IDENTITY, bytes)))),
    ("socket-authority", |bytes| settled(run(publish::fuzz::authority(bytes)))),
    // Callers.
    ("inbound-hello", inbound::fuzz::hello),
    ("inbound-records", |bytes| inbound::fuzz::records(&IDENTITY, health::fuzz::anybody, bytes)),
    ("inbound-session", |bytes| inbound::fuzz::session(&IDENTITY, health::fuzz::anybody, bytes)),
    // This host.
    ("bus", |bytes| settled(run(bus(bytes)))),
    ("admin", |bytes| settled(run(admin::fuzz::requests(bytes)))),
    ("exec-request", |bytes| settled(run(command::fuzz::request(bytes)))),
    ("exec-answer", |bytes| settled(run(command::fuzz::answer(bytes)))),
    ("probe-http", |bytes| run(health::fuzz::http(bytes))),
    ("probe-grpc", |bytes| run(health::fuzz::grpc(bytes))),
];

/// An identity, with a certificate that outlives every run.
static IDENTITY: LazyLock<Arc<X509Context>> = LazyLock::new(|| {
    let (now, id) = (SystemTime::now(), "spiffe://cluster.local/ns/vms/sa/payments");
    let leaf = [id];
    let leaf = Leaf { not_after: now + Duration::from_secs(365 * 24 * 3600), ..Leaf::new(&leaf, now) };
    let context = PrivateKey::generate(KeyKind::EcP256).ok().and_then(|key| {
        let answer = Authority::root("mesh").intermediate("istiod").issue(key.pem(), &leaf);
        X509Context::from_answer(&id.parse().ok()?, key, &answer, now).ok()
    });
    context.unwrap_or_else(|| unreachable!("a fresh key, and a certificate for it"))
});

/// A file is read as text; what is none is refused before.
fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// What this host refuses says nothing of the input, and without it nothing was tried.
fn settled(done: io::Result<()>) {
    if let Err(error) = done {
        assert!(error.kind() != io::ErrorKind::QuotaExceeded && error.raw_os_error() != Some(24), "{error}");
    }
}

/// On a runtime whose clock jumps to what is waited for: what would take long in time takes none here.
fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_all().start_paused(true).build();
    let runtime = runtime.unwrap_or_else(|error| unreachable!("{error}"));
    runtime.block_on(work)
}

fn token(text: &str) {
    match token::facts(text) {
        Ok(facts) => {
            let expected = Expected { namespace: "vms", service_account: "payments", accepted: Some(&facts) };
            drop(facts.wrong(expected, SystemTime::now()));
        }
        Err(error) => drop(error.to_string()),
    }
}

fn configuration(text: &str) {
    match Config::parse(Path::new("we-agent.yaml"), text) {
        Ok(config) => config.workload_names().for_each(|name| drop(config.workload(name))),
        Err(error) => drop(error.to_string()),
    }
}

/// What the other end of the system bus says to the question for a unit.
async fn bus(bytes: &[u8]) -> io::Result<()> {
    let dir = tempfile::tempdir()?;
    let root = Root::new(dir.path());
    let socket = root.path("/run/dbus/system_bus_socket");
    fs::create_dir_all(root.path("/run/dbus"))?;
    let listener = UnixListener::bind(&socket)?;
    let (ours, _theirs) = UnixStream::pair()?;
    let peer = Peer::of(&ours)?;
    let answering = async {
        let mut stream = listener.accept().await?.0;
        stream.write_all(bytes).await?;
        stream.shutdown().await?;
        Ok::<_, io::Error>(stream)
    };
    let units = Units::new(&root);
    let (unit, _stream) = tokio::join!(units.of(&peer), answering);
    unit.map(drop).unwrap_or_else(|error| drop(error.to_string()));
    Ok(())
}
