//! Sockets that the service manager holds, in processes of their own: descriptors are passed by a real exec, and kept
//! through the notify socket. The test is the service manager.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use crate::{
    daemon::Daemon,
    support::{Host, SOON},
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::{
    io::{IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::time::interval;
use we_agent::systemd::{Listeners, listen};
use we_lab::{Group, Lab};

/// From one look at a log to the next.
const LOOK: Duration = Duration::from_millis(10);

/// Puts its input to where passed descriptors begin, and becomes the program that follows: as a service manager does it.
const LAUNCH: &str = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";

/// A command whose process finds `socket` as its first passed descriptor, under `name`.
pub(crate) fn launch(name: &str, socket: OwnedFd) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", LAUNCH, "sh"]).env("LISTEN_FDNAMES", name).stdin(socket);
    command
}

/// This test program again, as the server below.
fn server(mut command: Command, dir: &TempDir) -> Child {
    command.arg(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "activation::serves_in_a_process_of_its_own"]);
    command.env("SERVE_IN", dir.path()).env("NOTIFY_SOCKET", dir.path().join("notify"));
    command.stdout(Stdio::null()).spawn().unwrap()
}

/// Answers each connection with the number of its process: on the socket that it was passed or, else, on one of its own,
/// which it asks to be kept.
#[tokio::test]
#[ignore = "the other process of the tests here"]
async fn serves_in_a_process_of_its_own() {
    let Some(dir) = std::env::var_os("SERVE_IN") else { return };
    let path = Path::new(&dir).join("agent.sock");
    let listeners = Listeners::from_service_manager().unwrap();
    assert_eq!(Listeners::from_service_manager().unwrap().left().len(), 0, "taken over twice");
    let listener = listeners.take("payments").or_else(|| listeners.take_kept(&path)).unwrap_or_else(|| {
        let _ = std::fs::remove_file(&path);
        let new = tokio::net::UnixListener::bind(&path).unwrap();
        listen::keep(&path, &new);
        new
    });
    assert_eq!(listeners.left().len(), 0);
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = stream.into_std().unwrap();
        let _ = stream.set_nonblocking(false);
        let _ = write!(stream, "{}", std::process::id());
    }
}

/// What the service manager is told next, and what comes with it.
pub(crate) fn told(notify: &UnixDatagram) -> (String, Vec<OwnedFd>) {
    notify.set_read_timeout(Some(SOON)).unwrap();
    let mut bytes = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let read = recvmsg(notify, &mut [IoSliceMut::new(&mut bytes)], &mut beside, RecvFlags::CMSG_CLOEXEC).unwrap();
    let rights = beside.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights.collect::<Vec<_>>()),
        _ => None,
    });
    let rights = rights.flatten().collect();
    (String::from_utf8(bytes[..read.bytes].to_vec()).unwrap(), rights)
}

/// Connects and reads the whole answer.
fn ask(path: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(SOON))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_restart_refuses_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    let first = server(Command::new("env"), &dir);
    // What it might hold of before is not on the path any more.
    assert_eq!(told(&notify).0, format!("FDSTOREREMOVE=1\nFDNAME={}\n", path.display()));
    let (text, mut kept) = told(&notify);
    assert_eq!(text, format!("FDSTORE=1\nFDNAME={}\n", path.display()));
    let socket = kept.pop().expect("no descriptor came with it");
    assert_eq!(ask(&path).unwrap(), first.id().to_string());

    // Consumers knock all the time, while the program dies twice.
    let (done, asked) = (AtomicBool::new(false), std::sync::Mutex::new(Vec::new()));
    thread::scope(|scope| {
        let consumer = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let answer = ask(&path).map_err(|error| error.to_string());
                asked.lock().unwrap().push(answer);
            }
        });
        let until = |pid: u32| {
            let end = Instant::now() + SOON;
            while asked.lock().unwrap().last() != Some(&Ok(pid.to_string())) {
                assert!(Instant::now() < end && !consumer.is_finished(), "{pid} does not answer");
                thread::yield_now();
            }
        };
        until(first.id());
        let mut running = first;
        for _ in 0..2 {
            end(running);
            let name = path.to_str().unwrap();
            running = server(launch(name, socket.try_clone().unwrap()), &dir);
            until(running.id());
        }
        done.store(true, Ordering::Relaxed);
        consumer.join().unwrap();
        end(running);
    });
    let asked = asked.into_inner().unwrap();
    // Whom a process had accepted when it was killed got nothing; nobody was refused.
    let lost: Vec<_> = asked.iter().filter(|answer| answer.is_err()).collect();
    assert!(lost.iter().all(|answer| matches!(answer, Err(error) if !error.contains("refused"))), "{lost:?}");
    assert!(lost.len() <= 2, "{lost:?}");
}

#[test]
fn a_socket_whose_path_is_gone_is_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    let old = UnixListener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let server = server(launch(path.to_str().unwrap(), old.into()), &dir);
    // When it is found, and when there is a new one.
    for _ in 0..2 {
        assert_eq!(told(&notify).0, format!("FDSTOREREMOVE=1\nFDNAME={}\n", path.display()));
    }
    let (text, kept) = told(&notify);
    assert!(text.starts_with("FDSTORE=1\n") && kept.len() == 1, "{text}");
    assert_eq!(ask(&path).unwrap(), server.id().to_string());
    end(server);
}

#[test]
fn what_does_not_listen_on_a_unix_socket_is_of_no_use() {
    for useless in [
        OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap()),
        OwnedFd::from(UnixStream::pair().unwrap().0),
        OwnedFd::from(std::fs::File::open("/dev/null").unwrap()),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let server = server(launch("payments", useless), &dir);
        assert_eq!(told(&notify).0, "FDSTOREREMOVE=1\nFDNAME=payments\n");
        assert!(told(&notify).0.starts_with("FDSTOREREMOVE=1\n"));
        assert!(told(&notify).0.starts_with("FDSTORE=1\n"));
        assert_eq!(ask(&dir.path().join("agent.sock")).unwrap(), server.id().to_string());
        end(server);
    }
}

/// With systemd's own tool, which waits for the first connection.
#[test]
fn systemd_passes_a_socket() {
    if Command::new("systemd-socket-activate").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: no systemd-socket-activate; it is a part of systemd");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let mut command = Command::new("systemd-socket-activate");
    command.arg("--listen").arg(&path).arg("--fdname=payments").stderr(Stdio::null());
    for variable in ["SERVE_IN", "NOTIFY_SOCKET"] {
        command.arg("--setenv").arg(variable);
    }
    let server = server(command, &dir);
    let deadline = Instant::now() + SOON;
    let id = loop {
        match ask(&path) {
            Ok(id) => break id,
            // It is not bound yet, or bound and does not listen yet.
            Err(error) => assert!(Instant::now() < deadline, "it does not listen: {error}"),
        }
        thread::yield_now();
    };
    assert_eq!(id, server.id().to_string());
    end(server);
}

/// The program itself, with a socket that no workload of its has.
#[tokio::test]
async fn the_daemon_takes_sockets_over_and_says_which_nobody_serves() {
    let host = Host::new().config("admin: {address: off}\n");
    let socket = UnixListener::bind(host.path("/stray.sock")).unwrap();
    let log = host.path("/passed.log");
    let output = std::fs::File::create(&log).unwrap();
    let mut command = launch("stray", socket.into());
    command.arg(env!("CARGO_BIN_EXE_we-agent")).args(["run", "--root"]).arg(host.path("/"));
    let daemon = command.stdout(Stdio::null()).stderr(output).spawn().unwrap();
    // It has a descriptor of the socket, too.
    drop(command);
    let said = |word: &str| std::fs::read_to_string(&log).unwrap().contains(word);
    let (deadline, mut look) = (Instant::now() + SOON, interval(LOOK));
    while !said("socket=stray") {
        assert!(Instant::now() < deadline, "{}", std::fs::read_to_string(&log).unwrap());
        look.tick().await;
    }
    assert!(said("no workload serves this socket that the service manager has passed"));
    // It is held: who connects waits.
    UnixStream::connect(host.path("/stray.sock")).unwrap();
    end(daemon);
    assert!(UnixStream::connect(host.path("/stray.sock")).is_err());
}

#[tokio::test]
async fn what_cannot_be_taken_over_ends_the_daemon() {
    let host = Host::new();
    let mut command = Command::new("sh");
    command.args(["-c", "export LISTEN_PID=$$ LISTEN_FDS=7; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_we-agent"), "run"]);
    let output = command.arg("--root").arg(host.path("/")).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("LISTEN_FDS") && said.contains("unset LISTEN_PID"), "{said}");
    // Another's are not ours.
    let daemon = Daemon::start(&host, &[], &[("LISTEN_PID", "1"), ("LISTEN_FDS", "7")]);
    let (deadline, mut look) = (Instant::now() + SOON, interval(LOOK));
    while !daemon.log().contains("no bundle in") {
        assert!(Instant::now() < deadline, "{}", daemon.log());
        look.tick().await;
    }
}

/// Speaks as much HTTP/2 as it takes to be answered.
fn is_served(path: &Path) -> std::io::Result<bool> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(SOON))?;
    // The preface and empty SETTINGS (RFC 9113 3.4); SETTINGS come back.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    Ok(head[3] == 4)
}

/// The program itself, killed and started again while consumers connect.
#[tokio::test]
async fn the_daemon_gets_its_socket_back() {
    let lab = Lab::builder().group(Group::new("vms", "payments")).spawn().await.unwrap();
    let host = Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
        .config("admin: {address: off}\n");
    let path = host.path("/run/we-agent/payments/agent.sock");
    let notify = UnixDatagram::bind(host.path("/notify")).unwrap();
    let start = |mut command: Command| {
        command.args([env!("CARGO_BIN_EXE_we-agent"), "run", "--root"]).arg(host.path("/"));
        command.env("NOTIFY_SOCKET", host.path("/notify")).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    // The lab stands still meanwhile: the socket is there without it.
    let first = start(Command::new("env"));
    let stored = format!("FDSTORE=1\nFDNAME={}\n", path.display());
    let socket = loop {
        let (text, mut kept) = told(&notify);
        if text == stored {
            break kept.pop().expect("no descriptor came with it");
        }
    };
    assert!(is_served(&path).unwrap());
    end(first);
    // Nobody runs, and nobody is refused.
    let waiting = thread::spawn({
        let path = path.clone();
        move || is_served(&path).unwrap()
    });
    let second = start(launch(path.to_str().unwrap(), socket));
    assert!(waiting.join().unwrap());
    assert!(is_served(&path).unwrap());
    end(second);
}

/// The program itself, whose configuration is another one after each restart.
#[tokio::test]
async fn what_is_not_configured_any_more_is_let_go_and_what_may_come_is_kept() {
    let lab = Lab::builder().group(Group::new("vms", "payments")).spawn().await.unwrap();
    let host = Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
        .config("admin: {address: off}\nworkloads: {payments: {socket: {also: [/run/also.sock]}}}\n");
    let (own, also) = (host.path("/run/we-agent/payments/agent.sock"), host.path("/run/also.sock"));
    let notify = UnixDatagram::bind(host.path("/notify")).unwrap();
    let log = host.path("/retired.log");
    let start = |mut command: Command| {
        command.args([env!("CARGO_BIN_EXE_we-agent"), "run", "--root"]).arg(host.path("/"));
        let output = std::fs::File::options().create(true).append(true).open(&log).unwrap();
        command.env("NOTIFY_SOCKET", host.path("/notify")).stdout(Stdio::null()).stderr(output);
        command.spawn().unwrap()
    };
    let until = |word: &str, path: &Path| while told(&notify).0 != format!("{word}=1\nFDNAME={}\n", path.display()) {};
    let first = start(Command::new("env"));
    let (mut stored, mut count) = ([None, None], 0);
    while count < 2 {
        let (text, mut kept) = told(&notify);
        if let Some(i) = [&own, &also].iter().position(|path| text.ends_with(&format!("FDNAME={}\n", path.display())))
            && text.starts_with("FDSTORE=1\n")
        {
            (stored[i], count) = (kept.pop(), count + 1);
        }
    }
    let [_, Some(also_kept)] = stored else { panic!("no descriptor came with it") };
    end(first);

    // One path less, and who waits there since then is told.
    let waits = UnixStream::connect(&also).unwrap();
    std::fs::write(host.path("/etc/we-agent/we-agent.yaml"), "admin: {address: off}\n").unwrap();
    // The service manager has one descriptor, and the daemon another.
    let second = start(launch(also.to_str().unwrap(), also_kept.try_clone().unwrap()));
    // Its own socket it makes anew, for nobody has passed it.
    let (mut own_kept, mut let_go) = (None, false);
    while own_kept.is_none() || !let_go {
        let (text, mut kept) = told(&notify);
        let_go |= text.starts_with("FDSTOREREMOVE") && text.contains(also.to_str().unwrap());
        own_kept = own_kept.or(kept.pop().filter(|_| text.contains(own.to_str().unwrap())));
    }
    drop(also_kept);
    let gone = |path: &Path| {
        let end = Instant::now() + SOON;
        while path.exists() {
            assert!(Instant::now() < end, "{path:?} is still there");
        }
    };
    gone(&also);
    waits.set_read_timeout(Some(SOON)).unwrap();
    let end_of_wait = (&waits).read(&mut [0]).map_err(|error| error.kind());
    assert!(matches!(end_of_wait, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)), "{end_of_wait:?}");
    end(second);

    // The bundle is away for now.
    let (bundle, away) = (host.path("/etc/we-agent/payments"), host.path("/etc/payments"));
    std::fs::rename(&bundle, &away).unwrap();
    let passed = || launch(own.to_str().unwrap(), own_kept.as_ref().unwrap().try_clone().unwrap());
    let third = start(passed());
    let (deadline, mut look) = (Instant::now() + SOON, interval(LOOK));
    while !std::fs::read_to_string(&log).unwrap().contains("no workload serves this socket") {
        assert!(Instant::now() < deadline, "{}", std::fs::read_to_string(&log).unwrap());
        look.tick().await;
    }
    UnixStream::connect(&own).unwrap();
    end(third);

    // It is back, and has no socket.
    std::fs::rename(&away, &bundle).unwrap();
    let none = "admin: {address: off}\nworkloads: {payments: {socket: {enabled: false}}}\n";
    std::fs::write(host.path("/etc/we-agent/we-agent.yaml"), none).unwrap();
    let fourth = start(passed());
    until("FDSTOREREMOVE", &own);
    gone(&own);
    end(fourth);
}

/// A socket unit starts its service for whoever waits, and fails for good at 20 starts in 2 s (systemd.socket(5)).
#[test]
fn a_wrong_configuration_takes_its_time_where_a_socket_is_passed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("we-agent.yaml");
    std::fs::write(&file, "adminn: {}\n").unwrap();
    let run = |mut command: Command| {
        let begun = Instant::now();
        let child = command.args(["run", "--root"]).arg(dir.path()).arg("--config").arg(&file).status().unwrap();
        (child.code(), begun.elapsed())
    };
    let program = env!("CARGO_BIN_EXE_we-agent");
    let mut passed = launch("payments", UnixListener::bind(dir.path().join("agent.sock")).unwrap().into());
    passed.arg(program);
    let (code, time) = run(passed);
    assert!(code == Some(78) && time >= Duration::from_secs(1), "{code:?} after {time:?}");
    assert_eq!(run(Command::new(program)).0, Some(78));
}
