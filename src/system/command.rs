//! Running somebody's command: without a shell, bounded, and leaving nothing behind.

use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use std::{
    io,
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{process::Command, time::timeout};

/// Where a command is looked for when the agent itself was given no PATH.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long a killed command may take to go. One that cannot (it hangs in the kernel) has failed all the same; the
/// runtime reaps it whenever it ends.
const LAST_BREATH: Duration = Duration::from_secs(1);

/// Why a command has not succeeded, in the words of Go's `os/exec`, which operators of Istio know.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// There is no first word.
    #[error("exec: no command")]
    Empty,
    /// No directory of the PATH has it.
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotFound(String),
    /// The system does not start it.
    #[error("fork/exec {program}: {}", words(.source))]
    NotStarted {
        /// The first word of the command.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// Its end cannot be awaited.
    #[error("wait: {}", words(.0))]
    Wait(io::Error),
    /// It has not ended in time and was killed, with all its children.
    #[error("command timeout exceeded: signal: killed")]
    Deadline,
    /// It ended with another status than 0.
    #[error("exit status {0}")]
    Exit(i32),
    /// A signal ended it.
    #[error("{}", signalled(.0))]
    Signal(ExitStatus),
}

/// Runs `command`, whose first word is the program, as the agent's user, for at most `bound`. It sees a PATH and nothing
/// else of our environment, reads and writes `/dev/null`, and leads a process group, which is killed when the command
/// has ended, when `bound` is over and when the future is dropped.
///
/// # Errors
/// When it cannot be started, does not end in time, or ends with another status than 0.
pub async fn run_command(command: &[String], bound: Duration) -> Result<(), CommandError> {
    let Some((program, arguments)) = command.split_first() else { return Err(CommandError::Empty) };
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| PATH.into()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| not_started(program, error))?;
    let group = child.id().and_then(|id| i32::try_from(id).ok()).map(|id| Group(Pid::from_raw(id)));
    let ended = timeout(bound, child.wait()).await;
    drop(group);
    match ended {
        Ok(Ok(status)) => verdict(status),
        Ok(Err(error)) => Err(CommandError::Wait(error)),
        Err(_) => {
            let _ = timeout(LAST_BREATH, child.wait()).await;
            Err(CommandError::Deadline)
        }
    }
}

/// The process group of a command, children of its children included. Its number stays taken while one of them lives,
/// so nobody else is hit after the leader was reaped; an empty group is no error.
struct Group(Pid);

impl Drop for Group {
    fn drop(&mut self) {
        match killpg(self.0, Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => tracing::warn!(%error, "left-over processes of a command cannot be killed"),
        }
    }
}

fn verdict(status: ExitStatus) -> Result<(), CommandError> {
    match (status.success(), status.code()) {
        (true, _) => Ok(()),
        (_, Some(code)) => Err(CommandError::Exit(code)),
        _ => Err(CommandError::Signal(status)),
    }
}

fn signalled(status: &ExitStatus) -> String {
    if status.signal() == Some(9) { "signal: killed".to_owned() } else { status.to_string() }
}

fn not_started(program: &str, source: io::Error) -> CommandError {
    let program = program.to_owned();
    if source.kind() == io::ErrorKind::NotFound && !program.contains('/') {
        return CommandError::NotFound(program);
    }
    CommandError::NotStarted { program, source }
}

/// What the kernel says, without a number and in lower case.
pub fn words(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => Errno::from_raw(code).desc().to_lowercase(),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::{path::Path, time::Instant};

    async fn run(command: &[&str], bound: Duration) -> Result<(), String> {
        let command: Vec<_> = command.iter().map(ToString::to_string).collect();
        run_command(&command, bound).await.map_err(|e| e.to_string())
    }

    async fn shell(script: &str, bound: Duration) -> Result<(), String> {
        run(&["/bin/sh", "-c", script], bound).await
    }

    /// Waits until no process has that number any more (a zombie that nobody reaped has left, too).
    async fn gone(pid: &str) {
        let stat = format!("/proc/{}/stat", pid.trim());
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < deadline, "{pid} lives");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn written(file: &Path) -> String {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match std::fs::read_to_string(file) {
                Ok(text) if text.ends_with('\n') => return text,
                _ => assert!(Instant::now() < deadline, "{} was not written", file.display()),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn the_exit_status_is_the_verdict() {
        let second = Duration::from_secs(10);
        assert_eq!(run(&["true"], second).await, Ok(()));
        assert_eq!(shell("exit 7", second).await.unwrap_err(), "exit status 7");
        assert_eq!(shell("kill -KILL $$", second).await.unwrap_err(), "signal: killed");
        let error = run(&["nosuchcommand"], second).await.unwrap_err();
        assert_eq!(error, "exec: \"nosuchcommand\": executable file not found in $PATH");
        let error = run(&["/nosuch/x"], second).await.unwrap_err();
        assert_eq!(error, "fork/exec /nosuch/x: no such file or directory");
    }

    #[tokio::test]
    async fn a_command_sees_a_path_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("seen");
        let name = file.display();
        // The shell's environment block as it was handed over, then its descriptors and its group.
        let script = format!(
            "environ=$(tr '\\0' '\\n' </proc/$$/environ); fds=$(readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2); \
             read -r _ _ _ _ group _ </proc/$$/stat; printf '%s\\n' \"$environ\" \"$fds\" \"$$ $group\" >{name}"
        );
        assert_eq!(shell(&script, Duration::from_secs(10)).await, Ok(()));
        let seen = written(&file).await;
        let lines: Vec<_> = seen.lines().collect();
        assert!(lines.len() == 5 && lines[0].starts_with("PATH="), "{seen}");
        assert_eq!(lines[1..4], ["/dev/null"; 3], "{seen}");
        let (process, group) = lines[4].split_once(' ').unwrap();
        assert_eq!(process, group);
    }

    #[tokio::test]
    async fn nothing_outlives_the_command() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let name = file.display();
        let begun = Instant::now();
        let error = shell(&format!("sleep 33 & echo $! >{name}; wait"), Duration::from_millis(300)).await.unwrap_err();
        assert_eq!(error, "command timeout exceeded: signal: killed");
        assert!(begun.elapsed() < Duration::from_secs(5));
        gone(&written(&file).await).await;
        // A command that ends in time leaves no child behind either.
        let ended = shell(&format!("sleep 33 & echo $! >{name}"), Duration::from_secs(10)).await;
        assert_eq!(ended, Ok(()));
        gone(&written(&file).await).await;
        // Nor does one that is given up half-way.
        std::fs::remove_file(&file).unwrap();
        let script = format!("sleep 33 & echo $! >{name}; wait");
        let given_up = shell(&script, Duration::from_secs(30));
        tokio::select! {
            ended = given_up => panic!("{ended:?}"),
            _ = written(&file) => {}
        }
        gone(&written(&file).await).await;
    }
}
