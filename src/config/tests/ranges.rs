//! What is refused at load, because it could only fail later.

use super::parse;

#[test]
fn every_duration_has_a_range() {
    let keys = [
        ("startup: {readyTimeout: @}", "9m"),
        ("defaults: {identity: {ttl: @}}", "90days"),
        ("defaults: {renewal: {minInterval: @}}", "1h"),
        ("defaults: {hooks: [{command: [a], deadline: @}]}", "1h"),
        ("defaults: {hooks: [{command: [a], verify: {address: 'a:1', within: @}}]}", "1h"),
        ("workloads: {a: {inbound: [{listen: 1, forward: 2, maxConnectionAge: @}]}}", "1year"),
        ("workloads: {a: {inbound: [{listen: 1, forward: 2, idleTimeout: @}]}}", "1year"),
        ("workloads: {a: {inbound: [{listen: 1, forward: 2, handshakeTimeout: @}]}}", "1h"),
        ("workloads: {a: {inbound: [{listen: 1, forward: 2, drainTimeout: @}]}}", "60s"),
    ];
    let (example, inbound) =
        (include_str!("../../../config/we-agent.yaml"), include_str!("../../../config/inbound.yaml"));
    let timed = |text: &str| text.matches("imeout:").count() + text.matches("Interval:").count();
    assert_eq!(timed(example) + timed(inbound), 5, "a new one belongs into the list above");
    for (text, most) in keys {
        parse(&text.replace('@', most)).unwrap();
        for (wrong, told) in [
            (format!("{most} 1s"), "is longer than"),
            ("400000000000years".to_owned(), "is longer than"),
            ("99999999999999999999s".to_owned(), "is no duration"),
            ("0s".to_owned(), "is no time at all"),
            ("1us".to_owned(), "is no time at all"),
            ("-1s".to_owned(), "is no duration"),
        ] {
            let error = parse(&text.replace('@', &wrong)).unwrap_err();
            assert!(error.contains(told), "{text} {wrong}: {error}");
        }
    }
}

#[test]
fn what_could_only_fail_later_is_refused_now() {
    for (key, told) in [
        (
            "controlPlane: {discoveryAddress: 'istiod:15010'}",
            "discoveryAddress: \"istiod:15010\" is istiod's plaintext port",
        ),
        ("controlPlane: {caAddress: 'https://ca:443'}", "caAddress: \"https://ca:443\" is a URL"),
        ("controlPlane: {discoveryAddress: '10.0.0:15012'}", "has a host that is neither"),
        ("controlPlane: {serverName: 'a b'}", "is no DNS name and no IP address"),
        ("labels: {app: 'b c'}", "labels: \"app\" has the value \"b c\", which Kubernetes refuses"),
        ("labels: {'a b': c}", "is no label key"),
        ("network: Net_1", "is no network id here"),
        ("clusterId: 'ä'", "cannot be sent as a header"),
        ("address: 0.0.0.0", "is no address that one host can have"),
        ("address: ['10.0.0.1', 'ff02::1']", "is no address that one host can have"),
        ("locality: a//b", "is no locality"),
    ] {
        let error = parse(&format!("defaults: {{{key}}}")).unwrap_err();
        assert!(error.contains(told), "{key}: {error}");
    }
    let config = parse("defaults: {locality: eu.west/z, address: '::ffff:10.0.0.1', network: '', controlPlane: {caAddress: '[fd00::1]:443'}}").unwrap();
    let one = config.workload("a");
    assert_eq!(one.locality.unwrap().region, "eu.west");
    assert_eq!(one.address, ["10.0.0.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(one.control_plane.ca_address.unwrap().host, "fd00::1");
}
