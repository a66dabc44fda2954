//! Running somebody's command: without a shell, bounded, and leaving nothing behind.
//!
//! A command needs more of the host than the daemon, whose sandbox would be in its way and which would have to be opened
//! for it. So a program of its own runs it (`we-agent exec`), as another user and in another sandbox. systemd starts one
//! for each command, on a socket of which the daemon is told; without one, the daemon runs commands itself.

mod direct;
mod error;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod reason;
mod runner;
mod serve;
mod tail;

pub use error::{CommandError, Why, words};
pub use serve::{RunnerError, serve_command};

use std::{path::PathBuf, time::Duration};

/// Who runs the commands of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Commands {
    /// We do, as our own user.
    #[default]
    Direct,
    /// Whoever systemd starts for each connection to this socket (see [`serve_command`]).
    Runner(PathBuf),
}

impl Commands {
    /// Runs `command`, whose first word is the program, for at most `bound`. It sees a PATH and nothing else of the
    /// environment, reads `/dev/null`, and leads a process group, which is killed when the command has ended, when
    /// `bound` is over and when the future is dropped.
    ///
    /// # Errors
    /// When it cannot be started, does not end in time, or ends with another status than 0; and when there is no runner.
    pub async fn run(&self, command: &[String], bound: Duration) -> Result<(), CommandError> {
        // Boxed: between two commands nothing is held.
        match self {
            Self::Direct => Box::pin(direct::run(command, bound)).await,
            Self::Runner(socket) => Box::pin(runner::ask(socket, command, bound)).await,
        }
    }

    /// The user that commands run as, in words.
    pub fn user(&self) -> &'static str {
        match self {
            Self::Direct => "the user that we-agent runs as",
            Self::Runner(_) => "the user of we-agent-exec@.service",
        }
    }
}
