//! Who may connect: processes of other users knock, and systemd (a fake on a socket, which speaks the real wire form)
//! knows their units.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use crate::{
    rotation::{host, lab},
    support,
    system_bus::{FORGED, Kind, SystemBus, UNKNOWN},
};
use std::{
    fs, io,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{
    net::{UnixListener, UnixStream},
    process::{Child, Command},
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing_subscriber::fmt::MakeWriter;
use we_agent::{
    files::Root,
    host::{Account, Allow, Peer},
    publish::Policy,
    systemd::Units,
};

const SOON: Duration = Duration::from_secs(10);
/// Connects and holds the connection until its input ends. Perl is on every Debian.
const HOLD: &str =
    "use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un($ARGV[0])) or die $!; <STDIN>";
const MALLORY: u32 = 54_321;

/// A host with a socket that everybody can reach.
pub(crate) struct Door {
    pub(crate) dir: TempDir,
    listener: UnixListener,
}

/// A process of another user with its connection.
pub(crate) struct Caller {
    child: Child,
    pub(crate) peer: Peer,
    _stream: UnixStream,
}

impl Door {
    /// None, said aloud, when we cannot make processes of other users.
    pub(crate) fn open() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: processes of other users take root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).unwrap();
        Some(Self { dir, listener })
    }

    pub(crate) async fn knock(&self) -> Caller {
        self.knock_as(MALLORY).await
    }

    async fn knock_as(&self, user: u32) -> Caller {
        let mut command = Command::new("setpriv");
        let user = user.to_string();
        command.args(["--reuid", &user, "--regid", "54322", "--groups", "54323,54324", "perl", "-e", HOLD]);
        command.arg(self.dir.path().join("agent.sock")).stdin(Stdio::piped()).kill_on_drop(true);
        let child = command.spawn().unwrap();
        let (stream, _) = timeout(SOON, self.listener.accept()).await.unwrap().unwrap();
        Caller { child, peer: Peer::of(&stream).unwrap(), _stream: stream }
    }

    pub(crate) fn policy(&self, allow: &[Allow]) -> Policy {
        Policy::new("payments", allow.to_vec(), Units::new(&Root::new(self.dir.path())))
    }
}

impl Caller {
    fn pid(&self) -> u32 {
        u32::try_from(self.peer.pid.unwrap()).unwrap()
    }

    async fn end(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().await.unwrap();
    }
}

pub(crate) fn unit(name: &str) -> Allow {
    Allow::Unit(name.to_owned())
}

#[tokio::test]
async fn root_and_we_ourselves_may_and_others_must_be_named() {
    let Some(door) = Door::open() else { return };
    let nobody = door.policy(&[]);
    let (ours, _theirs) = UnixStream::pair().unwrap();
    nobody.admit(&Peer::of(&ours).unwrap()).await.unwrap();

    let caller = door.knock().await;
    let denied = nobody.admit(&caller.peer).await.unwrap_err().to_string();
    let who = format!("refused uid 54321, gid 54322, pid {}: no entry of socket.allow lets it in; ", caller.pid());
    assert!(denied.starts_with(&who), "{denied}");
    assert!(denied.ends_with(" to workloads.payments.socket.allow in we-agent.yaml"), "{denied}");
    for (entry, admitted) in [
        (Allow::User(Account::Id(MALLORY)), true),
        (Allow::User(Account::Id(MALLORY + 1)), false),
        (Allow::User(Account::Name("root".to_owned())), false),
        (Allow::User(Account::Name("no-such-user".to_owned())), false),
        (Allow::Group(Account::Id(54_322)), true),
        (Allow::Group(Account::Id(54_324)), true),
        (Allow::Group(Account::Id(54_321)), false),
        (Allow::Group(Account::Name("root".to_owned())), false),
    ] {
        let admit = door.policy(std::slice::from_ref(&entry)).admit(&caller.peer).await;
        assert_eq!(admit.is_ok(), admitted, "{entry:?}");
        // One of several is enough.
        let admit = door.policy(&[Allow::User(Account::Id(1)), entry.clone()]).admit(&caller.peer).await;
        assert_eq!(admit.is_ok(), admitted, "{entry:?}");
    }
}

#[tokio::test]
async fn systemd_is_asked_for_the_unit_in_the_way_that_it_understands() {
    for (kind, calls) in [
        (Kind::New, &["GetUnitByPIDFD"][..]),
        (Kind::NewBigEndian, &["GetUnitByPIDFD"]),
        (Kind::Old, &["GetUnitByPIDFD", "GetUnitByPID"]),
        (Kind::WithoutDescriptors, &["GetUnitByPID"]),
    ] {
        let Some(door) = Door::open() else { return };
        let bus = SystemBus::start(door.dir.path(), kind);
        let policy = door.policy(&[unit("pg@15-main.service"), Allow::User(Account::Id(1))]);
        let caller = door.knock().await;
        let in_none = policy.admit(&caller.peer).await.unwrap_err().to_string();
        assert!(
            in_none.contains("its unit cannot be told (systemd says org.freedesktop.systemd1.NoUnitForPID"),
            "{in_none}"
        );
        assert_eq!(bus.asked(), calls, "{kind:?}");

        bus.put(caller.pid(), "cron.service");
        let other = policy.admit(&caller.peer).await.unwrap_err().to_string();
        assert!(other.contains(", unit cron.service: no entry"), "{other}");
        assert!(other.contains("add {unit: cron.service} to workloads.payments.socket.allow"), "{other}");

        bus.put(caller.pid(), "pg@15-main.service");
        policy.admit(&caller.peer).await.unwrap();
        bus.asked();
        // Where no answer could change anything, nobody is asked.
        door.policy(&[unit("x.service"), Allow::User(Account::Id(MALLORY))]).admit(&caller.peer).await.unwrap();
        door.policy(&[]).admit(&caller.peer).await.unwrap_err();
        assert_eq!(bus.asked(), [""; 0]);
    }
}

#[tokio::test]
async fn nobody_but_systemd_says_who_is_in_a_unit() {
    let Some(door) = Door::open() else { return };
    let bus = SystemBus::start(door.dir.path(), Kind::Pestered);
    let caller = door.knock().await;
    bus.put(caller.pid(), "nginx.service");
    let (entitled, forged) = (door.policy(&[unit("nginx.service")]), door.policy(&[unit(FORGED)]));
    for _ in 0..30 {
        entitled.admit(&caller.peer).await.unwrap();
        let denied = forged.admit(&caller.peer).await.unwrap_err().to_string();
        assert!(denied.contains(", unit nginx.service: no entry"), "{denied}");
    }
}

#[tokio::test]
async fn whoever_asks_too_much_keeps_only_itself_waiting() {
    let Some(door) = Door::open() else { return };
    let bus = SystemBus::start(door.dir.path(), Kind::New);
    let policy = door.policy(&[unit("nginx.service")]);
    let (mallory, entitled) = (door.knock().await, door.knock_as(MALLORY + 1).await);
    bus.put(mallory.pid(), UNKNOWN);
    bus.put(entitled.pid(), "nginx.service");
    let all = std::iter::repeat_n(&mallory, 20).chain([&entitled]).map(|caller| policy.admit(&caller.peer));
    let admitted = futures(all).await.into_iter().filter(Result::is_ok).count();
    assert_eq!(admitted, 1);
}

#[tokio::test]
async fn a_process_that_has_ended_is_nobody() {
    let Some(door) = Door::open() else { return };
    for kind in [Kind::New, Kind::Old] {
        let _ = std::fs::remove_dir_all(door.dir.path().join("run"));
        let bus = SystemBus::start(door.dir.path(), kind);
        let mut caller = door.knock().await;
        bus.put(caller.pid(), "nginx.service");
        let policies = [door.policy(&[unit("nginx.service")]), door.policy(&[Allow::User(Account::Id(MALLORY))])];
        for policy in &policies {
            policy.admit(&caller.peer).await.unwrap();
        }
        caller.end().await;
        // Its number may be anybody's now; systemd, which would say so, is not even asked.
        bus.asked();
        for policy in &policies {
            let denied = policy.admit(&caller.peer).await.unwrap_err().to_string();
            assert!(denied.contains("its process has ended"), "{denied}");
        }
        assert_eq!(bus.asked(), [""; 0]);
    }
}

#[tokio::test]
async fn without_an_answer_there_is_no_admission() {
    let Some(door) = Door::open() else { return };
    let caller = door.knock().await;
    let policy = door.policy(&[unit("nginx.service")]);
    let denied = policy.admit(&caller.peer).await.unwrap_err().to_string();
    assert!(denied.contains("run/dbus/system_bus_socket: No such file or directory"), "{denied}");
    assert!(denied.contains("a unit can only be told where systemd and the system bus run"), "{denied}");
    {
        let _bus = SystemBus::start(door.dir.path(), Kind::Nonsense);
        let denied = policy.admit(&caller.peer).await.unwrap_err().to_string();
        assert!(denied.contains("the bus does not accept this user"), "{denied}");
    }
    std::fs::remove_dir_all(door.dir.path().join("run")).unwrap();
    let bus = SystemBus::start(door.dir.path(), Kind::Silent);
    bus.put(caller.pid(), "nginx.service");
    let start = Instant::now();
    // More than can be asked at a time: none waits longer than one.
    let all = (0..12).map(|_| policy.admit(&caller.peer));
    for denied in futures(all).await {
        let denied = denied.unwrap_err().to_string();
        assert!(denied.contains("systemd did not answer in time"), "{denied}");
    }
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
}

/// Runs them at the same time.
async fn futures<T>(all: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut all: Vec<_> = all.map(Box::pin).collect();
    let mut done = Vec::new();
    std::future::poll_fn(|context| {
        all.retain_mut(|future| match future.as_mut().poll(context) {
            std::task::Poll::Ready(value) => {
                done.push(value);
                false
            }
            std::task::Poll::Pending => true,
        });
        if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done
}

/// What is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn a_refusal_is_one_line_in_the_journal() {
    let Some(door) = Door::open() else { return };
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(log.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let caller = door.knock().await;
    // Another test may be about to note that nobody listens to this line; from here on it is known that somebody does.
    door.policy(&[]).admit(&caller.peer).await.unwrap_err();
    tracing::callsite::rebuild_interest_cache();
    log.0.lock().unwrap().clear();
    let policy = door.policy(&[]);
    for _ in 0..100 {
        policy.admit(&caller.peer).await.unwrap_err();
    }
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("WARN") && text.contains("refused uid 54321, gid 54322, pid "), "{text}");
}

const INSIDE: &str = "WE_AGENT_TEST_IN_OWN_MOUNTS_AS_ROOT";
const CROWD: &str = "allowed::a_crowd_at_the_door_of_a_name_service_that_hangs_stops_nothing";

/// The test runs itself again where `/run` is its own, and is the name service cache there (nscd), which the C library asks
/// first and waits for, for seconds.
#[tokio::test]
async fn a_crowd_at_the_door_of_a_name_service_that_hangs_stops_nothing() {
    if std::env::var_os(INSIDE).is_some() {
        return crowd().await;
    }
    let inside = |program: &str| {
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount -t tmpfs none /run && exec \"$@\"", "sh", program]);
        command
    };
    if !nix::unistd::geteuid().is_root() || !inside("true").output().is_ok_and(|output| output.status.success()) {
        println!("skipped: processes of other users take root, and a `/run` of our own `unshare` and `mount`");
        return;
    }
    let itself = std::env::current_exe().unwrap();
    let output = inside(itself.to_str().unwrap()).args([CROWD, "--exact", "--nocapture"]).env(INSIDE, "1").output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said.lines().filter(|line| line.starts_with("skipped")).for_each(|line| println!("{line}"));
}

/// Counts questions about users. They stay without an answer; whoever asks for anything else is hung up on, and asks
/// elsewhere.
fn hanging_name_service() -> watch::Receiver<usize> {
    fs::create_dir("/run/nscd").unwrap();
    let cache = StdListener::bind("/run/nscd/socket").unwrap();
    let (count, asked) = watch::channel(0);
    std::thread::spawn(move || {
        let mut open = Vec::new();
        while let Ok((mut asks, _)) = cache.accept() {
            let mut question = [0; 256];
            let length = io::Read::read(&mut asks, &mut question).unwrap_or_default();
            if question[..length].windows(6).any(|word| word == b"passwd" || word == b"nobody") {
                open.push(asks);
                count.send_replace(open.len());
            }
        }
    });
    asked
}

async fn crowd() {
    const MANY: usize = 560;
    let door = Door::open().unwrap();
    let mut asked = hanging_name_service();
    let lab = lab().ttl(Duration::from_secs(8)).spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    assert_eq!(*asked.borrow(), 0, "an agent without names in its configuration asks for none");
    let policy = Arc::new(door.policy(&[Allow::User(Account::Name("nobody-of-this-host".to_owned()))]));
    let caller = Arc::new(door.knock().await);
    let mut crowd = JoinSet::new();
    for _ in 0..MANY {
        let (policy, caller) = (policy.clone(), caller.clone());
        crowd.spawn(async move { policy.admit(&caller.peer).await.unwrap_err().to_string() });
    }
    if !timeout(support::SOON, asked.wait_for(|count| *count > 0)).await.is_ok_and(|asked| asked.is_ok()) {
        println!("skipped: this C library asks no nscd");
        return;
    }
    // What is lost is made anew meanwhile, and what is new gets where it is to be.
    let socket = host.path("/run/we-agent/payments/agent.sock");
    fs::remove_file(&socket).unwrap();
    let end = Instant::now() + support::SOON;
    while StdStream::connect(&socket).is_err() {
        assert!(Instant::now() < end, "the socket is not made anew");
        sleep(Duration::from_millis(10)).await;
    }
    let before = agent.workload("payments").unwrap().identity.serial;
    agent
        .until("payments", "renewed and published", |w| {
            w.identity.serial != before && w.files.iter().all(|file| file.serial == w.identity.serial)
        })
        .await;
    for denied in timeout(support::SOON, crowd.join_all()).await.unwrap() {
        assert!(denied.contains("the names in socket.allow cannot be looked up"), "{denied}");
    }
    // What the names mean, and what the user is called who is in the journal: by the C library in two ways each.
    assert!(*asked.borrow() <= 8, "{} questions for {MANY} connections", *asked.borrow());
    agent.stop().await;
}
