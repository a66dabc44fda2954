#![allow(clippy::unwrap_used, clippy::print_stdout)]
use super::*;
use crate::command::Commands;
use std::{
    fs::{Permissions, set_permissions},
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    time::Instant,
};
use tokio::{io::AsyncBufReadExt, net::UnixListener, task::JoinHandle};

const SOON: Duration = Duration::from_secs(10);
/// A user who is none of this test's.
const OTHER: u32 = 4713;

/// A socket whose connections are served in this process.
struct Place {
    dir: tempfile::TempDir,
    served: JoinHandle<()>,
}

impl Place {
    fn new() -> Self {
        Self::run_as(OTHER)
    }

    /// What runs there believes that it is this user.
    fn run_as(uid: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let served = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move { converse(stream, [Uid::from_raw(uid); 2]).await });
            }
        });
        Self { dir, served }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    async fn run(&self, command: &[&str], bound: Duration) -> Result<(), CommandError> {
        run(&self.path(), command, bound).await
    }

    /// What is answered to `text`.
    async fn answer(&self, text: &[u8]) -> Why {
        let mut stream = BufReader::new(UnixStream::connect(self.path()).await.unwrap());
        let (mut line, _) = (String::new(), stream.get_mut().write_all(text).await);
        timeout(SOON, stream.read_line(&mut line)).await.unwrap().unwrap();
        serde_json::from_str::<Result<(), CommandError>>(&line).unwrap().unwrap_err().why
    }
}

async fn run(socket: &Path, command: &[&str], bound: Duration) -> Result<(), CommandError> {
    let command: Vec<_> = command.iter().map(ToString::to_string).collect();
    Commands::Runner(socket.to_owned()).run(&command, bound).await
}

#[tokio::test]
async fn it_is_as_if_we_had_run_it() {
    let place = Place::new();
    let shell = |script: &'static str| ["/bin/sh", "-c", script];
    let cases: [(&[&str], Duration); 8] = [
        (&["true"], SOON),
        (&shell("echo so; echo it is >&2; exit 7"), SOON),
        (&shell("kill -TERM $$"), SOON),
        (&shell("kill -KILL $$"), SOON),
        (&["nosuchcommand"], SOON),
        (&["/nosuch/x"], SOON),
        (&shell("echo waiting; sleep 33"), Duration::from_millis(200)),
        (&[], SOON),
    ];
    for (command, bound) in cases {
        let owned: Vec<_> = command.iter().map(ToString::to_string).collect();
        let directly = Commands::Direct.run(&owned, bound).await;
        assert_eq!(place.run(command, bound).await, directly, "{command:?}");
    }
}

#[tokio::test]
async fn what_is_no_request_is_refused() {
    let place = Place::new();
    let long = format!("{{\"command\":[\"{}\"],\"deadline\":1}}\n", "x".repeat(300_000));
    for text in ["\n", "hello\n", "{\"command\":\"true\",\"deadline\":1}\n", long.as_str()] {
        let why = place.answer(text.as_bytes()).await.to_string();
        assert!(why.starts_with("the request is not understood: "), "{why}");
    }
    let error = place.run(&["echo", &"x".repeat(300_000)], SOON).await.unwrap_err().to_string();
    assert!(error.starts_with("\"echo\" is longer than a command may be (262144 bytes); "), "{error}");
}

#[tokio::test]
async fn neither_root_nor_who_asks_runs_anything() {
    for (uid, wanted) in [(0, "commands are not run as root: set"), (geteuid().as_raw(), "commands are not run as ")] {
        let Why::Runner(text) = Place::run_as(uid).run(&["true"], SOON).await.unwrap_err().why else { unreachable!() };
        assert!(text.starts_with(wanted) && text.contains("User= of we-agent-exec@.service"), "{text}");
    }
    // Of somebody else's socket the same.
    if !geteuid().is_root() {
        println!("skipped: a socket of somebody else takes root");
        return;
    }
    let place = Place::run_as(4712);
    chown(place.path(), Some(4712), None).unwrap();
    let Why::Runner(text) = place.run(&["true"], SOON).await.unwrap_err().why else { unreachable!() };
    assert!(text.starts_with("commands are not run as the user that asks for them"), "{text}");
}

#[tokio::test]
async fn only_root_and_the_owner_of_the_socket_may_ask() {
    if !geteuid().is_root() {
        println!("skipped: a socket of somebody else takes root");
        return;
    }
    let place = Place::new();
    set_permissions(place.dir.path(), Permissions::from_mode(0o755)).unwrap();
    set_permissions(place.path(), Permissions::from_mode(0o666)).unwrap();
    chown(place.path(), Some(4711), None).unwrap();
    assert_eq!(place.run(&["true"], SOON).await, Ok(()), "we are root");
    const ASK: &str = "use IO::Socket::UNIX; $SIG{PIPE} = q(IGNORE); my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!; \
                       print $s qq({\"command\":[\"true\"],\"deadline\":9000}\\n); print scalar <$s>";
    for (user, wanted) in [("4711", "{\"Ok\":null}"), ("4712", "user 4712 may not have commands run; SocketUser= ")] {
        let mut command = tokio::process::Command::new("setpriv");
        command.args(["--reuid", user, "--regid", user, "--clear-groups", "perl", "-e", ASK]).arg(place.path());
        let said = String::from_utf8(command.output().await.unwrap().stdout).unwrap();
        assert!(said.contains(wanted), "{user}: {said}");
    }
}

#[tokio::test]
async fn what_has_no_owner_lets_nobody_in() {
    let (pair, _other) = UnixStream::pair().unwrap();
    assert!(matches!(may_run(&pair, [Uid::from_raw(OTHER); 2]), Err(RunnerError::NoOwner(_))));
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let (_asks, accepted) = tokio::join!(UnixStream::connect(dir.path().join("s")), listener.accept());
    let (stream, _) = accepted.unwrap();
    may_run(&stream, [Uid::from_raw(OTHER); 2]).unwrap();
    std::fs::remove_file(dir.path().join("s")).unwrap();
    assert!(matches!(may_run(&stream, [Uid::from_raw(OTHER); 2]), Err(RunnerError::NoOwner(_))));
}

#[tokio::test]
async fn without_a_runner_the_cause_and_the_fix_are_told() {
    let place = Place::new();
    let fix = "; start it: systemctl start we-agent-exec.socket";
    let path = place.path().display().to_string();
    place.served.abort();
    assert!(place.served.await.unwrap_err().is_cancelled());
    let error = run(Path::new(&path), &["true"], SOON).await.unwrap_err();
    assert_eq!(error.to_string(), format!("the runner of commands is not there ({path}: connection refused){fix}"));
    std::fs::remove_file(&path).unwrap();
    let error = run(Path::new(&path), &["true"], SOON).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("the runner of commands is not there ({path}: no such file or directory){fix}")
    );
}

#[tokio::test]
async fn hanging_up_ends_the_command() {
    let place = Place::new();
    let file = place.dir.path().join("pid");
    let script = format!("sleep 33 & echo $! >{}; wait", file.display());
    let command = ["/bin/sh", "-c", &script];
    let number = async {
        loop {
            match std::fs::read_to_string(&file) {
                Ok(text) if text.ends_with('\n') => return text,
                _ => tokio::task::yield_now().await,
            }
        }
    };
    let number = tokio::select! {
        ended = place.run(&command, SOON) => panic!("{ended:?}"),
        number = timeout(SOON, number) => number.unwrap(),
    };
    let stat = format!("/proc/{}/stat", number.trim());
    let deadline = Instant::now() + SOON;
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(Instant::now() < deadline, "{number} lives");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_is_not_waited_for() {
    let place = Place::new();
    let why = place.answer(b"{\"command\":").await.to_string();
    assert!(why.contains("it does not end"), "{why}");
}
