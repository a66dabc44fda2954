//! The generated protocol code is committed, so that nobody needs a protobuf compiler; this test keeps it fresh.
//! After a change of a `.proto` file: `WE_AGENT_REGENERATE=1 cargo test --test it generated`.

use prost_build::Config;
use std::{error::Error, fs, path::Path};

#[test]
fn protocol_code_is_fresh() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The agent is a client of all services of which it has a stub, and the lab the server.
    for (dir, server) in [("src/proto", false), ("tests/lab/src/proto", true)] {
        fresh(&root.join(dir), server)?;
    }
    Ok(())
}

fn fresh(dir: &Path, server: bool) -> Result<(), Box<dyn Error>> {
    let mut protos: Vec<_> = fs::read_dir(dir)?
        .filter_map(Result::ok)
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|x| x == "proto"))
        .collect();
    protos.sort();
    let out = tempfile::tempdir()?;
    let mut config = Config::new();
    config.out_dir(out.path()).include_file("mod.rs").bytes([".envoy.service.secret.v3"]);
    // What can hold a private key has no Debug: nothing can print it by accident.
    config.skip_debug([
        ".envoy.service.secret.v3",
        ".envoy.extensions.transport_sockets.tls.v3",
        ".X509SVID",
        ".X509SVIDResponse",
    ]);
    let stubs = tonic_prost_build::configure().build_client(!server).build_server(server).build_transport(false);
    config.service_generator(stubs.service_generator());
    config.compile_fds(protox::compile(&protos, [dir])?)?;
    let committed = dir.join("gen");
    if std::env::var_os("WE_AGENT_REGENERATE").is_some() {
        fs::create_dir_all(&committed)?;
        for entry in fs::read_dir(out.path())? {
            let entry = entry?;
            fs::copy(entry.path(), committed.join(entry.file_name()))?;
        }
    }
    for entry in fs::read_dir(out.path())? {
        let entry = entry?;
        let name = entry.file_name();
        let fresh = fs::read_to_string(entry.path())?;
        let kept = fs::read_to_string(committed.join(&name)).unwrap_or_default();
        assert!(
            fresh == kept,
            "{}/gen/{} is stale: WE_AGENT_REGENERATE=1 cargo test --test it generated",
            dir.display(),
            name.display()
        );
    }
    Ok(())
}
