//! Why a command has not succeeded.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::{io, os::unix::process::ExitStatusExt, process::ExitStatus};

/// A command that has not succeeded, and what it said. It is written as [`Why`] alone: what a command says is its own
/// business, and not for everybody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{why}")]
pub struct CommandError {
    /// What happened.
    pub why: Why,
    /// The last line of its output, shortened; empty when it said nothing.
    pub said: String,
}

/// Of a program with blanks in its name, which is not there.
pub(super) const WORDS: &str = "program and arguments are a list, each an item of its own";

/// Why a command has not succeeded, in the words of Go's `os/exec`, which operators of Istio know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Why {
    /// There is no first word.
    #[error("exec: no command")]
    Empty,
    /// No directory of the PATH has it.
    #[error("exec: {0:?}: executable file not found in $PATH{blanks}", blanks = blanks(.0))]
    NotFound(String),
    /// The system does not start it.
    #[error("fork/exec {program}: {cause}")]
    NotStarted {
        /// The first word of the command.
        program: String,
        /// What the system said.
        cause: String,
    },
    /// Its end cannot be awaited.
    #[error("wait: {0}")]
    Wait(String),
    /// It has not ended in time and was killed, with all its children.
    #[error("command timeout exceeded: signal: killed")]
    Deadline,
    /// It ended with another status than 0.
    #[error("exit status {0}")]
    Exit(i32),
    /// A signal ended it; the status as wait(2) gives it.
    #[error("{}", signalled(*.0))]
    Signal(i32),
    /// The runner is not there, or does not run it; with the fix.
    #[error("{0}")]
    Runner(String),
}

impl From<Why> for CommandError {
    fn from(why: Why) -> Self {
        Self { why, said: String::new() }
    }
}

fn blanks(program: &str) -> String {
    if program.contains(char::is_whitespace) { format!(": {WORDS}") } else { String::new() }
}

fn signalled(status: i32) -> String {
    let status = ExitStatus::from_raw(status);
    if status.signal() == Some(9) { "signal: killed".to_owned() } else { status.to_string() }
}

/// What the kernel says, without a number and in lower case.
pub fn words(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => Errno::from_raw(code).desc().to_lowercase(),
        None => error.to_string(),
    }
}
