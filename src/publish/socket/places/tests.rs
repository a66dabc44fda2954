//! Sockets that are new, taken back and lost again.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
use super::*;
use crate::{
    files::{Dir, Root},
    host::Account,
    systemd::Listeners,
};
use nix::unistd::{getegid, geteuid};
use std::{
    fs::{self, Permissions},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use tokio::{sync::mpsc, time::timeout};

const SOON: Duration = Duration::from_secs(20);
const OWN: &str = "/run/we-agent/payments";
const ALSO: &str = "/run/secrets/socket";

/// A socket that is looked after, and what comes of it.
struct Door {
    _host: TempDir,
    path: PathBuf,
    fact: watch::Receiver<Publication>,
    /// One for each connection.
    came: mpsc::Receiver<()>,
    looks: watch::Sender<Instant>,
}

impl Door {
    fn open(host: TempDir, place: impl FnOnce(&Root) -> Place) -> Self {
        let (looks, moments) = watch::channel(Instant::now());
        let place = place(&Root::new(host.path())).looked_after(moments);
        let (told, fact) = watch::channel(Publication::default());
        let (door, came) = mpsc::channel(8);
        let path = place.path();
        tokio::spawn(async move {
            let mut places = Places::new(place, told, Clock::Wall);
            places.offer("1f");
            while places.accept(true).await.is_ok() && door.send(()).await.is_ok() {}
        });
        Self { _host: host, path, fact, came, looks }
    }

    /// Waits until somebody who connects is let in by us.
    async fn serves(&mut self) {
        let end = Instant::now() + SOON;
        let _stream = loop {
            match StdStream::connect(&self.path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < end, "{error}; {:?}", self.fact.borrow()),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert!(timeout(SOON, self.came.recv()).await.unwrap().is_some());
    }

    async fn until(&mut self, kind: Option<&str>) -> Option<String> {
        let wanted = |fact: &Publication| fact.trouble.as_ref().map(|trouble| trouble.kind) == kind;
        let seen = timeout(SOON, self.fact.wait_for(wanted)).await.unwrap().unwrap().clone();
        seen.trouble.map(|trouble| trouble.cause)
    }

    /// Waits until consumers see what is offered, or nothing.
    async fn shows(&mut self, serial: Option<&str>) {
        let wanted = |fact: &Publication| fact.serial.as_deref() == serial;
        assert!(timeout(SOON, self.fact.wait_for(wanted)).await.unwrap().is_ok());
    }

    /// Waits until the name has this group and 0660.
    async fn is_for(&self, gid: u32) {
        let end = Instant::now() + SOON;
        while rights(&self.path) != (gid, 0o660) {
            assert!(Instant::now() < end, "{:?}", rights(&self.path));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn look(&self) {
        self.looks.send_replace(Instant::now());
    }
}

fn rights(path: &Path) -> (u32, u32) {
    let facts = fs::metadata(path).unwrap();
    (facts.gid(), facts.mode() & 0o777)
}

/// A listener of a process before us, as the service manager gives it back.
fn kept(host: &TempDir, gid: Option<u32>) -> Listeners {
    let root = Root::new(host.path());
    let listener = Dir::passable(&root, Path::new(OWN)).unwrap().listen("agent.sock", gid).unwrap();
    let name = root.path(OWN).join("agent.sock").to_str().unwrap().to_owned();
    [(name, listener.into())].into_iter().collect()
}

fn named(group: &str) -> Option<Account> {
    Some(Account::Name(group.to_owned()))
}

fn may_not_choose_groups() -> bool {
    if !geteuid().is_root() {
        println!("skipped: giving a socket to another group takes root");
    }
    !geteuid().is_root()
}

#[tokio::test]
async fn a_socket_is_for_its_group_whether_it_is_new_or_taken_back() {
    if may_not_choose_groups() {
        return;
    }
    // On every Linux, by number and by name.
    let daemon = crate::files::group_number("daemon").unwrap();
    for group in [named("daemon"), Some(Account::Id(daemon))] {
        let mut new = Door::open(tempfile::tempdir().unwrap(), |root| Place::new(root, OWN, group.clone()));
        new.serves().await;
        assert_eq!(rights(&new.path), (daemon, 0o660));

        let host = tempfile::tempdir().unwrap();
        let listeners = kept(&host, None);
        let path = Root::new(host.path()).path(OWN).join("agent.sock");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let before = SocketId::at(&path).unwrap();
        let mut back = Door::open(host, |root| Place::new(root, OWN, group).inherit("payments", &listeners));
        back.is_for(daemon).await;
        back.serves().await;
        assert_eq!(SocketId::at(&path).unwrap(), before, "who waited at the old one is lost");
    }
    // The group is not configured any more.
    let host = tempfile::tempdir().unwrap();
    let listeners = kept(&host, Some(daemon));
    let mut back = Door::open(host, |root| Place::new(root, OWN, None).inherit("payments", &listeners));
    back.is_for(getegid().as_raw()).await;
    back.serves().await;
}

/// That of the package is in a directory of root's, and its name leads there.
#[tokio::test]
async fn the_socket_of_a_unit_has_the_modes_of_the_unit() {
    for elsewhere in [false, true] {
        of_a_unit(elsewhere).await;
    }
}

async fn of_a_unit(elsewhere: bool) {
    let host = tempfile::tempdir().unwrap();
    let path = Root::new(host.path()).path(OWN).join("agent.sock");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let bound = if elsewhere { host.path().join("payments.sock") } else { path.clone() };
    let passed = StdListener::bind(&bound).unwrap();
    if elsewhere {
        std::os::unix::fs::symlink(&bound, &path).unwrap();
    }
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let listeners: Listeners = [("payments".to_owned(), passed.into())].into_iter().collect();
    let mut door = Door::open(host, |root| Place::new(root, OWN, named("daemon")).inherit("payments", &listeners));
    door.serves().await;
    door.look();
    door.serves().await;
    assert_eq!(rights(&path), (getegid().as_raw(), 0o600));

    // Nor is it ours to make anew: systemd holds it, and would pass it again.
    fs::remove_file(&path).unwrap();
    door.look();
    assert!(door.until(Some("removed")).await.unwrap().ends_with("restart the socket unit, and start we-agent"));
    door.shows(None).await;
    assert!(!path.exists());
}

#[tokio::test]
async fn a_name_that_a_socket_unit_has_lost_is_still_lost_after_a_restart() {
    let host = tempfile::tempdir().unwrap();
    let path = Root::new(host.path()).path(OWN).join("agent.sock");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let passed = StdListener::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let listeners: Listeners = [("payments".to_owned(), passed.into())].into_iter().collect();
    let mut door = Door::open(host, |root| Place::new(root, OWN, None).inherit("payments", &listeners));
    assert!(door.until(Some("removed")).await.is_some());
    assert_eq!(door.fact.borrow().serial, None, "nobody finds it");
}

#[tokio::test]
async fn consumers_see_what_is_offered_while_they_find_the_socket() {
    let host = tempfile::tempdir().unwrap();
    let path = Root::new(host.path()).path(ALSO);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let other = StdListener::bind(&path).unwrap();
    let mut door = Door::open(host, |root| Place::also(root, Path::new(ALSO), None).unwrap());
    door.until(Some("served_by_another")).await;
    assert_eq!(door.fact.borrow().serial, None);
    drop(other);
    door.shows(Some("1f")).await;
    fs::remove_file(&path).unwrap();
    let _another = StdListener::bind(&path).unwrap();
    door.look();
    door.shows(None).await;
}

#[tokio::test]
async fn without_its_group_a_socket_is_not_made_and_one_that_is_there_is_served_as_it_was() {
    let unknown = || named("no-such-group");
    let mut new = Door::open(tempfile::tempdir().unwrap(), |root| Place::new(root, OWN, unknown()));
    let said = new.until(Some("no_such_account")).await.unwrap();
    assert_eq!(said, "this host knows no group no-such-group: create it, or configure another");
    assert!(!new.path.exists());

    let host = tempfile::tempdir().unwrap();
    let listeners = kept(&host, None);
    let mut back = Door::open(host, |root| Place::new(root, OWN, unknown()).inherit("payments", &listeners));
    assert_eq!(back.until(Some("no_such_account")).await.unwrap(), said);
    back.serves().await;
}

#[tokio::test]
async fn a_socket_whose_name_is_gone_or_anothers_is_made_anew() {
    let mut door = Door::open(tempfile::tempdir().unwrap(), |root| Place::new(root, OWN, None));
    door.serves().await;
    // As it is, it stays.
    let first = SocketId::at(&door.path).unwrap();
    door.look();
    door.serves().await;
    assert_eq!(SocketId::at(&door.path).unwrap(), first);

    let path = door.path.clone();
    let remove = || fs::remove_file(&path).unwrap();
    let replace = || {
        remove();
        drop(StdListener::bind(&path).unwrap());
    };
    let remove_all = || fs::remove_dir_all(path.parent().unwrap()).unwrap();
    let ways: [&dyn Fn(); 3] = [&remove, &replace, &remove_all];
    for way in ways {
        way();
        StdStream::connect(&path).unwrap_err();
        door.look();
        door.serves().await;
    }
    assert_eq!(door.fact.borrow().trouble, None);
}

#[tokio::test]
async fn a_path_that_another_program_has_taken_meanwhile_is_his() {
    let mut door = Door::open(tempfile::tempdir().unwrap(), |root| Place::also(root, Path::new(ALSO), None).unwrap());
    door.serves().await;
    fs::remove_file(&door.path).unwrap();
    let other = StdListener::bind(&door.path).unwrap();
    door.look();
    assert!(door.until(Some("served_by_another")).await.is_some());
    // It ends, and its name stays behind.
    drop(other);
    door.until(None).await;
    door.serves().await;
}

#[tokio::test]
async fn a_socket_is_looked_after_when_there_is_no_room_for_anybody() {
    let host = tempfile::tempdir().unwrap();
    let (looks, moments) = watch::channel(Instant::now());
    let place = Place::new(&Root::new(host.path()), OWN, None).looked_after(moments);
    let path = place.path();
    let mut places = Places::new(place, watch::Sender::default(), Clock::Wall);
    let made = async |before| {
        while SocketId::at(&path).unwrap().is_none_or(|found| Some(found) == before) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, async {
        tokio::select! { _ = places.accept(false) => panic!("there is no room"), () = made(None) => {} }
        let _waits = StdStream::connect(&path).unwrap();
        let before = SocketId::at(&path).unwrap();
        fs::remove_file(&path).unwrap();
        looks.send_replace(Instant::now());
        tokio::select! { _ = places.accept(false) => panic!("there is no room"), () = made(before) => {} }
    })
    .await
    .unwrap();
}
