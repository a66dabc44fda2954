//! The files of one workload: `files`, and each item of `files.outputs`.

use super::{section::Section, value};
use crate::publish::{Content, Output};
use std::collections::BTreeSet;

/// The files that consumers read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilesConfig {
    /// `outputCerts`: whether the bundle's `OUTPUT_CERTS` directory is served too (no).
    pub output_certs: bool,
    /// `mode` of each file (0600) unless its output says otherwise; never for others, for one of them is the key.
    pub mode: u32,
    /// `outputs`: what is written where (one PEM set). A workload's own list replaces that of `defaults`.
    pub outputs: Vec<Output>,
}

impl Default for FilesConfig {
    fn default() -> Self {
        Self { output_certs: false, mode: 0o600, outputs: vec![Output::default()] }
    }
}

/// The word alone, before it is known whether `passwordFile` goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FormatWord {
    Pem,
    Combined,
    Pkcs12,
    Trust,
}

/// Reads one item of `files.outputs`; none when it has a mistake.
fn output(s: &mut Section<'_>) -> Option<Output> {
    let (mut word, mut password_file) = (None, None);
    s.set_some("format", output_format, &mut word);
    s.set_some("passwordFile", value::path, &mut password_file);
    let mut output = Output::default();
    s.set_some("dir", value::output_dir, &mut output.dir);
    s.set_some("name", value::file_name, &mut output.name);
    s.set_some("owner", value::owner, &mut output.owner);
    s.set_some("group", value::account, &mut output.group);
    let public = word == Some(FormatWord::Trust);
    s.set_some("mode", if public { value::public_mode } else { value::mode }, &mut output.mode);
    if s.is_wrong() {
        return None;
    }
    output.content = match (word, password_file) {
        (Some(FormatWord::Pkcs12), Some(password_file)) => Some(Content::Pkcs12 { password_file }),
        (Some(FormatWord::Pkcs12), None) => {
            s.mistake("has format: pkcs12, which needs a password; put it into a file and name that with passwordFile");
            return None;
        }
        (_, Some(_)) => {
            s.mistake("has a passwordFile, which is for format: pkcs12 alone; remove it");
            return None;
        }
        (Some(FormatWord::Combined), None) => Some(Content::Combined),
        (Some(FormatWord::Trust), None) => Some(Content::Trust),
        (Some(FormatWord::Pem), None) => None,
        (None, None) => {
            s.mistake("needs a format: pem, combined, pkcs12 or trust");
            return None;
        }
    };
    if output.content.is_none() && output.name.is_some() {
        s.mistake("has a name, which is for one file, and format: pem writes three; remove it");
    }
    Some(output)
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
        if s.list("outputs", |s| outputs.extend(output(s))) {
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
