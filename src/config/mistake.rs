//! What is wrong with a configuration, and where.

use crate::{files::ReadError, yaml::YamlError};
use marked_yaml::Marker;
use std::{fmt, path::PathBuf};

/// Why there is no configuration. The daemon ends with exit status 78 (`EX_CONFIG`), and is not restarted on it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", .file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        source: ReadError,
    },
    /// Everything that is wrong in it, one line each: `FILE:LINE:COL: message; fix`.
    #[error("{}", lines(.file, .mistakes))]
    Wrong {
        /// The file.
        file: PathBuf,
        /// In the order of the file; never empty.
        mistakes: Vec<Mistake>,
    },
}

fn lines(file: &std::path::Path, mistakes: &[Mistake]) -> String {
    let lines: Vec<_> = mistakes.iter().map(|mistake| format!("{}:{mistake}", file.display())).collect();
    lines.join("\n")
}

/// One mistake: prints as `LINE:COL: message; fix`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// Counted from 1.
    pub line: usize,
    /// Counted from 1, in characters.
    pub column: usize,
    /// What is wrong and how to put it right.
    pub message: String,
}

impl Mistake {
    pub(super) fn at(mark: Option<&Marker>, message: String) -> Self {
        Self { line: mark.map_or(1, Marker::line), column: mark.map_or(1, Marker::column), message }
    }
}

impl From<YamlError> for Mistake {
    fn from(YamlError { line, column, message }: YamlError) -> Self {
        Self { line, column, message }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}
