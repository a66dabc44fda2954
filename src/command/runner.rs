//! A command run for us: one connection, a line that asks and a line that answers. Hanging up ends the command.

use super::error::{CommandError, Why, words};
use serde::{Deserialize, Serialize};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::timeout,
};

/// No question and no answer is longer, in bytes.
pub(super) const LONGEST: u64 = 256 * 1024;
/// What systemd may take to start a runner, and the runner to end the command. The bound of a command counts from its
/// own start, as it does without a runner.
const GRACE: Duration = Duration::from_secs(5);

/// What is asked. Nothing else goes over the connection, and nothing of it is secret.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    /// Program and arguments.
    pub(super) command: Vec<String>,
    /// How long it may take, in milliseconds.
    pub(super) deadline: u64,
}

/// What is answered.
pub(super) type Answer = Result<(), CommandError>;

/// Why there is no answer. Each message ends with what to do.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("{0:?} is longer than a command may be ({LONGEST} bytes); put it into a file of its own")]
    TooLong(String),
    #[error(
        "the runner of commands does not let us in ({}: {}); SocketUser= of we-agent-exec.socket must be the user that \
         we-agent runs as", .0.display(), words(.1)
    )]
    Denied(PathBuf, io::Error),
    #[error(
        "the runner of commands is not there ({}: {}); start it: systemctl start we-agent-exec.socket",
        .0.display(), words(.1)
    )]
    NotThere(PathBuf, io::Error),
    #[error("the runner of commands has {0}; journalctl -u we-agent-exec.socket -u 'we-agent-exec@*' says why")]
    NoAnswer(&'static str),
}

/// Has the runner at `socket` run `command`.
pub(super) async fn ask(socket: &Path, command: &[String], bound: Duration) -> Answer {
    let answered = timeout(bound.saturating_add(GRACE), exchange(socket, command, bound)).await;
    answered
        .unwrap_or(Err(AskError::NoAnswer("not answered in time")))
        .unwrap_or_else(|error| Err(Why::Runner(error.to_string()).into()))
}

async fn exchange(socket: &Path, command: &[String], bound: Duration) -> Result<Answer, AskError> {
    let deadline = u64::try_from(bound.as_millis()).unwrap_or(u64::MAX);
    let line = line(&Request { command: command.to_vec(), deadline });
    if line.len() as u64 > LONGEST {
        let program = command.first().map(|program| program.chars().take(100).collect());
        return Err(AskError::TooLong(program.unwrap_or_default()));
    }
    let mut stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => AskError::Denied(socket.to_owned(), error),
        _ => AskError::NotThere(socket.to_owned(), error),
    })?;
    // Whoever refuses may have hung up already, and has answered before.
    let _ = stream.write_all(&line).await;
    let answer = read_line(&mut BufReader::new(stream)).await.map_err(|_| AskError::NoAnswer("broken off"))?;
    if answer.is_empty() {
        return Err(AskError::NoAnswer("ended without an answer"));
    }
    serde_json::from_slice(&answer).map_err(|_| AskError::NoAnswer("answered what we do not understand"))
}

/// `message` as it goes over the connection.
pub(super) fn line(message: &impl Serialize) -> Vec<u8> {
    // Strings and numbers: there is nothing in it that JSON cannot say.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// The next line, without what follows; empty when there is none.
pub(super) async fn read_line(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    stream.take(LONGEST).read_until(b'\n', &mut line).await?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::net::UnixListener;

    /// What is said of a runner that reads the question, says `answer`, and then hangs up, unless it `stays`.
    async fn said_of(answer: &'static [u8], stays: bool) -> String {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let runner = async {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            let question = read_line(&mut stream).await.unwrap();
            assert_eq!(question, b"{\"command\":[\"true\",\"\\n\"],\"deadline\":1500}\n");
            stream.get_mut().write_all(answer).await.unwrap();
            if stays { Some(stream) } else { None }
        };
        let command = ["true", "\n"].map(str::to_owned);
        let (answer, _stream) = tokio::join!(ask(&socket, &command, Duration::from_millis(1500)), runner);
        answer.map_or_else(|error| error.to_string(), |()| "well".to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_runner_that_does_not_keep_its_word_is_told_of() {
        let wrong = |what: &str| {
            format!(
                "the runner of commands has {what}; journalctl -u we-agent-exec.socket -u 'we-agent-exec@*' says why"
            )
        };
        assert_eq!(said_of(b"{\"Ok\":null}\n", true).await, "well");
        assert_eq!(said_of(b"", false).await, wrong("ended without an answer"));
        assert_eq!(said_of(b"{\"Err\":", false).await, wrong("answered what we do not understand"));
        assert_eq!(said_of(b"hello\n", true).await, wrong("answered what we do not understand"));
        let begun = tokio::time::Instant::now();
        assert_eq!(said_of(b"", true).await, wrong("not answered in time"));
        assert!(begun.elapsed() >= Duration::from_millis(1500) + GRACE);
    }
}
