//! The token: removed when it has served, and who may read it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    daemon::we_agent,
    rotation::{TOKEN, lab, uid},
    support::{Host, SOON},
};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    time::Duration,
};
use we_agent::{
    files::{Root, Stamp, ask_removal},
    status::{IdentityState, TokenState, WorkloadReport},
};
use we_lab::{Fault, Lab};

fn host(lab: &Lab) -> Host {
    Host::new()
        .bundle("payments", &lab.bundle("vms", "payments").internal_ip("127.0.0.1"))
        .config("defaults: {identity: {removeToken: true}, renewal: {minInterval: 100ms}}")
}

#[tokio::test]
async fn it_goes_when_it_has_served_and_so_does_the_next_one() {
    let lab = lab().ttl(Duration::from_secs(3600)).spawn().await.unwrap();
    let host = host(&lab);
    lab.inject(Fault::CaRefuses(14));
    let mut agent = host.start().await;
    let w = agent.until("payments", "refused", |w| w.identity.cause.is_some()).await;
    assert_eq!((w.identity.token.state, host.path(TOKEN).exists()), (TokenState::Kept, true));
    lab.heal_all();
    agent.until("payments", "removed", |w| w.ready && w.identity.token.state == TokenState::Removed).await;
    assert!(!host.path(TOKEN).exists());
    let uid_before = uid(&lab);
    agent.stop().await;

    // The restart needs none, and a token that is not needed stays.
    let mut agent = host.start().await;
    agent.until("payments", "gone", |w| w.ready && w.identity.token.state == TokenState::Removed).await;
    assert_eq!(uid(&lab), uid_before);
    fs::write(host.path(TOKEN), lab.token("vms", "payments-sa", Duration::from_secs(600)).unwrap()).unwrap();
    agent.until("payments", "kept", |w| w.identity.token.state == TokenState::Kept).await;
    agent.stop().await;
    assert!(host.path(TOKEN).exists());

    // The certificate is lost: the one line says what to do, and the token that comes is used and goes.
    fs::remove_file(host.path(TOKEN)).unwrap();
    fs::remove_dir_all(host.path("/var/lib/we-agent/payments")).unwrap();
    let mut agent = host.start().await;
    let w = agent.until("payments", "dead", |w| w.identity.state == IdentityState::Dead).await;
    let cause = w.cause.unwrap();
    assert!(cause.contains("there is no token") && cause.contains("make a new bundle with istioctl"), "{cause}");
    fs::write(host.path(TOKEN), lab.token("vms", "payments-sa", Duration::from_secs(600)).unwrap()).unwrap();
    agent.until("payments", "removed again", |w| w.ready && w.identity.token.state == TokenState::Removed).await;
    assert!(!host.path(TOKEN).exists());
    agent.stop().await;
}

#[tokio::test]
async fn what_is_not_durable_keeps_its_token() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    // A file where the store's directory has to be.
    fs::create_dir_all(host.path("/var/lib/we-agent")).unwrap();
    fs::write(host.path("/var/lib/we-agent/payments"), "").unwrap();
    let mut agent = host.start().await;
    let lost =
        |w: &WorkloadReport| w.identity.store.cause.as_ref().is_some_and(|c| c.contains("a restart would lose it"));
    let w = agent.until("payments", "not durable", |w| w.ready && lost(w)).await;
    assert_eq!((w.identity.state, w.identity.cause, w.identity.store.durable), (IdentityState::Valid, None, false));
    assert_eq!((w.identity.token.state, host.path(TOKEN).exists()), (TokenState::Kept, true));
    fs::remove_file(host.path("/var/lib/we-agent/payments")).unwrap();
    let w = agent.until("payments", "durable", |w| w.identity.token.state == TokenState::Removed).await;
    assert!(w.identity.store.durable && w.identity.store.cause.is_none(), "{w:#?}");
    agent.stop().await;
}

/// After a live change of its CA istiod issues what it refuses: only the token still opens the door.
#[tokio::test]
async fn a_certificate_that_is_refused_keeps_its_token() {
    for no_alert in [false, true] {
        let lab = lab().ttl(Duration::from_secs(3600)).spawn().await.unwrap();
        lab.inject(Fault::RefuseNewCertificate);
        if no_alert {
            lab.inject(Fault::LoseAlerts);
        }
        let host = host(&lab);
        let mut agent = host.start().await;
        let w = agent.until("payments", "stays", |w| w.identity.token.state == TokenState::Stays).await;
        let cause = w.identity.token.cause.unwrap();
        assert!(cause.contains("when the control plane has accepted the certificate"), "{cause}");
        assert!(host.path(TOKEN).exists() && w.identity.store.durable);
        lab.heal_all();
        agent.until("payments", "removed", |w| w.identity.token.state == TokenState::Removed).await;
        assert!(!host.path(TOKEN).exists());
        agent.stop().await;
    }
}

#[tokio::test]
async fn permit_is_for_the_group_of_the_agent() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    fs::set_permissions(host.path(TOKEN), fs::Permissions::from_mode(0o744)).unwrap();
    let other = host.path("/other.yaml");
    fs::write(&other, "{}").unwrap();
    let run = async |group: &str, config: &[&str]| {
        let mut permit = we_agent(&host);
        let output = tokio::time::timeout(SOON, permit.args(["permit", "--group", group]).args(config).output()).await;
        let output = output.expect("it hangs").unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run("no-such-group", &[]).await;
    assert!(code == Some(1) && said.contains("this host knows no group no-such-group"), "{code:?} {said}");
    let group = nix::unistd::getegid().as_raw();
    let group_name = group.to_string();
    let facts = |path: &str| {
        let m = fs::metadata(host.path(path)).unwrap();
        (m.mode() & 0o7777, m.uid(), m.gid())
    };
    let us = nix::unistd::geteuid().as_raw();
    assert_eq!(run(&group_name, &["--config", other.to_str().unwrap()]).await, (Some(0), String::new()));
    assert_eq!(facts(TOKEN), (0o640, us, group));
    assert_eq!(facts("/etc/we-agent/payments"), (0o750, us, group));
    // The agent asks for its removal, which that configuration does not allow, and that of the host does.
    let stamp = Stamp::of(&host.path(TOKEN)).unwrap();
    ask_removal(&Root::new(host.path("/")), "payments", stamp).unwrap();
    let (code, said) = run(&group_name, &["--config", other.to_str().unwrap()]).await;
    assert!(code == Some(0) && said.contains("the token of payments stays, for the configuration"), "{said}");
    let (code, said) = run(&group_name, &[]).await;
    assert!(code == Some(0) && said.contains("the token of payments has served and was removed"), "{said}");
    assert!(!host.path(TOKEN).exists() && host.path("/etc/we-agent/payments/root-cert.pem").exists());
}

/// A token that istiod refuses is here: what is wrong with it is said, and only that.
#[tokio::test]
async fn the_one_thing_that_is_wrong_with_a_token_is_named() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab);
    let good = lab.token("vms", "payments-sa", Duration::from_secs(3600)).unwrap();
    let audience = lab.token_for("vms", "payments-sa", "vault", 3600).unwrap();
    let expired = lab.token_for("vms", "payments-sa", "istio-ca", -3600).unwrap();
    let wrong = [
        (audience, "is for another audience (vault, not istio-ca)"),
        (expired, "expired at "),
        (format!("Bearer {good}"), "more than a token: remove"),
        (good.replacen('.', ".\n", 1), "more than a token: remove what stands before"),
    ];
    fs::write(host.path(TOKEN), &wrong[0].0).unwrap();
    let mut agent = host.start().await;
    for (token, words) in &wrong {
        fs::write(host.path(TOKEN), token).unwrap();
        let told = |cause: &Option<String>| cause.as_ref().is_some_and(|cause| cause.contains(words));
        let w = agent.until("payments", words, |w| told(&w.identity.cause) && told(&w.registration.cause)).await;
        let cause = w.identity.cause.unwrap();
        assert!(!cause.contains("Kubernetes API") && !cause.contains(&good), "{cause}");
    }
    fs::write(host.path(TOKEN), good).unwrap();
    agent.ready("payments").await;
    agent.stop().await;
}
