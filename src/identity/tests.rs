//! The loop under paused time, with a scripted control plane.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::{
    authority::{Authority, Leaf},
    control::{Disposition, Error, Post},
};
use std::{
    future::pending,
    sync::Mutex,
    sync::atomic::{AtomicUsize, Ordering},
};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time::timeout};

const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";
const DAY: Duration = Duration::from_secs(86_400);

/// What the control plane does at present.
#[derive(Debug, Clone)]
enum Act {
    Issue,
    /// Somebody else's certificate.
    Stranger,
    /// An authority's.
    Authority,
    Refuse(Error),
    Hang,
}

/// A control plane that follows a script and counts requests.
struct Script {
    authority: Authority,
    act: Mutex<Act>,
    asked: AtomicUsize,
    clock: Clock,
}

impl ControlPlane for Script {
    async fn sign(&self, csr: &Csr, ttl: Duration) -> Result<Signed, Error> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let act = self.act.lock().unwrap().clone();
        let now = self.clock.now();
        let id = if matches!(act, Act::Stranger) { "spiffe://cluster.local/ns/a/sa/b" } else { ID };
        let uris = [id];
        let leaf = Leaf { not_after: now + ttl, ca: matches!(act, Act::Authority), ..Leaf::new(&uris, now) };
        match act {
            Act::Refuse(error) => Err(error),
            Act::Hang => pending().await,
            _ => {
                let chain = self.authority.answer(csr.pem(), &leaf);
                let vouched = X509Bundle::from_pem(chain.last().unwrap()).unwrap();
                Ok(Signed { chain, accepted: None, vouched })
            }
        }
    }

    async fn session(&self, _: &mut Post) -> Result<(), Error> {
        pending().await
    }
}

struct Story {
    host: TempDir,
    script: Arc<Script>,
    clock: Clock,
    fact: watch::Receiver<Identity>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Story {
    fn begin(act: Act) -> Self {
        let host = tempfile::tempdir().unwrap();
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000));
        let authority = Authority::root("mesh").intermediate("istiod");
        let script = Arc::new(Script { authority, act: Mutex::new(act), asked: AtomicUsize::new(0), clock });
        let (sender, fact) = watch::channel(Identity::default());
        let stop = CancellationToken::new();
        let token = host.path().join("bundle/istio-token");
        std::fs::create_dir(host.path().join("bundle")).unwrap();
        let local = FileWatch::new([token.clone()]);
        let wanted = Wanted {
            id: ID.parse().unwrap(),
            key: KeyKind::EcP256,
            ttl: DAY,
            min_interval: Duration::from_secs(10),
            root: Root::new(host.path()),
            store: "/var/lib/we-agent/payments".into(),
            token: TokenFile { remove: true, ..TokenFile::new(token) },
        };
        let running = tokio::spawn(run(script.clone(), wanted, sender, local, clock, stop.clone()));
        Self { host, script, clock, fact, stop, running }
    }

    fn act(&self, act: Act) {
        *self.script.act.lock().unwrap() = act;
    }

    fn asked(&self) -> usize {
        self.script.asked.load(Ordering::Relaxed)
    }

    /// Waits, a week of the loop's time at most.
    async fn until(&mut self, wanted: impl FnMut(&Identity) -> bool) -> Identity {
        timeout(7 * DAY, self.fact.wait_for(wanted)).await.unwrap().unwrap().clone()
    }

    async fn certified(&mut self) -> Arc<X509Context> {
        self.until(|fact| fact.current.is_some()).await.current.unwrap()
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(DAY, self.running).await.unwrap().unwrap();
    }
}

fn refusal(disposition: Disposition, kind: &'static str) -> Act {
    Act::Refuse(Error::Refused {
        call: "CreateCertificate",
        code: 14,
        message: String::new(),
        meaning: "",
        fix: "",
        disposition,
        kind,
    })
}

#[tokio::test(start_paused = true)]
async fn a_month_takes_two_requests_a_day() {
    let mut story = Story::begin(Act::Issue);
    let first = story.certified().await;
    tokio::time::sleep(30 * DAY).await;
    let fact = story.fact.borrow().clone();
    let (now, current) = (story.clock.now(), fact.current.unwrap());
    assert!((54..=67).contains(&story.asked()), "{}", story.asked());
    assert!(current.svid.is_valid(now) && current.received > first.received + 29 * DAY);
    assert_ne!(current.svid.key().pem(), fact.previous.unwrap().svid.key().pem(), "each certificate has its own key");
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_until_the_last_twentieth_is_survived() {
    let mut story = Story::begin(Act::Issue);
    let first = story.certified().await;
    story.act(refusal(Disposition::Retry, "unavailable"));
    let fact = story.until(|fact| fact.trouble.is_some()).await;
    assert_eq!(fact.trouble.unwrap().kind, "unavailable");
    story.clock.sleep_until(first.received + DAY.mul_f64(0.95)).await;
    assert_eq!(story.fact.borrow().current.as_ref().unwrap().svid.serial(), first.svid.serial());
    // Half a day in waits of a minute at most, half a minute on average.
    assert!(story.asked() < 3_000, "{}", story.asked());
    story.act(Act::Issue);
    let healed = story.clock.now();
    let fact = story.until(|fact| fact.trouble.is_none()).await;
    let (current, previous) = (fact.current.unwrap(), fact.previous.unwrap());
    assert!(current.received.duration_since(healed).unwrap() <= Duration::from_secs(60));
    assert_eq!(previous.svid.serial(), first.svid.serial(), "kept while it is valid");
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_wrong_answer_replaces_nothing() {
    for (act, kind) in [(Act::Stranger, "wrong_identity"), (Act::Authority, "bad_answer")] {
        let mut story = Story::begin(act.clone());
        let fact = story.until(|fact| fact.trouble.is_some()).await;
        assert!(fact.current.is_none() && fact.trouble.unwrap().kind == kind);
        story.act(Act::Issue);
        let good = story.certified().await;
        story.act(act);
        let fact = story.until(|fact| fact.trouble.is_some()).await;
        assert_eq!(fact.current.unwrap().svid.serial(), good.svid.serial());
        // Until its end, and beyond: it is not withdrawn.
        story.clock.sleep_until(good.svid.not_after() + DAY).await;
        let fact = story.fact.borrow().clone();
        assert!(fact.valid(story.clock.now()).is_none() && fact.current.is_some());
        story.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_parked_request_is_repeated_rarely_and_at_once_for_a_new_file() {
    let mut story = Story::begin(refusal(Disposition::Park, "ttl"));
    story.until(|fact| fact.trouble.is_some()).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!((60..=121).contains(&story.asked()), "{}", story.asked());
    story.act(Act::Issue);
    let put = story.clock.now();
    std::fs::write(story.host.path().join("bundle/istio-token"), "new").unwrap();
    let received = story.certified().await.received;
    assert!(received.duration_since(put).unwrap() <= Duration::from_secs(5));
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn dead_is_said_only_when_the_certificate_is_dead_too() {
    let dead = || Act::Refuse(Error::Dead("the token has expired".to_owned()));
    let mut story = Story::begin(Act::Issue);
    let first = story.certified().await;
    story.act(dead());
    let fact = story.until(|fact| fact.trouble.is_some()).await;
    assert!(!fact.credentials_dead);
    let since = fact.trouble.unwrap().since;
    let fact = story.until(|fact| fact.credentials_dead).await;
    assert!(story.clock.now() >= first.svid.not_after());
    assert_eq!(fact.trouble.unwrap().since, since, "the first failure of its kind in a row");
    story.act(Act::Issue);
    let fact = story.until(|fact| fact.trouble.is_none()).await;
    assert!(!fact.credentials_dead && fact.valid(story.clock.now()).is_some());
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_hangs_does_not_keep_the_loop_from_stopping() {
    let story = Story::begin(Act::Hang);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(story.asked(), 1);
    story.end().await;
}

/// Root lets us into the directory after the token has served: nothing else changes then, and no certificate is due.
#[tokio::test(start_paused = true)]
async fn a_token_that_could_not_be_removed_is_removed_before_the_next_renewal() {
    use std::{fs, os::unix::fs::PermissionsExt};
    let mut story = Story::begin(Act::Issue);
    let dir = story.host.path().join("bundle");
    let token = dir.join("istio-token");
    let mode = |path: &PathBuf, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    fs::write(&token, "served").unwrap();
    mode(&dir, 0o777);
    let fact = story.until(|fact| fact.current.is_some()).await;
    assert!(matches!(fact.token, Token::Stays { .. }), "{:?}", fact.token);
    // As "we-agent permit" does it, which the watch sees: the token still has served.
    mode(&token, 0o640);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(matches!(story.fact.borrow().token, Token::Stays { .. }) && token.exists());
    mode(&dir, 0o700);
    let put = story.clock.now();
    story.until(|fact| fact.token == Token::Removed).await;
    assert!(!token.exists() && story.clock.now().duration_since(put).unwrap() <= Duration::from_secs(60));
    // The next one is not needed, and is not taken for the one that has served.
    fs::write(&token, "the next").unwrap();
    story.until(|fact| fact.token == Token::Kept).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(token.exists() && story.asked() == 1);
    story.end().await;
}
