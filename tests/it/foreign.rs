//! Whatever stands where a file of a bundle should be costs that bundle an error, and nobody else anything.

use crate::support::{Host, Running};
use nix::{sys::stat::Mode, unistd::mkfifo};
use std::{fs, os::unix::fs::symlink, path::Path, time::Duration};
use we_agent::status::WorkloadReport;
use we_lab::{Group, Lab};

const FILES: [&str; 5] = ["cluster.env", "mesh.yaml", "root-cert.pem", "hosts", "istio-token"];

async fn lab(names: &[&str]) -> Lab {
    let mut lab = Lab::builder();
    for name in names {
        lab = lab.group(Group::new("vms", name).service_account(&format!("{name}-sa")));
    }
    lab.spawn().await.unwrap()
}

/// A host with one bundle for each name.
fn host(lab: &Lab, names: &[&str]) -> Host {
    names.iter().fold(Host::new(), |host, name| host.bundle(name, &lab.bundle("vms", name).internal_ip("127.0.0.1")))
}

fn pipe(path: &Path) {
    fs::remove_file(path).unwrap();
    mkfifo(path, Mode::S_IRWXU).unwrap();
}

/// Waits until that file of the workload is complained about in these words.
async fn told(agent: &mut Running, name: &str, file: &str, words: &str) -> WorkloadReport {
    let says = |w: &WorkloadReport| {
        let mut said = w.broken.iter().chain(&w.identity.cause).chain(&w.cause);
        said.any(|line| line.contains(&format!("{name}/{file}")) && line.contains(words))
    };
    agent.until(name, &format!("told of {file} ({words})"), says).await
}

#[tokio::test]
async fn a_pipe_as_any_of_the_five_files_disturbs_nobody() {
    let names = ["w0", "w1", "w2", "w3", "w4", "healthy"];
    let lab = lab(&names).await;
    let host = host(&lab, &names);
    for (name, file) in names.iter().zip(FILES) {
        pipe(&host.path(&format!("/etc/we-agent/{name}/{file}")));
    }
    let mut agent = host.start().await;
    agent.ready("healthy").await;
    for (name, file) in names.iter().zip(FILES) {
        told(&mut agent, name, file, "is no regular file: put the file itself there").await;
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_token_without_end_costs_no_memory() {
    let names = ["endless", "huge", "healthy"];
    let lab = lab(&names).await;
    let host = host(&lab, &names);
    let token = |name: &str| host.path(&format!("/etc/we-agent/{name}/istio-token"));
    fs::remove_file(token("endless")).unwrap();
    symlink("/dev/zero", token("endless")).unwrap();
    fs::write(token("huge"), vec![b'x'; 1 << 20]).unwrap();
    let mut agent = host.start().await;
    agent.ready("healthy").await;
    told(&mut agent, "endless", "istio-token", "is no regular file").await;
    told(&mut agent, "huge", "istio-token", "is longer than 65536 bytes").await;
    // Mended, it is used.
    for name in ["endless", "huge"] {
        fs::remove_file(token(name)).unwrap();
        let good = lab.token("vms", &format!("{name}-sa"), Duration::from_secs(600)).unwrap();
        fs::write(token(name), good).unwrap();
        agent.ready(name).await;
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_pipe_beside_a_running_workload_stops_nothing() {
    let names = ["piped", "healthy"];
    let lab = lab(&names).await;
    let host = host(&lab, &names).config("defaults: {renewal: {minInterval: 100ms}, identity: {removeToken: true}}");
    // The store cannot be made, so that the token stays wanted, and is looked at again and again.
    fs::create_dir_all(host.path("/var/lib/we-agent")).unwrap();
    fs::write(host.path("/var/lib/we-agent/piped"), "").unwrap();
    let mut agent = host.start().await;
    agent.until("piped", "valid", |w| w.identity.serial.is_some()).await;
    for file in FILES {
        pipe(&host.path(&format!("/etc/we-agent/piped/{file}")));
    }
    agent.ready("healthy").await;
    agent.until("healthy", "published", |w| w.files.iter().all(|f| f.serial == w.identity.serial)).await;
    agent.stop().await;
}
