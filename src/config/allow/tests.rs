#![allow(clippy::unwrap_used)]
use crate::{
    config::Config,
    host::{Account, Allow},
};
use std::path::Path;

fn parse(allow: &str) -> Result<Vec<Allow>, String> {
    let text = format!("workloads: {{a: {{socket: {{allow: {allow}}}}}}}\n");
    let config = Config::parse(Path::new("c.yaml"), &text).map_err(|error| error.to_string())?;
    Ok(config.workload("a").socket.allow)
}

#[test]
fn a_peer_is_named_by_user_group_or_unit() {
    let name = |text: &str| Account::Name(text.to_owned());
    let expected = vec![
        Allow::User(name("envoy")),
        Allow::User(Account::Id(1337)),
        Allow::Group(name("mesh")),
        Allow::Group(Account::Id(0)),
        Allow::Unit("nginx.service".to_owned()),
        Allow::Unit("pg@15-main.service".to_owned()),
    ];
    let text =
        "[{user: envoy}, {user: 1337}, {group: mesh}, {group: 0}, {unit: nginx.service}, {unit: pg@15-main.service}]";
    assert_eq!(parse(text), Ok(expected));
    assert_eq!(parse("[]"), Ok(Vec::new()));
    assert_eq!(parse(""), Ok(Vec::new()));
}

#[test]
fn a_workload_can_be_stricter_than_the_defaults() {
    let text = "defaults: {socket: {allow: [{user: envoy}]}}\nworkloads: {a: {socket: {allow: []}}, b: {}}\n";
    let config = Config::parse(Path::new("c.yaml"), text).unwrap();
    assert_eq!(config.workload("a").socket.allow, []);
    assert_eq!(config.workload("b").socket.allow.len(), 1);
}

#[test]
fn what_lets_anybody_in_or_nobody_is_refused() {
    for (allow, says) in [
        ("envoy", "workloads.a.socket.allow must be a list"),
        ("[envoy]", "workloads.a.socket.allow[0] must be a mapping"),
        ("[{}]", "workloads.a.socket.allow[0] must say one of user, group and unit"),
        ("[{user: a, group: b}]", "workloads.a.socket.allow[0] must say one of user, group and unit"),
        ("[{user: a}, {usr: b}]", "unknown key \"usr\" in workloads.a.socket.allow[1]; known are: user, group, unit"),
        ("[{user: nobody}]", "user: \"nobody\" may be anybody"),
        ("[{group: 65534}]", "group: \"65534\" may be anybody"),
        ("[{user: 4294967295}]", "is no id"),
        ("[{user: 4294967296}]", "is neither a name nor an id"),
        ("[{user: -1}]", "is neither a name nor an id"),
        ("[{group: 'a b'}]", "is neither a name nor an id"),
        ("[{unit: nginx}]", "is no unit that processes are in; write its full name, for example nginx.service"),
        ("[{unit: nginx.socket}]", "is no unit"),
        ("[{unit: pg@.service}]", "is no unit"),
        ("[{unit: '*.service'}]", "is no unit"),
        ("[{unit: .service}]", "is no unit"),
    ] {
        let error = parse(allow).unwrap_err();
        assert!(error.contains(says), "{allow}: {error}");
    }
}
