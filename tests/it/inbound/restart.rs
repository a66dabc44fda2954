//! The daemon is restarted under load, and its sockets are held meanwhile: by a socket unit, or because it asked for it.

use super::{Echo, Pod, WEB};
use crate::{
    activation::{launch, told},
    rotation::lab,
    support::{Host, SOON},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    net::{SocketAddr, TcpListener},
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::time::{Instant, timeout};
use we_lab::Lab;

/// A VM whose listener is at `at`.
fn vm(lab: &Lab, at: SocketAddr, forward: SocketAddr) -> Host {
    Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1")).config(&format!(
        "admin: {{address: 'off'}}\nworkloads: {{payments: {{inbound: [{{listen: '{at}', forward: '{forward}'}}]}}}}\n"
    ))
}

fn start(host: &Host, mut command: Command) -> Child {
    command.args([env!("CARGO_BIN_EXE_we-agent"), "run", "--root"]).arg(host.path("/"));
    let log = std::fs::File::options().create(true).append(true).open(host.path("/daemon.log")).unwrap();
    command.stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// Stops it as a service manager does, and waits for its end.
async fn stop(mut child: Child) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert!(tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap().success());
}

/// Calls all the time, each time on a new connection.
struct Caller {
    done: Arc<AtomicBool>,
    /// What came of each call.
    calls: Arc<Mutex<Vec<Result<(), String>>>>,
}

impl Caller {
    fn start(lab: &Lab, at: SocketAddr) -> Self {
        let (done, calls) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<_>>>::default());
        let (pod, ended, log) = (Pod::new(lab, WEB), done.clone(), calls.clone());
        tokio::spawn(async move {
            while !ended.load(Ordering::Relaxed) {
                let call = match timeout(SOON, pod.try_echo(at, b"ping")).await {
                    Ok(Ok(answer)) if answer == b"ping" => Ok(()),
                    other => Err(format!("{other:?}")),
                };
                log.lock().unwrap().push(call);
            }
        });
        Self { done, calls }
    }

    /// Waits until so many more calls were made.
    async fn until_more(&self, more: usize) {
        let (end, wanted) = (Instant::now() + SOON, self.calls.lock().unwrap().len() + more);
        while self.calls.lock().unwrap().len() < wanted {
            assert!(Instant::now() < end, "nobody answers");
            tokio::task::yield_now().await;
        }
    }

    fn end(self) -> Vec<String> {
        self.done.store(true, Ordering::Relaxed);
        let calls = self.calls.lock().unwrap();
        calls.iter().filter_map(|call| call.clone().err()).collect()
    }
}

#[tokio::test]
async fn a_socket_unit_lets_a_restart_refuse_nobody() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    let host = vm(&lab, at, echo.address);
    let passed = || launch("web.socket", OwnedFd::from(socket.try_clone().unwrap()));
    let mut daemon = start(&host, passed());
    // The first certificate takes a moment, and without one nobody is let in.
    let (pod, end) = (Pod::new(&lab, WEB), Instant::now() + SOON);
    while pod.try_echo(at, b"ping").await.is_err() {
        assert!(Instant::now() < end, "{}", std::fs::read_to_string(host.path("/daemon.log")).unwrap());
    }
    let caller = Caller::start(&lab, at);
    for _ in 0..3 {
        caller.until_more(10).await;
        stop(daemon).await;
        daemon = start(&host, passed());
    }
    caller.until_more(10).await;
    let errors = caller.end();
    assert!(errors.is_empty(), "{errors:?}");
    stop(daemon).await;
}

#[tokio::test]
async fn a_socket_of_our_own_is_kept_and_let_go_when_nobody_wants_it() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    // The port that the application has on one loopback address is ours on another.
    let at = SocketAddr::from(([127, 0, 0, 2], echo.address.port()));
    let host = vm(&lab, at, echo.address);
    let notify = UnixDatagram::bind(host.path("/notify")).unwrap();
    let name = format!("inbound-payments-127.0.0.2-{}", at.port());
    let until = |line: &str| loop {
        let (text, mut kept) = told(&notify);
        if text == format!("{line}\nFDNAME={name}\n") {
            break kept.pop();
        }
    };
    // Somebody must read what it is told, or who tells it waits.
    let telling = |mut command: Command| {
        command.env("NOTIFY_SOCKET", host.path("/notify"));
        command
    };
    let first = start(&host, telling(Command::new("env")));
    let socket = until("FDSTORE=1").expect("no descriptor came with it");
    let (pod, end) = (Pod::new(&lab, WEB), Instant::now() + SOON);
    while pod.try_echo(at, b"ping").await.is_err() {
        assert!(Instant::now() < end, "{}", std::fs::read_to_string(host.path("/daemon.log")).unwrap());
    }
    stop(first).await;
    // Nobody runs, and nobody is refused.
    let caller = Caller::start(&lab, at);
    let second = start(&host, launch(&name, socket.try_clone().unwrap()));
    caller.until_more(10).await;
    let errors = caller.end();
    assert!(errors.is_empty(), "{errors:?}");
    stop(second).await;
    // The listener is not configured any more.
    std::fs::write(host.path("/etc/we-agent/we-agent.yaml"), "admin: {address: 'off'}\n").unwrap();
    let third = start(&host, telling(launch(&name, socket)));
    assert!(until("FDSTOREREMOVE=1").is_none());
    stop(third).await;
}
