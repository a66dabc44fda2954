//! Bundles that a real istioctl wrote, and environment files as a real bash reads them.
//!
//! `tests/golden/bundle/<case>`: the input, the files, and in `expected.json` what bash (`set -ea; . cluster.env`) made
//! of `cluster.env` and what istioctl's own YAML library made of `mesh.yaml`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};
use we_agent::{
    bundle::{Bundle, BundleDir, Env, parse_env},
    files::Root,
    workload::{ProbeMethod, ReadinessProbe, token},
};

type Variables = BTreeMap<String, String>;

/// Environment texts that bash takes and that are refused here, with what the refusal says.
const ENV_REFUSED: [(&str, &str); 2] = [
    ("command-substitution", "is not evaluated"), // nothing is ever run
    ("crlf", "end in CR LF"),                     // bash keeps the CR in the value, and istio-agent dies of it later
];

/// Bundles that are refused although istioctl wrote a `cluster.env`: places and what is said, in order. In the first three
/// istioctl itself had stopped half-way.
const BUNDLE_REFUSED: [(&str, &[&str]); 8] = [
    ("05-by-name-no-sa", &["cluster.env:16: SERVICE_ACCOUNT: is not set"]),
    ("67-root-missing", &["root-cert.pem: the file is missing"]),
    ("87-group-no-namespace", &["root-cert.pem: the file is missing", "cluster.env:12: ISTIO_NAMESPACE: is not set"]),
    // bash would run these lines as commands; with `-e` the service never starts.
    ("45-metadata-key-dash", &["cluster.env:20: \"my-key\" begins no assignment"]),
    ("47-metadata-key-inject", &["cluster.env:1: \"A\" begins no assignment"]),
    // A mesh whose own configuration was emptied by hand; Istio's chart always sets it. It cannot be told from half a file.
    ("58-mesh-no-defaultconfig", &[NO_DISCOVERY]),
    ("60-mesh-defaultconfig-empty", &[NO_DISCOVERY]),
    ("62-mesh-unknown-fields", &[NO_DISCOVERY]),
];
const NO_DISCOVERY: &str = "mesh.yaml: has no defaultConfig.discoveryAddress";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bundle")
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn variables(env: &Env) -> Variables {
    env.iter().map(|(name, variable)| (name.to_owned(), variable.value.clone())).collect()
}

fn read(text: &str) -> Result<Variables, String> {
    parse_env(Path::new("cluster.env"), text, &Env::default())
        .map(|env| variables(&env))
        .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
}

fn recorded(env: &Value) -> Variables {
    serde_json::from_value(env.clone()).unwrap()
}

#[test]
fn environment_texts_read_as_bash_reads_them() {
    let cases = json(&golden().join("env-cases.json"));
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 59);
    let mut refused = 0;
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let ours = read(case["text"].as_str().unwrap());
        let accepted = case["bash"]["rc"] == 0;
        match (accepted, ENV_REFUSED.iter().find(|(n, _)| *n == name)) {
            (true, None) => assert_eq!(ours, Ok(recorded(&case["bash"]["env"])), "{name}"),
            (true, Some((_, said))) => {
                refused += 1;
                assert!(ours.as_ref().is_err_and(|e| e.contains(said)), "{name}: {ours:?}");
            }
            (false, _) => assert!(ours.is_err(), "{name}: bash refuses it, we read {ours:?}"),
        }
    }
    assert_eq!(refused, ENV_REFUSED.len());
}

#[test]
fn bundles_of_istioctl_are_read_or_refused_better() {
    let mut dirs: Vec<_> = fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.retain(|dir| dir.join("expected.json").exists());
    dirs.sort();
    assert_eq!(dirs.len(), 67);
    let (mut read, mut refused, mut nothing) = (0, 0, 0);
    for dir in dirs {
        let name = dir.file_name().unwrap().to_str().unwrap();
        let expected = json(&dir.join("expected.json"));
        let bundle = Bundle::read(&Root::default(), &BundleDir::directory(&dir));
        if !dir.join("cluster.env").exists() {
            // istioctl had written nothing: the files without which nothing goes are named.
            let said = bundle.unwrap_err().to_string();
            assert!(said.contains("cluster.env: the file is missing"), "{name}: {said}");
            assert!(said.contains("root-cert.pem: the file is missing"), "{name}: {said}");
            nothing += 1;
            continue;
        }
        if let Some((_, said)) = BUNDLE_REFUSED.iter().find(|(n, _)| *n == name) {
            let errors = bundle.unwrap_err().0;
            assert_eq!(errors.len(), said.len(), "{name}: {errors:?}");
            for (error, said) in errors.iter().zip(*said) {
                assert!(error.to_string().contains(said), "{name}: {error}");
            }
            refused += 1;
            continue;
        }
        let bundle = bundle.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(variables(&bundle.env), recorded(&expected["env"]), "{name}");
        same_mesh(name, &bundle, &expected["mesh"]["defaultConfig"]);
        same_hosts(name, &bundle, &dir);
        same_token(name, &dir, &expected["token"]);
        read += 1;
    }
    assert_eq!((read, refused, nothing), (42, BUNDLE_REFUSED.len(), 17));
}

/// Each recorded field is there; what else is there is a default.
fn same_mesh(name: &str, bundle: &Bundle, recorded: &Value) {
    const DEFAULTS: [&str; 11] = [
        "configPath",
        "binaryPath",
        "serviceCluster",
        "drainDuration",
        "terminationDrainDuration",
        "proxyAdminPort",
        "statusPort",
        "statNameLength",
        "controlPlaneAuthPolicy",
        "discoveryAddress",
        "proxyMetadata",
    ];
    let recorded = recorded.as_object().unwrap();
    for (field, value) in recorded {
        assert_eq!(bundle.proxy_config.get(field), Some(value), "{name}: {field}");
    }
    for field in bundle.proxy_config.keys().filter(|f| !recorded.contains_key(*f)) {
        assert!(DEFAULTS.contains(&field.as_str()), "{name}: {field} is not in mesh.yaml");
    }
    assert_eq!(bundle.probe.is_some(), recorded.contains_key("readinessProbe"), "{name}");
}

fn same_hosts(name: &str, bundle: &Bundle, dir: &Path) {
    let hosts = fs::read_to_string(dir.join("hosts")).unwrap_or_default();
    let ours: String =
        bundle.hosts.iter().flat_map(|(host, ips)| ips.iter().map(move |ip| format!("{ip} {host}\n"))).collect();
    assert_eq!(ours, hosts, "{name}");
}

fn same_token(name: &str, dir: &Path, recorded: &Value) {
    let Ok(text) = fs::read_to_string(dir.join("istio-token")) else {
        return assert!(recorded.is_null(), "{name}");
    };
    let facts = token::facts(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(facts.subject.as_deref(), recorded["sub"].as_str(), "{name}");
    assert_eq!(serde_json::json!(facts.audiences), recorded["aud"], "{name}");
    assert!(facts.expires.is_some(), "{name}");
}

#[test]
fn probes_of_istioctl_become_probes_that_can_run() {
    let host = |name: &str| Some(name.to_owned());
    let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let plain = |method| ReadinessProbe {
        initial_delay: Duration::ZERO,
        timeout: Duration::from_secs(1),
        period: Duration::from_secs(10),
        success_threshold: 1,
        failure_threshold: 1,
        method,
    };
    let full = ProbeMethod::Http {
        path: "/healthz?full=1&x=%20y".into(),
        port: 8443,
        host: host("app.internal"),
        https: true,
        headers: vec![
            header("X-A", "b"),
            header("X-A", "c"),
            header("Host", "virtual.example.com"),
            header("X-Empty", ""),
        ],
    };
    let full = ReadinessProbe {
        initial_delay: Duration::from_secs(3),
        timeout: Duration::from_secs(2),
        period: Duration::from_secs(4),
        success_threshold: 2,
        failure_threshold: 5,
        method: full,
    };
    let script = "test -f /tmp/ok && echo 'a b' \"$HOME\"\n";
    let exec = ProbeMethod::Exec { command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec() };
    let zeros = ProbeMethod::Http { path: "/".into(), port: 8080, host: None, https: false, headers: vec![] };
    for (case, probe) in [
        ("27-probe-http-full", full),
        ("28-probe-tcp-host", plain(ProbeMethod::Tcp { host: host("127.0.0.1"), port: 9090 })),
        ("29-probe-exec", plain(exec)),
        ("30-probe-grpc", plain(ProbeMethod::Grpc { port: 9090, service: "my.Service".into() })),
        ("32-probe-zeros", plain(zeros)),
    ] {
        let bundle = Bundle::read(&Root::default(), &BundleDir::directory(&golden().join(case))).unwrap();
        assert_eq!(bundle.probe, Some(probe), "{case}");
    }
}

/// Environment files made of what the reader promises to understand.
fn promised() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["A", "B", "_c", "N_1", "a9"]);
    let plain = "[A-Za-z0-9@%+=,./_!*?^#é日-]{0,6}";
    let variable = (name.clone(), 0..3, plain).prop_map(|(name, form, default)| match form {
        0 => format!("${{{name}}}"),
        1 => format!("${{{name}:-{default}}}"),
        _ => format!("${name}"),
    });
    let double = prop_oneof![
        4 => "[A-Za-z '\\n\\t~:;#&|()<>{}*!é-]{0,6}",
        1 => prop::sample::select(vec!["\\\"", "\\\\", "\\$", "\\`", "\\\n", "\\n", "\\'", "$ ", "$'"]).prop_map(str::to_owned),
        1 => variable.clone(),
    ];
    let piece = prop_oneof![
        3 => plain.prop_map(String::from),
        2 => "[^'\\x00]{0,8}".prop_map(|s| format!("'{s}'")),
        2 => prop::collection::vec(double, 0..4).prop_map(|parts| format!("\"{}\"", parts.concat())),
        1 => "[ -~]".prop_map(|c| format!("\\{c}")),
        1 => Just("\\\n".to_owned()),
        1 => variable,
        1 => prop::sample::select(vec!["$.", ":", ":~/x", ":~", "a~", "~\\x", "~'x'"]).prop_map(str::to_owned),
    ];
    // A word may begin with ~, and # or $ must not meet what follows by chance: pieces are joined with an empty quote.
    let value =
        (prop::sample::select(vec!["", "~", "~/x"]), prop::collection::vec(piece, 0..5)).prop_map(|(tilde, pieces)| {
            match (tilde, pieces.as_slice()) {
                ("", pieces) => pieces.join("''"),
                (tilde, _) => tilde.to_owned(),
            }
        });
    let assignment = (name.clone(), value).prop_map(|(name, value)| format!("{name}={value}"));
    let command = prop_oneof![
        6 => prop::collection::vec(assignment.clone(), 1..3).prop_map(|a| a.join(" ")),
        2 => prop::collection::vec(assignment, 1..3).prop_map(|a| format!("export {}", a.join("\t"))),
        1 => name.clone().prop_map(|n| format!("export {n}")),
        1 => (name.clone(), name).prop_map(|(a, b)| format!("unset {a} {b}")),
    ];
    let end = prop::sample::select(vec!["\n", " \n", "; ", ";\n", "\n\n \t", " # it's \"$(x\\\n", ";# c\r\n"]);
    prop::collection::vec((command, end), 1..8).prop_map(|commands| {
        let text: String = commands.into_iter().map(|(command, end)| command + end).collect();
        format!("HOME=/h\n{text}")
    })
}

/// Any text of a small alphabet: most are refused; what is accepted must be what bash makes of it.
fn anything() -> impl Strategy<Value = String> {
    prop::collection::vec(
        prop::sample::select(vec![
            "A", "B", "=", "=", "A=", "\nB=", "'", "\"", "\\", "\n", "\n", " ", "\t", ";", "#", "$", "${A", "}", ":-",
            "~", "/", ":", "&", "|", "(", ")", "{", "`", "!", "*", "export ", "unset ", "-", "1", "\r", "é", "+",
        ]),
        0..14,
    )
    .prop_map(|parts| parts.concat())
}

#[test]
fn generated_files_read_as_bash_reads_them() {
    let Some(bash) = ["/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash"].into_iter().find(|p| Path::new(p).exists())
    else {
        eprintln!("skipped: there is no bash");
        return;
    };
    let mut runner = TestRunner::default();
    let mut draw = |strategy: &dyn Fn(&mut TestRunner) -> String, n: usize| -> Vec<String> {
        (0..n).map(|_| strategy(&mut runner)).collect()
    };
    let (good, any) = (promised(), anything());
    let promised = draw(&|r| good.new_tree(r).unwrap().current(), 400);
    let anything = draw(&|r| any.new_tree(r).unwrap().current(), 1200);
    let accepted: Vec<_> = anything.into_iter().filter(|text| read(text).is_ok()).collect();
    assert!(accepted.len() > 50, "only {} of the arbitrary texts are accepted", accepted.len());
    let texts: Vec<_> = promised.into_iter().chain(accepted).collect();
    let real = with_bash(bash, &texts);
    for (text, (status, real)) in texts.iter().zip(real) {
        assert_eq!(read(text), Ok(real), "bash ended with {status} after:\n{text}\n---\n{text:?}");
        assert_eq!(status, "0", "{text:?}");
    }
}

/// What one bash makes of each text: its exit status and the variables that it exports. As Istio's start script does
/// it (`set -ea`), in an empty environment, each file in a subshell. Only texts that our reader accepts, or that are
/// made of nothing but assignments, come here.
fn with_bash(bash: &str, texts: &[String]) -> Vec<(String, Variables)> {
    const DRIVER: &str = "i=0; while [ -e $i.env ]; do \
        ( set -ea; . ./$i.env; set +a; exec /usr/bin/env -0 ) >$i.out 2>/dev/null </dev/null; echo $? >$i.status; i=$((i+1)); done";
    let dir = tempfile::tempdir().unwrap();
    for (i, text) in texts.iter().enumerate() {
        fs::write(dir.path().join(format!("{i}.env")), text).unwrap();
    }
    let status = Command::new(bash)
        .args(["--norc", "--noprofile", "-c", DRIVER])
        .env_clear()
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let result = |i: usize| {
        let path = |end: &str| dir.path().join(format!("{i}.{end}"));
        let out = String::from_utf8(fs::read(path("out")).unwrap()).unwrap();
        let pairs = out.split('\0').filter_map(|line| line.split_once('='));
        let own = ["PWD", "OLDPWD", "SHLVL", "_"]; // bash's own
        let variables = pairs.filter(|(k, _)| !own.contains(k)).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        (fs::read_to_string(path("status")).unwrap().trim().to_owned(), variables)
    };
    (0..texts.len()).map(result).collect()
}
