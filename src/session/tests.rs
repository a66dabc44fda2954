//! The loop under paused time, with a scripted control plane.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::{
    control::Signed,
    spiffe::{Csr, X509Context},
    status::{Addresses, Health, Membership},
};
use std::{collections::VecDeque, future::pending, sync::Mutex, time::SystemTime};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

/// Ends of sessions, in order; whether it was registered before. The last one is held.
struct Script {
    ends: Mutex<VecDeque<(bool, Error)>>,
    begun: Mutex<Vec<Instant>>,
}

impl ControlPlane for Script {
    async fn sign(&self, _: &Csr, _: Duration) -> Result<Signed, Error> {
        pending().await
    }

    async fn accepts(&self, _: &Arc<X509Context>) -> Result<(), Error> {
        Ok(())
    }

    async fn session(&self, post: &mut Post) -> Result<(), Error> {
        self.begun.lock().unwrap().push(Instant::now());
        let end = self.ends.lock().unwrap().pop_front();
        let entry = "vms/payments-192.0.2.7".to_owned();
        if end.as_ref().is_none_or(|(registered, _)| *registered) {
            let since = SystemTime::UNIX_EPOCH;
            post.registration.send_replace(Registration::Registered { entry, since, trouble: None });
        }
        if let Some((_, error)) = end {
            return Err(error);
        }
        post.stop.cancelled().await;
        Ok(())
    }
}

struct Story {
    script: Arc<Script>,
    registration: watch::Receiver<Registration>,
    addresses: watch::Sender<Addresses>,
    stop: CancellationToken,
    running: JoinHandle<()>,
    local: watch::Sender<Versions>,
    _health: watch::Sender<Health>,
    _leaving: watch::Sender<bool>,
}

impl Story {
    fn begin(ends: impl IntoIterator<Item = (bool, Error)>) -> Self {
        let script = Arc::new(Script { ends: Mutex::new(ends.into_iter().collect()), begun: Mutex::default() });
        let (addresses, health) = (watch::Sender::new(Addresses::default()), watch::Sender::new(Health::default()));
        let (registration, leaving) = (watch::Sender::new(Registration::default()), watch::Sender::new(false));
        let stop = CancellationToken::new();
        let read = registration.subscribe();
        let post = Post {
            health: health.subscribe(),
            addresses: addresses.subscribe(),
            registration,
            membership: watch::Sender::new(Membership::default()),
            stop: stop.clone(),
            leaving: leaving.subscribe(),
        };
        let (local, files) = watch::channel(Versions::default());
        let running = tokio::spawn(run(script.clone(), post, files, Clock::simulated(SystemTime::UNIX_EPOCH)));
        let story =
            Self { script, registration: read, addresses, stop, running, local, _health: health, _leaving: leaving };
        story.address(7);
        story
    }

    fn address(&self, last: u8) {
        let ip = std::net::IpAddr::from([192, 0, 2, last]);
        self.addresses.send_replace(Addresses { primary: Some(ip), all: vec![ip], ..Addresses::default() });
    }

    async fn until(&mut self, wanted: impl FnMut(&Registration) -> bool) -> Registration {
        timeout(Duration::from_secs(3600), self.registration.wait_for(wanted)).await.unwrap().unwrap().clone()
    }

    /// Waits between the beginnings of sessions.
    fn waits(&self) -> Vec<Duration> {
        self.script.begun.lock().unwrap().windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    async fn end(mut self) {
        self.stop.cancel();
        timeout(Duration::from_secs(60), self.running).await.unwrap().unwrap();
        assert_eq!(*self.registration.borrow_and_update(), Registration::Absent, "a stopped loop holds nothing");
    }
}

fn ended() -> Error {
    Error::Ended { address: "istiod:15012".to_owned(), cause: "closed".to_owned() }
}

fn is_registered(fact: &Registration) -> bool {
    matches!(fact, Registration::Registered { .. })
}

/// A control plane that answers and closes.
#[tokio::test(start_paused = true)]
async fn a_session_that_lived_is_resumed_promptly_but_once() {
    let story = Story::begin((0..40).map(|_| (true, ended())));
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let waits = story.waits();
    assert!(waits[0] <= Duration::from_millis(202), "{waits:?}");
    assert!(waits[1..].iter().all(|wait| *wait >= FLOOR), "{waits:?}");
    assert!(waits.iter().take(20).sum::<Duration>() > Duration::from_secs(15), "no jitter goes as low: {waits:?}");
    story.end().await;
}

/// Looking for somebody who is not there costs him nothing.
#[tokio::test(start_paused = true)]
async fn who_is_away_is_found_within_two_seconds() {
    let away = || Error::Connect { address: "istiod:15012".to_owned(), cause: "refused".to_owned() };
    let mut story = Story::begin((0..100).map(|_| (false, away())));
    story.until(is_registered).await;
    let waits = story.waits();
    assert!(waits.iter().all(|wait| (1000..=2002).contains(&wait.as_millis())), "{waits:?}");
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn refusals_slow_it_down_and_the_first_of_a_row_is_told() {
    let mut story = Story::begin((0..40).map(|_| (false, ended())));
    let refused = |fact: &Registration| match fact {
        Registration::Asked { trouble, .. } => trouble.as_ref().map(|trouble| trouble.since),
        _ => None,
    };
    let first = story.until(|fact| refused(fact).is_some()).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(refused(&story.registration.borrow()), refused(&first), "never lost, as it never was");
    story.until(is_registered).await;
    let waits = story.waits();
    assert_eq!(waits.len(), 40);
    assert!(waits.iter().all(|wait| (FLOOR..=CAP + FLOOR).contains(wait)), "{waits:?}");
    assert!(waits.iter().skip(7).sum::<Duration>() > Duration::from_secs(200), "no jitter goes as low: {waits:?}");
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn lost_is_only_what_was_registered() {
    let ends = [(false, ended()), (true, ended()), (false, Error::Invalid("wrong".to_owned())), (false, ended())];
    let mut story = Story::begin(ends.into_iter().chain((0..3).map(|_| (false, ended()))));
    let is_lost = |fact: &Registration| matches!(fact, Registration::Lost { .. });
    story.until(|fact| matches!(fact, Registration::Asked { trouble: Some(_), .. })).await;
    story.until(is_lost).await;
    story.until(|fact| matches!(fact, Registration::Parked { .. })).await;
    story.until(is_lost).await;
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_parked_waits_for_a_file_or_an_address() {
    let wrong = || Error::Invalid("wrong".to_owned());
    let mut story = Story::begin((0..4).map(|_| (false, wrong())));
    let parked = |fact: &Registration| matches!(fact, Registration::Parked { .. });
    story.until(parked).await;
    story.local.send_replace(Versions::of(["istio-token"]));
    let begun = |story: &Story| story.script.begun.lock().unwrap().len();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(begun(&story), 2, "a new file ends the wait");
    story.address(8);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(begun(&story), 3, "so does another address");
    story.until(is_registered).await;
    assert!(story.waits()[2..].iter().all(|wait| (CAP / 2..=CAP + FLOOR).contains(wait)), "{:?}", story.waits());
    story.end().await;
}
