//! The files of a bundle, as somebody else may have written them.

use super::{Bundle, BundleDir, Env, env, mesh};
use crate::{
    files::Root,
    workload::{HostFacts, Overrides},
};
use std::{fs, io, path::Path};

/// Between the files in the input of [`bundle`].
const NEXT: &str = "\n---8<---\n";
const ROOTS: &str = include_str!("../../tests/golden/bundle/66-mesh-multiroot/root-cert.pem");

/// `cluster.env`.
pub(crate) fn env(text: &str) {
    let read = env::parse(Path::new("cluster.env"), text, &Env::default());
    read.map(drop).unwrap_or_else(|errors| errors.iter().for_each(|error| drop(error.problem.to_string())));
}

/// `mesh.yaml`, and the variable that is laid over it.
pub(crate) fn mesh(text: &str) {
    let layers = [mesh::mesh_config("mesh.yaml", text), mesh::proxy_config("PROXY_CONFIG", text)];
    let mut read = Vec::new();
    for layer in layers {
        layer.map(|layer| read.push(layer)).unwrap_or_else(|mistake| drop(mistake.to_string()));
    }
    mesh::merge(read).1.iter().for_each(|mistake| drop(mistake.to_string()));
}

/// `hosts`.
pub(crate) fn hosts(text: &str) {
    let read = super::hosts::parse("hosts", text);
    read.map(drop).unwrap_or_else(|mistakes| mistakes.iter().for_each(|mistake| drop(mistake.to_string())));
}

/// All of them, with good roots: what they mean together.
pub(crate) fn bundle(text: &str) -> io::Result<()> {
    let (dir, root) = (tempfile::tempdir()?, Root::new("/"));
    for (file, text) in ["cluster.env", "mesh.yaml", "hosts"].iter().zip(text.split(NEXT)) {
        fs::write(dir.path().join(file), text)?;
    }
    fs::write(dir.path().join("root-cert.pem"), ROOTS)?;
    let workload = Bundle::read(&root, &BundleDir::directory(dir.path())).and_then(|bundle| {
        let host = HostFacts { host_name: "vm1".to_owned() };
        bundle.workload("payments", &Overrides::default(), &host)
    });
    match workload {
        Ok(workload) => drop(workload.node(&[], None, true)),
        Err(errors) => drop(errors.to_string()),
    }
    Ok(())
}
