#![allow(clippy::unwrap_used, clippy::print_stdout)]
use super::*;
use nix::unistd::{getegid, geteuid};
use std::{
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::Duration,
};
use tokio::net::UnixListener;

/// Connects to the socket that is its argument and holds the connection until its input ends. Perl is on every Debian.
const HOLD: &str =
    "use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un($ARGV[0])) or die $!; <STDIN>";
/// As above, in a child that it leaves behind.
const LEAVE: &str = "use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un($ARGV[0])) or die $!; \
                     exit 0 if fork; <STDIN>";

struct Place {
    dir: tempfile::TempDir,
    listener: UnixListener,
}

impl Place {
    fn new() -> Self {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let open =
            |path: &std::path::Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        open(dir.path(), 0o755);
        open(&dir.path().join("s"), 0o666);
        Self { dir, listener }
    }

    fn connect(&self, command: &mut Command, script: &str) -> Child {
        let command = command.args(["perl", "-e", script]).arg(self.dir.path().join("s"));
        command.stdin(Stdio::piped()).spawn().unwrap()
    }

    async fn accept(&self) -> UnixStream {
        tokio::time::timeout(Duration::from_secs(10), self.listener.accept()).await.unwrap().unwrap().0
    }
}

#[tokio::test]
async fn a_peer_is_who_it_is() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let peer = Peer::of(&ours).unwrap();
    let mut groups: Vec<_> = nix::unistd::getgroups().unwrap().into_iter().map(|gid| gid.as_raw()).collect();
    groups.insert(0, getegid().as_raw());
    assert_eq!((peer.uid, peer.gid, &peer.groups), (geteuid().as_raw(), getegid().as_raw(), &groups));
    assert_eq!(peer.pid, i32::try_from(std::process::id()).ok());
    assert!(peer.pidfd().is_some() && !peer.has_gone());
    assert_eq!(peer.to_string(), format!("uid {}, gid {}, pid {}", peer.uid, peer.gid, std::process::id()));
}

#[tokio::test]
async fn what_is_no_unix_socket_has_no_peer() {
    let pipe = std::io::pipe().unwrap();
    let error = raw::peer_groups(pipe.0.as_fd()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::ENOTSOCK as i32));
}

#[tokio::test]
async fn other_users_and_all_their_groups_are_seen() {
    if !geteuid().is_root() {
        println!("skipped: becoming another user takes root");
        return;
    }
    let place = Place::new();
    // More than one call has room for at first.
    let many: Vec<u32> = (5000..5100).collect();
    let list: Vec<_> = many.iter().map(u32::to_string).collect();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "4711", "--regid", "4712", "--groups", &list.join(",")]);
    let mut child = place.connect(&mut command, HOLD);
    let peer = Peer::of(&place.accept().await).unwrap();
    assert_eq!((peer.uid, peer.gid, peer.groups[0]), (4711, 4712, 4712));
    assert_eq!(peer.groups[1..], many);
    assert_eq!(peer.pid, i32::try_from(child.id()).ok());
    let user = |id| Allow::User(Account::Id(id)).fits(peer.uid, &peer.groups);
    let group = |id| Allow::Group(Account::Id(id)).fits(peer.uid, &peer.groups);
    assert!(user(4711) && group(4712) && group(5000) && group(5099));
    assert!(!user(4712) && !user(0) && !group(4711) && !group(0));
    assert!(!peer.has_gone());
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(peer.has_gone());
}

/// The connection lives on in a child, which may have become somebody else meanwhile.
#[tokio::test]
async fn a_peer_that_left_its_connection_behind_has_gone() {
    let place = Place::new();
    let mut command = Command::new("env");
    let mut child = place.connect(command.process_group(0), LEAVE);
    let input = child.stdin.take();
    child.wait().unwrap();
    let stream = place.accept().await;
    let peer = Peer::of(&stream).unwrap();
    assert!(peer.has_gone(), "{peer:?}");
    assert_eq!(peer.uid, geteuid().as_raw());
    let mut byte = [0];
    assert_eq!(stream.try_read(&mut byte).unwrap_err().kind(), io::ErrorKind::WouldBlock, "nobody has the connection");
    drop(input);
}

#[test]
fn older_kernels_pin_by_number() {
    let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let number = i32::try_from(child.id()).unwrap();
    let Process::Pinned(fd) = Process::by_number(Some(number)).unwrap() else { panic!("not pinned") };
    assert!(!has_ended(fd.as_fd()));
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(has_ended(fd.as_fd()));
    assert!(matches!(Process::by_number(Some(number)).unwrap(), Process::Gone));
    assert!(matches!(Process::by_number(None).unwrap(), Process::Unpinned));
}

#[test]
fn names_are_looked_up_and_the_unmapped_are_nobody() {
    let name = |name: &str| Account::Name(name.to_owned());
    assert!(Allow::User(name("root")).is_by_name() && !Allow::User(name("root")).fits(0, &[]));
    assert!(
        Allow::User(name("root")).resolved().fits(0, &[]) && Allow::Group(name("root")).resolved().fits(7, &[7, 0])
    );
    assert!(!Allow::User(name("no such user")).resolved().fits(0, &[]));
    assert!(!Allow::User(Account::Id(UNMAPPED)).fits(UNMAPPED, &[]));
    assert!(!Allow::User(name("nobody")).resolved().fits(UNMAPPED, &[]));
    assert!(!Allow::Unit("root".to_owned()).resolved().fits(0, &[0]));
    assert_eq!((user_name(0).as_deref(), user_name(4_000_000_000)), (Some("root"), None));
}
