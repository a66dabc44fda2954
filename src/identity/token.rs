//! The token, once it has served. With `identity.removeToken` it is removed, so that nobody finds it later: when the
//! certificate that it was exchanged for is durable, and the control plane has accepted it once in a handshake (one that
//! refuses what it issues would lock us out). Where the directory is root's, as in the package, root is asked to do it. What
//! cannot be removed safely stays, and that is told.

use super::{Facts, Wanted};
use crate::{
    aside::aside,
    control::{self, ControlPlane},
    files::{Dir, DirError, MAX_FILE, Removal, Stamp, Versions, ask_no_more, ask_removal, read_text},
    spiffe::X509Context,
    status::{self, Token},
    time::{Backoff, Clock},
    workload::token::{self, TokenFile},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};

/// From one attempt to remove what could not be removed to the next, besides those at a change of the file.
const AGAIN: Duration = Duration::from_secs(30);
/// Root has removed by then what it was asked to.
const ANSWERED: Duration = Duration::from_secs(5);

/// Why a token that has served is still there.
#[derive(Debug, thiserror::Error)]
enum Stays {
    #[error(
        "{} is a credential, which systemd alone can remove: take its LoadCredential= line out of the unit, and its source \
         away", .0.display()
    )]
    Credential(PathBuf),
    #[error("{} is a link or has a second name, so a removal would leave the token behind: remove all of it by hand", .0.display())]
    Linked(PathBuf),
    #[error("it is removed when the control plane has accepted the certificate that it was exchanged for: {0}")]
    Unproven(control::Error),
    #[error("{0}; {1}")]
    Denied(DirError, &'static str),
    #[error(
        "root was asked to remove it and has not: journalctl -u we-agent-permit says why; \"we-agent permit\", run as root, does it"
    )]
    Asked,
    #[error(transparent)]
    Dir(#[from] DirError),
}

/// Removes what has served, and tells the token's fact, whose only writer it is. `exchanged` says for which token a
/// certificate was issued: what has come since is the next one. It looks again when one of the `local` files has changed.
pub(super) async fn run<C: ControlPlane>(
    control: &C,
    wanted: &Wanted,
    facts: &Facts,
    mut exchanged: watch::Receiver<Option<Stamp>>,
    mut local: watch::Receiver<Versions>,
    clock: Clock,
) {
    let fact = &facts.token;
    if !wanted.token.remove {
        status::tell(fact, Token::Kept);
        return;
    }
    let (mut identity, mut durable) = (facts.identity.subscribe(), facts.durable.subscribe());
    let mut removal = TokenRemoval::default();
    let mut backoff = Backoff::new(Duration::from_millis(500), AGAIN);
    loop {
        let current = identity.borrow_and_update().valid(clock.now()).cloned();
        let kept = durable.borrow_and_update().clone();
        let (token, wait) = match current.filter(|context| kept.holds(context.svid.serial())) {
            None => (Token::Kept, AGAIN),
            Some(certificate) => match removal.settle(control, wanted, &certificate, clock.now()).await {
                Ok(()) => {
                    backoff.reset();
                    (present(&wanted.token), if removal.asked.is_some() { ANSWERED } else { AGAIN })
                }
                Err(cause @ Stays::Unproven(_)) => (Token::Stays { cause: cause.to_string() }, backoff.next_wait()),
                Err(cause) => (Token::Stays { cause: cause.to_string() }, AGAIN),
            },
        };
        if let Token::Stays { cause } = &token
            && *fact.borrow() != token
        {
            warn!(%cause, "the token has served, but stays");
        }
        status::tell(fact, token);
        tokio::select! {
            () = clock.sleep(wait) => {}
            Ok(()) = local.changed() => {}
            Ok(()) = exchanged.changed() => removal.served = exchanged.borrow().or(removal.served),
            Ok(()) = identity.changed() => {}
            Ok(()) = durable.changed() => {}
        }
    }
}

/// What is to be said of the token beside a certificate, when nothing is to be removed.
fn present(token: &TokenFile) -> Token {
    let gone = token.remove && token.standing_in().is_none() && Stamp::of(&token.file).is_none();
    if gone { Token::Removed } else { Token::Kept }
}

/// What is to be removed.
#[derive(Default)]
struct TokenRemoval {
    /// The token that has served, until it is gone.
    served: Option<Stamp>,
    /// Serial of the certificate that the control plane has accepted.
    accepted: Option<String>,
    /// What root was asked to remove, and has not yet, and since when.
    asked: Option<(Stamp, Instant)>,
}

impl TokenRemoval {
    /// Whether root, who is asked to remove it, may still do so.
    fn waits_for_root(&mut self, served: Stamp) -> bool {
        let asked = self.asked.filter(|(stamp, _)| *stamp == served).unwrap_or((served, Instant::now()));
        self.asked = Some(asked);
        asked.1.elapsed() < ANSWERED
    }

    /// Removes the token, beside a durable certificate, when it has served or has expired. (One that has come but was not
    /// needed is the next one.) What cannot be removed stays to be removed.
    async fn settle<C: ControlPlane>(
        &mut self,
        control: &C,
        wanted: &Wanted,
        certificate: &Arc<X509Context>,
        now: SystemTime,
    ) -> Result<(), Stays> {
        // Stamped before it is read: one that comes in between is another, and stays.
        let token = wanted.token.current().to_owned();
        let stamp = Stamp::of(&token);
        if self.served.is_none() && aside(token.clone(), move || has_expired(&token, now)).await {
            self.served = stamp;
        }
        let Some(served) = self.served else { return Ok(()) };
        if let Some(credential) = wanted.token.standing_in() {
            return Err(Stays::Credential(credential.to_owned()));
        }
        let serial = certificate.svid.serial();
        if stamp.is_some() && self.accepted.as_deref() != Some(serial) {
            control.accepts(certificate).await.map_err(Stays::Unproven)?;
            self.accepted = Some(serial.to_owned());
        }
        let (removable, file) = (wanted.clone(), wanted.token.file.clone());
        // It may sync a directory.
        match aside(file.clone(), move || remove(&removable, served)).await {
            Ok(Removal::Linked) => Err(Stays::Linked(file)),
            Ok(removed) => {
                self.served = None;
                if self.asked.take().is_some_and(|(stamp, _)| stamp == served) || removed == Removal::Removed {
                    info!("the token has served and was removed");
                }
                Ok(())
            }
            // Told when root has had its time.
            Err(Stays::Asked) if self.waits_for_root(served) => Ok(()),
            Err(cause) => Err(cause),
        }
    }
}

fn remove(wanted: &Wanted, stamp: Stamp) -> Result<Removal, Stays> {
    let file = &wanted.token.file;
    let dir = file.parent().and_then(|dir| wanted.root.name(dir));
    let (Some(dir), Some(name)) = (dir, file.file_name().and_then(|name| name.to_str())) else {
        return Ok(Removal::Linked);
    };
    let removed = Dir::open(&wanted.root, &dir).and_then(|dir| dir.remove_seen(name, stamp));
    // Of a bundle that root has copied.
    let workload = dir.strip_prefix("/etc/we-agent").ok().and_then(Path::to_str);
    match (removed, workload) {
        (Err(error), Some(workload)) if matches!(error.kind(), "denied" | "read_only") => {
            ask_removal(&wanted.root, workload, stamp)?;
            Err(Stays::Asked)
        }
        (Err(error), None) if error.kind() == "denied" => Err(Stays::Denied(error, wanted.token.remedy())),
        (Ok(Removal::Gone), Some(workload)) => {
            let _ = ask_no_more(&wanted.root, workload);
            Ok(Removal::Gone)
        }
        (removed, _) => Ok(removed?),
    }
}

fn has_expired(file: &Path, now: SystemTime) -> bool {
    let facts = read_text(file, MAX_FILE).ok().and_then(|text| token::facts(&text).ok());
    facts.and_then(|facts| facts.expires).is_some_and(|expires| expires <= now)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        authority::{Authority, Leaf},
        control::{Error, Post, Signed},
        files::Root,
        spiffe::{Csr, KeyKind, PrivateKey, SpiffeId},
    };
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    /// A host with a token that expires at the second 1000.
    struct Host(tempfile::TempDir, Wanted);

    fn token() -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(r#"{"exp":1000}"#))
    }

    /// A control plane that accepts certificates, or none.
    struct Accepting(bool);

    impl ControlPlane for Accepting {
        async fn sign(&self, _: &Csr, _: Duration) -> Result<Signed, Error> {
            Err(Error::Invalid("nobody signs".to_owned()))
        }

        async fn accepts(&self, _: &Arc<X509Context>) -> Result<(), Error> {
            if self.0 { Ok(()) } else { Err(Error::Invalid("refused".to_owned())) }
        }

        async fn session(&self, _: &mut Post) -> Result<(), Error> {
            std::future::pending().await
        }
    }

    fn certificate(id: &SpiffeId) -> Arc<X509Context> {
        let (now, key) = (at(1_795_000_000), PrivateKey::generate(KeyKind::EcP256).unwrap());
        let answer = Authority::root("mesh").intermediate("istiod").issue(key.pem(), &Leaf::new(&[id.as_str()], now));
        X509Context::from_answer(id, key, &answer, now).unwrap()
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let root = Root::new(dir.path());
            let file = root.path("/etc/we-agent/payments/istio-token");
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, token()).unwrap();
            let wanted = Wanted {
                id: "spiffe://td/ns/a/sa/b".parse().unwrap(),
                key: KeyKind::EcP256,
                ttl: Duration::from_secs(60),
                min_interval: Duration::ZERO,
                looks: Duration::ZERO,
                root,
                store: "/var/lib/we-agent/payments".into(),
                token: TokenFile { remove: true, ..TokenFile::new(file) },
            };
            Self(dir, wanted)
        }

        fn file(&self) -> &Path {
            &self.1.token.file
        }

        /// After a certificate was issued for the token, or not for it.
        async fn settle(&self, used: bool, now: u64) -> Token {
            let served = used.then(|| Stamp::of(self.1.token.current())).flatten();
            self.settle_after(&mut TokenRemoval { served, ..TokenRemoval::default() }, now).await
        }

        async fn settle_after(&self, removal: &mut TokenRemoval, now: u64) -> Token {
            let certificate = certificate(&self.1.id);
            match removal.settle(&Accepting(true), &self.1, &certificate, at(now)).await {
                Ok(()) => present(&self.1.token),
                Err(cause) => Token::Stays { cause: cause.to_string() },
            }
        }
    }

    fn cause(token: Token) -> String {
        match token {
            Token::Stays { cause } => cause,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn only_what_has_served_or_expired_goes_and_only_if_configured() {
        let host = Host::new();
        assert_eq!((host.settle(false, 999).await, host.file().exists()), (Token::Kept, true), "not needed yet");
        assert_eq!((host.settle(false, 1001).await, host.file().exists()), (Token::Removed, false));
        assert_eq!((present(&host.1.token), host.settle(true, 1).await), (Token::Removed, Token::Removed));
        fs::write(host.file(), token()).unwrap();
        assert_eq!(present(&host.1.token), Token::Kept);
        assert_eq!((host.settle(true, 1).await, host.file().exists()), (Token::Removed, false));
    }

    #[tokio::test]
    async fn a_token_that_came_meanwhile_is_the_next_one() {
        let host = Host::new();
        let before = Stamp::of(host.file());
        let beside = host.0.path().join("new");
        fs::write(&beside, token()).unwrap();
        fs::rename(beside, host.file()).unwrap();
        let mut removal = TokenRemoval { served: before, ..TokenRemoval::default() };
        for _ in 0..2 {
            let token = host.settle_after(&mut removal, 1).await;
            assert_eq!((token, host.file().exists()), (Token::Kept, true), "it never becomes that one");
        }
    }

    #[tokio::test]
    async fn what_could_not_be_removed_is_removed_once_it_can_be() {
        let host = Host::new();
        let dir = host.file().parent().unwrap();
        let mode = |path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let mut removal = TokenRemoval { served: Stamp::of(host.file()), ..TokenRemoval::default() };
        mode(dir, 0o777);
        for _ in 0..2 {
            let token = host.settle_after(&mut removal, 1).await;
            assert!(matches!(token, Token::Stays { .. }) && host.file().exists());
        }
        mode(dir, 0o700);
        // As "we-agent permit" does it: another mode is no other token.
        mode(host.file(), 0o640);
        assert_eq!((host.settle_after(&mut removal, 1).await, host.file().exists()), (Token::Removed, false));
    }

    #[tokio::test]
    async fn a_token_outlives_its_certificate_until_that_is_accepted() {
        let host = Host::new();
        let certificate = certificate(&host.1.id);
        let mut removal = TokenRemoval { served: Stamp::of(host.file()), ..TokenRemoval::default() };
        let refused = removal.settle(&Accepting(false), &host.1, &certificate, at(2000)).await;
        assert!(matches!(refused, Err(Stays::Unproven(_))) && host.file().exists());
        let accepted = removal.settle(&Accepting(true), &host.1, &certificate, at(1)).await;
        assert!(accepted.is_ok() && !host.file().exists());
    }

    #[tokio::test]
    async fn links_and_credentials_stay_and_are_told() {
        let mut host = Host::new();
        let elsewhere = host.0.path().join("elsewhere");
        fs::rename(host.file(), &elsewhere).unwrap();
        symlink(&elsewhere, host.file()).unwrap();
        assert!(cause(host.settle(true, 1).await).contains("is a link or has a second name"));
        fs::remove_file(host.file()).unwrap();
        fs::hard_link(&elsewhere, host.file()).unwrap();
        assert!(cause(host.settle(true, 1).await).contains("by hand"));
        assert!(elsewhere.exists() && host.file().exists());
        fs::remove_file(host.file()).unwrap();
        host.1.token.credential = Some(elsewhere.clone());
        assert!(cause(host.settle(true, 1).await).contains("LoadCredential="));
        assert!(elsewhere.exists());
    }

    #[tokio::test]
    async fn a_directory_that_others_may_write_to_is_not_touched() {
        let host = Host::new();
        let dir = host.file().parent().unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        let cause = cause(host.settle(true, 1).await);
        assert!(cause.contains("everybody may write to it") && host.file().exists(), "{cause}");
    }
}
