//! The agent's socket beside its files.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use crate::{
    daemon::{Daemon, may_look},
    published,
    rotation::{host, lab},
    support::SOON,
};
use std::{
    fs,
    io::{ErrorKind, Read as _},
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener, UnixStream},
    },
    process::Command,
    thread,
};
use tokio::{
    sync::mpsc,
    time::{Duration, Instant, sleep, timeout},
};

const ALSO: &str = "/run/secrets/workload-spiffe-uds/socket";

#[tokio::test]
async fn files_and_socket_share_a_directory_that_can_be_passed_while_keys_cannot_be_reached() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab).config(&format!("workloads: {{payments: {{socket: {{also: [{ALSO}]}}}}}}\n"));
    let mut agent = host.start().await;
    let both = agent.until("payments", "published twice", |w| {
        let files: Vec<_> = w.files.iter().filter(|p| p.serial == w.identity.serial).collect();
        w.ready
            && ["files", "socket", &format!("socket {ALSO}")]
                .iter()
                .all(|name| files.iter().any(|p| p.publisher == *name))
    });
    assert!(both.await.files.iter().all(|p| p.cause.is_none()));
    let dir = published::dir(&host, "payments");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir) & 0o011, 0o011, "others could not reach the socket: mode {:o}", mode(&dir));
    assert_eq!(mode(&dir.join("agent.sock")), 0o660);
    assert_eq!(mode(&host.path("/run/secrets/workload-spiffe-uds/socket")), 0o660);
    assert_eq!((mode(&dir.join("..data")), mode(&dir.join("key.pem"))), (0o700, 0o600));
    agent.stop().await;
}

#[tokio::test]
async fn a_socket_that_somebody_has_removed_is_back_within_seconds() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let socket = host.path("/run/we-agent/payments/agent.sock");
    UnixStream::connect(&socket).unwrap();
    fs::remove_file(&socket).unwrap();
    let end = Instant::now() + SOON;
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < end, "nobody noticed");
        sleep(Duration::from_millis(10)).await;
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_connection_costs_one_descriptor_of_all_that_the_host_allows() {
    const MANY: usize = 50;
    if !may_look() {
        return;
    }
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let daemon = Daemon::start(&host, &[], &[]);
    daemon.until("payments", |w| w.ready).await;
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.id())).unwrap();
    let limit: Vec<_> = limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split(' ').collect();
    let limit: Vec<_> = limit.into_iter().filter_map(|word| word.parse::<u64>().ok()).collect();
    assert_eq!(limit[0], limit[1], "{limits}");

    // Sockets, and whatever else.
    let open = || {
        let links = fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap();
        let links: Vec<_> = links.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).collect();
        let sockets = links.iter().filter(|link| link.to_str().unwrap().starts_with("socket:")).count();
        (sockets, links.len() - sockets)
    };
    let (sockets, others) = open();
    let socket = host.path("/run/we-agent/payments/agent.sock");
    let _held: Vec<_> = (0..MANY).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let end = Instant::now() + SOON;
    loop {
        let now = open();
        if now.0 >= sockets + MANY && now.1 < others + MANY / 2 {
            break;
        }
        assert!(Instant::now() < end, "{now:?} after {:?}", (sockets, others));
        sleep(Duration::from_millis(10)).await;
    }
}

const INSIDE: &str = "WE_AGENT_TEST_IN_OWN_MOUNTS";
const HANGING: &str = "socket::a_name_service_that_hangs_stops_nothing_else";

/// The test runs itself again where `/run` is its own, and is the name service cache there (nscd), which the C library asks
/// first and waits for, for seconds.
#[tokio::test]
async fn a_name_service_that_hangs_stops_nothing_else() {
    if std::env::var_os(INSIDE).is_some() {
        return hanging().await;
    }
    let unshare = |program: &str| {
        let mut command = Command::new("unshare");
        command.args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            "mount -t tmpfs none /run && exec \"$@\"",
            "sh",
        ]);
        command.arg(program);
        command
    };
    if !unshare("true").output().is_ok_and(|output| output.status.success()) {
        println!("skipped: needs `unshare` (user namespaces allowed) and `mount`");
        return;
    }
    let itself = std::env::current_exe().unwrap();
    let output =
        unshare(itself.to_str().unwrap()).args([HANGING, "--exact", "--nocapture"]).env(INSIDE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    if let Some(skipped) = said.lines().find(|line| line.starts_with("skipped")) {
        println!("{skipped}");
    }
}

async fn hanging() {
    fs::create_dir("/run/nscd").unwrap();
    let cache = UnixListener::bind("/run/nscd/socket").unwrap();
    let (asks, mut asked) = mpsc::unbounded_channel();
    thread::spawn(move || {
        // Of groups; whoever asks for anything else is hung up on, and asks elsewhere.
        while let Ok((mut asks_for, _)) = cache.accept() {
            let mut question = [0; 256];
            let length = asks_for.read(&mut question).unwrap_or_default();
            if question[..length].windows(5).any(|word| word == b"group") && asks.send(asks_for).is_err() {
                return;
            }
        }
    });
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab).config("workloads: {payments: {socket: {group: a-group-of-nobody}}}\n");
    let mut agent = host.start().await;
    // The agent has this thread alone: if it waited for the answer, we would hear of the question when it has given up.
    let Ok(Some(mut question)) = timeout(SOON, asked.recv()).await else {
        println!("skipped: this C library asks no nscd");
        return;
    };
    question.set_nonblocking(true).unwrap();
    assert_eq!(question.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "it waits for the answer");
    drop((question, asked));
    let known = agent.until("payments", "without a group", |w| {
        let known = |p: &we_agent::status::PublicationReport| {
            let said = |cause: &String| cause.contains("this host knows no group a-group-of-nobody");
            p.publisher == "socket" && p.cause.as_ref().is_some_and(said)
        };
        w.files.iter().any(known)
    });
    known.await;
    agent.stop().await;
}
