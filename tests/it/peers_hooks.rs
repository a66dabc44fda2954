//! Hooks with real servers: nginx, haproxy, stunnel and PostgreSQL, each in the foreground as a child of ours, take every
//! new certificate while clients connect again and again, and a hook that lies is noticed.

#![allow(clippy::print_stdout)]

use crate::{
    readme,
    rotation::{host, lab},
    support::{App, Host, Running, SOON},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid, getegid},
};
use peer::{Client, StartTls};
use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use we_agent::status::{ReloadReport, ReloadState, WorkloadReport};
use we_lab::Lab;

#[path = "peers_hooks/peer.rs"]
mod peer;

/// How many certificates each server has to take while it is called.
const ROTATIONS: usize = 3;
const TTL: &str = "8s";
const FILES: &str = "/run/we-agent/payments";
/// Every server takes our files as they are, but PostgreSQL, which runs as another user and has a copy.
const OUTPUTS: &str = "outputs: [{format: pem}, {format: combined}, {format: trust}]";

/// A program of this machine; without it the test says so and passes.
fn program(name: &str, package: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut dirs: Vec<_> = path.split(':').map(PathBuf::from).chain([PathBuf::from("/usr/sbin")]).collect();
    // Debian keeps each version of PostgreSQL apart.
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    dirs.extend(versions.map(|version| version.path().join("bin")));
    let found = dirs.into_iter().map(|dir| dir.join(name)).find(|file| file.is_file());
    if found.is_none() {
        println!("skipped: {name} is not installed; apt-get install {package}");
    }
    found
}

/// A port that was free a moment ago: these servers cannot tell which one they got.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A server, ended in the way that takes its own children with it.
struct Server {
    child: Child,
    end: Signal,
}

impl Server {
    fn start(command: &mut Command, end: Signal, log: &Path) -> Self {
        let log = fs::File::create(log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        Self { child, end }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), self.end);
        let end = Instant::now() + SOON;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > end {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A host whose files are there already, as after a first start: servers do not start without. They are good for a day.
struct Stage {
    lab: Lab,
    host: Host,
    serial: Option<String>,
    /// For the server's own things.
    dir: PathBuf,
}

impl Stage {
    async fn new() -> Self {
        let lab = lab().spawn().await.unwrap();
        let host = host(&lab).config(&format!("defaults: {{files: {{{OUTPUTS}}}}}\n"));
        let dir = host.path("/srv");
        fs::create_dir_all(&dir).unwrap();
        // PostgreSQL runs as another user.
        fs::set_permissions(host.path("/"), fs::Permissions::from_mode(0o755)).unwrap();
        let mut agent = host.start().await;
        let published = |w: &WorkloadReport| w.ready && w.files.iter().all(|output| output.serial.is_some());
        let w = agent.until("payments", "published", published).await;
        agent.stop().await;
        Self { lab, host, serial: w.files[0].serial.clone(), dir }
    }

    /// An example of the README, with the paths of here, and `here` instead of `there`.
    fn example(&self, word: &str, there: &str, here: &str) -> String {
        let example = readme::example_in(&self.host.path(FILES), word);
        assert_eq!(example.matches(there).count(), 1, "{there}: {example}");
        example.replace(there, here)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let file = self.dir.join(name);
        fs::write(&file, text).unwrap();
        file
    }

    /// Starts the agent again, with one hook, and lets it forget its certificate; the next ones are short-lived.
    async fn agent(self, command: &[&str], verify: &str) -> (Lab, Host, Running) {
        let hook = serde_json::json!({ "command": command, "deadline": "10s" }).to_string();
        let hook = format!("{}, \"verify\": {{{verify}}}}}", hook.trim_end_matches('}'));
        let identity = format!("identity: {{ttl: {TTL}}}, renewal: {{minInterval: 100ms}}");
        let config = format!("defaults: {{files: {{{OUTPUTS}}}, {identity}, hooks: [{hook}]}}\n");
        let host = self.host.config(&config);
        fs::remove_dir_all(host.path("/var/lib/we-agent/payments")).unwrap();
        let agent = host.start().await;
        (self.lab, host, agent)
    }

    /// The whole story of a server that is told by `command`: it takes each new certificate, and nobody who connects
    /// meanwhile is turned away.
    async fn rotates(self, port: u16, start_tls: Option<StartTls>, command: &[&str]) {
        let client = Client { port, dir: self.host.path(FILES), start_tls };
        client.until_served().await;
        let protocol = if start_tls.is_some() { ", startTls: postgres" } else { "" };
        let verify = format!("address: \"127.0.0.1:{port}\", sni: payments.example.com{protocol}, within: 5s");
        let (_lab, _host, mut agent) = self.agent(command, &verify).await;
        let calls = client.call_on_and_on();
        let mut serials = Vec::new();
        while serials.len() < ROTATIONS {
            let last = serials.last().cloned();
            let fresh = |w: &WorkloadReport| {
                let hook = &w.reloads[0];
                hook.state == ReloadState::Reloaded && hook.served.is_some() && hook.served != last
            };
            let w = agent.until("payments", "reloaded", fresh).await;
            serials.extend(w.reloads[0].served.clone());
        }
        let calls = calls.stop().await;
        assert_eq!(calls.lost, Vec::<String>::new(), "connections were lost, of {}", calls.served.len());
        let unseen: Vec<_> = serials.iter().filter(|serial| !calls.served.contains(serial)).collect();
        // The last one may have come after the last call.
        assert!(unseen.len() <= 1, "the agent says that {unseen:?} are served, but no client was shown them");
        println!("{} connections, none lost; serials {serials:?}", calls.served.len());
        agent.stop().await;
    }
}

fn nginx(stage: &Stage, port: u16) -> Option<(Server, String, String)> {
    let nginx = program("nginx", "nginx-light")?.display().to_string();
    let (dir, example) = (stage.dir.display(), stage.example(readme::NGINX, " 443", &format!(" 127.0.0.1:{port}")));
    let user = if Uid::effective().is_root() { "user root;" } else { "" };
    let conf = stage.write(
        "nginx.conf",
        &format!(
            "pid {dir}/nginx.pid; error_log {dir}/error.log; worker_processes 1; {user}
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u;
  scgi_temp_path {dir}/s;
  server {{
{example}
    location / {{ return 200 \"ok\"; }}
  }}
}}\n"
        ),
    );
    let conf = conf.display().to_string();
    let mut command = Command::new(&nginx);
    command.args(["-c", &conf, "-e", &format!("{dir}/error.log"), "-g", "daemon off;"]);
    Some((Server::start(&mut command, Signal::SIGTERM, &stage.dir.join("out")), nginx, conf))
}

#[tokio::test]
async fn nginx_takes_every_certificate() {
    let stage = Stage::new().await;
    let port = free_port();
    let Some((_server, nginx, conf)) = nginx(&stage, port) else { return };
    let log = stage.dir.join("error.log").display().to_string();
    stage.rotates(port, None, &[&nginx, "-c", &conf, "-e", &log, "-s", "reload"]).await;
}

#[tokio::test]
async fn a_hook_that_lies_is_noticed() {
    let stage = Stage::new().await;
    let port = free_port();
    let Some(_server) = nginx(&stage, port) else { return };
    Client { port, dir: stage.host.path(FILES), start_tls: None }.until_served().await;
    let first = stage.serial.clone();
    let verify = format!("address: \"127.0.0.1:{port}\", within: 300ms");
    let (_lab, _host, mut agent) = stage.agent(&["true"], &verify).await;
    let stale = agent.until("payments", "stale", |w| w.reloads[0].state == ReloadState::Stale).await;
    let ReloadReport { serial, served, cause, hook, .. } = &stale.reloads[0];
    assert_eq!((hook.as_str(), served), ("true", &first));
    assert!(serial.is_some() && serial != served, "{stale:?}");
    assert!(cause.as_ref().unwrap().contains("look at the log of the program"), "{cause:?}");
    assert!(stale.ready, "the workload itself is well");
    let metrics = peer::metrics(agent.admin).await;
    let line = "we_agent_reload_state{workload=\"payments\",hook=\"true\",state=\"stale\"} 1.0";
    assert!(metrics.contains(line), "{metrics}");
    agent.stop().await;
}

/// haproxy, and what makes it read its file again.
fn haproxy(stage: &Stage, port: u16) -> Option<(Server, String)> {
    let haproxy = program("haproxy", "haproxy")?;
    let (dir, example) = (stage.dir.display(), stage.example(readme::HAPROXY, " :8443", &format!(" 127.0.0.1:{port}")));
    let conf = stage.write(
        "haproxy.cfg",
        &format!(
            "global
  stats socket {dir}/admin.sock mode 600 level admin expose-fd listeners
  hard-stop-after 5s
defaults
  mode http
  timeout client 10s
  timeout server 10s
  timeout connect 2s
{example}
  http-request return status 200 content-type text/plain string ok\n"
        ),
    );
    let mut command = Command::new(&haproxy);
    command.arg("-W").arg("-f").arg(&conf);
    let server = Server::start(&mut command, Signal::SIGTERM, &stage.dir.join("out"));
    let reload = format!("set -e\n{} -c -f {}\nkill -USR2 {}\n", haproxy.display(), conf.display(), server.pid());
    Some((server, reload))
}

#[tokio::test]
async fn haproxy_takes_every_certificate() {
    let (stage, port) = (Stage::new().await, free_port());
    let Some((_server, reload)) = haproxy(&stage, port) else { return };
    let script = stage.write("reload", &reload).display().to_string();
    stage.rotates(port, None, &["/bin/sh", &script]).await;
}

#[tokio::test]
async fn haproxy_takes_every_certificate_by_its_runtime_api() {
    let Some(_socat) = program("socat", "socat") else { return };
    let (stage, port) = (Stage::new().await, free_port());
    let Some((_server, _)) = haproxy(&stage, port) else { return };
    let script = readme::example_in(&stage.host.path(FILES), readme::HAPROXY_API);
    let script = stage.write("set", &script).display().to_string();
    let socket = stage.dir.join("admin.sock").display().to_string();
    stage.rotates(port, None, &["/bin/sh", &script, &socket]).await;
}

#[tokio::test]
async fn stunnel_takes_every_certificate() {
    // At each reload stunnel closes its own sockets and opens them again: who connects in that moment is refused. Those
    // of a socket unit it keeps.
    let (Some(stunnel), Some(socket)) =
        (program("stunnel4", "stunnel4"), program("systemd-socket-activate", "systemd"))
    else {
        return;
    };
    let stage = Stage::new().await;
    let (app, port, dir) = (App::start().await, free_port(), stage.dir.display().to_string());
    let example = stage.example(readme::STUNNEL, " 8443", &format!(" 127.0.0.1:{port}"));
    let example = example.replace("127.0.0.1:8080", &format!("127.0.0.1:{}", app.port));
    let conf = stage.write("stunnel.conf", &format!("foreground = yes\npid = {dir}/pid\ndebug = warning\n{example}\n"));
    let mut command = Command::new(socket);
    command.arg(format!("--listen=127.0.0.1:{port}")).arg(stunnel).arg(conf);
    let server = Server::start(&mut command, Signal::SIGTERM, &stage.dir.join("out"));
    let reload = format!("kill -HUP {}", server.pid());
    stage.rotates(port, None, &["/bin/sh", "-c", &reload]).await;
}

#[tokio::test]
async fn postgresql_takes_every_certificate() {
    let (Some(initdb), Some(postgres)) = (program("initdb", "postgresql"), program("postgres", "postgresql")) else {
        return;
    };
    let stage = Stage::new().await;
    let (port, dir) = (free_port(), stage.dir.display().to_string());
    // It refuses to run as root.
    let root = Uid::effective().is_root();
    let (uid, gid) = if root { (65534, 65534) } else { (Uid::effective().as_raw(), getegid().as_raw()) };
    let user = |program: &Path| match root {
        false => Command::new(program),
        true => {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program);
            command
        }
    };
    std::os::unix::fs::chown(&stage.dir, Some(uid), None).unwrap();
    let example = |word| readme::example_in(&stage.host.path(FILES), word).replace("/var/lib/postgresql", &dir);
    let unit = example(readme::POSTGRESQL_COPY).replace("-o postgres -g postgres", &format!("-o {uid} -g {gid}"));
    let commands = |key: &str| -> Vec<String> {
        unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned)).collect()
    };
    let run = |script: &str| assert!(Command::new("/bin/sh").args(["-c", script]).status().unwrap().success());
    run(&commands("ExecStart").join(" && "));
    let made =
        user(&initdb).args(["-D", &format!("{dir}/db"), "-A", "trust", "-U", "t", "--no-sync"]).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let conf = format!(
        "listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
{}\n",
        example(readme::POSTGRESQL)
    );
    stage.write("db/postgresql.auto.conf", &conf);
    stage.write("db/pg_hba.conf", "hostssl all all 127.0.0.1/32 trust clientcert=verify-ca\n");
    let mut command = user(&postgres);
    command.args(["-D", &format!("{dir}/db")]).current_dir(&stage.dir);
    let server = Server::start(&mut command, Signal::SIGQUIT, &stage.host.path("/out"));
    // What systemd would do for the unit: the hook's reload of it.
    let reload = commands("ExecReload")
        .join(" && ")
        .replace("/bin/systemctl --no-block reload postgresql@15-main.service", &format!("kill -HUP {}", server.pid()));
    stage.rotates(port, Some(StartTls::Postgres), &["/bin/sh", "-c", &reload]).await;
}
