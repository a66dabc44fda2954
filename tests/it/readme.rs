//! The examples of the README's "Use the identity". Whoever tests a program takes them from here, so that what stands
//! there is what was run.

use crate::support::Host;
use std::{fs, os::unix::fs::symlink, path::Path};
use we_agent::{config::Config, files::Root};

const README: &str = include_str!("../../README.md");

/// The examples, each by words that only it has.
pub(crate) const ENVOY_CLUSTER: &str = "- name: sds-grpc";
pub(crate) const ENVOY_TLS: &str = "tls_certificate_sds_secret_configs:";
pub(crate) const PYTHON: &str = "from spiffe import";
pub(crate) const RUST: &str = "spiffe::X509Source";
pub(crate) const PKCS12: &str = "keytool";
pub(crate) const JAVA: &str = "KeyManagerFactory";
pub(crate) const RESOLVED: &str = "readlink -f";
pub(crate) const NGINX: &str = "ssl_certificate_key";
pub(crate) const HAPROXY: &str = "ssl crt";
pub(crate) const HAPROXY_API: &str = "commit ssl cert";
pub(crate) const STUNNEL: &str = "connect = 127.0.0.1:8080";
pub(crate) const POSTGRESQL: &str = "ssl_key_file";
pub(crate) const POSTGRESQL_COPY: &str = "install -o postgres";
/// Our own.
const CONFIGURATION: &str = "workloads:\n  payments:\n";
/// For systemd, which is not here: units and drop-ins.
const SYSTEMD: &str = "# /etc/systemd/system/";

/// Every block of the section: its language and its text.
fn blocks() -> impl Iterator<Item = (&'static str, &'static str)> {
    let (_, section) = README.split_once("\n## Use the identity\n").expect("no such section");
    let section = section.split("\n## ").next().unwrap_or(section);
    section.split("\n```").skip(1).step_by(2).filter_map(|block| block.split_once('\n'))
}

/// The example that has this word.
pub(crate) fn example(word: &str) -> &'static str {
    let found: Vec<_> = blocks().filter(|(_, text)| text.contains(word)).collect();
    let [(_, text)] = found[..] else { panic!("{} examples have {word}", found.len()) };
    text
}

/// The example for a workload whose files and socket are in `dir`.
pub(crate) fn example_in(dir: &Path, word: &str) -> String {
    let (there, here) = ("/run/we-agent/payments", dir.display().to_string());
    assert!(example(word).contains(there), "{word}: no path to replace");
    example(word).replace(there, &here)
}

#[test]
fn every_example_is_one_that_is_tested() {
    let taken = [ENVOY_CLUSTER, ENVOY_TLS, PYTHON, RUST, PKCS12, RESOLVED, NGINX, HAPROXY, HAPROXY_API, STUNNEL];
    let taken = [&taken[..], &[POSTGRESQL, JAVA, SYSTEMD, CONFIGURATION]].concat();
    for word in taken.iter().filter(|word| ![CONFIGURATION, SYSTEMD].contains(word)) {
        example(word);
    }
    // Without a language: what is printed or typed.
    for (language, text) in blocks().filter(|(language, _)| !language.is_empty()) {
        assert!(taken.iter().any(|word| text.contains(word)), "no test takes this {language}:\n{text}");
    }
}

#[test]
fn every_configuration_is_accepted() {
    let configurations: Vec<_> = blocks().filter(|(_, text)| text.contains(CONFIGURATION)).collect();
    assert!(configurations.len() > 3, "{configurations:?}");
    for (_, text) in configurations {
        let host = Host::new().config(text);
        let wants = host.path("/etc/systemd/system/paths.target.wants");
        fs::create_dir_all(&wants).unwrap();
        let consent = "we-agent-reload@nginx.service.path";
        symlink("/usr/lib/systemd/system/we-agent-reload@.path", wants.join(consent)).unwrap();
        Config::load(&Root::new(host.path("/")), None).unwrap_or_else(|error| panic!("{error}\n{text}"));
    }
}
