//! The runner: what systemd starts for each command of the agent, with the connection as its standard input.

use super::{
    direct,
    error::{CommandError, Why},
    runner::{Request, line, read_line},
};
use crate::host::{Account, Allow};
use nix::unistd::{Uid, geteuid, getuid};
use std::{
    io,
    os::{
        fd::BorrowedFd,
        unix::{fs::MetadataExt, net::UnixStream as StdStream},
    },
    path::PathBuf,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::timeout,
};

/// Who connects has said what he wants after this long, and has taken the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a runner runs nothing.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// Standard input is something else.
    #[error(
        "standard input is no connection to run a command for: systemd starts this program for each one \
         (systemctl start we-agent-exec.socket)"
    )]
    NoConnection(#[source] io::Error),
    /// Commands of somebody else never run as root.
    #[error(
        "commands are not run as root: set User= of we-agent-exec@.service to another user (we-agent-exec has no rights)"
    )]
    Root,
    /// Nor as the user that we-agent runs as, to whom its keys belong.
    #[error(
        "commands are not run as the user that asks for them, who has the keys: set User= of we-agent-exec@.service to another \
         user (we-agent-exec has no rights)"
    )]
    Asker,
    /// The peer is neither root nor the owner of the socket.
    #[error(
        "user {uid} may not have commands run; SocketUser= of we-agent-exec.socket must be the user that we-agent runs as"
    )]
    Stranger {
        /// Who connected.
        uid: u32,
    },
    /// Nobody knows who may ask.
    #[error("the owner of the socket cannot be found out ({0}): systemctl restart we-agent-exec.socket makes it anew")]
    NoOwner(io::Error),
    /// What was asked is no question.
    #[error("the request is not understood: {0}; restart we-agent after an upgrade")]
    Request(String),
}

/// Runs the one command that is asked for on the connection `stdin`, and answers. The command ends with the connection.
/// To be called within the runtime.
///
/// Who may ask is said in one place, the socket unit: root and the owner of the socket (`SocketUser=`). Its mode keeps
/// others from connecting; that the peer is one of the two is seen to here once more.
///
/// # Errors
/// When nothing was run. The peer was told why, if there is one.
pub async fn serve_command(stdin: BorrowedFd<'_>) -> Result<(), RunnerError> {
    let stream = connection(stdin).map_err(RunnerError::NoConnection)?;
    converse(stream, [getuid(), geteuid()]).await
}

fn connection(stdin: BorrowedFd<'_>) -> io::Result<UnixStream> {
    let stream = StdStream::from(stdin.try_clone_to_owned()?);
    stream.peer_addr()?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// As one of the users `us`.
async fn converse(stream: UnixStream, us: [Uid; 2]) -> Result<(), RunnerError> {
    let mut stream = BufReader::new(stream);
    let asked = match may_run(stream.get_ref(), us) {
        Ok(()) => request(&mut stream).await,
        Err(refused) => Err(refused),
    };
    let (answer, result) = match asked {
        Ok(request) => {
            let bound = Duration::from_millis(request.deadline);
            let ended = tokio::select! {
                ended = direct::run(&request.command, bound) => ended,
                // There is nothing more to say but good-bye. The command is killed here.
                _ = stream.read_u8() => return Ok(()),
            };
            (ended, Ok(()))
        }
        Err(error) => (Err(CommandError::from(Why::Runner(error.to_string()))), Err(error)),
    };
    // Who has hung up meanwhile does not want to know.
    let _ = timeout(PATIENCE, stream.get_mut().write_all(&line(&answer))).await;
    result
}

/// For root and the owner of the socket, who is the agent; as neither of them. Users who do not exist in our user namespace
/// are nobody.
fn may_run(stream: &UnixStream, us: [Uid; 2]) -> Result<(), RunnerError> {
    if us.iter().any(|uid| uid.is_root()) {
        return Err(RunnerError::Root);
    }
    let uid = stream.peer_cred().map_err(RunnerError::NoOwner)?.uid();
    let owner = owner(stream).map_err(RunnerError::NoOwner)?;
    if us.contains(&Uid::from_raw(owner)) {
        return Err(RunnerError::Asker);
    }
    let allowed = uid == 0 || Allow::User(Account::Id(owner)).fits(uid, &[]);
    if allowed { Ok(()) } else { Err(RunnerError::Stranger { uid }) }
}

/// The user to whom the path belongs that the connection was made on.
fn owner(stream: &UnixStream) -> io::Result<u32> {
    let address = stream.local_addr()?;
    let path = address.as_pathname().map(PathBuf::from);
    let path = path.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it has no path"))?;
    Ok(std::fs::symlink_metadata(path)?.uid())
}

pub(super) async fn request(stream: &mut BufReader<UnixStream>) -> Result<Request, RunnerError> {
    let wrong = |cause: String| RunnerError::Request(cause);
    let asked = timeout(PATIENCE, read_line(stream)).await.map_err(|_| wrong("it does not end".to_owned()))?;
    let line = asked.map_err(|error| wrong(error.to_string()))?;
    serde_json::from_slice(&line).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests;
