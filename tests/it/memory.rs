//! What is in the memory of the daemon is seen by nobody but root, and of a secret that has served nothing is left there.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use crate::{
    daemon::{Daemon, may_look},
    outputs::PASSWORD,
    rotation::{TOKEN, issued, lab, next_issue},
    support::{Host, SOON},
};
use nix::{sys::signal::Signal, unistd::geteuid};
use std::{
    fs,
    os::unix::{
        fs::{FileExt as _, PermissionsExt as _, chown},
        process::ExitStatusExt as _,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::{net::UnixStream, sync::watch, task::yield_now};
use we_agent::spiffe::PrivateKey;
use we_lab::Fault;

/// Whom the daemon runs as when the tests run as root, who sees everything.
const USER: u32 = 4711;

/// Begins a command line that is run as that user.
fn as_user() -> Vec<String> {
    let user = USER.to_string();
    let root = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"];
    if geteuid().is_root() { root.map(str::to_owned).to_vec() } else { vec!["env".to_owned()] }
}

/// Whether a process of the same user may open this file about a process.
fn may_open(pid: u32, file: &str) -> bool {
    let [program, arguments @ ..] = &as_user()[..] else { unreachable!() };
    let open = format!(": </proc/{pid}/{file}");
    let opened = Command::new(program).args(arguments).args(["sh", "-c", &open]).stderr(Stdio::null()).status();
    opened.unwrap().success()
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < end, "not in time: {what}");
        yield_now().await;
    }
}

#[tokio::test]
async fn no_process_of_the_same_user_sees_it() {
    const ABOUT: [&str; 3] = ["environ", "maps", "mem"];
    let host = Host::new().config("admin: {address: off}\n");
    if geteuid().is_root() {
        for path in ["/", "/etc", "/etc/we-agent", "/etc/we-agent/we-agent.yaml"] {
            chown(host.path(path), Some(USER), Some(USER)).unwrap();
        }
    }
    let words = as_user();
    let daemon = Daemon::start_by(&host, &words.iter().map(String::as_str).collect::<Vec<_>>());
    until("a daemon that runs", || daemon.log().contains("starting")).await;
    assert_eq!(ABOUT.map(|file| may_open(daemon.id(), file)), [false; 3]);
    // What is its own it still sees, and it ends in order.
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;

    let mut other = Command::new(&words[0]);
    let other = Killed(other.args(&words[1..]).args(["sleep", "600"]).spawn().unwrap());
    // A kernel with Yama lets nobody trace but a parent.
    until("another program that is seen", || ABOUT[..2].iter().all(|file| may_open(other.0.id(), file))).await;
}

#[tokio::test]
async fn a_crash_leaves_no_core() {
    let host = Host::new().config("admin: {address: off}\n");
    let dir = host.path("/").display().to_string();
    let anywhere = format!("ulimit -c unlimited && cd {dir} && exec \"$@\"");
    let crash = format!("ulimit -c unlimited && cd {dir} && kill -ABRT $$");
    if !Command::new("sh").args(["-c", &crash]).status().is_ok_and(|status| status.core_dumped()) {
        println!("skipped: this host writes no core files");
        return;
    }
    let mut daemon = Daemon::start_by(&host, &["sh", "-c", &anywhere, "sh"]);
    until("a daemon that runs", || daemon.log().contains("starting")).await;
    daemon.signal(Signal::SIGABRT);
    let status = daemon.died().await;
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::SIGABRT as i32), false));
}

/// Bytes that are looked for.
type Needle = (&'static str, Vec<u8>);

/// A secret number as it could stand in memory, in halves: what is freed has its first bytes written over.
fn of_key(pem: &str) -> Vec<Needle> {
    let der = pem::parse(pem).unwrap().into_contents();
    // Behind SEC 1's header.
    let header = [0x02, 0x01, 0x01, 0x04, 0x20];
    let at = der.windows(header.len()).position(|w| w == header).unwrap() + header.len();
    let number = &der[at..at + 32];
    let turned: Vec<u8> = number.iter().rev().copied().collect();
    let lines: Vec<_> = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let text = |part: &str| part.as_bytes().to_vec();
    vec![
        ("DER, first half", number[..16].to_vec()),
        ("DER, second half", number[16..].to_vec()),
        ("as words, second half", turned[..16].to_vec()),
        ("as words, first half", turned[16..].to_vec()),
        ("PEM, first half", text(&lines[0][48..])),
        ("PEM, second half", text(&lines[1][4..24])),
    ]
}

/// What of it is in the memory of a process, and where.
fn found(pid: u32, needles: &[Needle]) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|may| may.starts_with("rw"))) {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [from, to] = [from, to].map(|at| u64::from_str_radix(at, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
        // It may have gone meanwhile.
        let _ = memory.read_exact_at(&mut bytes, from);
        for (what, needle) in needles {
            for at in memchr::memmem::find_iter(&bytes, needle) {
                found.push(format!("{what} at {:x} in {line}", from + at as u64));
            }
        }
    }
    found
}

/// Calls a method on the workload's socket with this message; all that is answered.
async fn call(host: &Host, method: &str, message: &[u8]) -> watch::Receiver<Vec<u8>> {
    let socket = UnixStream::connect(host.path("/run/we-agent/payments/agent.sock")).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://localhost/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("workload.spiffe.io", "true");
    let (answer, mut send) = client.ready().await.unwrap().send_request(request.body(()).unwrap(), false).unwrap();
    let head = [0, 0, 0, 0, u8::try_from(message.len()).unwrap()];
    send.send_data([&head[..], message].concat().into(), false).unwrap();
    let (given, held) = watch::channel(Vec::new());
    tokio::spawn(async move {
        let mut body = answer.await.unwrap().into_body();
        while let Some(Ok(bytes)) = body.data().await {
            let _ = body.flow_control().release_capacity(bytes.len());
            given.send_modify(|all| all.extend_from_slice(&bytes));
        }
        drop(send);
    });
    held
}

/// One of Envoy's kind and one of SPIFFE's, and all that they are given.
pub(crate) async fn consumers(host: &Host) -> [watch::Receiver<Vec<u8>>; 2] {
    let secret = b"\x1a\x07default\x22\x44type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    [
        call(host, "envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets", secret).await,
        call(host, "SpiffeWorkloadAPI/FetchX509SVID", b"").await,
    ]
}

/// What was given away, by files, by the socket and to the control plane, is forgotten when it has served.
#[tokio::test]
async fn a_secret_that_has_served_is_nowhere() {
    if !may_look() {
        return;
    }
    let lab = lab().ttl(Duration::from_secs(6)).spawn().await.unwrap();
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1")).config(
        "
admin: {address: off}
workloads:
  payments:
    renewal: {minInterval: 100ms}
    inbound: [{listen: '127.0.0.1:0', forward: '127.0.0.1:9'}]
    files: {outputs: [{format: pem}, {format: combined}, {format: pkcs12, passwordFile: /etc/password}]}
",
    );
    fs::write(host.path("/etc/password"), PASSWORD).unwrap();
    fs::set_permissions(host.path("/etc/password"), fs::Permissions::from_mode(0o600)).unwrap();
    let token = fs::read_to_string(host.path(TOKEN)).unwrap();
    let token = ("token", token.trim().rsplit('.').next().unwrap().as_bytes()[..32].to_vec());
    let daemon = Daemon::start(&host, &[], &[]);
    daemon.until("payments", |w| w.ready).await;
    fs::remove_file(host.path(TOKEN)).unwrap();
    let [envoy, spiffe] = consumers(&host).await;

    // One key that both consumers have.
    let file: PathBuf = host.path("/run/we-agent/payments/key.pem");
    let end = Instant::now() + SOON;
    let key = loop {
        let pem = fs::read_to_string(&file).unwrap_or_default();
        let has = |held: &watch::Receiver<Vec<u8>>, key: &[u8]| memchr::memmem::find(&held.borrow(), key).is_some();
        if let Ok(key) = PrivateKey::from_pem(&pem)
            && has(&envoy, pem.as_bytes())
            && has(&spiffe, key.pkcs8().secret_der())
        {
            break of_key(&pem);
        }
        assert!(Instant::now() < end, "it was not published\n{}", daemon.log());
        yield_now().await;
    };
    assert!(found(daemon.id(), &key).len() >= 4, "a key in use is found");

    // The one before the present one is kept for when that is not accepted.
    let mut mark = lab.mark();
    for _ in 0..3 {
        next_issue(&lab, mark).await;
        mark = lab.mark();
    }
    lab.inject(Fault::CaDown);
    let secrets: Vec<_> = key.into_iter().chain([token]).collect();
    let end = Instant::now() + SOON;
    loop {
        let left = found(daemon.id(), &secrets);
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "still there: {left:#?}");
        yield_now().await;
    }
    assert!(lab.events().iter().filter(|e| issued(e).is_some()).count() >= 4);
}
