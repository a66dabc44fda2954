//! What is kept on the disk, and what becomes of the token.

use super::*;

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
    let stays = |token: &Token| matches!(token, Token::Stays { .. });
    timeout(DAY, story.token.wait_for(stays)).await.unwrap().unwrap();
    // As "we-agent permit" does it, which a look sees: the token still has served.
    mode(&token, 0o640);
    story.look();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(stays(&story.token.borrow()) && token.exists());
    mode(&dir, 0o700);
    let put = story.clock.now();
    timeout(DAY, story.token.wait_for(|token| *token == Token::Removed)).await.unwrap().unwrap();
    assert!(!token.exists() && story.clock.now().duration_since(put).unwrap() <= Duration::from_secs(60));
    // The next one is not needed, and is not taken for the one that has served.
    fs::write(&token, "the next").unwrap();
    story.look();
    timeout(DAY, story.token.wait_for(|token| *token == Token::Kept)).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(token.exists() && story.asked() == 1);
    story.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_save_that_failed_is_made_up_for_as_soon_as_it_can_be() {
    let host = tempfile::tempdir().unwrap();
    let in_the_way = host.path().join(STORE);
    std::fs::create_dir_all(in_the_way.parent().unwrap()).unwrap();
    std::fs::write(&in_the_way, "").unwrap();
    std::fs::create_dir(host.path().join("bundle")).unwrap();
    std::fs::write(host.path().join("bundle/istio-token"), "serves").unwrap();
    let (wanted, clock) = (wanted(&host), Clock::simulated(SystemTime::UNIX_EPOCH + 20_000 * DAY));
    let mut story = Story::begin_on(host, wanted, clock, Act::Issue);
    story.certified().await;
    timeout(DAY, story.durable.wait_for(|durable| durable.trouble.is_some())).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    let Durable { serial, trouble } = story.durable.borrow().clone();
    assert!(serial.is_none() && trouble.unwrap().cause.contains("a restart would lose it"));
    assert!(story.host.path().join("bundle/istio-token").exists() && story.fact.borrow().trouble.is_none());

    std::fs::remove_file(&in_the_way).unwrap();
    assert!(story.kept().await <= Duration::from_secs(10));
    timeout(DAY, story.token.wait_for(|token| *token == Token::Removed)).await.unwrap().unwrap();
    // What vanishes or is changed is saved anew, again and again.
    let kept = || -> Vec<_> { std::fs::read_dir(&in_the_way).unwrap().map(|file| file.unwrap().path()).collect() };
    let text = std::fs::read(&kept()[0]).unwrap();
    let damages: [&dyn Fn(); 3] =
        [&|| std::fs::remove_dir_all(&in_the_way).unwrap(), &|| std::fs::write(&kept()[0], "{").unwrap(), &|| {
            std::fs::remove_file(&kept()[0]).unwrap()
        }];
    for damage in damages.iter().cycle().take(6) {
        damage();
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(kept().iter().any(|file| std::fs::read(file).unwrap() == text));
    }
    assert_eq!((story.asked(), story.durable.borrow().trouble.clone()), (1, None));
    story.end().await;
}

/// A certificate that was passed over, because the clock was wrong at the boot, and a control plane that lets nobody in.
#[tokio::test(start_paused = true)]
async fn a_stored_certificate_is_found_when_the_clock_is_right() {
    let dead = || Act::Refuse(Error::Dead("the token has expired".to_owned()));
    for behind in [30 * 86_400, 20_000 * 86_400] {
        let mut first = Story::begin(Act::Issue);
        let stored = first.certified().await;
        first.kept().await;
        let (clock, host) = (first.clock, std::mem::replace(&mut first.host, tempfile::tempdir().unwrap()));
        first.end().await;

        clock.step(-behind);
        let wanted = wanted(&host);
        let mut story = Story::begin_on(host, wanted, clock, dead());
        story.until(|fact| fact.credentials_dead).await;
        tokio::time::sleep(Duration::from_secs(600)).await;
        clock.step(behind);
        let set = tokio::time::Instant::now();
        let fact = story.until(|fact| fact.current.is_some()).await;
        assert!(set.elapsed() <= Duration::from_secs(15), "{:?}", set.elapsed());
        assert_eq!(fact.current.unwrap().svid.serial(), stored.svid.serial());
        assert!(!fact.credentials_dead && fact.trouble.is_none());
        story.end().await;
    }
}

/// istiod after a live change of its CA: what it issues, it refuses.
#[tokio::test(start_paused = true)]
async fn a_token_stays_until_its_certificate_was_accepted() {
    let host = tempfile::tempdir().unwrap();
    let token = host.path().join("bundle/istio-token");
    std::fs::create_dir(host.path().join("bundle")).unwrap();
    std::fs::write(&token, "serves").unwrap();
    let (wanted, clock) = (wanted(&host), Clock::simulated(SystemTime::UNIX_EPOCH + 20_000 * DAY));
    let mut story = Story::begin_on(host, wanted, clock, Act::IssueForeign);
    story.certified().await;
    story.kept().await;
    let stays = |told: &Token| matches!(told, Token::Stays { cause } if cause.contains("has accepted"));
    timeout(DAY, story.token.wait_for(stays)).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(token.exists() && story.asked() == 1);
    story.act(Act::Issue);
    timeout(Duration::from_secs(60), story.token.wait_for(|told| *told == Token::Removed)).await.unwrap().unwrap();
    assert!(!token.exists());
    story.end().await;
}
