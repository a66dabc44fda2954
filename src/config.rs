//! `/etc/we-agent/we-agent.yaml`: optional, strict, read at the start, and again when we are asked to reload.
//!
//! A bundle in place is enough to run; this file only says what the bundle cannot or should not decide. An unknown key
//! is refused, and all mistakes are told at once, each with its line and column. `config/we-agent.yaml` shows every key
//! at its default; a test holds it to the code.

mod allow;
mod files;
mod hooks;
mod inbound;
mod mistake;
mod section;
mod settings;
mod value;

pub use files::FilesConfig;
pub use mistake::{ConfigError, Mistake};
pub use settings::{ControlPlaneConfig, HealthConfig, IdentityConfig, MembershipConfig, SocketConfig, WorkloadConfig};

use crate::{
    files::{ReadError, Root, read_text},
    inbound::Listen,
    telemetry::LogFilter,
    yaml,
};
use section::Section;
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

/// Where the file is unless the command line says otherwise, below the root.
pub const PATH: &str = "/etc/we-agent/we-agent.yaml";
/// More than this is no configuration, in bytes.
const MAX_SIZE: usize = 256 * 1024;

/// The whole configuration; what the file does not say is at its default.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `startup.readyTimeout`: after this long the service manager is told READY even when a workload is not (60 s), so
    /// that a dead control plane cannot block the boot; 9 min at most.
    pub ready_timeout: Duration,
    /// `admin.address`: where `/healthz/ready` and `/metrics` are served, always loopback; none means `off`.
    pub admin_address: Option<SocketAddr>,
    /// `log.level`: a level, or `target=level` pairs; the command line wins. None means `info`.
    pub log_level: Option<LogFilter>,
    defaults: WorkloadConfig,
    workloads: BTreeMap<String, WorkloadConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ready_timeout: Duration::from_secs(60),
            admin_address: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 15020))),
            log_level: None,
            defaults: WorkloadConfig::default(),
            workloads: BTreeMap::new(),
        }
    }
}

impl Config {
    /// Reads `file`, or [`PATH`] below `root`. Only the latter may be absent: then everything is at its default. What
    /// needs the consent of the host at `root` (reloading a unit) is refused without it.
    ///
    /// # Errors
    /// When the file cannot be read, or with every mistake in it.
    pub fn load(root: &Root, file: Option<&Path>) -> Result<Self, ConfigError> {
        let path = file.map_or_else(|| root.path(PATH), Path::to_owned);
        match read_text(&path, MAX_SIZE) {
            Ok(text) => Self::check(&path, &text, Some(root)),
            Err(ReadError::Missing) if file.is_none() => Ok(Self::default()),
            Err(source) => Err(ConfigError::Unreadable { file: path, source }),
        }
    }

    /// Reads `text`; `file` is only named in errors.
    ///
    /// # Errors
    /// Every mistake in it, or the place where it stops being YAML.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::check(file, text, None)
    }

    /// With a `host`, also what it must have agreed to.
    fn check(file: &Path, text: &str, host: Option<&Root>) -> Result<Self, ConfigError> {
        let wrong = |mistakes| ConfigError::Wrong { file: file.to_owned(), mistakes };
        let node = yaml::parse(text).map_err(|error| wrong(vec![error.into()]))?;
        let mut config = Self::default();
        let mut mistakes = Vec::new();
        if let Some(top) = node.as_mapping() {
            Section::read(top, "", &mut mistakes, |top| config.read(top));
            mistakes.extend(host.into_iter().flat_map(|root| hooks::without_consent(top, root)));
        }
        mistakes.sort();
        if mistakes.is_empty() { Ok(config) } else { Err(wrong(mistakes)) }
    }

    fn read(&mut self, top: &mut Section<'_>) {
        top.section("startup", |s| s.set("readyTimeout", value::ready_timeout, &mut self.ready_timeout));
        top.section("admin", |s| s.set("address", value::admin_address, &mut self.admin_address));
        top.section("log", |s| s.set_some("level", value::log_level, &mut self.log_level));
        top.section("defaults", |s| {
            self.defaults.read(s);
            if self.defaults.files.outputs.iter().any(|output| output.dir.is_some()) {
                s.mistake("has files.outputs with a dir, so that every workload would write there; give it in workloads.<name>");
            }
            if !self.defaults.socket.also.is_empty() {
                s.mistake("has socket.also, so that every workload would listen there; give it in workloads.<name>");
            }
            if !self.defaults.inbound.is_empty() {
                s.mistake("has inbound, so that every workload would listen there; give it in workloads.<name>");
            }
        });
        let (defaults, workloads) = (&self.defaults, &mut self.workloads);
        let mut taken: BTreeMap<PathBuf, String> = BTreeMap::new();
        let mut listens: Vec<(Listen, String)> = Vec::new();
        top.sections("workloads", value::workload_name, |name, s| {
            let mut workload = defaults.clone();
            workload.read(s);
            let files = workload.files.outputs.iter().flat_map(|output| output.paths(name));
            for path in files.chain(workload.socket.also.iter().cloned()) {
                if let Some(other) = taken.insert(path.clone(), name.to_owned()).filter(|other| other != name) {
                    s.mistake(&format!(
                        "writes to {}, and so does workload {other}; give one of them another dir",
                        path.display()
                    ));
                }
            }
            for listen in workload.inbound.iter().map(|inbound| inbound.listen) {
                if let Some((taken, other)) = listens.iter().find(|(taken, _)| taken.overlaps(listen)) {
                    s.mistake(&format!(
                        "listens on {listen}, and so does workload {other} ({taken}); give one of them another port, or each an \
                         address of its own"
                    ));
                }
                listens.push((listen, name.to_owned()));
            }
            workloads.insert(name.to_owned(), workload);
        });
    }

    /// The settings of the workload `name`: its own, then `defaults`, then ours.
    pub fn workload(&self, name: &str) -> WorkloadConfig {
        self.workloads.get(name).unwrap_or(&self.defaults).clone()
    }

    /// The keys that only count at the start, as far as they differ from those of `other`.
    pub fn only_at_start(&self, other: &Self) -> Vec<&'static str> {
        let differs = [
            (self.ready_timeout != other.ready_timeout, "startup.readyTimeout"),
            (self.admin_address != other.admin_address, "admin.address"),
            (self.log_level != other.log_level, "log.level"),
        ];
        differs.into_iter().filter_map(|(differs, key)| differs.then_some(key)).collect()
    }

    /// The workloads that the file names: each should have a bundle.
    pub fn workload_names(&self) -> impl Iterator<Item = &str> {
        self.workloads.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests;
