//! What the control plane does wrong, and what the agent makes of it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    published,
    rotation::{ENTRY, ID, TOKEN, assert_held, host, issued, lab, next_issue, uid},
    support::{App, Host, Running, SOON},
};
use serde_json::json;
use std::{
    fs,
    time::{Duration, SystemTime},
};
use we_agent::status::{IdentityState, RegistrationState, WorkloadReport};
use we_lab::{Event, Fault, Group, Lab, What};

fn says(cause: &Option<String>, words: &str) -> bool {
    cause.as_ref().is_some_and(|cause| cause.contains(words))
}

async fn blames(agent: &mut Running, words: &str) -> WorkloadReport {
    agent.until("payments", words, |w| says(&w.identity.cause, words)).await
}

/// Answers that must not be used, and how they are called.
fn wrong_answers() -> [(Fault, &'static str); 4] {
    [
        (Fault::WrongIdentity, "not exactly spiffe://cluster.local/ns/vms/sa/payments-sa"),
        (Fault::WrongKey, "the certificate is not for our key"),
        (Fault::ShortChain, "1 chain element(s)"),
        (Fault::ShortLife(Duration::ZERO), "the certificate expired"),
    ]
}

#[tokio::test]
async fn a_wrong_answer_is_never_published() {
    for (fault, words) in wrong_answers() {
        let lab = lab().spawn().await.unwrap();
        lab.inject(fault.clone());
        let host = host(&lab);
        let mut agent = host.start().await;
        let w = blames(&mut agent, words).await;
        assert_eq!(w.identity.state, IdentityState::None);
        assert!(says(&w.cause, words), "readiness names it, too: {:?}", w.cause);
        assert!(published::pair(&published::dir(&host, "payments"), ID).is_none(), "{fault:?} was published");
        let stored = fs::read_dir(host.path("/var/lib/we-agent/payments")).unwrap().count();
        assert_eq!(stored, 0, "{fault:?} was stored");
        lab.heal_all();
        let w = agent.ready("payments").await;
        assert_eq!(w.identity.cause, None);
        agent.stop().await;
    }
}

async fn wrong_at_renewal(fault: Fault, words: &str) {
    let lab = lab().ttl(Duration::from_secs(6)).spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let before = agent.until("payments", "published", |w| w.files[0].serial.is_some()).await;
    let dir = published::dir(&host, "payments");
    let mark = lab.mark();
    lab.inject(fault);
    let w = blames(&mut agent, words).await;
    assert_eq!((w.identity.state, &w.identity.serial), (IdentityState::Valid, &before.identity.serial));
    assert_eq!(w.registration.state, RegistrationState::Registered);
    assert_eq!(published::pair(&dir, ID).map(|p| p.svid.serial().to_owned()), before.identity.serial);
    assert!(published::is_good(&dir, ID));
    lab.heal_all();
    let other = |w: &WorkloadReport| w.files[0].serial != before.identity.serial && w.identity.cause.is_none();
    agent.until("payments", "renewed", other).await;
    assert_held(&lab, mark);
    agent.stop().await;
}

#[tokio::test]
async fn a_wrong_answer_at_a_renewal_leaves_the_old_pair() {
    let [a, b, c, d] = wrong_answers().map(|(fault, words)| wrong_at_renewal(fault, words));
    tokio::join!(a, b, c, d);
}

#[tokio::test]
async fn an_outage_of_the_ca_from_half_life_to_the_last_twentieth() {
    let lab = lab().ttl(Duration::from_secs(8)).spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let before = agent.until("payments", "published", |w| w.files[0].serial.is_some()).await;
    let (begin, mark) = (SystemTime::now(), lab.mark());
    let life = before.identity.not_after.unwrap().0.duration_since(begin).unwrap();
    lab.inject(Fault::CaDown);
    let reader = published::Reader::start(published::dir(&host, "payments"), ID);
    let w = blames(&mut agent, "istiod is not available").await;
    assert!(SystemTime::now() >= begin + life.mul_f64(0.4), "nobody asks before half of the life is over");
    assert_eq!(w.identity.state, IdentityState::Valid);
    let late = (begin + life.mul_f64(0.95)).duration_since(SystemTime::now()).unwrap_or_default();
    tokio::time::sleep(late).await;
    assert_eq!(reader.stop(), [before.identity.serial.clone().unwrap()].into(), "one pair, valid all along");
    lab.heal_all();
    agent.until("payments", "renewed", |w| w.ready && w.files[0].serial != before.identity.serial).await;
    assert_held(&lab, mark);
    agent.stop().await;
}

#[tokio::test]
async fn the_session_outlives_a_refused_certificate() {
    let lab = lab().ttl(Duration::from_secs(8)).spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let (uid, mark) = (uid(&lab), lab.mark());
    // The first renewal brings the session onto a certificate; then the token is of no more use.
    next_issue(&lab, mark).await;
    let moved = |e: &Event| matches!(e.what, What::StreamOpened { observer: false, .. });
    assert!(lab.until_since(mark, SOON, moved).await.is_some());
    fs::remove_file(host.path(TOKEN)).unwrap();

    lab.inject(Fault::RefuseNewCertificate);
    let w = agent.until("payments", "refused", |w| w.identity.state == IdentityState::Refused).await;
    assert!(w.ready && says(&w.identity.cause, "refuses our newest certificate"), "{w:#?}");
    assert!(says(&w.registration.cause, "restart istiod"), "{w:#?}");
    assert!(published::is_good(&published::dir(&host, "payments"), ID));
    // It follows a connection that ends in order, as always.
    let told = lab.mark();
    lab.inject(Fault::Goaway);
    assert!(lab.until_since(told, Duration::from_secs(9), moved).await.is_some(), "GOAWAY is not heard");
    // Also when its connection is cut: it comes back on the previous pair, and the trouble is still told.
    assert_held(&lab, mark);
    let cut = lab.mark();
    lab.inject(Fault::DropConnections);
    assert!(lab.until_since(cut, SOON, moved).await.is_some(), "the session does not come back");
    agent.until("payments", "refused", |w| w.ready && w.identity.state == IdentityState::Refused).await;
    assert_eq!(self::uid(&lab), uid);

    lab.heal_all();
    let mark = lab.mark();
    agent
        .until("payments", "accepted", |w| {
            w.ready && w.identity.state == IdentityState::Valid && w.registration.cause.is_none()
        })
        .await;
    assert!(lab.until_since(mark, SOON, moved).await.is_some());
    assert_eq!(self::uid(&lab), uid);
    agent.stop().await;
}

#[tokio::test]
async fn a_refused_token_is_named_and_tried_again() {
    let lab = lab().spawn().await.unwrap();
    lab.inject(Fault::RefuseToken);
    let host = host(&lab);
    let mut agent = host.start().await;
    let w = blames(&mut agent, "the credential was not accepted").await;
    assert_eq!(w.identity.state, IdentityState::None, "a token that looks good is not called dead");
    let w = agent.until("payments", "told of it", |w| says(&w.registration.cause, "was not accepted")).await;
    assert_eq!(w.registration.state, RegistrationState::Asked);
    lab.heal_all();
    agent.ready("payments").await;
    agent.stop().await;
}

#[tokio::test]
async fn dead_credentials_are_called_dead_until_a_token_comes() {
    let lab = lab().ttl(Duration::from_secs(2)).spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    lab.inject(Fault::CaDown);
    let expired = lab.token_for("vms", "payments-sa", "istio-ca", -60).unwrap();
    fs::write(host.path(TOKEN), expired).unwrap();
    agent.until("payments", "expired", |w| w.identity.state == IdentityState::Expired).await;
    lab.heal_all();
    lab.inject(Fault::DropConnections);
    let w = agent.until("payments", "dead", |w| w.identity.state == IdentityState::Dead).await;
    let cause = w.cause.unwrap();
    assert!(cause.contains("istio-token expired at ") && !cause.contains('\n'), "{cause}");
    assert!(!w.ready);

    let token = lab.token("vms", "payments-sa", Duration::from_secs(3600)).unwrap();
    fs::write(host.path(TOKEN), token).unwrap();
    agent.until("payments", "alive", |w| w.identity.state == IdentityState::Valid).await;
    agent.ready("payments").await;
    agent.stop().await;
}

#[tokio::test]
async fn without_an_api_server_certificates_work_and_tokens_do_not() {
    let lab = lab().ttl(Duration::from_secs(6)).spawn().await.unwrap();
    let host = host(&lab);
    lab.inject(Fault::ApiServerDown(Duration::ZERO));
    let mut agent = host.start().await;
    let w = blames(&mut agent, "istiod cannot reach its Kubernetes API").await;
    assert!(says(&w.identity.cause, "nothing is wrong with the token"), "{w:#?}");
    assert!(![RegistrationState::Parked, RegistrationState::Registered].contains(&w.registration.state));
    lab.heal_all();
    agent.ready("payments").await;
    let (uid, mark) = (uid(&lab), lab.mark());
    lab.inject(Fault::ApiServerDown(Duration::ZERO));
    next_issue(&lab, mark).await;
    let mark2 = lab.mark();
    next_issue(&lab, mark2).await;
    let w = agent.workload("payments").unwrap();
    assert!(w.ready, "{w:#?}");
    lab.heal_all();
    agent.until("payments", "registered", |w| w.ready && w.registration.cause.is_none()).await;
    assert_held(&lab, mark);
    assert_eq!(self::uid(&lab), uid);
    agent.stop().await;
}

#[tokio::test]
async fn a_lifetime_beyond_the_cap_is_parked_with_the_fix() {
    let lab = lab().ttl_cap(Duration::from_secs(3600)).spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    let w = blames(&mut agent, "lower SECRET_TTL, or identity.ttl").await;
    assert!(says(&w.identity.cause, "greater than the max allowed TTL 1h0m0s"), "{w:#?}");
    assert_eq!(w.identity.state, IdentityState::None);
    agent.stop().await;
    let csr = |e: &Event| matches!(e.what, What::Csr { .. });
    assert_eq!(lab.events().into_iter().filter(csr).count(), 1, "it is not asked again at once");
    let host = host.config("defaults: {identity: {ttl: 30m}}\n");
    let mut agent = host.start().await;
    agent.ready("payments").await;
    agent.stop().await;
}

/// The distance between renewals is for a clock that jumps; it does not let a certificate expire.
#[tokio::test]
async fn a_long_distance_between_renewals_makes_no_certificate_expire() {
    let lab = lab().spawn().await.unwrap();
    lab.inject(Fault::ShortLife(Duration::from_secs(5)));
    let host = host(&lab).config("defaults: {renewal: {minInterval: 30s}}\n");
    let mut agent = host.start().await;
    let mut last = agent.ready("payments").await;
    for _ in 0..3 {
        let old = last.identity.serial.clone();
        let end = last.identity.not_after.unwrap();
        last = agent.until("payments", "renewed", |w| w.identity.serial != old).await;
        assert!(SystemTime::now() < end.0, "{old:?} was not renewed before its end");
    }
    agent.stop().await;
}

/// What ends as soon as it is there is named, and asked for no more often than certificates may be renewed.
#[tokio::test]
async fn a_certificate_that_ends_at_once_is_refused_and_named() {
    let lab = lab().spawn().await.unwrap();
    lab.inject(Fault::ShortLife(Duration::from_secs(1)));
    let host = host(&lab).config("defaults: {renewal: {minInterval: 10s}}\n");
    let mut agent = host.start().await;
    let w = agent.until("payments", "a name for it", |w| w.identity.cause.is_some()).await;
    assert!(says(&w.identity.cause, "is not used: the certificate ") && w.identity.serial.is_none(), "{w:#?}");
    agent.stop().await;
    let times: Vec<_> = lab.events().iter().filter(|e| issued(e).is_some()).map(|e| e.at).collect();
    let apart = |pair: &[SystemTime]| pair[1].duration_since(pair[0]).unwrap();
    assert!(times.windows(2).all(|pair| apart(pair) >= Duration::from_secs(9)), "{times:?}");
}

#[tokio::test]
async fn a_stored_pair_is_published_without_any_network() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let mut agent = host.start().await;
    let before = agent.ready("payments").await;
    agent.until("payments", "published", |w| w.files[0].serial.is_some()).await;
    agent.stop().await;
    fs::remove_dir_all(host.path("/run/we-agent/payments")).unwrap(); // a reboot
    lab.stop().await;

    let mut agent = host.start().await;
    let w = agent.until("payments", "published", |w| w.files[0].serial.is_some()).await;
    assert_eq!(w.files[0].serial, before.identity.serial);
    assert!(published::is_good(&published::dir(&host, "payments"), ID));
    let w = agent.until("payments", "told of it", |w| says(&w.registration.cause, "cannot be reached")).await;
    assert!(!w.ready && w.identity.state == IdentityState::Valid);
    lab.restart().await;
    agent.ready("payments").await;
    agent.stop().await;
}

/// A lab whose group probes `app`, and a VM of it.
async fn probed(app: &App, ttl: Duration) -> (Lab, Host) {
    let probe = json!({"periodSeconds": 1, "failureThreshold": 1, "httpGet": {"path": "/healthz", "port": app.port}});
    let group = Group::new("vms", "payments").service_account("payments-sa").port("http", app.port).probe(probe);
    // Pings may come at any pace: the lab counts by the real clock, and the agent's runs faster here.
    let lab = Lab::builder().group(group).ttl(ttl).ping_interval(Duration::ZERO).spawn().await.unwrap();
    let host = host(&lab);
    (lab, host)
}

async fn reported(lab: &Lab, mark: usize, wanted: bool) -> bool {
    let report = |e: &Event| matches!(e.what, What::Health { healthy, lost: false, .. } if healthy == wanted);
    lab.until_since(mark, SOON, report).await.is_some()
}

#[tokio::test]
async fn a_ca_that_hangs_disturbs_nobody() {
    let app = App::start().await;
    let (lab, host) = probed(&app, Duration::from_secs(5)).await;
    let mut agent = host.start().await;
    agent.ready("payments").await;
    assert!(reported(&lab, 0, true).await);
    let mark = lab.mark();
    lab.inject(Fault::CaHangs);
    let hung = |e: &Event| matches!(&e.what, What::Csr { outcome: we_lab::Outcome::Hung, .. });
    assert!(lab.until_since(mark, SOON, hung).await.is_some());
    let here = lab.mark();
    app.healthy.send_replace(false);
    assert!(reported(&lab, here, false).await, "the probe waits for the CA");
    lab.heal_all();
    blames(&mut agent, "no answer from").await; // the deadline of the one that hangs
    agent.until("payments", "renewed", |w| w.ready && w.identity.cause.is_none()).await;
    assert_held(&lab, mark);
    agent.stop().await;
}

/// Lets the timers of this test run faster: in strides that are shorter than what a connection is pinged after. A ping
/// is missed after five strides without an answer. So that there is time for it on the wire, `app` has to have answered a
/// probe, of which there is one a second, before the next stride.
async fn fast_forward(app: &App, time: Duration) {
    const STRIDE: Duration = Duration::from_secs(2);
    let mut answered = app.answered.clone();
    for _ in 0..time.as_secs() / STRIDE.as_secs() {
        answered.mark_unchanged();
        tokio::time::pause();
        tokio::time::advance(STRIDE).await;
        tokio::time::resume();
        tokio::time::timeout(SOON, answered.changed()).await.expect("no probe").unwrap();
    }
}

#[tokio::test]
async fn a_lost_report_is_repeated() {
    let app = App::start().await;
    let (lab, host) = probed(&app, Duration::from_secs(24 * 3600)).await;
    let mut agent = host.start().await;
    agent.ready("payments").await;
    assert!(reported(&lab, 0, true).await);
    let mark = lab.mark();
    lab.inject(Fault::ApiServerDown(Duration::ZERO));
    app.healthy.send_replace(false);
    let lost = |e: &Event| matches!(e.what, What::Health { healthy: false, lost: true, .. });
    assert!(lab.until_since(mark, SOON, lost).await.is_some());
    lab.heal_all();
    assert_eq!(lab.entry("vms", ENTRY).unwrap().healthy(), Some(true), "istiod does not know better");
    fast_forward(&app, Duration::from_secs(340)).await;
    assert!(reported(&lab, mark, false).await);
    assert_eq!(lab.entry("vms", ENTRY).unwrap().healthy(), Some(false));
    assert_held(&lab, mark);
    agent.stop().await;
}

#[tokio::test]
async fn a_refused_certificate_is_proven_again_after_a_reconnect() {
    let lab = lab().spawn().await.unwrap();
    lab.inject(Fault::RefuseNewCertificate);
    let host = host(&lab);
    let mut agent = host.start().await;
    agent.ready("payments").await;
    let uid = uid(&lab);
    lab.inject(Fault::DropConnections);
    let w = agent.until("payments", "refused", |w| w.identity.state == IdentityState::Refused).await;
    assert!(w.ready, "the token is the last resort: {w:#?}");
    lab.heal_all();
    let accepted = |w: &WorkloadReport| w.ready && w.identity.state == IdentityState::Valid;
    agent.until("payments", "accepted", accepted).await;
    assert_eq!(lab.events().iter().filter(|e| issued(e).is_some()).count(), 1, "the same certificate is proven");
    assert_eq!(self::uid(&lab), uid);
    agent.stop().await;
}
