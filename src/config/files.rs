//! The files of one workload: `files`, and each item of `files.outputs`.

use super::{section::Section, value};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// The files that consumers read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilesConfig {
    /// `outputCerts`: whether the bundle's `OUTPUT_CERTS` directory is served too (no).
    pub output_certs: bool,
    /// `mode` of each file (0600) unless its output says otherwise; never for others, for one of them is the key.
    pub mode: u32,
    /// `outputs`: what is written where (one PEM set). A workload's own list replaces that of `defaults`.
    pub outputs: Vec<OutputConfig>,
}

impl Default for FilesConfig {
    fn default() -> Self {
        Self { output_certs: false, mode: 0o600, outputs: vec![OutputConfig::new(OutputFormat::Pem)] }
    }
}

/// One item of `files.outputs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputConfig {
    /// `format`, with `passwordFile`.
    pub format: OutputFormat,
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

/// What an output holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputFormat {
    /// `pem`: key, chain and roots in three files.
    Pem,
    /// `combined`: key and chain in one file.
    Combined,
    /// `pkcs12`: key, chain and roots in one file.
    Pkcs12 {
        /// `passwordFile`: the password is its one line.
        password_file: PathBuf,
    },
    /// `trust`: the roots alone.
    Trust,
}

/// The word alone, before it is known whether `passwordFile` goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FormatWord {
    Pem,
    Combined,
    Pkcs12,
    Trust,
}

impl OutputConfig {
    fn new(format: OutputFormat) -> Self {
        Self { format, dir: None, name: None, owner: None, group: None, mode: None }
    }

    /// The directory for the workload `name`.
    pub fn dir(&self, workload: &str) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| Path::new("/run/we-agent").join(workload))
    }

    /// The name of the one file; none for a PEM set.
    pub fn file_name(&self) -> Option<&str> {
        let by_default = match self.format {
            OutputFormat::Pem => return None,
            OutputFormat::Combined => "combined.pem",
            OutputFormat::Pkcs12 { .. } => "identity.p12",
            OutputFormat::Trust => "trust.pem",
        };
        Some(self.name.as_deref().unwrap_or(by_default))
    }

    /// The mode of its files; `files` is `files.mode`. Who names a group wants it to read; roots are no secret.
    pub fn mode(&self, files: u32) -> u32 {
        match (self.mode, &self.format, &self.group) {
            (Some(mode), ..) => mode,
            (None, OutputFormat::Trust, _) => 0o644,
            (None, _, Some(_)) => files | 0o040,
            (None, _, None) => files,
        }
    }

    /// Every path that it writes to.
    pub(super) fn paths(&self, workload: &str) -> Vec<PathBuf> {
        let names =
            self.file_name().map_or_else(|| vec!["key.pem", "cert-chain.pem", "root-cert.pem"], |name| vec![name]);
        names.into_iter().map(|name| self.dir(workload).join(name)).collect()
    }

    fn read(s: &mut Section<'_>) -> Option<Self> {
        let (mut word, mut password_file) = (None, None);
        s.set_some("format", output_format, &mut word);
        s.set_some("passwordFile", value::path, &mut password_file);
        let mut output = Self::new(OutputFormat::Pem);
        s.set_some("dir", value::output_dir, &mut output.dir);
        s.set_some("name", value::file_name, &mut output.name);
        s.set_some("owner", value::owner, &mut output.owner);
        s.set_some("group", value::account, &mut output.group);
        let public = word == Some(FormatWord::Trust);
        s.set_some("mode", if public { value::public_mode } else { value::mode }, &mut output.mode);
        if s.is_wrong() {
            return None;
        }
        output.format = match (word, password_file) {
            (Some(FormatWord::Pkcs12), Some(password_file)) => OutputFormat::Pkcs12 { password_file },
            (Some(FormatWord::Pkcs12), None) => {
                s.mistake(
                    "has format: pkcs12, which needs a password; put it into a file and name that with passwordFile",
                );
                return None;
            }
            (_, Some(_)) => {
                s.mistake("has a passwordFile, which is for format: pkcs12 alone; remove it");
                return None;
            }
            (Some(FormatWord::Combined), None) => OutputFormat::Combined,
            (Some(FormatWord::Trust), None) => OutputFormat::Trust,
            (Some(FormatWord::Pem), None) => OutputFormat::Pem,
            (None, None) => {
                s.mistake("needs a format: pem, combined, pkcs12 or trust");
                return None;
            }
        };
        if output.format == OutputFormat::Pem && output.name.is_some() {
            s.mistake("has a name, which is for one file, and format: pem writes three; remove it");
        }
        Some(output)
    }
}

fn output_format(text: &str) -> Result<FormatWord, String> {
    use FormatWord::{Combined, Pem, Pkcs12, Trust};
    value::one_of(text, &[("pem", Pem), ("combined", Combined), ("pkcs12", Pkcs12), ("trust", Trust)])
}

impl FilesConfig {
    pub(super) fn read(&mut self, s: &mut Section<'_>) {
        s.set("outputCerts", value::boolean, &mut self.output_certs);
        s.set("mode", value::mode, &mut self.mode);
        let mut outputs = Vec::new();
        if s.list("outputs", |s| outputs.extend(OutputConfig::read(s))) {
            self.outputs = outputs;
        }
        let mut seen = BTreeSet::new();
        for path in self.outputs.iter().flat_map(|output| output.paths("<workload>")) {
            let told = format!("has two outputs at {}; give one of them another name or dir", path.display());
            if !seen.insert(path) {
                s.mistake(&told);
            }
        }
    }
}
