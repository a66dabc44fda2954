//! From what is configured to what is written, and where it is served.

use crate::{
    config::{SocketConfig, WorkloadConfig},
    files::{Dir, DirError, Grant, Root},
    publish::{Content, Files, Folder, Layout, Output, Place},
    workload::Workload,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Below it, each workload has a directory.
pub(super) const RUN: &str = "/run/we-agent";

/// The files of `workload`, each with the word that status and metrics know it by.
pub(super) fn outputs(workload: &Workload, settings: &WorkloadConfig, root: &Root) -> Vec<(String, Files)> {
    let files = &settings.files;
    let mut words = BTreeMap::new();
    let mut outputs: Vec<_> = files
        .outputs
        .iter()
        .map(|output| (numbered(word(output), &mut words), output.files(root, &workload.name, files.mode)))
        .collect();
    if let Some(dir) = &workload.output_certs {
        let grant = Grant { mode: files.mode, ..Grant::default() };
        outputs.push(("output_certs".to_owned(), Files::new(root, dir, Folder::Theirs, Layout::Flat, grant)));
    }
    outputs
}

fn word(output: &Output) -> &'static str {
    match output.content {
        None => "files",
        Some(Content::Combined) => "combined",
        Some(Content::Pkcs12 { .. }) => "pkcs12",
        Some(Content::Trust) => "trust",
    }
}

/// `combined`, then `combined-2`, and so on.
fn numbered(word: &'static str, seen: &mut BTreeMap<&'static str, usize>) -> String {
    let count = seen.entry(word).and_modify(|count| *count += 1).or_insert(1);
    if *count == 1 { word.to_owned() } else { format!("{word}-{count}") }
}

/// Where the socket of a workload is, and its files if nothing else is said.
pub(super) fn own_dir(workload: &str) -> PathBuf {
    Path::new(RUN).join(workload)
}

/// Removes what `workload` has published below `/run/we-agent`. The socket of a socket unit stays, and with it the directory.
pub(super) fn remove(root: &Root, workload: &str) -> Result<(), DirError> {
    let all = match Dir::open(root, Path::new(RUN)) {
        Err(DirError::Io { errno: nix::errno::Errno::ENOENT, .. }) => return Ok(()),
        opened => opened?,
    };
    let own = match all.enter(workload) {
        Err(DirError::Io { errno: nix::errno::Errno::ENOENT, .. }) => return Ok(()),
        opened => opened?,
    };
    let (served, rest): (Vec<_>, Vec<_>) = own.names()?.into_iter().partition(|name| own.is_served(name));
    rest.iter().try_for_each(|name| own.remove(name))?;
    if served.is_empty() { all.remove(workload) } else { Ok(()) }
}

/// Where the socket of `workload` is by the configuration, each place with its name in status.
pub(super) fn configured(workload: &str, socket: &SocketConfig, root: &Root) -> impl Iterator<Item = (String, Place)> {
    let own = ("socket".to_owned(), Place::new(root, own_dir(workload), socket.group.clone()));
    let also = socket.also.iter().filter_map(|path| {
        Some((format!("socket {}", path.display()), Place::also(root, path, socket.group.clone())?))
    });
    std::iter::once(own).chain(also).filter(|_| socket.enabled)
}
