//! The program: a lab in one process, its bundle written by another.
#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
};

use serde_json::Value;

struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn lab() -> Command {
    Command::new(env!("CARGO_BIN_EXE_we-lab"))
}

#[test]
fn serve_says_where_it_is_and_bundle_leads_there() {
    let dir = tempfile::tempdir().unwrap();
    let (kept, out, port) = (dir.path().join("kept"), dir.path().join("out"), dir.path().join("port"));
    let mut serve = lab();
    serve
        .args(["serve", "--group", "vms/payments=sa", "--fault", "short-life=5s"])
        .arg("--dir")
        .arg(&kept)
        .arg("--port-file")
        .arg(&port);
    let mut serve = Served(serve.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(serve.0.stdout.take().unwrap())
        .lines()
        .map(|l| serde_json::from_str::<Value>(&l.unwrap()).unwrap());
    let address = lines.next().unwrap()["address"].as_str().unwrap().to_owned();
    assert!(address.ends_with(&format!(":{}", std::fs::read_to_string(port).unwrap())));
    assert_eq!(lines.next().unwrap()["event"], "listening");
    let bundle = lab()
        .args(["bundle", "--group", "vms/payments=sa", "--internalIP", "10.0.0.5"])
        .arg("--dir")
        .arg(&kept)
        .arg("-o")
        .arg(&out)
        .status();
    assert!(bundle.unwrap().success());
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    assert_eq!(read("root-cert.pem"), std::fs::read_to_string(kept.join("root-cert.pem")).unwrap());
    assert!(
        read("cluster.env").contains("ISTIO_SVC_IP='10.0.0.5'\n")
            && read("mesh.yaml").contains(address.rsplit(':').next().unwrap())
    );
    let mut orders = serve.0.stdin.take().unwrap();
    writeln!(orders, "heal short-life\ninject nonsense\nentries").unwrap();
    let answers: Vec<Value> = lines.by_ref().take(3).collect();
    assert_eq!(answers[0]["healed"], "short-life");
    assert!(answers[1]["error"].as_str().unwrap().contains("is no fault"));
    assert_eq!(answers[2]["entries"], Value::Array(Vec::new()));
}

#[test]
fn what_is_wrong_is_said() {
    let output = lab()
        .args(["bundle", "--group", "vms/payments", "--dir", "/nonexistent", "-o", "/nonexistent/out"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("/nonexistent/address: not read; does the lab run with --dir?"),
        "{said}"
    );
    let output = lab().args(["serve", "--group", "payments"]).stdin(Stdio::null()).output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("write it as NAMESPACE/NAME"));
}
