//! The real program under a clock that is set forward and back while it runs (libfaketime): its timers go on as they were,
//! as they do when a VM was suspended or its clock was set.
#![allow(clippy::print_stdout)]

use crate::{
    daemon::Daemon,
    published,
    rotation::{ID, TOKEN, issued, lab},
    support::Host,
};
use nix::sys::signal::Signal;
use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};
use we_agent::status::{IdentityState, WorkloadReport};
use we_lab::{Event, Fault, Lab, What};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;
/// From a step to the decision made anew, and what a busy machine adds.
const PROMPT: Duration = Duration::from_secs(18);

/// Where Debian has the library.
fn library() -> Option<PathBuf> {
    let places = fs::read_dir("/usr/lib").ok()?.flatten().map(|place| place.path());
    let found = places.map(|place| place.join("faketime/libfaketimeMT.so.1")).find(|library| library.exists());
    if found.is_none() {
        println!("skipped: libfaketime is not installed; apt-get install faketime");
    }
    found
}

/// A VM whose clock is off by so many seconds.
struct Vm {
    host: Host,
    library: PathBuf,
}

impl Vm {
    fn new(lab: &Lab, library: PathBuf) -> Self {
        let host = Host::new()
            .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
            .config("admin: {address: off}\n");
        Self { host, library }
    }

    fn set(&self, seconds: i64) -> Instant {
        let (new, file) = (self.host.path("/clock.new"), self.host.path("/clock"));
        fs::write(&new, format!("{seconds:+}")).unwrap();
        fs::rename(new, file).unwrap();
        Instant::now()
    }

    fn start(&self) -> Daemon<'_> {
        let (library, file) = (self.library.to_str().unwrap(), self.host.path("/clock"));
        let clock = [
            ("LD_PRELOAD", library),
            ("FAKETIME_TIMESTAMP_FILE", file.to_str().unwrap()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ];
        Daemon::start(&self.host, &[], &clock)
    }
}

fn requests(lab: &Lab, mark: usize) -> usize {
    lab.events_since(mark).iter().filter(|e| matches!(e.what, What::Csr { .. })).count()
}

fn published(serial: Option<&str>) -> impl Fn(&WorkloadReport) -> bool {
    let serial = serial.map(str::to_owned);
    move |w| w.ready && w.identity.serial != serial && w.files[0].serial == w.identity.serial
}

/// Rows C1 and C2: past half of the life (12 h, ±10 %), almost all of it, and while the process stood still.
#[tokio::test]
async fn after_a_step_forward_or_a_suspend_there_is_one_renewal_and_it_is_prompt() {
    let Some(library) = library() else { return };
    for (by, suspended) in [(14 * HOUR, false), (23 * HOUR, true)] {
        let lab = lab().ttl(Duration::from_secs(DAY.unsigned_abs())).spawn().await.unwrap();
        let vm = Vm::new(&lab, library.clone());
        vm.set(0);
        let daemon = vm.start();
        let first = daemon.until("payments", published(None)).await;
        let mark = lab.mark();
        if suspended {
            daemon.signal(Signal::SIGSTOP);
        }
        let set = vm.set(by);
        if suspended {
            daemon.signal(Signal::SIGCONT);
        }
        let renewal = lab.until_since(mark, PROMPT, |e| issued(e).is_some()).await;
        assert!(renewal.is_some(), "no renewal within {:?}\n{}", set.elapsed(), daemon.log());
        daemon.until("payments", |w| w.identity.serial != first.identity.serial).await;
        assert_eq!(requests(&lab, mark), 1, "{}", daemon.log());
        daemon.kill().await;
    }
}

/// Row C3: the pair stays in use, nothing loops, and a server that does not verify any more is told with the remedy.
#[tokio::test]
async fn after_a_step_back_the_pair_is_kept() {
    let Some(library) = library() else { return };
    for by in [10 * 60, DAY, 3650 * DAY] {
        let lab = lab().spawn().await.unwrap();
        let vm = Vm::new(&lab, library.clone());
        vm.set(0);
        let daemon = vm.start();
        let first = daemon.until("payments", published(None)).await;
        let mark = lab.mark();
        vm.set(-by);
        lab.inject(Fault::DropConnections);
        let told =
            |w: &WorkloadReport| w.registration.cause.as_ref().is_some_and(|cause| cause.contains("check the clocks"));
        let w = daemon.until("payments", told).await;
        assert_eq!((w.identity.state, &w.identity.serial), (IdentityState::Valid, &first.identity.serial));
        let pair = published::pair(&published::dir(&vm.host, "payments"), ID).unwrap();
        assert_eq!(Some(pair.svid.serial()), first.identity.serial.as_deref());
        vm.set(0);
        let w = daemon.until("payments", |w| w.ready).await;
        assert_eq!((&w.identity.serial, w.identity.cause), (&first.identity.serial, None));
        assert_eq!(requests(&lab, mark), 0, "{}", daemon.log());
        daemon.kill().await;
    }
}

/// Row C4, and a kept certificate that was passed over at a boot with a wrong clock, when nothing else is left.
#[tokio::test]
async fn a_boot_with_a_wrong_clock_is_mended_by_the_right_one() {
    let Some(library) = library() else { return };
    let lab = lab().spawn().await.unwrap();
    let vm = Vm::new(&lab, library);
    let since_1970 = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed();
    vm.set(-since_1970);
    let daemon = vm.start();
    let w = daemon.until("payments", |w| w.identity.cause.is_some()).await;
    assert!(w.identity.cause.as_deref().unwrap().contains("clock"), "{w:#?}");
    let passed = |e: &Event| matches!(e.what, What::Csr { .. } | What::StreamOpened { .. });
    assert!(!lab.events().iter().any(passed), "a credential was sent to a server that did not verify");
    vm.set(0);
    let first = daemon.until("payments", published(None)).await;
    daemon.kill().await;

    fs::remove_file(vm.host.path(TOKEN)).unwrap();
    vm.set(-30 * DAY);
    let daemon = vm.start();
    let w = daemon.until("payments", |w| w.identity.cause.is_some()).await;
    assert!(w.identity.serial.is_none(), "{w:#?}");
    vm.set(0);
    let w = daemon.until("payments", |w| w.ready && w.identity.state == IdentityState::Valid).await;
    assert_eq!((w.identity.serial, w.identity.cause), (first.identity.serial, None));
    daemon.kill().await;
}
