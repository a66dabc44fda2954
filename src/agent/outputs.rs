//! From what is configured to what is written.

use crate::{
    config::{OutputConfig, OutputFormat, WorkloadConfig},
    publish::{Content, Files, Folder, Layout, SingleFile},
    system::{Grant, Root},
    workload::Workload,
};
use std::collections::BTreeMap;

/// The files of `workload`, each with the word that status and metrics know it by.
pub(super) fn outputs(workload: &Workload, settings: &WorkloadConfig, root: &Root) -> Vec<(String, Files)> {
    let files = &settings.files;
    let grant = |output: &OutputConfig| Grant {
        owner: output.owner.clone(),
        group: output.group.clone(),
        mode: output.mode(files.mode),
    };
    let mut words = BTreeMap::new();
    let mut outputs: Vec<_> = files
        .outputs
        .iter()
        .map(|output| {
            let folder = if output.dir.is_some() { Folder::Given } else { Folder::Own };
            let files = Files::new(root, output.dir(&workload.name), folder, layout(output), grant(output));
            (numbered(word(output), &mut words), files)
        })
        .collect();
    if let Some(dir) = workload.output_certs.as_ref().filter(|_| files.output_certs) {
        let grant = Grant { mode: files.mode, ..Grant::default() };
        outputs.push(("output_certs".to_owned(), Files::new(root, dir, Folder::Theirs, Layout::Flat, grant)));
    }
    outputs
}

fn layout(output: &OutputConfig) -> Layout {
    let content = match &output.format {
        OutputFormat::Pem => return Layout::Generations,
        OutputFormat::Combined => Content::Combined,
        OutputFormat::Pkcs12 { password_file } => Content::Pkcs12 { password_file: password_file.clone() },
        OutputFormat::Trust => Content::Trust,
    };
    Layout::Single(SingleFile { name: output.file_name().unwrap_or_default().to_owned(), content })
}

fn word(output: &OutputConfig) -> &'static str {
    match output.format {
        OutputFormat::Pem => "files",
        OutputFormat::Combined => "combined",
        OutputFormat::Pkcs12 { .. } => "pkcs12",
        OutputFormat::Trust => "trust",
    }
}

/// `combined`, then `combined-2`, and so on.
fn numbered(word: &'static str, seen: &mut BTreeMap<&'static str, usize>) -> String {
    let count = seen.entry(word).and_modify(|count| *count += 1).or_insert(1);
    if *count == 1 { word.to_owned() } else { format!("{word}-{count}") }
}
