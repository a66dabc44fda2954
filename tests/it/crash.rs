//! `kill -9`, and a full disk, at every system call that changes the disk while an SVID is stored and published.
//!
//! A child process (this binary again) does one save or one publication under strace. A first run records its calls;
//! then there is one run for each call that writes, killed just before it, and one in which that call fails. After
//! each, what is on the disk must be a usable pair, and the next run must succeed and clean up.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod trace;

use crate::authority::{Authority, Leaf};
use std::{
    fs,
    io::Write as _,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, exit},
    sync::Arc,
    time::{Duration, SystemTime},
};
use trace::{BEGIN, END, assert_durable, before, calls};
use we_agent::{
    files::{Grant, Root},
    identity::Store,
    publish::{Content, Files, Folder, Layout, SingleFile},
    spiffe::{KeyKind, PrivateKey, SpiffeId, X509Bundle, X509Context},
};

const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";
const STORE: &str = "/var/lib/we-agent/payments";
const OUT: &str = "/run/we-agent/payments";
/// Exit codes of the child.
const DONE: i32 = 0;
const REFUSED: i32 = 3;

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000)
}

fn id() -> SpiffeId {
    ID.parse().unwrap()
}

/// A temporary directory in memory where there is one: some hundred runs sync a lot.
fn host() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn anchors() -> X509Bundle {
    X509Bundle::from_pem(Authority::root("operator").root_pem()).unwrap()
}

fn issue(authority: &Authority) -> Arc<X509Context> {
    let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
    let answer = authority.issue(key.pem(), &Leaf::new(&[ID], now()));
    X509Context::from_answer(&id(), key, &answer, now()).unwrap()
}

/// What one run does.
#[derive(Clone, Copy)]
enum Act {
    Save,
    Generations,
    Flat,
    Combined,
}

impl Act {
    const ALL: [Self; 4] = [Self::Save, Self::Generations, Self::Flat, Self::Combined];

    fn word(self) -> &'static str {
        match self {
            Self::Save => "save",
            Self::Generations => "generations",
            Self::Flat => "flat",
            Self::Combined => "combined",
        }
    }

    fn run(self, root: &Root, context: &X509Context, previous: Option<&X509Context>) -> Result<(), String> {
        let (folder, layout) = match self {
            Self::Save => {
                let store = Store::open(root, STORE).map_err(|e| e.to_string())?;
                return store.save(context, previous, &context.bundle).map_err(|e| e.to_string());
            }
            Self::Generations => (Folder::Own, Layout::Generations),
            Self::Flat => (Folder::Theirs, Layout::Flat),
            Self::Combined => {
                let file = SingleFile { name: "combined.pem".to_owned(), content: Content::Combined };
                (Folder::Own, Layout::Single(file))
            }
        };
        let files = Files::new(root, OUT, folder, layout, Grant::default());
        files.publish(context, now()).map(|_| ()).map_err(|e| e.to_string())
    }
}

/// Two pairs, on disk for the child: the one that is in force, and the next.
struct Pairs {
    dir: tempfile::TempDir,
    old: Arc<X509Context>,
    new: Arc<X509Context>,
}

impl Pairs {
    fn new() -> Self {
        let authority = Authority::root("mesh").intermediate("istiod");
        let pairs = Self { dir: host(), old: issue(&authority), new: issue(&authority) };
        for (name, context) in [("old", &pairs.old), ("new", &pairs.new)] {
            let path = |part: &str| pairs.dir.path().join(format!("{name}.{part}"));
            fs::write(path("key"), context.svid.key().pem()).unwrap();
            fs::write(path("chain"), context.svid.chain_pem()).unwrap();
            fs::write(path("roots"), context.bundle.pem()).unwrap();
        }
        pairs
    }

    fn read(dir: &Path, name: &str) -> Arc<X509Context> {
        let text = |part: &str| fs::read_to_string(dir.join(format!("{name}.{part}"))).unwrap();
        let key = PrivateKey::from_pem(&text("key")).unwrap();
        X509Context::from_pem(&id(), key, &text("chain"), &text("roots"), now(), now()).unwrap()
    }
}

/// The child of the tests below: one act, then out.
#[test]
#[ignore = "the child process of the crash tests"]
fn child() {
    let var = |name: &str| std::env::var(name).unwrap();
    let word = var("WE_AGENT_CRASH_ACT");
    let act = Act::ALL.into_iter().find(|act| act.word() == word).unwrap();
    let pairs = PathBuf::from(var("WE_AGENT_CRASH_PAIRS"));
    let (old, new) = (Pairs::read(&pairs, "old"), Pairs::read(&pairs, "new"));
    let root = Root::new(var("WE_AGENT_CRASH_HOST"));
    // strace counts calls thread by thread, and loader and harness open and write, too, in a thread of their own: with
    // more of both behind us, the numbers of our calls are ours alone.
    for _ in 0..var("WE_AGENT_CRASH_PASSED").parse().unwrap() {
        fs::File::options().write(true).open("/dev/null").unwrap().write_all(b"-").unwrap();
    }
    let _ = fs::metadata(BEGIN);
    let result = act.run(&root, &new, Some(&old));
    let _ = fs::metadata(END);
    exit(if result.is_ok() { DONE } else { REFUSED });
}

/// One run of the child under strace; `passed` opens and writes come before its act.
fn strace(act: Act, pairs: &Pairs, host: &Path, passed: usize, options: &[&str]) -> std::process::ExitStatus {
    Command::new("strace")
        .args(["-f", "-qq"])
        .args(options)
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "crash::child", "--test-threads=1", "--nocapture"])
        .env("WE_AGENT_CRASH_ACT", act.word())
        .env("WE_AGENT_CRASH_PAIRS", pairs.dir.path())
        .env("WE_AGENT_CRASH_HOST", host)
        .env("WE_AGENT_CRASH_PASSED", passed.to_string())
        .output()
        .unwrap()
        .status
}

fn strace_works() -> bool {
    let works = Command::new("strace").args(["-o", "/dev/null", "true"]).output().is_ok_and(|o| o.status.success());
    if !works {
        println!("skipped: strace is not installed, or may not trace here");
    }
    works
}

/// Runs `act` with a kill before, and then with a failure of, each of its calls.
fn at_every_call(act: Act, prepare: impl Fn(&Root, &Pairs), check: impl Fn(&Root, &Pairs, &str, bool)) {
    if !strace_works() {
        return;
    }
    let pairs = Pairs::new();
    let fresh = || {
        let host = host();
        prepare(&Root::new(host.path()), &pairs);
        host
    };
    let log = pairs.dir.path().join("log");
    let record = |passed| {
        let host = fresh();
        assert_eq!(strace(act, &pairs, host.path(), passed, &["-o", log.to_str().unwrap()]).code(), Some(DONE));
        fs::read_to_string(&log).unwrap()
    };
    // How often the loader looks for libraries depends on the machine, and may differ a little from run to run.
    let passed = 2 * before(&record(0));
    let calls = calls(&record(passed));
    assert_durable(&calls);
    println!("{}: {} calls", act.word(), calls.len());
    for (name, count, text) in &calls {
        for fault in ["signal=KILL", "error=ENOSPC"] {
            let host = fresh();
            let inject = format!("inject={name}:{fault}:when={count}");
            let status = strace(act, &pairs, host.path(), passed, &["-o", log.to_str().unwrap(), "-e", &inject]);
            let told = format!("{fault} at {text}");
            assert!(fs::read_to_string(&log).unwrap().contains(BEGIN), "too early: {told}");
            let killed = fault == "signal=KILL";
            match (status.signal(), status.code()) {
                (Some(9), _) | (_, Some(137)) => assert!(killed, "{told}"),
                (_, Some(DONE | REFUSED)) => assert!(!killed, "the kill has missed: {told}"),
                _ => panic!("{told}: {status:?}"),
            }
            check(&Root::new(host.path()), &pairs, &told, status.code() == Some(DONE));
            // And then the next run: succeeds, and leaves nothing half done.
            act.run(&Root::new(host.path()), &pairs.new, Some(&pairs.old)).unwrap();
            check(&Root::new(host.path()), &pairs, &format!("the run after {told}"), true);
            let left = names(&Root::new(host.path()), act);
            assert!(!left.iter().any(|name| name.contains("unfinished")), "the run after {told} left {left:?}");
            assert!(left.len() <= 8, "the run after {told} left {left:?}");
        }
    }
}

fn names(root: &Root, act: Act) -> Vec<String> {
    let dir = root.path(if matches!(act, Act::Save) { STORE } else { OUT });
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_save_that_is_killed_at_any_call_leaves_a_usable_pair() {
    let older = issue(&Authority::root("older"));
    let prepare = |root: &Root, pairs: &Pairs| {
        let store = Store::open(root, STORE).unwrap();
        store.save(&older, None, &anchors()).unwrap();
        store.save(&pairs.old, Some(&older), &anchors()).unwrap();
    };
    at_every_call(Act::Save, prepare, |root, pairs, told, done| {
        let loaded = Store::open(root, STORE).unwrap().load(&id(), now()).unwrap();
        let serial = loaded.current.as_ref().unwrap().context.svid.serial().to_owned();
        let (old, new) = (pairs.old.svid.serial(), pairs.new.svid.serial());
        assert!(serial == new || (!done && serial == old), "{told}");
        assert!(loaded.passed_over.is_empty(), "{told}: {:?}", loaded.passed_over);
        assert!(loaded.previous.is_some(), "{told}");
    });
}

#[test]
fn the_first_save_that_is_killed_leaves_nothing_or_a_usable_pair() {
    at_every_call(
        Act::Save,
        |_, _| {},
        |root, pairs, told, done| {
            let loaded = Store::open(root, STORE).unwrap().load(&id(), now()).unwrap();
            let serial = loaded.current.as_ref().map(|stored| stored.context.svid.serial());
            assert!(serial == Some(pairs.new.svid.serial()) || (!done && serial.is_none()), "{told}");
            assert!(loaded.passed_over.is_empty(), "{told}: {:?}", loaded.passed_over);
        },
    );
}

/// Key, chain and roots as a careful reader gets them: `..data` is resolved once.
fn read_once(root: &Root) -> Option<[String; 3]> {
    let dir = root.path(OUT).join(fs::read_link(root.path(OUT).join("..data")).ok()?);
    Some(["key.pem", "cert-chain.pem", "root-cert.pem"].map(|name| fs::read_to_string(dir.join(name)).unwrap()))
}

fn texts(context: &X509Context) -> [String; 3] {
    [context.svid.key().pem().to_owned(), context.svid.chain_pem(), context.bundle.pem()]
}

#[test]
fn a_switch_that_is_killed_at_any_call_leaves_a_pair_that_matches() {
    let authority = Authority::root("older");
    let older: Vec<_> = (0..4).map(|_| issue(&authority)).collect();
    let prepare = |root: &Root, pairs: &Pairs| {
        for context in older.iter().chain([&pairs.old]) {
            Act::Generations.run(root, context, None).unwrap();
        }
    };
    at_every_call(Act::Generations, prepare, |root, pairs, told, done| {
        let read = read_once(root).unwrap();
        assert!(read == texts(&pairs.new) || (!done && read == texts(&pairs.old)), "{told}");
        let key = fs::read_to_string(root.path(OUT).join("key.pem")).unwrap();
        assert_eq!(key, read[0], "{told}: the three names lead to the present generation");
    });
}

#[test]
fn the_first_publication_that_is_killed_leaves_nothing_or_a_whole_pair() {
    at_every_call(
        Act::Generations,
        |_, _| {},
        |root, pairs, told, done| {
            let read = read_once(root);
            assert!(read == Some(texts(&pairs.new)) || (!done && read.is_none()), "{told}");
            if done {
                assert_eq!(
                    fs::read_to_string(root.path(OUT).join("key.pem")).unwrap(),
                    pairs.new.svid.key().pem(),
                    "{told}"
                );
            }
        },
    );
}

#[test]
fn flat_files_are_each_whole_after_a_kill_and_match_after_the_next_run() {
    let prepare = |root: &Root, pairs: &Pairs| {
        fs::create_dir_all(root.path(OUT)).unwrap();
        Act::Flat.run(root, &pairs.old, None).unwrap();
    };
    at_every_call(Act::Flat, prepare, |root, pairs, told, done| {
        let files = ["key.pem", "cert-chain.pem", "root-cert.pem"]
            .map(|name| fs::read_to_string(root.path(OUT).join(name)).unwrap());
        let (old, new) = (texts(&pairs.old), texts(&pairs.new));
        for ((file, old), new) in files.iter().zip(&old).zip(&new) {
            assert!(file == new || (!done && file == old), "{told}");
        }
    });
}

#[test]
fn one_file_is_whole_after_a_kill() {
    let prepare = |root: &Root, pairs: &Pairs| Act::Combined.run(root, &pairs.old, None).unwrap();
    at_every_call(Act::Combined, prepare, |root, pairs, told, done| {
        let file = fs::read_to_string(root.path(OUT).join("combined.pem")).unwrap();
        let whole = |context: &X509Context| texts(context)[..2].concat();
        assert!(file == whole(&pairs.new) || (!done && file == whole(&pairs.old)), "{told}");
    });
}
