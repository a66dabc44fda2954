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
    io,
    net::{SocketAddr, TcpListener},
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use we_lab::Lab;

/// How many call at the same time.
const CALLERS: usize = 4;
/// From one look at what came of calls to the next.
const LOOK: Duration = Duration::from_millis(5);
/// Between two requests of a connection that is kept: five times what is called quiet at a stop, so that a connection is
/// ended long before its next request, on a busy machine too.
const PAUSE: Duration = Duration::from_millis(1500);

/// How a connection that was ended looks to who has said something meanwhile.
const GONE: [io::ErrorKind; 2] = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];

/// A VM whose listener is at `at`.
fn vm(lab: &Lab, at: SocketAddr, forward: SocketAddr) -> Host {
    let inbound = format!("inbound: [{{listen: '{at}', forward: '{forward}', drainTimeout: 1200ms}}]");
    Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
        .config(&format!("admin: {{address: 'off'}}\nworkloads: {{payments: {{{inbound}}}}}\n"))
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

/// Several pods that call all the time: some each time on a new connection, some on one that they keep as long as they may.
struct Callers {
    done: Arc<AtomicBool>,
    /// What came of each call, and of each connection that was kept.
    calls: Arc<Mutex<Vec<Result<Call, String>>>>,
    tasks: JoinSet<()>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Call {
    New,
    Kept,
    /// A kept connection was ended in order between two requests, or while the next one was on its way here: nobody has heard
    /// that, and whoever keeps connections asks again.
    Ended,
}

impl Callers {
    fn start(lab: &Lab, at: SocketAddr) -> Self {
        let mut callerss = Self { done: Arc::default(), calls: Arc::default(), tasks: JoinSet::new() };
        for n in 0..2 * CALLERS {
            let (pod, done, calls) = (Pod::new(lab, WEB), callerss.done.clone(), callerss.calls.clone());
            callerss.tasks.spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    let told = |call| calls.lock().unwrap().push(call);
                    if n < CALLERS {
                        told(match timeout(SOON, pod.try_echo(at, b"ping")).await {
                            Ok(Ok(answer)) if answer == b"ping" => Ok(Call::New),
                            other => Err(format!("new: {other:?}")),
                        });
                    } else if let Err(error) = keep(&pod, at, &done, |call| told(Ok(call))).await {
                        told(Err(format!("kept: {error}")));
                    }
                }
            });
        }
        callerss
    }

    fn count(&self, kind: Call) -> usize {
        self.calls.lock().unwrap().iter().filter(|call| **call == Ok(kind)).count()
    }

    /// Waits until so many more calls of each kind were made.
    async fn until_more(&self, more: usize) {
        let end = Instant::now() + SOON;
        for kind in [Call::New, Call::Kept] {
            let wanted = self.count(kind) + more;
            while self.count(kind) < wanted {
                assert!(Instant::now() < end, "nobody answers: {:?}", self.calls.lock().unwrap());
                sleep(LOOK).await;
            }
        }
    }

    /// What went wrong, and how many kept connections were ended. Of `before` on, the application heard what was answered, and
    /// nothing else.
    async fn end(mut self, echo: &Echo, before: usize) -> (Vec<String>, usize) {
        self.done.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        let errors = self.calls.lock().unwrap().iter().filter_map(|call| call.clone().err()).collect();
        let answered = 4 * (self.count(Call::New) + self.count(Call::Kept));
        assert_eq!(echo.heard.load(Ordering::Relaxed) - before, answered, "a call was heard and not answered");
        (errors, self.count(Call::Ended))
    }
}

/// Asks again and again on one connection, until it is ended, or `done`.
async fn keep(pod: &Pod, at: SocketAddr, done: &AtomicBool, told: impl Fn(Call)) -> io::Result<()> {
    let mut stream = timeout(SOON, pod.connect(at)).await??;
    while !done.load(Ordering::Relaxed) {
        let mut answer = [0; 4];
        let said = match stream.write_all(b"ping").await {
            Ok(()) => timeout(SOON, stream.read(&mut answer)).await?,
            Err(error) => Err(error),
        };
        match said {
            Ok(n @ 1..) => timeout(SOON, stream.read_exact(&mut answer[n..])).await?.map(drop)?,
            Err(error) if !GONE.contains(&error.kind()) => return Err(error),
            Ok(0) | Err(_) => {
                told(Call::Ended);
                return Ok(());
            }
        }
        told(Call::Kept);
        match timeout(PAUSE, stream.read(&mut [0])).await {
            Err(_) => {}
            Ok(Ok(0)) => {
                told(Call::Ended);
                return Ok(());
            }
            Ok(other) => return Err(io::Error::other(format!("between two requests: {other:?}"))),
        }
    }
    Ok(())
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
    let before = echo.heard.load(Ordering::Relaxed);
    let callers = Callers::start(&lab, at);
    for _ in 0..3 {
        callers.until_more(5).await;
        stop(daemon).await;
        daemon = start(&host, passed());
    }
    callers.until_more(5).await;
    let (errors, ended) = callers.end(&echo, before).await;
    assert!(errors.is_empty(), "{errors:?}");
    assert!(ended >= 3 * CALLERS, "{ended} connections were ended in order");
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
    let before = echo.heard.load(Ordering::Relaxed);
    let callers = Callers::start(&lab, at);
    let second = start(&host, launch(&name, socket.try_clone().unwrap()));
    callers.until_more(5).await;
    let (errors, _) = callers.end(&echo, before).await;
    assert!(errors.is_empty(), "{errors:?}");
    stop(second).await;
    // The listener is not configured any more.
    std::fs::write(host.path("/etc/we-agent/we-agent.yaml"), "admin: {address: 'off'}\n").unwrap();
    let third = start(&host, telling(launch(&name, socket)));
    assert!(until("FDSTOREREMOVE=1").is_none());
    stop(third).await;
}
