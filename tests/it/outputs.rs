//! Outputs beside the PEM set, as their consumers see them.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use crate::{
    authority::Authority,
    files::{Host, issue, mesh, mode, names},
    published, rotation,
    support::SOON,
};
use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::PathBuf,
    process::Command,
    time::{Duration, SystemTime},
};
use we_agent::{
    files::{Grant, Root},
    publish::{Content, Files, Folder, Layout, Outcome, SingleFile},
    spiffe::X509Context,
    status::PublicationReport,
};
use we_lab::Fault;

pub(crate) const PASSWORD: &str = "correct horse";

/// One file in a directory that the configuration names.
fn single(host: &Host, name: &str, content: Content, grant: Grant) -> Files {
    let file = SingleFile { name: name.to_owned(), content };
    Files::new(&Root::new(host.0.path()), "/etc/peer/certs", Folder::Given, Layout::Single(file), grant)
}

pub(crate) fn pkcs12(host: &Host) -> Files {
    set_password(host, PASSWORD, 0o600);
    let content = Content::Pkcs12 { password_file: "/etc/password".into() };
    single(host, "identity.p12", content, Grant::default())
}

pub(crate) fn set_password(host: &Host, password: &str, mode: u32) -> PathBuf {
    let path = host.0.path().join("etc/password");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, format!("{password}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path
}

fn combined_text(context: &X509Context) -> String {
    format!("{}{}", context.svid.key().pem(), context.svid.chain_pem())
}

#[test]
fn combined_is_key_and_chain_in_one_file_that_is_replaced_at_once() {
    let (host, authority, now) = (Host::new(), mesh(), SystemTime::now());
    let files = single(&host, "site.pem", Content::Combined, Grant::default());
    let first = issue(&authority, now);
    assert_eq!(files.publish(&first, now).unwrap(), Outcome::Written);
    let path = files.path().join("site.pem");
    assert_eq!((fs::read_to_string(&path).unwrap(), mode(&path)), (combined_text(&first), 0o600));
    assert_eq!((mode(&files.path()), names(&files.path())), (0o700, vec!["site.pem".to_owned()]));
    assert_eq!(files.publish(&first, now).unwrap(), Outcome::Unchanged);

    let before = fs::metadata(&path).unwrap().ino();
    let second = issue(&authority, now);
    assert_eq!(files.publish(&second, now).unwrap(), Outcome::Written);
    assert_ne!(fs::metadata(&path).unwrap().ino(), before, "another file, not another content of the same one");
    fs::write(&path, "x").unwrap();
    assert_eq!(files.publish(&second, now).unwrap(), Outcome::Written);
    assert_eq!(fs::read_to_string(&path).unwrap(), combined_text(&second));
}

#[test]
fn pkcs12_is_written_again_only_for_another_content_or_password() {
    let (host, authority, now) = (Host::new(), mesh(), SystemTime::now());
    let (files, context) = (pkcs12(&host), issue(&authority, now));
    files.publish(&context, now).unwrap();
    let read = || fs::read(files.path().join("identity.p12")).unwrap();
    let first = read();
    assert_eq!(files.publish(&context, now).unwrap(), Outcome::Unchanged, "although its salts are random");
    assert_eq!(read(), first);
    set_password(&host, "another one", 0o600);
    assert_eq!(files.publish(&context, now).unwrap(), Outcome::Written);
    let second = read();
    assert_ne!(second, first);

    // A password that cannot be used changes nothing, and is not in the error.
    let refused = |what: &str, why: &str| {
        let error = files.publish(&issue(&authority, now), now).unwrap_err();
        assert_eq!(error.kind(), "password", "{what}");
        let told = error.to_string();
        assert!(told.contains("etc/password: ") && told.contains(why) && !told.contains("secret"), "{what}: {told}");
        assert_eq!(read(), second, "{what}");
    };
    set_password(&host, "secret", 0o644);
    refused("for everybody", "everybody may read it (mode 0644); chmod o-rwx");
    set_password(&host, "", 0o600);
    refused("empty", "one line of 1 to 1024 printable ASCII characters");
    set_password(&host, "secrét", 0o600);
    refused("not ASCII", "printable ASCII");
    set_password(&host, "secret\nsecret", 0o600);
    refused("two lines", "one line");
    set_password(&host, &"secret".repeat(1000), 0o600);
    refused("long", "1 to 1024");
    fs::remove_file(host.0.path().join("etc/password")).unwrap();
    refused("missing", "there is no such file");
    nix::unistd::mkfifo(&host.0.path().join("etc/password"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused("a pipe that nobody writes to", "is no regular file");
    assert_eq!(names(&files.path()), ["identity.p12"], "nothing half done is left");
}

#[test]
fn trust_is_the_roots_alone_for_everybody() {
    let (host, now) = (Host::new(), SystemTime::now());
    let files = single(&host, "trust.pem", Content::Trust, Grant { mode: 0o644, ..Grant::default() });
    let authority = mesh();
    let context = issue(&authority, now);
    files.publish(&context, now).unwrap();
    let path = files.path().join("trust.pem");
    assert_eq!((fs::read_to_string(&path).unwrap(), mode(&path)), (context.bundle.pem(), 0o644));
    assert_eq!(mode(&files.path()), 0o755, "who may read the file may enter");
    // Another certificate under the same roots, and the same roots in another spelling, are no reason to write.
    let next = issue(&authority, now);
    assert_eq!(files.publish(&next, now).unwrap(), Outcome::Unchanged);
    fs::write(&path, format!("# mesh\n{0}{0}", context.bundle.pem())).unwrap();
    assert_eq!(files.publish(&next, now).unwrap(), Outcome::Unchanged);
    let other = issue(&Authority::root("other"), now);
    assert_eq!(files.publish(&other, now).unwrap(), Outcome::Written);
    assert_eq!(fs::read_to_string(&path).unwrap(), other.bundle.pem());
}

#[test]
fn a_configured_directory_keeps_its_mode_and_a_file_gets_its_own() {
    let (host, now) = (Host::new(), SystemTime::now());
    let dir = host.0.path().join("etc/peer/certs");
    fs::create_dir_all(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    let gid = fs::metadata(&dir).unwrap().gid();
    let files =
        |mode| single(&host, "a.pem", Content::Combined, Grant { group: Some(gid.to_string()), mode, owner: None });
    let context = issue(&mesh(), now);
    for wanted in [0o640, 0o660, 0o600] {
        assert_eq!(files(wanted).publish(&context, now).unwrap(), Outcome::Written, "another mode is written anew");
        assert_eq!((mode(&dir.join("a.pem")), mode(&dir)), (wanted, 0o755));
    }
    fs::set_permissions(dir.join("a.pem"), fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(files(0o600).publish(&context, now).unwrap(), Outcome::Written, "a mode that drifted");
    assert_eq!(mode(&dir.join("a.pem")), 0o600);
}

#[test]
fn an_account_is_looked_up_by_name_and_who_is_unknown_gets_nothing() {
    let (host, authority, now) = (Host::new(), mesh(), SystemTime::now());
    let grant = |owner: Option<&str>, group: &str| Grant {
        owner: owner.map(str::to_owned),
        group: Some(group.to_owned()),
        mode: 0o640,
    };
    let files = |grant| single(&host, "a.pem", Content::Combined, grant);
    let error = files(grant(None, "no-such-group")).publish(&issue(&authority, now), now).unwrap_err();
    assert_eq!(error.kind(), "no_such_account");
    assert!(!host.0.path().join("etc/peer").exists(), "nothing was made");
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root may give files away");
        return;
    }
    let (nobody, daemon) = (nix::unistd::User::from_name("nobody"), nix::unistd::Group::from_name("daemon"));
    let (Ok(Some(nobody)), Ok(Some(daemon))) = (nobody, daemon) else {
        println!("skipped: this host has no user nobody or no group daemon");
        return;
    };
    let context = issue(&authority, now);
    for layout in [Layout::Generations, Layout::Single(SingleFile { name: "a.pem".into(), content: Content::Combined })]
    {
        let grant = grant(Some("nobody"), "daemon");
        let files = Files::new(&Root::new(host.0.path()), "/etc/peer/certs", Folder::Given, layout, grant);
        assert_eq!(files.publish(&context, now).unwrap(), Outcome::Written);
        assert_eq!(files.publish(&context, now).unwrap(), Outcome::Unchanged);
    }
    for name in ["key.pem", "a.pem"] {
        let stat = fs::metadata(host.0.path().join("etc/peer/certs").join(name)).unwrap();
        let (uid, gid) = (nobody.uid.as_raw(), daemon.gid.as_raw());
        assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o777), (uid, gid, 0o640), "{name}");
    }
}

#[test]
fn a_name_that_is_taken_by_something_else_is_refused() {
    let (host, now) = (Host::new(), SystemTime::now());
    let (files, context) = (single(&host, "a.pem", Content::Combined, Grant::default()), issue(&mesh(), now));
    let (path, outside) = (files.path().join("a.pem"), host.0.path().join("outside"));
    fs::create_dir_all(files.path()).unwrap();
    fs::write(&outside, "untouched").unwrap();
    symlink(&outside, &path).unwrap();
    let error = files.publish(&context, now).unwrap_err();
    assert!(error.to_string().ends_with("a.pem is in the way: it was not made by we-agent; move it away"), "{error}");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(files.publish(&context, now).unwrap_err().kind(), "in_the_way");
    fs::remove_dir(&path).unwrap();
    // A link where the unfinished file goes is removed, not followed.
    symlink(&outside, files.path().join(".we-agent-unfinished-a.pem")).unwrap();
    files.publish(&context, now).unwrap();
    assert_eq!(
        (fs::read_to_string(&outside).unwrap(), names(&files.path())),
        ("untouched".into(), vec!["a.pem".to_owned()])
    );

    fs::set_permissions(files.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(files.publish(&context, now).unwrap_err().kind(), "unsafe_path");
}

/// A file system of 64 KiB that goes away with it.
struct Small(PathBuf);

impl Small {
    /// None where we may not mount.
    fn mount(at: PathBuf) -> Option<Self> {
        fs::create_dir_all(&at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs"]).arg(&at).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(at));
        }
        println!("skipped: this user may not mount a small file system; run as root");
        None
    }

    fn remount(&self, how: &str) {
        let options = format!("remount,{how}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_disk_that_is_full_or_read_only_keeps_what_is_there() {
    let (host, authority, now) = (Host::new(), mesh(), SystemTime::now());
    let Some(disk) = Small::mount(host.0.path().join("etc/peer")) else { return };
    let set =
        Files::new(&Root::new(host.0.path()), "/etc/peer/certs", Folder::Given, Layout::Generations, Grant::default());
    let outputs = [set, single(&host, "a.pem", Content::Combined, Grant::default())];
    let (old, new) = (issue(&authority, now), issue(&authority, now));
    let publish = |context: &X509Context| outputs.each_ref().map(|output| output.publish(context, now));
    let says = |context: &X509Context| {
        let dir = outputs[0].path();
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        assert_eq!(read("a.pem"), combined_text(context));
        assert_eq!(format!("{}{}", read("key.pem"), read("cert-chain.pem")), combined_text(context));
    };
    for result in publish(&old) {
        assert_eq!(result.unwrap(), Outcome::Written);
    }
    fs::write(disk.0.join("ballast"), [b'x'; 1 << 16]).unwrap_err();
    for result in publish(&new) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), "disk_full");
        assert!(error.to_string().ends_with("no space left on device: free some space there"), "{error}");
    }
    says(&old);
    disk.remount("ro");
    for result in publish(&new) {
        assert_eq!(result.unwrap_err().kind(), "read_only");
    }
    says(&old);
    disk.remount("rw");
    fs::remove_file(disk.0.join("ballast")).unwrap();
    for result in publish(&new) {
        assert_eq!(result.unwrap(), Outcome::Written);
    }
    says(&new);
}

/// The configuration that the README shows, on a host of its own.
#[tokio::test]
async fn every_output_that_is_configured_follows_each_rotation() {
    let lab = rotation::lab().ttl(Duration::from_secs(6)).spawn().await.unwrap();
    let config = "
defaults: {renewal: {minInterval: 100ms}}
workloads:
  payments:
    files:
      outputs:
        - format: pem
        - {format: combined, dir: /etc/haproxy/certs, name: payments.pem}
        - {format: pkcs12, passwordFile: /etc/password}
        - {format: trust}
        - {format: combined, group: no-such-group}
";
    let host = crate::support::Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
        .config(config);
    fs::write(host.path("/etc/password"), PASSWORD).unwrap();
    fs::set_permissions(host.path("/etc/password"), fs::Permissions::from_mode(0o600)).unwrap();
    let mut agent = host.start().await;

    let (own, mut mark) = (published::dir(&host, "payments"), 0);
    for _ in 0..2 {
        lab.heal_all();
        // No other certificate comes before this one is everywhere.
        let serial = rotation::next_issue(&lab, mark).await;
        lab.inject(Fault::CaDown);
        let report = agent
            .until("payments", "written everywhere it can be", |w| {
                let written = |output: &PublicationReport| output.serial.as_ref() == Some(&serial);
                w.files[..4].iter().all(|output| written(output) && output.cause.is_none())
                    && w.files[4].cause.is_some()
            })
            .await;
        let words: Vec<_> = report.files.iter().map(|output| output.publisher.as_str()).collect();
        assert_eq!(words, ["files", "combined", "pkcs12", "trust", "combined-2", "socket"]);
        let cause = report.files[4].cause.as_deref().unwrap();
        assert!(cause.contains("this host knows no group no-such-group"), "{cause}");
        assert_eq!(report.files[4].serial, None, "one that fails does not hinder the others");
        mark = lab.mark();
    }
    tokio::time::timeout(SOON, agent.stop()).await.unwrap();

    // Stopping is not leaving: everything stays, and all of it is of one certificate.
    let pair = published::pair(&own, rotation::ID).unwrap();
    let combined = host.path("/etc/haproxy/certs/payments.pem");
    assert_eq!(fs::read_to_string(&combined).unwrap(), combined_text(&pair));
    assert_eq!(fs::read_to_string(own.join("trust.pem")).unwrap(), pair.bundle.pem());
    let modes = [own.clone(), own.join("identity.p12"), own.join("trust.pem"), combined].map(|path| mode(&path));
    assert_eq!(modes, [0o755, 0o600, 0o644, 0o600], "the way is for everybody, each file for its own");
    assert!(own.join("identity.p12").exists() && !own.join("combined.pem").exists());
}
