//! The log, and a reader of it that has stopped.

use crate::{
    daemon::{Daemon, we_agent},
    inbound::threads,
    support::{App, Host, SOON},
};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::Signal,
};
use serde_json::json;
use std::{
    io::{BufRead, BufReader, PipeReader},
    process::Stdio,
    sync::mpsc,
    thread,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, interval, timeout},
};
use we_agent::status::HealthState;
use we_lab::{Group, Lab};

/// How many lines of the log the daemon has dropped.
async fn dropped(host: &Host) -> u64 {
    let mut stream = UnixStream::connect(host.path("/run/we-agent/admin.sock")).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let line = answer.lines().find_map(|line| line.strip_prefix("we_agent_log_dropped_total "));
    line.expect("it is not counted").parse().unwrap()
}

/// Reads until a line has `words`, and then no more.
fn read_until(reader: &mut BufReader<PipeReader>, words: &str) {
    let found = reader.lines().map(Result::unwrap).any(|line| line.contains(words));
    assert!(found, "{words} was not said");
}

/// The application falls ill and recovers, each time to be told by the daemon, until more lines were dropped than `before`.
async fn talk_until_dropped(daemon: &Daemon<'_>, host: &Host, app: &App, before: u64) -> u64 {
    let end = Instant::now() + 4 * SOON;
    loop {
        for (healthy, state) in [(false, HealthState::Unhealthy), (true, HealthState::Healthy)] {
            app.healthy.send_replace(healthy);
            daemon.until("payments", |w| w.health.state == state && w.ready).await;
        }
        let dropped = dropped(host).await;
        if dropped > before {
            return dropped;
        }
        assert!(Instant::now() < end, "nothing is dropped");
    }
}

/// A daemon that says all it can into a pipe of one page, which is full after a few dozen lines; and who may read it.
async fn talkative(host: &Host) -> (Daemon<'_>, PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let mut command = we_agent(host);
    command.args(["run", "--log-level", "trace,h2=trace"]).stdout(Stdio::null()).stderr(writer);
    let daemon = Daemon::spawn(host, command);
    daemon.until("payments", |w| w.ready).await;
    (daemon, reader)
}

#[tokio::test]
async fn a_reader_that_has_stopped_stops_nobody() {
    let app = App::start().await;
    let probe = json!({"periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let lab = Lab::builder().group(Group::new("vms", "payments").probe(probe)).spawn().await.unwrap();
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"));
    let host = host.config("admin: {address: off}\n");
    let (daemon, reader) = talkative(&host).await;
    let first = talk_until_dropped(&daemon, &host, &app, 0).await;

    // It reads on, and is told what it has missed.
    let (reads, read) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        read_until(&mut reader, "lines of the log are missing here");
        let _ = reads.send(reader);
    });
    let reader = tokio::task::spawn_blocking(move || read.recv_timeout(SOON)).await.unwrap().expect("it is not told");

    // And stops again; a stop of the daemon is none of its business.
    talk_until_dropped(&daemon, &host, &app, first).await;
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;
    drop(reader);
}

/// Whether the daemon has a thread that writes its log.
fn writes_aside(daemon: &Daemon<'_>) -> bool {
    threads(daemon.id()).iter().any(|name| name == "log\n")
}

#[tokio::test]
async fn a_thread_writes_only_while_the_reader_is_behind() {
    let lab = Lab::builder().group(Group::new("vms", "payments")).spawn().await.unwrap();
    let host = Host::new().bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"));
    let host = host.config("admin: {address: off}\n");
    let (daemon, reader) = talkative(&host).await;
    assert!(writes_aside(&daemon));
    thread::spawn(move || BufReader::new(reader).lines().map(Result::unwrap).for_each(drop));
    let mut look = interval(Duration::from_millis(50));
    let gone = async {
        while writes_aside(&daemon) {
            look.tick().await;
        }
    };
    timeout(SOON, gone).await.expect("the log is read, and has a thread all the same");
}
