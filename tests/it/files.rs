//! The published files as their consumers see them.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use crate::authority::{Authority, Leaf};
use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use we_agent::{
    files::{Grant, Root},
    publish::{self, Files, Folder, Layout, Outcome},
    spiffe::{KeyKind, PrivateKey, X509Context},
    status::{Identity, Publication},
    time::Clock,
};

pub(crate) const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";
pub(crate) const NAMES: [&str; 3] = ["key.pem", "cert-chain.pem", "root-cert.pem"];

/// A VM in a temporary directory, in memory where there is one.
pub(crate) struct Host(pub(crate) tempfile::TempDir);

impl Host {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap())
    }

    pub(crate) fn files(&self, layout: Layout) -> Files {
        let (dir, folder) = match layout {
            Layout::Flat => ("/etc/certs", Folder::Theirs),
            _ => ("/run/we-agent/payments", Folder::Own),
        };
        if layout == Layout::Flat {
            fs::create_dir_all(self.0.path().join("etc/certs")).unwrap();
        }
        Files::new(&Root::new(self.0.path()), dir, folder, layout, Grant::default())
    }
}

pub(crate) fn issue(authority: &Authority, now: SystemTime) -> Arc<X509Context> {
    let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
    let answer = authority.issue(key.pem(), &Leaf::new(&[ID], now));
    X509Context::from_answer(&ID.parse().unwrap(), key, &answer, now).unwrap()
}

pub(crate) fn mesh() -> Authority {
    Authority::root("mesh").intermediate("istiod")
}

pub(crate) fn texts(context: &X509Context) -> [String; 3] {
    [context.svid.key().pem().to_owned(), context.svid.chain_pem(), context.bundle.pem()]
}

fn read(dir: &Path) -> [String; 3] {
    NAMES.map(|name| fs::read_to_string(dir.join(name)).unwrap())
}

pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(crate) fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn three_names_lead_through_one_link_and_only_the_owner_may_read() {
    let (host, authority, now) = (Host::new(), mesh(), SystemTime::now());
    let files = host.files(Layout::Generations);
    for _ in 0..2 {
        let context = issue(&authority, now);
        assert_eq!(files.publish(&context, now).unwrap(), Outcome::Written);
        assert_eq!(read(&files.path()), texts(&context));
    }
    for name in NAMES {
        assert_eq!(fs::read_link(files.path().join(name)).unwrap(), Path::new("..data").join(name));
        assert_eq!(mode(&files.path().join(name)), 0o600);
    }
    let generation = fs::read_link(files.path().join("..data")).unwrap();
    assert_eq!((mode(&files.path()), mode(&files.path().join(generation))), (0o755, 0o700), "names are no secret");
    assert_eq!(
        names(&files.path()).len(),
        3 + 1 + 2,
        "three names, the link, the present generation and the one before"
    );
}

#[test]
fn a_group_may_be_let_in() {
    let host = Host::new();
    let (context, gid) = (issue(&mesh(), SystemTime::now()), fs::metadata(host.0.path()).unwrap().gid());
    let root = Root::new(host.0.path());
    let files = |grant| Files::new(&root, "/run/we-agent/payments", Folder::Own, Layout::Generations, grant);
    files(Grant::default()).publish(&context, SystemTime::now()).unwrap();
    let files = files(Grant { group: Some(gid.to_string()), mode: 0o640, owner: None });
    assert_eq!(
        files.publish(&context, SystemTime::now()).unwrap(),
        Outcome::Written,
        "another setting is written anew"
    );
    assert_eq!(files.publish(&context, SystemTime::now()).unwrap(), Outcome::Unchanged);
    let data = files.path().join("..data");
    assert_eq!((mode(&files.path()), mode(&data), mode(&data.join("key.pem"))), (0o755, 0o750, 0o640));
}

#[test]
fn openssl_verifies_the_chain_and_sees_one_name() {
    for authority in [Authority::root("mesh"), mesh()] {
        let host = Host::new();
        let files = host.files(Layout::Generations);
        files.publish(&issue(&authority, SystemTime::now()), SystemTime::now()).unwrap();
        let openssl = |args: &[&str]| {
            let output = Command::new("openssl").args(args).current_dir(files.path()).output();
            output.map(|o| (o.status.success(), String::from_utf8_lossy(&o.stdout).into_owned()))
        };
        if openssl(&["version"]).is_err() {
            println!("skipped: openssl is not installed");
            return;
        }
        let chain = ["-CAfile", "root-cert.pem", "-untrusted", "cert-chain.pem", "cert-chain.pem"];
        for purpose in ["sslclient", "sslserver"] {
            let strict = ["verify", "-x509_strict", "-purpose", purpose];
            let (good, said) = openssl(&[&strict[..], &chain[..]].concat()).unwrap();
            assert!(good && said.trim() == "cert-chain.pem: OK", "{said}");
        }
        let (_, san) = openssl(&["x509", "-in", "cert-chain.pem", "-noout", "-ext", "subjectAltName"]).unwrap();
        assert_eq!(san.lines().last().unwrap().trim(), format!("URI:{ID}"), "exactly one name: {san}");
        let (_, of_leaf) = openssl(&["x509", "-in", "cert-chain.pem", "-noout", "-pubkey"]).unwrap();
        let (_, of_key) = openssl(&["pkey", "-in", "key.pem", "-pubout"]).unwrap();
        assert!(of_leaf == of_key && of_key.contains("PUBLIC KEY"), "the key is the leaf's");
        fs::write(host.0.path().join("foreign.pem"), Authority::root("mesh").root_pem()).unwrap();
        let foreign = host.0.path().join("foreign.pem");
        let (good, _) = openssl(&["verify", "-CAfile", foreign.to_str().unwrap(), "cert-chain.pem"]).unwrap();
        assert!(!good, "another root of the same name is no root of ours");
    }
}

#[test]
fn the_same_content_is_not_written_again_and_what_was_lost_comes_back() {
    for layout in [Layout::Generations, Layout::Flat] {
        let (host, now) = (Host::new(), SystemTime::now());
        let (files, context) = (host.files(layout), issue(&mesh(), now));
        files.publish(&context, now).unwrap();
        let inode = |name: &str| fs::metadata(files.path().join(name)).unwrap().ino();
        let before = inode("key.pem");
        assert_eq!(files.publish(&context, now).unwrap(), Outcome::Unchanged);
        // The same roots in another spelling: a comment, a repetition, no line feed at the end.
        let roots = files.path().join("root-cert.pem");
        let pem = context.bundle.pem();
        fs::write(&roots, format!("# mesh\n{pem}{}", pem.trim_end())).unwrap();
        assert_eq!(files.publish(&context, now).unwrap(), Outcome::Unchanged);
        assert_eq!(inode("key.pem"), before);

        fs::set_permissions(files.path().join("key.pem"), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(files.publish(&context, now).unwrap(), Outcome::Written, "a mode that drifted");
        for name in NAMES {
            fs::remove_file(files.path().join(name)).unwrap();
            assert_eq!(files.publish(&context, now).unwrap(), Outcome::Written, "{name} was removed");
            fs::write(files.path().join(name), "x").unwrap();
            assert_eq!(files.publish(&context, now).unwrap(), Outcome::Written, "{name} was overwritten");
            assert_eq!(read(&files.path()), texts(&context));
        }
    }
}

#[test]
fn what_a_killed_run_left_goes_and_what_others_left_stays() {
    let (host, now) = (Host::new(), SystemTime::now());
    let (files, context) = (host.files(Layout::Generations), issue(&mesh(), now));
    files.publish(&context, now).unwrap();
    let before = names(&files.path());
    fs::create_dir(files.path().join("..unfinished-..123-ab")).unwrap();
    fs::write(files.path().join("..unfinished-..123-ab/key.pem"), "half").unwrap();
    symlink("..123-ab", files.path().join("..unfinished-data")).unwrap();
    files.publish(&context, now).unwrap();
    assert_eq!(names(&files.path()), before);

    let flat = host.files(Layout::Flat);
    fs::write(flat.path().join("key.pem.tmp.123"), "Istio's").unwrap();
    fs::write(flat.path().join(".we-agent-unfinished-key.pem"), "half").unwrap();
    flat.publish(&context, now).unwrap();
    assert_eq!(names(&flat.path()), ["cert-chain.pem", "key.pem", "key.pem.tmp.123", "root-cert.pem"]);
}

#[test]
fn old_generations_stay_for_slow_readers_and_then_go() {
    let (host, authority, now) = (Host::new(), mesh(), SystemTime::now());
    let files = host.files(Layout::Generations);
    let contexts: Vec<_> = (0..6).map(|_| issue(&authority, now)).collect();
    let generation = || files.path().join(fs::read_link(files.path().join("..data")).unwrap());
    let mut seen: Vec<PathBuf> = Vec::new();
    for context in &contexts {
        files.publish(context, now).unwrap();
        seen.push(generation());
    }
    let there: Vec<_> = seen.iter().map(|dir| dir.exists()).collect();
    assert_eq!(there, [false, false, true, true, true, true]);
    assert_eq!(read(&seen[2]), texts(&contexts[2]));
    files.publish(&contexts[5], now + Duration::from_secs(3700)).unwrap();
    assert!(seen[5].exists() && !seen[4].exists(), "after an hour only the present one is left");
}

#[test]
fn squatted_names_and_unsafe_parents_are_refused_before_anything_is_written() {
    let (host, now) = (Host::new(), SystemTime::now());
    let context = issue(&mesh(), now);
    let outside = host.0.path().join("outside");
    fs::write(&outside, "untouched").unwrap();
    for layout in [Layout::Generations, Layout::Flat] {
        let files = host.files(layout);
        fs::create_dir_all(files.path()).unwrap();
        symlink(&outside, files.path().join("key.pem")).unwrap();
        let error = files.publish(&context, now).unwrap_err();
        assert_eq!(error.kind(), "in_the_way");
        assert!(
            error.to_string().ends_with("key.pem is in the way: it was not made by we-agent; move it away"),
            "{error}"
        );
        assert_eq!(names(&files.path()), ["key.pem"]);
        fs::remove_file(files.path().join("key.pem")).unwrap();
        fs::create_dir(files.path().join("cert-chain.pem")).unwrap();
        assert_eq!(files.publish(&context, now).unwrap_err().kind(), "in_the_way");
        fs::remove_dir(files.path().join("cert-chain.pem")).unwrap();
        files.publish(&context, now).unwrap();
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched");

    let parent = host.0.path().join("run/we-agent");
    fs::set_permissions(&parent, fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(host.files(Layout::Generations).publish(&context, now).unwrap_err().kind(), "unsafe_path");

    let missing = Files::new(&Root::new(host.0.path()), "/etc/none", Folder::Theirs, Layout::Flat, Grant::default());
    let error = missing.publish(&context, now).unwrap_err();
    assert!(error.to_string().ends_with("etc/none: no such file or directory: create it"), "{error}");
}

/// Waits for a condition of a fact, with a deadline.
async fn until(fact: &mut watch::Receiver<Publication>, what: impl FnMut(&Publication) -> bool) -> Publication {
    tokio::time::timeout(Duration::from_secs(3600), fact.wait_for(what)).await.unwrap().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn the_loop_publishes_what_is_valid_retries_and_leaves_the_files_when_it_ends() {
    let (host, authority, now) = (Host::new(), mesh(), SystemTime::now());
    let files = host.files(Layout::Generations);
    let (identity, identities) = watch::channel(Identity::default());
    let (fact, mut seen) = watch::channel(Publication::default());
    let (clock, shutdown) = (Clock::simulated(now), CancellationToken::new());
    let looks = watch::Sender::new(Instant::now());
    let running =
        tokio::spawn(publish::run(files.clone(), identities, fact, looks.subscribe(), clock, shutdown.clone()));
    let become_current = |context: &Arc<X509Context>| {
        identity.send_replace(Identity { current: Some(Arc::clone(context)), ..Identity::default() });
    };

    let first = issue(&authority, now);
    become_current(&first);
    let told = until(&mut seen, |p| p.serial.as_deref() == Some(first.svid.serial())).await;
    assert_eq!(told.trouble, None);
    assert_eq!(read(&files.path()), texts(&first));

    // Trouble: the link's name is taken. The old pair stays, the cause is told, and the retry succeeds by itself.
    let data = fs::read_link(files.path().join("..data")).unwrap();
    fs::remove_file(files.path().join("..data")).unwrap();
    fs::create_dir(files.path().join("..data")).unwrap();
    let second = issue(&authority, now);
    become_current(&second);
    let told = until(&mut seen, |p| p.trouble.is_some()).await;
    let trouble = told.trouble.unwrap();
    assert_eq!((told.serial.as_deref(), trouble.kind), (Some(first.svid.serial()), "in_the_way"));
    assert!(trouble.cause.contains("..data is in the way") && files.path().join(&data).exists(), "{trouble:?}");
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(
        seen.borrow().trouble.as_ref().unwrap().since,
        trouble.since,
        "it is one trouble, however often it is tried"
    );
    fs::remove_dir(files.path().join("..data")).unwrap();
    until(&mut seen, |p| p.trouble.is_none() && p.serial.as_deref() == Some(second.svid.serial())).await;
    assert_eq!(read(&files.path()), texts(&second));

    // An SVID that has expired is not handed out, and what is there stays.
    let expired = issue(&authority, now - Duration::from_secs(7200));
    become_current(&expired);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(read(&files.path()), texts(&second));
    become_current(&second);

    // Files that somebody removed come back, at the next look.
    until(&mut seen, |p| p.trouble.is_none()).await;
    for name in ["key.pem", "..data"] {
        fs::remove_file(files.path().join(name)).unwrap();
        looks.send_replace(Instant::now());
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(read(&files.path()), texts(&second));
    }

    shutdown.cancel();
    running.await.unwrap();
    assert_eq!(read(&files.path()), texts(&second), "stopping is not leaving");
}
