//! A command as a child of this process.

use super::{
    error::{CommandError, Why, words},
    reason,
    tail::Tail,
};
use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use std::{io, os::unix::process::ExitStatusExt, process::Stdio, time::Duration};
use tokio::{process::Command, time::timeout};

/// Where a command is looked for when the agent itself was given no PATH.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long a killed command may take to go. One that cannot (it hangs in the kernel) has failed all the same; the
/// runtime reaps it whenever it ends.
const LAST_BREATH: Duration = Duration::from_secs(1);

/// Runs `command` as our own user (see [`super::Commands::run`]).
pub(super) async fn run(command: &[String], bound: Duration) -> Result<(), CommandError> {
    let Some((program, arguments)) = command.split_first() else { return Err(Why::Empty.into()) };
    let not_started = |error: io::Error| not_started(program, &error);
    let (mut tail, writer) = Tail::new().map_err(not_started)?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| PATH.into()))
        .stdin(Stdio::null())
        .stdout(writer.try_clone().map_err(not_started)?)
        .stderr(writer)
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(not_started)?;
    let group = child.id().and_then(|id| i32::try_from(id).ok()).map(|id| Group(Pid::from_raw(id)));
    let ended = timeout(bound, async {
        tokio::select! {
            ended = child.wait() => ended,
            never = tail.follow() => match never {},
        }
    });
    let ended = ended.await;
    drop(group);
    let why = match ended {
        Ok(Ok(status)) => match (status.success(), status.code()) {
            (true, _) => return Ok(()),
            (_, Some(code)) => Why::Exit(code),
            _ => Why::Signal(status.into_raw()),
        },
        Ok(Err(error)) => Why::Wait(words(&error)),
        Err(_) => {
            let _ = timeout(LAST_BREATH, child.wait()).await;
            Why::Deadline
        }
    };
    Err(CommandError { why, said: tail.last_line() })
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

fn not_started(program: &str, error: &io::Error) -> CommandError {
    let program = program.to_owned();
    let missing = error.kind() == io::ErrorKind::NotFound && !program.contains('/');
    if missing {
        return Why::NotFound(program).into();
    }
    let cause = match reason::behind(&program, error) {
        Some(reason) => format!("{}: {reason}", words(error)),
        None => words(error),
    };
    Why::NotStarted { program, cause }.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::{os::unix::fs::PermissionsExt, path::Path, time::Instant};

    async fn run(command: &[&str], bound: Duration) -> Result<(), String> {
        let command: Vec<_> = command.iter().map(ToString::to_string).collect();
        super::run(&command, bound).await.map_err(|e| e.to_string())
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

    /// What the system says of these, it says of the file that is there, and means another one or nothing of the kind.
    #[tokio::test]
    async fn the_real_reason_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, text: &[u8], mode: u32| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let second = Duration::from_secs(10);
        let loader = [b"\x7fELF\x02\x01\x01".as_slice(), &[0; 200]].concat();
        for (name, text, mode, reason) in [
            (
                "orphan",
                b"#! /no/such/interpreter -x\n".as_slice(),
                0o755,
                ": its interpreter /no/such/interpreter is not there",
            ),
            (
                "windows",
                b"#!/bin/sh\r\ntrue\r\n",
                0o755,
                ": its lines end as on Windows (CR LF), so that its interpreter is not found",
            ),
            ("plain", b"#!/bin/sh\n", 0o644, ": it is not marked executable (chmod +x)"),
            (
                "note",
                b"true\n",
                0o755,
                ": it is neither a program for this machine nor a script that names its interpreter (#!) in the first line",
            ),
            ("foreign", &loader, 0o755, ": it is neither a program for this machine"),
        ] {
            let error = run(&[&program(name, text, mode)], second).await.unwrap_err();
            assert!(error.contains(reason), "{name}: {error}");
        }
        let here = dir.path().to_str().unwrap();
        let error = run(&[here], second).await.unwrap_err();
        assert_eq!(error, format!("fork/exec {here}: permission denied: it is a directory"));
        for line in ["systemctl reload nginx", "/usr/bin/systemctl reload nginx"] {
            let error = run(&[line], second).await.unwrap_err();
            assert!(error.ends_with(": program and arguments are a list, each an item of its own"), "{error}");
        }
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
        assert_eq!(lines[1], "/dev/null", "{seen}");
        assert!(lines[2] == lines[3] && lines[2].starts_with("pipe:"), "{seen}");
        let (process, group) = lines[4].split_once(' ').unwrap();
        assert_eq!(process, group);
    }

    #[tokio::test]
    async fn output_never_stops_a_command_and_its_last_line_is_kept() {
        let script = "head -c 3000000 /dev/zero; echo one >&2; echo two; exit 3";
        let command = ["/bin/sh", "-c", script].map(str::to_owned);
        let error = super::run(&command, Duration::from_secs(10)).await.unwrap_err();
        assert_eq!((error.why, error.said.as_str()), (Why::Exit(3), "two"));
        // Somebody outside the group holds the pipe open.
        let command = ["/bin/sh", "-c", "setsid sleep 20 & echo last; exit 4"].map(str::to_owned);
        let begun = Instant::now();
        let error = super::run(&command, Duration::from_secs(10)).await.unwrap_err();
        assert_eq!((error.why, error.said.as_str()), (Why::Exit(4), "last"));
        assert!(begun.elapsed() < Duration::from_secs(15));
    }

    #[tokio::test]
    async fn nothing_outlives_the_command() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let name = file.display();
        let begun = Instant::now();
        let error = shell(&format!("sleep 33 & echo $! >{name}; wait"), Duration::from_millis(300)).await.unwrap_err();
        assert_eq!(error, "command timeout exceeded: signal: killed");
        assert!(begun.elapsed() < Duration::from_secs(30));
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
