//! Our own configuration as it is in force, and whether the file on the disk says the same.

use crate::{
    config::{Config, ConfigError, PATH},
    files::{Root, Stamp},
};
use std::path::PathBuf;

/// The configuration in force.
#[derive(Debug)]
pub(super) struct Settings {
    root: Root,
    /// As the command line gives it.
    file: Option<PathBuf>,
    config: Config,
    seen: Option<Stamp>,
    note: Option<String>,
}

impl Settings {
    /// `config` as it was read from `file`, or from its usual place below `root`.
    pub(super) fn new(root: &Root, file: Option<PathBuf>, config: Config) -> Self {
        let mut settings = Self { root: root.clone(), file, config, seen: None, note: None };
        settings.seen = settings.stamp();
        settings
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// What is to be said of the file: that it is not what is in force.
    pub(super) fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    fn stamp(&self) -> Option<Stamp> {
        Stamp::of(&self.path())
    }

    fn path(&self) -> PathBuf {
        self.file.clone().unwrap_or_else(|| self.root.path(PATH))
    }

    /// Whether the file is still the one in force; it is only read when it is another than at the last look.
    pub(super) fn look(&mut self) {
        let stamp = self.stamp();
        if stamp == self.seen {
            return;
        }
        self.seen = stamp;
        let path = self.path();
        self.note = match Config::load(&self.root, self.file.as_deref()) {
            Ok(config) if config == self.config => None,
            Ok(_) => Some(format!(
                "{} has changed and is not in force: \"systemctl reload we-agent\" (or \"we-agent reload\") takes it",
                path.display()
            )),
            Err(error) => Some(format!(
                "{} has changed and cannot be used, so the one of before is in force: {}",
                path.display(),
                one_line(&error)
            )),
        };
    }

    /// Reads the file again. What is valid is in force from now on, but for what is only read at the start, which is said.
    ///
    /// # Errors
    /// Every mistake in it. Everything stays then.
    pub(super) fn reload(&mut self) -> Result<String, ConfigError> {
        self.seen = self.stamp();
        let config = Config::load(&self.root, self.file.as_deref()).inspect_err(|error| {
            let note = format!("{} was not taken, so the one of before is in force", self.path().display());
            tracing::error!(cause = one_line(error), "{note}");
            self.note = Some(format!("{note}: {}", one_line(error)));
        })?;
        let late = config.only_at_start(&self.config);
        self.config = config;
        let path = self.path();
        self.note = (!late.is_empty()).then(|| {
            format!(
                "{} has another {}, which is read at the start: restart we-agent",
                path.display(),
                late.join(" and ")
            )
        });
        let said = self.note.clone().unwrap_or_else(|| format!("{} is in force", path.display()));
        tracing::info!("reloaded: {said}");
        Ok(said)
    }
}

fn one_line(error: &ConfigError) -> String {
    error.to_string().replace('\n', "; ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs;

    #[test]
    fn a_file_that_is_not_in_force_is_said_to_be_so() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        let file = root.path(PATH);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let write = |text: &str| fs::write(&file, text).unwrap();
        write("defaults: {network: one}\n");
        let mut settings = Settings::new(&root, None, Config::load(&root, None).unwrap());
        let note = |settings: &mut Settings| {
            settings.look();
            settings.note().map(str::to_owned).unwrap_or_default()
        };
        assert_eq!(note(&mut settings), "");
        write("defaults: {network: another}\n");
        assert!(note(&mut settings).contains("is not in force: \"systemctl reload we-agent\""));
        assert_eq!(settings.config().workload("a").network.as_deref(), Some("one"));
        write("defaults: {network: one} # again\n");
        assert_eq!(note(&mut settings), "", "the same in other words");

        // A mistake changes nothing, and is told with its place, now and later.
        write("defaults: {netwrk: another}\n");
        let mistake = settings.reload().unwrap_err().to_string();
        assert!(mistake.contains("we-agent.yaml:1:12: "), "{mistake}");
        assert!(note(&mut settings).contains("we-agent.yaml:1:12: "));
        assert_eq!(settings.config().workload("a").network.as_deref(), Some("one"));
        write("defaults: {network: another}\n");
        assert!(settings.reload().unwrap().ends_with("we-agent.yaml is in force"));
        assert_eq!(
            (note(&mut settings).as_str(), settings.config().workload("a").network.as_deref()),
            ("", Some("another"))
        );
        write("admin: {address: off}\n");
        assert!(settings.reload().unwrap().contains("has another admin.address, which is read at the start"));
    }
}
