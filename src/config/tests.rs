#![allow(clippy::unwrap_used)]
use super::*;
use crate::publish::{Action, Content, HookSettings, StartTls, Verify};
use proptest::prelude::*;

mod ranges;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(Path::new("c.yaml"), text).map_err(|error| error.to_string())
}

#[test]
fn an_absent_file_is_the_default_unless_it_was_named() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::new(dir.path());
    assert_eq!(Config::load(&root, None).unwrap(), Config::default());
    let named = dir.path().join("mine.yaml");
    assert!(matches!(Config::load(&root, Some(&named)), Err(ConfigError::Unreadable { .. })));
    std::fs::write(&named, "startup: {readyTimeout: 5s}").unwrap();
    assert_eq!(Config::load(&root, Some(&named)).unwrap().ready_timeout, Duration::from_secs(5));
    std::fs::write(&named, "#".repeat(300_000)).unwrap();
    assert!(matches!(
        Config::load(&root, Some(&named)),
        Err(ConfigError::Unreadable { source: ReadError::TooLong(_), .. })
    ));
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_the_file() {
    let text = "\
startup:
  readyTimeout: soon
admin: {address: 0.0.0.0:15020}
defaults:
  files:
    mode: 0644
  helth: {}
  address: [10.0.0.1, nowhere]
workloads:
  Payments: {}
  orders: 7
";
    let error = parse(text).unwrap_err();
    let lines: Vec<_> = error.lines().collect();
    let begins = [
        "c.yaml:2:17: startup.readyTimeout: \"soon\" is no duration; ",
        "c.yaml:3:18: admin.address: \"0.0.0.0:15020\" is not a loopback address; ",
        "c.yaml:6:11: defaults.files.mode: \"0644\" must let the owner read, ",
        "c.yaml:7:3: unknown key \"helth\" in defaults; known are: trustDomain, ",
        "c.yaml:8:23: defaults.address: \"nowhere\" is no IP address; ",
        "c.yaml:10:3: workloads: \"Payments\" is no name of a workload; ",
        "c.yaml:11:11: workloads.orders must be a mapping",
    ];
    assert_eq!(lines.len(), begins.len(), "{error}");
    for (line, begin) in lines.iter().zip(begins) {
        assert!(line.starts_with(begin), "{line:?} does not begin with {begin:?}");
    }
}

#[test]
fn ready_is_said_before_systemd_gives_up() {
    assert!(parse("startup: {readyTimeout: 9m}").is_ok());
    let error = parse("startup: {readyTimeout: 9m 1s}").unwrap_err();
    assert!(error.contains("longer than 9m; ") && error.contains("TimeoutStartSec="), "{error}");
    let unit = include_str!("../../systemd/we-agent.service");
    assert!(unit.lines().any(|line| line == "TimeoutStartSec=10min"));
}

#[test]
fn what_is_no_yaml_names_the_place() {
    for (text, place) in [
        ("a: [1\n", "c.yaml:2:1: no YAML: "),
        ("log: &x {}\n", "c.yaml:1:9: anchors"),
        ("log: {}\nlog: {}\n", "c.yaml:2:1: key \"log\" stands already in line 1"),
        ("- a\n", "c.yaml:1:1: the file is no mapping"),
        ("log: *x\n", "c.yaml:1:6: no YAML"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.starts_with(place), "{text:?}: {error}");
    }
}

#[test]
fn a_workload_has_its_own_settings_over_the_defaults_over_ours() {
    let config = parse(
        "defaults: {network: vm, labels: {tier: back, app: x}, identity: {key: rsa-3072}}\n\
         workloads: {a: {labels: {app: a}, health: {allowExec: true}, address: fd00::7}, b: }\n",
    )
    .unwrap();
    let a = config.workload("a");
    assert_eq!(a.network.as_deref(), Some("vm"));
    assert_eq!(a.labels, BTreeMap::from([("tier".into(), "back".into()), ("app".into(), "a".into())]));
    assert!(a.health.allow_exec && a.identity.key == Some(crate::spiffe::KeyKind::Rsa3072));
    assert_eq!(a.address, ["fd00::7".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(config.workload("b"), config.workload("somebody else"));
    assert!(!config.workload("b").health.allow_exec);
    assert_eq!(config.workload_names().collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn defaults_count_wherever_they_stand() {
    let config = parse("workloads: {a: {}}\ndefaults: {network: vm}\n").unwrap();
    assert_eq!(config.workload("a").network.as_deref(), Some("vm"));
}

#[test]
fn values_are_read_in_their_units() {
    assert_eq!(value::bytes("8MiB"), Ok(8 << 20));
    assert_eq!(value::bytes("512 KiB"), Ok(512 << 10));
    assert_eq!(value::bytes("17"), Ok(17));
    for wrong in ["", "0", "MiB", "8MB", "-1", "99999999999999999999", "99999999999GiB", "½MiB"] {
        assert!(value::bytes(wrong).is_err(), "{wrong}");
    }
    assert_eq!(value::mode("0640"), Ok(0o640));
    for wrong in ["0644", "0200", "0700", "9", "01600", "rw"] {
        assert!(value::mode(wrong).is_err(), "{wrong}");
    }
    for right in ["istiod.istio-system.svc:15012", "[fd00::1]:15012", "10.0.0.1:15012"] {
        assert!(value::authority(right).is_ok(), "{right}");
    }
    assert_eq!(value::host_port("localhost:15010").as_deref(), Ok("localhost:15010"), "it is a program of this host");
    for wrong in
        ["istiod", "istiod:15010", "istiod:0", "istiod:99999", ":15012", "fd00::1:15012", "a b:1", "https://a:1"]
    {
        assert!(value::authority(wrong).is_err(), "{wrong}");
    }
    assert!(value::ttl("90days").is_ok() && value::ttl("91days").is_err() && value::ttl("900ms").is_err());
    assert_eq!(value::admin_address("off"), Ok(None));
    assert_eq!(value::admin_address("[::1]:0"), Ok(Some("[::1]:0".parse().unwrap())));
}

#[test]
fn outputs_are_a_list_of_sections_and_a_workload_has_its_own() {
    let config = parse(
        "defaults: {files: {mode: '0640', outputs: [{format: trust}]}}\n\
         workloads:\n  a:\n    files:\n      outputs:\n      - format: combined\n        dir: /etc/haproxy/certs/\n        \
         name: a.pem\n        group: haproxy\n        mode: \"0660\"\n      \
         - {format: pkcs12, passwordFile: /etc/we-agent/password, group: '4711'}\n  b: {files: {outputs: []}}\n",
    )
    .unwrap();
    let [combined, pkcs12] = &config.workload("a").files.outputs[..] else { panic!("not two") };
    assert_eq!((combined.content.clone(), combined.group.as_deref()), (Some(Content::Combined), Some("haproxy")));
    assert_eq!(combined.paths("a"), [Path::new("/etc/haproxy/certs/a.pem")]);
    assert_eq!(combined.mode(0o600), 0o660);
    assert_eq!(pkcs12.content, Some(Content::Pkcs12 { password_file: "/etc/we-agent/password".into() }));
    assert_eq!(pkcs12.paths("a"), [Path::new("/run/we-agent/a/identity.p12")]);
    assert_eq!(pkcs12.mode(0o600), 0o640, "who names a group lets it read");
    assert_eq!(config.workload("b").files.outputs, []);
    let trust = &config.workload("c").files.outputs[0];
    assert_eq!((trust.file_name(), trust.mode(0o600)), (Some("trust.pem"), 0o644));
    assert_eq!(Config::default().workload("c").files.outputs[0].content, None);
}

#[test]
fn a_socket_is_at_other_paths_of_one_workload() {
    let istio = "/var/run/secrets/workload-spiffe-uds/socket";
    let config = parse(&format!("workloads: {{a: {{socket: {{also: [{istio}, /srv/b.sock]}}}}}}\n")).unwrap();
    assert_eq!(config.workload("a").socket.also, [PathBuf::from(istio), "/srv/b.sock".into()]);
    assert!(config.workload("b").socket.also.is_empty());
    for (text, said) in [
        (format!("defaults: {{socket: {{also: {istio}}}}}"), "every workload would listen there; give it in workloads"),
        (
            format!("workloads: {{a: {{socket: {{also: {istio}}}}}, b: {{socket: {{also: {istio}}}}}}}"),
            "and so does workload a",
        ),
        (format!("workloads: {{a: {{socket: {{also: [{istio}, {istio}]}}}}}}"), "has one path twice"),
        ("workloads: {a: {socket: {also: ./socket}}}".to_owned(), "is no path that can be used here"),
        ("workloads: {a: {socket: {also: /run/we-agent/b/agent.sock}}}".to_owned(), "is of we-agent itself"),
        (format!("workloads: {{a: {{socket: {{also: /{}}}}}}}", "x".repeat(103)), "is longer than the 103 bytes"),
    ] {
        let error = parse(&text).unwrap_err();
        assert!(error.contains(said), "{text}: {error}");
    }
}

#[test]
fn mistakes_in_outputs_name_the_item_and_the_fix() {
    for (item, said) in [
        ("{dir: /srv/a}", "outputs[0] needs a format: pem, combined, pkcs12 or trust"),
        ("{format: jks}", "outputs[0].format: \"jks\" is none of pem, combined, pkcs12, trust"),
        ("{format: pkcs12}", "outputs[0] has format: pkcs12, which needs a password; put it into a file and"),
        (
            "{format: pem, passwordFile: /p}",
            "outputs[0] has a passwordFile, which is for format: pkcs12 alone; remove it",
        ),
        (
            "{format: pem, name: a.pem}",
            "outputs[0] has a name, which is for one file, and format: pem writes three; remove it",
        ),
        ("{format: trust, name: ../a}", "outputs[0].name: \"../a\" is no name for a file"),
        ("{format: trust, dir: certs}", "outputs[0].dir: \"certs\" is no path that can be used here"),
        ("{format: trust, dir: /a/../b}", "is no path that can be used here; write an absolute one without"),
        ("{format: trust, dir: /var/lib/we-agent/a}", "is of we-agent itself; leave dir out"),
        ("{format: combined, mode: '0644'}", "outputs[0].mode: \"0644\" must let the owner read"),
        ("{format: trust, mode: '0666'}", "outputs[0].mode: \"0666\" must let the owner read"),
        ("{format: trust, group: 'a:b'}", "outputs[0].group: \"a:b\" is no name or number of an account"),
        ("{format: trust, owner: '4294967295'}", "4294967294"),
        ("{format: trust, colour: red}", "unknown key \"colour\" in workloads.a.files.outputs[0]; known are: format, "),
        ("trust", "workloads.a.files.outputs[0] must be a mapping, for example {key: value}"),
        (
            "{format: trust}, {format: trust}",
            "workloads.a.files has two outputs at /run/we-agent/<workload>/trust.pem; give one of them",
        ),
        ("{format: pem}, {format: combined, name: key.pem}", "/key.pem; give one of them another name or dir"),
    ] {
        let error = parse(&format!("workloads: {{a: {{files: {{outputs: [{item}]}}}}}}\n")).unwrap_err();
        // Who is not root hears that first.
        assert!(error.contains(said) || error.contains("does not run as root"), "{item}: {error}");
        assert_eq!(error.lines().count(), 1, "{item}: {error}");
    }
    let error = parse("workloads: {a: {files: {outputs: {format: pem}}}}\n").unwrap_err();
    assert!(error.ends_with("workloads.a.files.outputs must be a list (\"- \" and keys)"), "{error}");
    assert!(value::owner_as("root", false).unwrap_err().contains("we-agent does not run as root here"));
    assert_eq!(value::owner_as("root", true).as_deref(), Ok("root"));
}

#[test]
fn no_two_workloads_write_to_the_same_place() {
    let same = "{files: {outputs: [{format: combined, dir: /srv/certs}]}}";
    let error = parse(&format!("workloads:\n  a: {same}\n  b: {same}\n")).unwrap_err();
    assert!(error.starts_with("c.yaml:3:"), "{error}");
    assert!(error.ends_with(
        "workloads.b writes to /srv/certs/combined.pem, and so does workload a; give one of them another dir"
    ));
    let error = parse(&format!("defaults: {same}\n")).unwrap_err();
    assert!(error.contains("so that every workload would write there; give it in workloads.<name>"), "{error}");
    parse("workloads: {a: {files: {outputs: [{format: trust}]}}, b: {files: {outputs: [{format: trust}]}}}").unwrap();
}

#[test]
fn a_hook_is_a_command_or_a_unit_and_may_be_verified() {
    let config = parse(
        "defaults: {hooks: [{unit: nginx.service}]}\n\
         workloads: {a: {}, b: {hooks: [{command: [pg_ctl, reload, -D, /db], deadline: 5s, \
         verify: {address: '[::1]:5432', sni: db.example.com, startTls: postgres, within: 1s}}]}}\n",
    )
    .unwrap();
    let unit = HookSettings {
        action: Action::Unit("nginx.service".to_owned()),
        deadline: Duration::from_secs(30),
        verify: None,
    };
    assert_eq!((unit.name(), config.workload("a").hooks), ("nginx.service", vec![unit.clone()]));
    let verify = Verify {
        address: "[::1]:5432".to_owned(),
        sni: Some("db.example.com".to_owned()),
        start_tls: Some(StartTls::Postgres),
        within: Duration::from_secs(1),
    };
    let command = HookSettings {
        action: Action::Command(["pg_ctl", "reload", "-D", "/db"].map(str::to_owned).to_vec()),
        deadline: Duration::from_secs(5),
        verify: Some(verify),
    };
    assert_eq!((command.name(), config.workload("b").hooks), ("pg_ctl", vec![command.clone()]));
}

#[test]
fn a_hook_needs_a_file_to_wait_for() {
    let config =
        |files: &str| parse(&format!("workloads: {{a: {{files: {{{files}}}, hooks: [{{unit: a.service}}]}}}}"));
    let error = config("outputs: []").unwrap_err();
    assert!(error.contains("workloads.a has hooks, which run after a switch of the files, and no file: "), "{error}");
    config("outputs: [], outputCerts: true").unwrap();
    config("outputs: [{format: trust}]").unwrap();
    parse("defaults: {hooks: [{unit: a.service}]}\nworkloads: {a: {files: {outputs: []}, hooks: []}}").unwrap();
}

#[test]
fn a_hook_that_does_nothing_or_two_things_is_refused() {
    let neither = "defaults.hooks[0] needs one of the two: command, a list of program and arguments, or unit, ";
    for (hook, message) in [
        ("{}", neither),
        ("{command: []}", neither),
        ("{command: ['']}", neither),
        ("{command: [true], unit: a.service}", neither),
        ("{deadline: 1s}", neither),
        ("{unit: ../../nginx.service}", "defaults.hooks[0].unit: \"../../nginx.service\" is no name of a service; "),
        ("{unit: '--now.service'}", "defaults.hooks[0].unit: \"--now.service\" is no name of a service; "),
        ("{unit: nginx}", "defaults.hooks[0].unit: \"nginx\" is no name of a service; "),
        ("{command: [true], verify: {}}", "defaults.hooks[0].verify needs address, the host:port "),
        (
            "{command: [true], verify: {address: a:1, startTls: smtp}}",
            "defaults.hooks[0].verify.startTls: \"smtp\" is ",
        ),
        ("[true]", "defaults.hooks[0] must be a mapping"),
        (
            "{command: systemctl reload nginx}",
            "defaults.hooks[0].command: \"systemctl reload nginx\" is one word with blanks in it; write a list: [systemctl, \
             reload, nginx]",
        ),
        ("{command: [true], cmd: 1}", "unknown key \"cmd\" in defaults.hooks[0]; known are: command, unit, deadline, "),
    ] {
        let error = parse(&format!("defaults: {{hooks: [{hook}]}}")).unwrap_err();
        let (_, after) = error.split_once(": ").unwrap();
        assert!(after.starts_with(message) && error.lines().count() == 1, "{hook}: {error}");
    }
}

#[test]
fn a_unit_is_reloaded_only_where_the_host_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::new(dir.path());
    let file = dir.path().join("c.yaml");
    let text = "defaults: {hooks: [{unit: a.service}]}\nworkloads:\n  w:\n    hooks: [{unit: b.service}]\n";
    std::fs::write(&file, text).unwrap();
    let error = Config::load(&root, Some(&file)).unwrap_err().to_string();
    let lines: Vec<_> = error.lines().collect();
    assert_eq!(lines.len(), 2, "{error}");
    assert!(lines[0].contains("c.yaml:1:27: unit: this host has not agreed"), "{error}");
    assert!(lines[0].contains("systemctl enable --now we-agent-reload@a.service.path"), "{error}");
    assert!(lines[1].contains("c.yaml:4:20: ") && lines[1].contains("we-agent-reload@b.service.service"), "{error}");
    let wants = dir.path().join("etc/systemd/system/paths.target.wants");
    std::fs::create_dir_all(&wants).unwrap();
    for unit in ["a", "b"] {
        std::fs::write(wants.join(format!("we-agent-reload@{unit}.service.path")), "").unwrap();
    }
    assert!(Config::load(&root, Some(&file)).is_ok());
}

#[test]
fn a_mark_of_the_byte_order_is_read_over() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "\u{feff}admin: {address: off}\n").unwrap();
    let config = Config::load(&Root::default(), Some(file.path())).unwrap();
    assert_eq!(config.admin_address, None);
}

#[test]
fn nesting_without_end_is_a_mistake_like_any_other() {
    for text in ["[".repeat(200_000), "defaults: ".to_owned() + &"{a: ".repeat(50_000)] {
        assert!(parse(&text).unwrap_err().contains("nested deeper than 64 levels"));
    }
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "[a-z:\\-\\[\\]{}&*!#|>'\"%,~?@ \n\t]{0,60}|\\PC{0,40}") {
        let _ = parse(&text);
    }

    #[test]
    fn no_mutation_of_the_example_makes_it_panic(at in 0usize..4000, with in "\\PC{0,3}|\n|  ") {
        let mut text = include_str!("../../config/we-agent.yaml").replace("\n#", "\n");
        let at = (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap();
        text.insert_str(at, &with);
        let _ = parse(&text);
    }
}
