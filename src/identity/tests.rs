//! The loop under paused time, with a scripted control plane.
#![allow(clippy::unwrap_used)]

mod kept;

use super::*;
use crate::{
    authority::{Authority, Leaf},
    control::{Disposition, Error, Post},
    time::BEAT,
};
use std::{
    future::pending,
    path::Path,
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
    /// Certificates that live so long.
    IssueFor(Duration),
    /// Certificates that it will not accept.
    IssueForeign,
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
        let life = if let Act::IssueFor(life) = act { life } else { ttl };
        let leaf = Leaf { not_after: now + life, ca: matches!(act, Act::Authority), ..Leaf::new(&uris, now) };
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

    async fn accepts(&self, _: &Arc<X509Context>) -> Result<(), Error> {
        match *self.act.lock().unwrap() {
            Act::IssueForeign => Err(Error::Invalid("unknown certificate authority".to_owned())),
            _ => Ok(()),
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
    durable: watch::Receiver<Durable>,
    token: watch::Receiver<Token>,
    local: watch::Sender<Versions>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

const STORE: &str = "var/lib/we-agent/payments";

fn wanted(host: &TempDir) -> Wanted {
    Wanted {
        id: ID.parse().unwrap(),
        key: KeyKind::EcP256,
        ttl: DAY,
        min_interval: Duration::from_secs(10),
        looks: BEAT,
        root: Root::new(host.path()),
        store: Path::new("/").join(STORE),
        token: TokenFile { remove: true, ..TokenFile::new(host.path().join("bundle/istio-token")) },
    }
}

impl Story {
    fn begin(act: Act) -> Self {
        Self::begin_with(act, |_| {})
    }

    fn begin_with(act: Act, prepare: impl FnOnce(&mut Wanted)) -> Self {
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000));
        let host = tempfile::tempdir().unwrap();
        let mut wanted = wanted(&host);
        prepare(&mut wanted);
        // Months pass in these stories, and each look is one at a real disk.
        wanted.looks = DAY;
        Self::begin_on(host, wanted, clock, act)
    }

    fn begin_on(host: TempDir, wanted: Wanted, clock: Clock, act: Act) -> Self {
        let authority = Authority::root("mesh").intermediate("istiod");
        let script = Arc::new(Script { authority, act: Mutex::new(act), asked: AtomicUsize::new(0), clock });
        let facts = Facts::default();
        let (fact, durable, token) = (facts.identity.subscribe(), facts.durable.subscribe(), facts.token.subscribe());
        let stop = CancellationToken::new();
        std::fs::create_dir_all(host.path().join("bundle")).unwrap();
        let (local, files) = watch::channel(Versions::of(wanted.token.paths()));
        facts.identity.send_replace(load(&wanted, clock.now()));
        let running = tokio::spawn(run(script.clone(), wanted, facts, files, clock, stop.clone()));
        Self { host, script, clock, fact, durable, token, local, stop, running }
    }

    /// Waits until the store has the newest certificate: how long that took.
    async fn kept(&mut self) -> Duration {
        let begun = self.clock.now();
        let fact = self.fact.clone();
        let newest = || fact.borrow().current.as_ref().map(|context| context.svid.serial().to_owned());
        timeout(DAY, self.durable.wait_for(|durable| durable.serial.is_some() && durable.serial == newest()))
            .await
            .unwrap()
            .unwrap();
        self.clock.now().duration_since(begun).unwrap()
    }

    /// The token is looked at, as the workload does it at each beat.
    fn look(&self) {
        crate::status::tell(&self.local, Versions::of([self.host.path().join("bundle/istio-token")]));
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
    story.look();
    let received = story.certified().await.received;
    assert!(received.duration_since(put).unwrap() <= Duration::from_secs(1));
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

#[tokio::test(start_paused = true)]
async fn a_step_of_the_clock_makes_one_renewal_at_most_and_leaves_no_trouble() {
    const HOUR: i64 = 3600;
    for by in [13 * HOUR, 25 * HOUR, 24_000 * HOUR] {
        let mut story = Story::begin(Act::Issue);
        let first = story.certified().await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        story.clock.step(by);
        tokio::time::sleep(Duration::from_secs(15)).await;
        assert_eq!(story.asked(), 2, "{by}");
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(story.asked(), 2, "{by}");
        assert_ne!(story.certified().await.svid.serial(), first.svid.serial());
        story.end().await;
    }
    // Back: the pair stays in use, and nobody is asked.
    for by in [600, 24 * HOUR, 24 * 365 * HOUR] {
        let mut story = Story::begin(Act::Issue);
        let first = story.certified().await;
        story.clock.step(-by);
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let fact = story.fact.borrow().clone();
        assert!(fact.trouble.is_none() && fact.valid(story.clock.now()).is_some() && story.asked() == 1);
        assert_eq!(fact.current.unwrap().svid.serial(), first.svid.serial());
        story.end().await;
    }
    // Forth and back: what was said meanwhile is over when the clock is right again.
    let mut story = Story::begin(Act::Issue);
    let first = story.certified().await;
    story.act(Act::Refuse(Error::Dead("the token has expired".to_owned())));
    story.clock.step(30 * 24 * HOUR);
    story.until(|fact| fact.credentials_dead).await;
    story.clock.step(-30 * 24 * HOUR);
    let set = tokio::time::Instant::now();
    let fact = story.until(|fact| fact.trouble.is_none()).await;
    assert!(set.elapsed() <= Duration::from_secs(15), "{:?}", set.elapsed());
    assert!(!fact.credentials_dead && fact.current.unwrap().svid.serial() == first.svid.serial());
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_wait_after_a_failure_ends_when_the_clock_has_moved() {
    let mut story = Story::begin(refusal(Disposition::Park, "ttl"));
    story.until(|fact| fact.trouble.is_some()).await;
    for _ in 0..20 {
        let asked = story.asked();
        story.clock.step(3600); // a resumed VM
        tokio::time::sleep(Duration::from_secs(11)).await;
        assert_eq!(story.asked(), asked + 1);
    }
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn short_lives_are_renewed_in_time_or_refused_and_named() {
    let mut story = Story::begin_with(Act::IssueFor(Duration::from_secs(12)), |wanted| {
        wanted.min_interval = Duration::from_secs(30);
    });
    story.certified().await;
    for _ in 0..600 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(story.fact.borrow().valid(story.clock.now()).is_some());
    }
    assert!(story.asked() <= 130, "{}", story.asked());
    // What ends at once is not used, and asked for at most as often as certificates may be renewed.
    for life in [Duration::from_millis(900), Duration::ZERO] {
        let before = story.fact.borrow().current.clone().unwrap();
        story.act(Act::IssueFor(life));
        let fact = story.until(|fact| fact.trouble.is_some()).await;
        // A certificate has whole seconds.
        let kind = fact.trouble.unwrap().kind;
        assert!(kind == "validity" || (kind == "short_lived" && !life.is_zero()), "{kind}");
        assert_eq!(fact.current.unwrap().svid.serial(), before.svid.serial());
        let asked = story.asked();
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!((5..=21).contains(&(story.asked() - asked)), "{life:?}: {}", story.asked() - asked);
        story.act(Act::IssueFor(Duration::from_secs(12)));
        story.until(|fact| fact.trouble.is_none()).await;
    }
    story.act(Act::IssueFor(Duration::from_secs(100 * 365 * 86_400)));
    let fact = story.until(|fact| fact.renew_at.is_some_and(|at| at > SystemTime::UNIX_EPOCH + 30_000 * DAY)).await;
    assert!(fact.trouble.is_none());
    story.end().await;
}
