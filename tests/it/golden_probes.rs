//! The prober against recordings of istio-agent's: for each probe the same row of reports, and the probed server sees
//! the same requests. Cases that differ on purpose say so, and why.
//!
//! The recordings are real ones, from a host at 10.77.0.5 with a server at 8080–8085; here it is 127.0.0.1 with ports
//! that were free, and texts are translated. Periods are a tenth of the recorded ones: order is compared, not time.

#![allow(clippy::unwrap_used)]

mod target;

use crate::support::SOON;
use serde_json::{Value, json};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};
use target::Target;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use we_agent::{
    command::Commands,
    health::{self, ProbeSettings},
    status::{Addresses, Health},
    workload::{ProbeMethod, ReadinessProbe},
};

/// What a case does differently, on purpose.
enum Differs {
    /// Other reports than the recorded ones: here `None` is healthy, a text is unhealthy with a text that begins so.
    Reports(Vec<Option<String>>),
    /// Not comparable.
    NotApplicable,
}

/// Every difference, and its reason.
fn differs(case: &str, here: &dyn Fn(&str) -> String) -> Option<Differs> {
    let reports = |list: &[Option<&str>]| Some(Differs::Reports(list.iter().map(|r| r.map(here)).collect()));
    match case {
        // Istio's agent asks Envoy first. No Envoy runs beside ours, so its state can neither hide a healthy
        // application nor make the first report a failure that nobody's application had.
        "envoy-not-ready" => Some(Differs::NotApplicable),
        "envoy-ready" => reports(&[None, Some("status code was not from [200,400), bad code 503")]),
        // There, reports wait for Envoy's LDS request. Our verdict waits for nothing.
        "no-lds" => reports(&[None]),
        // The verdict is a fact; that each new stream hears it again is the session's work.
        "reconnect-resend" => reports(&[None]),
        // There, these crash.
        "no-method" => reports(&[]),
        "grpc-not-serving" => reports(&[Some("health rpc probe: service \"bad\" is NOT_SERVING")]),
        // There, a refused connection is noticed at the timeout only, and without its reason.
        "grpc-refused" => reports(&[Some(
            "failed to connect health check grpc service on port 9: dial tcp 10.77.0.5:9: connect: connection refused",
        )]),
        // The words of another resolver.
        "tcp-noname" => reports(&[Some("dial tcp: lookup nosuch.invalid")]),
        // There, the loopback source keeps a probe from leaving the host (`invalid argument`). Ours binds it only for
        // targets on this host, so what is refused was really asked.
        "http-redir-external" => reports(&[Some(
            "Get \"http://127.0.0.98:9/x\": dial tcp 127.0.0.6:0->127.0.0.98:9: connect: connection refused",
        )]),
        // There, certificates have been verified since 1.24, by mistake; ours are not, as in Kubernetes and as asked for.
        "https-untrusted" => reports(&[None]),
        _ => None,
    }
}

fn probe(spec: &Value, here: &dyn Fn(&str) -> String, port: &dyn Fn(u64) -> u16) -> Option<ReadinessProbe> {
    let seconds = |field: &str, default: u64| spec[field].as_u64().filter(|n| *n > 0).unwrap_or(default);
    let count = |field: &str| u32::try_from(seconds(field, 1)).unwrap();
    let text = |value: &Value| value.as_str().map(here);
    let method = if let Some(get) = spec.get("httpGet") {
        let header = |h: &Value| (h["name"].as_str().unwrap().to_owned(), h["value"].as_str().unwrap().to_owned());
        ProbeMethod::Http {
            path: text(&get["path"]).unwrap_or_else(|| "/".to_owned()),
            port: port(get["port"].as_u64().unwrap()),
            host: text(&get["host"]),
            https: get["scheme"] == "HTTPS",
            headers: get["httpHeaders"].as_array().into_iter().flatten().map(header).collect(),
        }
    } else if let Some(tcp) = spec.get("tcpSocket") {
        ProbeMethod::Tcp { host: text(&tcp["host"]), port: port(tcp["port"].as_u64().unwrap()) }
    } else if let Some(exec) = spec.get("exec") {
        ProbeMethod::Exec { command: exec["command"].as_array().unwrap().iter().filter_map(text).collect() }
    } else {
        let grpc = spec.get("grpc")?;
        let service = grpc["service"].as_str().unwrap_or_default().to_owned();
        ProbeMethod::Grpc { port: port(grpc["port"].as_u64().unwrap()), service }
    };
    Some(ReadinessProbe {
        initial_delay: Duration::from_millis(100 * seconds("initialDelaySeconds", 0)),
        timeout: Duration::from_secs(seconds("timeoutSeconds", 1)),
        period: Duration::from_millis(100 * seconds("periodSeconds", 10)),
        success_threshold: count("successThreshold"),
        failure_threshold: count("failureThreshold"),
        method,
    })
}

/// A recorded text as it would be here.
fn translate(text: &str, ports: &[(u16, u16)], dir: &str) -> String {
    let mut text = text
        .replace("http://10.77.0.99/", "http://127.0.0.98:9/")
        .replace("10.77.0.99", "127.0.0.99")
        .replace("10.77.0.5", "127.0.0.1")
        .replace("app.internal", "app.localhost")
        .replace("discovery.example.com", "discovery.localhost")
        .replace("exec.out", &format!("{dir}/exec.out"))
        .replace("child.pid", &format!("{dir}/child.pid"));
    for (recorded, port) in ports {
        for before in [":", "port "] {
            for after in ["/", ":", "\"", " "] {
                text = text.replace(&format!("{before}{recorded}{after}"), &format!("{before}{port}{after}"));
            }
        }
        if let Some(start) = text.strip_suffix(&format!(":{recorded}")) {
            text = format!("{start}:{port}");
        }
    }
    text
}

/// What is compared of an event; none for those that are not.
fn essence(event: &Value, here: &dyn Fn(&str) -> String) -> Option<Value> {
    let peer = event["peer"].as_str()?.parse().map_or_else(
        |_| event["peer"].as_str().unwrap().rsplit_once(':').unwrap().0.to_owned(),
        |ip: std::net::IpAddr| ip.to_string(),
    );
    let text = |value: &Value| value.as_str().map(here);
    let peer = here(&peer);
    match event["ev"].as_str()? {
        "http" => {
            let mut headers = event["headers"].clone();
            if let Some(referer) = text(&headers["Referer"][0]) {
                headers["Referer"][0] = json!(referer);
            }
            Some(json!(["http", text(&event["uri"]), text(&event["host"]), headers, peer]))
        }
        "grpc" => {
            let md = &event["md"];
            // `istio-probe/1.0`, there followed by the version of grpc-go.
            let agent = md["user-agent"][0].as_str()?.split(' ').next();
            let authority = text(&md[":authority"][0]);
            Some(json!(["grpc", event["deadline"], authority, md["content-type"], agent, event["req"], peer]))
        }
        "https_hello" => Some(json!(["https_hello", text(&event["sni"]), peer])),
        "tcp" => Some(json!(["tcp", event["read"], peer])),
        "blackhole" => Some(json!(["blackhole", peer])),
        _ => None,
    }
}

async fn play(case: String, recording: Value, commands: Commands) {
    let (target, dir) = (Target::start().await, tempfile::tempdir().unwrap());
    // Commands write there, as whoever runs them.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let dir_name = dir.path().display().to_string();
    let here = |text: &str| translate(text, &target.ports, &dir_name);
    let port = |recorded: u64| target.ports.iter().find(|(r, _)| u64::from(*r) == recorded).unwrap().1;

    let recorded = recording["health_messages"].as_array().unwrap().iter();
    let mut expected: Vec<_> = recorded.map(|m| m["error_detail"]["message"].as_str().map(here)).collect();
    let mut exact = true;
    match differs(&case, &here) {
        Some(Differs::NotApplicable) => return,
        Some(Differs::Reports(reports)) => (expected, exact) = (reports, false),
        None => {}
    }
    let of = |events: &[Value]| events.iter().filter_map(|e| essence(e, &here)).collect::<Vec<_>>();
    let requests = match case.as_str() {
        "https-untrusted" => vec![], // the recorded ones stopped at the handshake
        _ => of(recording["target_saw"].as_array().unwrap()),
    };

    let mut probe = probe(&recording["probe"], &here, &port);
    // Where no report is about time and gRPC's server is not told it, the timeout is of no matter but to a busy machine.
    let timed = |report: &String| report.contains("timeout") || report.contains("exceeded");
    if let Some(probe) = probe.as_mut().filter(|_| !expected.iter().flatten().any(timed))
        && !matches!(probe.method, ProbeMethod::Grpc { .. })
    {
        probe.timeout = SOON;
    }
    let given = recording["extra_env"].as_str().unwrap();
    let primary = if given.contains("203.0.113.7") { "203.0.113.7" } else { "127.0.0.1" };
    let settings = ProbeSettings {
        allow_exec: true,
        commands,
        verify_tls: false,
        localhost: given.contains("REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION=true"),
        detours: Vec::new(),
    };
    let addresses = Addresses { primary: Some(primary.parse().unwrap()), ..Addresses::default() };
    let (_addresses, addresses) = watch::channel(addresses);
    let (fact, mut verdict) = watch::channel(Health::Unknown);
    let shutdown = CancellationToken::new();
    let mut loops = JoinSet::new();
    loops.spawn(health::run(probe, settings, addresses, fact, shutdown.clone()));

    let mut reports = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    while reports.len() < expected.len() || of(&target.seen()).len() < requests.len() {
        tokio::select! {
            changed = verdict.changed() => {
                changed.unwrap();
                match &*verdict.borrow_and_update() {
                    Health::Healthy => reports.push(None),
                    Health::Unhealthy { message } => reports.push(Some(message.clone())),
                    Health::Unknown | Health::Delayed { .. } => {} // these are not reported
                    other => panic!("{case}: {other:?}"),
                }
            }
            () = sleep(Duration::from_millis(20)) => {}
        }
        assert!(Instant::now() < deadline, "{case}: {reports:?}, expected {expected:?}; saw {:?}", of(&target.seen()));
    }
    shutdown.cancel();
    loops.join_next().await.unwrap().unwrap();

    let same = reports.len() == expected.len()
        && reports.iter().zip(&expected).all(|pair| match pair {
            (Some(got), Some(wanted)) => got == wanted || (!exact && got.starts_with(wanted)),
            (got, wanted) => got == wanted,
        });
    assert!(same, "{case}: got {reports:#?}, expected {expected:#?}");
    let seen = of(&target.seen());
    for (i, (got, wanted)) in seen.iter().zip(&requests).enumerate() {
        assert_eq!(got, wanted, "{case}: request {i}");
    }
    // No connection is kept, be the server ever so silent.
    for wanted in ["tcp", "blackhole"] {
        while target.seen().iter().any(|e| e["ev"] == wanted && e["closed"] != true) {
            assert!(Instant::now() < deadline, "{case}: a connection is still open");
            sleep(Duration::from_millis(5)).await;
        }
    }
    if let Ok(pid) = fs::read_to_string(dir.path().join("child.pid")) {
        let stat = format!("/proc/{}/stat", pid.trim());
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < deadline, "{case}: the command's child lives");
            sleep(Duration::from_millis(5)).await;
        }
    }
    if let Ok(seen) = fs::read_to_string(dir.path().join("exec.out")) {
        let foreign = seen.lines().find(|line| line.starts_with("CARGO") || line.starts_with("HOME="));
        assert_eq!(foreign, None, "{case}: the command saw our environment");
    }
}

#[tokio::test]
async fn every_recorded_probe() {
    assert_eq!(play_all(|_| true, &Commands::Direct).await, 45);
}

/// Plays the recordings of exec probes, and says how many there are.
pub(crate) async fn every_recorded_command(commands: &Commands) -> usize {
    play_all(|case| case.starts_with("exec-"), commands).await
}

async fn play_all(wanted: impl Fn(&str) -> bool, commands: &Commands) -> usize {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bundle/probes");
    let mut cases = JoinSet::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let case = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if wanted(&case) {
            let recording = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            cases.spawn(play(case, recording, commands.clone()));
        }
    }
    let count = cases.len();
    while let Some(ended) = cases.join_next().await {
        ended.unwrap();
    }
    count
}
