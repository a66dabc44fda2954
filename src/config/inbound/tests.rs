#![allow(clippy::unwrap_used)]
use super::*;
use crate::config::{Config, ConfigError};
use std::path::Path;

fn read(inbound: &str) -> Result<Vec<Settings>, String> {
    let text = format!("workloads: {{payments: {{inbound: {inbound}}}}}");
    match Config::parse(Path::new("we-agent.yaml"), &text) {
        Ok(config) => Ok(config.workload("payments").inbound),
        Err(error @ ConfigError::Wrong { .. }) => Err(error.to_string()),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn two_keys_are_enough() {
    let [inbound] = &read("[{listen: 8443, forward: 8080}]").unwrap()[..] else { panic!() };
    assert_eq!(inbound.listen, Listen { ip: None, port: 8443 });
    assert_eq!(inbound.forward, Local::Tcp("127.0.0.1:8080".parse().unwrap()));
    assert!(!inbound.permissive && !inbound.proxy_header && inbound.allow.is_empty() && inbound.max_age.is_none());
    assert_eq!(inbound.listen.to_string(), "8443");
}

#[test]
fn everything_can_be_said() {
    let [inbound] = &read(
        "[{listen: '[::1]:8443', forward: unix:/run/app.sock, mode: permissive, proxyProtocol: v2, maxConnectionAge: 1h, \
          idleTimeout: 5m, handshakeTimeout: 3s, maxConnections: 7, maxHandshakes: 3, drainTimeout: 2s, \
          allow: [{id: spiffe://td/ns/a/sa/b}, {namespace: a}, {serviceAccount: c, namespace: d}, {trustDomain: e.f}]}]",
    )
    .unwrap()[..] else {
        panic!()
    };
    assert_eq!(inbound.forward, Local::Unix("/run/app.sock".into()));
    assert!(inbound.permissive && inbound.proxy_header);
    assert_eq!(inbound.max_age, Some(Duration::from_secs(3600)));
    assert_eq!((inbound.idle, inbound.handshake), (Duration::from_secs(300), Duration::from_secs(3)));
    assert_eq!((inbound.max_connections, inbound.max_handshakes), (7, 3));
    assert_eq!(inbound.drain, Duration::from_secs(2));
    let parts = |td: Option<&str>, ns: Option<&str>, sa: Option<&str>| IdPattern::Parts {
        trust_domain: td.map(|td| td.parse().unwrap()),
        namespace: ns.map(str::to_owned),
        service_account: sa.map(str::to_owned),
    };
    let exact = IdPattern::Exact("spiffe://td/ns/a/sa/b".parse().unwrap());
    let others = [parts(None, Some("a"), None), parts(None, Some("d"), Some("c")), parts(Some("e.f"), None, None)];
    assert_eq!(inbound.allow, [&[exact][..], &others].concat());
}

#[test]
fn each_mistake_is_told() {
    for (inbound, told) in [
        ("[{listen: 8443}]", "must say listen"),
        ("[{listen: here, forward: 8080}]", "neither a port nor address:port"),
        ("[{listen: 8443, forward: '10.0.0.1:80'}]", "no longer encrypted"),
        ("[{listen: 8443, forward: 'unix:app.sock'}]", "absolute"),
        ("[{listen: 8443, forward: 8080, mode: maybe}]", "is none of strict, permissive"),
        ("[{listen: 8443, forward: 8080, allow: [{}]}]", "must say either id, or one or more"),
        ("[{listen: 8443, forward: 8080, allow: [{id: spiffe://td/a, namespace: b}]}]", "must say either id"),
        ("[{listen: 8443, forward: 8080, allow: [{namespace: a/b}]}]", "no name of a namespace"),
        ("[{listen: 8443, forward: 8080, maxConnections: 0}]", "is no number"),
        ("[{listen: 8443, forward: 8080, idleTimeout: 2years}]", "is longer than 1year"),
        ("[{listen: 8443, forward: 8080, drainTimeout: 2m}]", "is longer than 60s"),
        ("[{listen: '127.0.0.1:80', forward: 80}]", "forwards to itself: 127.0.0.1:80 answers at 127.0.0.1:80, too"),
        (
            "[{listen: 80, forward: 80}]",
            "forwards to itself: 80 answers at 127.0.0.1:80, too; give the application another port, or listen on the address of this",
        ),
        ("[{listen: '[::]:80', forward: '127.0.0.5:80'}]", "forwards to itself"),
        ("[{listen: '0.0.0.0:80', forward: '[::1]:80'}]", "forwards to itself"),
        ("[{listen: '[::ffff:127.0.0.1]:80', forward: 80}]", "forwards to itself"),
        ("[{listen: 80, forward: 81}, {listen: 80, forward: 82}]", "listens on 80, and so does"),
        ("[{listen: 80, forward: 81}, {listen: '10.0.0.7:80', forward: 82}]", "listens on 10.0.0.7:80, and so does"),
        ("[{listen: '10.0.0.7:80', forward: 81}, {listen: 80, forward: 82}]", "workload payments (10.0.0.7:80)"),
        ("[{listen: '[fd00::1]:80', forward: 81}, {listen: '[fd00::1]:80', forward: 82}]", "another port, or each"),
    ] {
        let error = read(inbound).unwrap_err();
        assert!(error.contains(told), "{inbound}: {error}");
    }
}

#[test]
fn one_port_can_be_had_on_several_addresses() {
    let several = "[{listen: '10.0.0.7:80', forward: 80}, {listen: '10.0.0.8:80', forward: 81}, {listen: 0, forward: 82}, \
                   {listen: 0, forward: 83}]";
    assert_eq!(read(several).unwrap().len(), 4);
}
