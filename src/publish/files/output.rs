//! What an output is, as configured.

use super::{CHAIN, Content, Files, Folder, KEY, Layout, ROOTS, SingleFile};
use crate::files::{Grant, Root};
use std::path::{Path, PathBuf};

/// One item of `files.outputs`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// `format`, with `passwordFile`: what is in one file; none is `pem`, key, chain and roots in three.
    pub content: Option<Content>,
    /// `dir`; none is `/run/we-agent/<workload>`.
    pub dir: Option<PathBuf>,
    /// `name` of the file; none depends on the format. A PEM set has three names of its own.
    pub name: Option<String>,
    /// `owner`, a name or a number; only for root.
    pub owner: Option<String>,
    /// `group`, a name or a number.
    pub group: Option<String>,
    /// `mode`; none depends on format and group.
    pub mode: Option<u32>,
}

impl Output {
    /// The directory for the workload `name`.
    pub fn dir(&self, workload: &str) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| Path::new("/run/we-agent").join(workload))
    }

    /// The name of the one file; none for a PEM set.
    pub fn file_name(&self) -> Option<&str> {
        let by_default = match self.content.as_ref()? {
            Content::Combined => "combined.pem",
            Content::Pkcs12 { .. } => "identity.p12",
            Content::Trust => "trust.pem",
        };
        Some(self.name.as_deref().unwrap_or(by_default))
    }

    /// The mode of its files; `files` is `files.mode`. Who names a group wants it to read; roots are no secret.
    pub fn mode(&self, files: u32) -> u32 {
        match (self.mode, &self.content, &self.group) {
            (Some(mode), ..) => mode,
            (None, Some(Content::Trust), _) => 0o644,
            (None, _, Some(_)) => files | 0o040,
            (None, _, None) => files,
        }
    }

    /// Every path that it writes to.
    pub fn paths(&self, workload: &str) -> Vec<PathBuf> {
        let names = self.file_name().map_or_else(|| vec![KEY, CHAIN, ROOTS], |name| vec![name]);
        names.into_iter().map(|name| self.dir(workload).join(name)).collect()
    }

    /// Its files for a workload, looked up below `root`; `mode` is `files.mode`.
    pub fn files(&self, root: &Root, workload: &str, mode: u32) -> Files {
        let folder = if self.dir.is_some() { Folder::Given } else { Folder::Own };
        let layout = match (&self.content, self.file_name()) {
            (Some(content), Some(name)) => {
                Layout::Single(SingleFile { name: name.to_owned(), content: content.clone() })
            }
            _ => Layout::Generations,
        };
        let grant = Grant { owner: self.owner.clone(), group: self.group.clone(), mode: self.mode(mode) };
        Files::new(root, self.dir(workload), folder, layout, grant)
    }
}
