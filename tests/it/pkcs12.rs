//! Programs of others open our PKCS#12.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use crate::{
    files::{Host, ID, issue, mesh},
    outputs::{PASSWORD, pkcs12},
    readme,
};
use std::{fs, path::Path, process::Command, time::SystemTime};

/// What a program says, and whether it succeeded; none when it is not installed.
fn run(program: &str, dir: &Path, args: &[&str]) -> Option<(bool, String)> {
    let Ok(output) = Command::new(program).args(args).current_dir(dir).output() else {
        println!("skipped: {program} is not installed");
        return None;
    };
    let said = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

#[test]
fn openssl_opens_pkcs12_with_the_password_and_finds_key_chain_and_roots() {
    let (host, now) = (Host::new(), SystemTime::now());
    let (files, context) = (pkcs12(&host), issue(&mesh(), now));
    files.publish(&context, now).unwrap();
    let dir = files.path();
    let openssl = |args: &[&str]| run("openssl", &dir, args);
    let password = format!("pass:{PASSWORD}");
    let open = |args: &[&str]| openssl(&[&["pkcs12", "-in", "identity.p12", "-passin", &password], args].concat());
    let Some((good, info)) = open(&["-info", "-noout"]) else { return };
    assert!(good, "{info}");
    assert!(info.contains("MAC: sha256") && info.matches("PBES2, PBKDF2, AES-256-CBC").count() == 2, "{info}");

    let (good, leaf) = open(&["-clcerts", "-nokeys", "-out", "leaf.pem"]).unwrap();
    assert!(good, "{leaf}");
    let (good, key) = open(&["-nocerts", "-noenc", "-out", "key.pem"]).unwrap();
    assert!(good, "{key}");
    let (_, of_leaf) = openssl(&["x509", "-in", "leaf.pem", "-noout", "-pubkey"]).unwrap();
    let (_, of_key) = openssl(&["pkey", "-in", "key.pem", "-pubout"]).unwrap();
    assert!(of_leaf == of_key && of_key.contains("PUBLIC KEY"), "the key is the leaf's");
    let (_, san) = openssl(&["x509", "-in", "leaf.pem", "-noout", "-ext", "subjectAltName"]).unwrap();
    assert!(san.contains(&format!("URI:{ID}")), "{san}");
    let (_, all) = open(&["-nokeys"]).unwrap();
    assert_eq!(all.matches("BEGIN CERTIFICATE").count(), 3, "leaf, intermediate and root: {all}");

    let (good, said) = openssl(&["pkcs12", "-in", "identity.p12", "-passin", "pass:wrong", "-noout"]).unwrap();
    assert!(!good && said.contains("Mac verify error"), "{said}");
}

#[test]
fn keytool_finds_one_key_and_the_roots_to_trust() {
    let (host, now) = (Host::new(), SystemTime::now());
    let (files, context) = (pkcs12(&host), issue(&mesh(), now));
    files.publish(&context, now).unwrap();
    if run("keytool", &files.path(), &["-help"]).is_none() {
        return;
    }
    let password = host.0.path().join("etc/password").display().to_string();
    let list = readme::example_in(&files.path(), readme::PKCS12).replace("/etc/we-agent/payments.password", &password);
    let (good, said) = run("sh", &files.path(), &["-c", &list]).unwrap();
    assert!(good, "{said}");
    assert_eq!(said.matches("Entry type: PrivateKeyEntry").count(), 1, "{said}");
    assert_eq!(said.matches("Entry type: trustedCertEntry").count(), 1, "{said}");
    assert!(said.contains("Alias name: identity") && said.contains("Alias name: root-1"), "{said}");
    assert!(said.contains("Certificate chain length: 2") || said.contains("Certificate chain length: 3"), "{said}");
    assert!(said.contains(&format!("URIName: {ID}")), "{said}");
}

/// Java compiles the program itself: it takes a JDK.
#[test]
fn java_speaks_mutual_tls_with_it() {
    let (host, now) = (Host::new(), SystemTime::now());
    let files = pkcs12(&host);
    files.publish(&issue(&mesh(), now), now).unwrap();
    if run("javac", &files.path(), &["-version"]).is_none() {
        return;
    }
    let password = host.0.path().join("etc/password").display().to_string();
    let example = readme::example_in(&files.path(), readme::JAVA).replace("/etc/we-agent/payments.password", &password);
    let program = include_str!("../peers/Handshake.java").replace("/* README */", &example);
    fs::write(host.0.path().join("Handshake.java"), program).unwrap();
    let said = run("java", host.0.path(), &["Handshake.java"]).unwrap();
    assert_eq!(said, (true, format!("{ID}\n{ID}\n")));
}
