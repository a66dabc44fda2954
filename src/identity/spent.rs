//! The token, once it has served. With `identity.removeToken` it is removed, so that nobody finds it later; whatever cannot
//! be removed safely stays, and that is told.

use super::Wanted;
use crate::{
    files::{Dir, DirError, MAX_FILE, Removal, Stamp, read_text},
    status::Token,
    workload::token::{self, TokenFile},
};
use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use tokio::time::sleep;

/// From one attempt to remove what could not be removed to the next, besides those at a change of the file.
const AGAIN: Duration = Duration::from_secs(30);

/// What is to be removed: the token that has served, until it is gone. Only a durable certificate makes it superfluous.
#[derive(Debug, Default)]
pub(super) struct Spent {
    served: Option<Stamp>,
    durable: bool,
}

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
    #[error("{0}; {1}")]
    Denied(DirError, &'static str),
    #[error(transparent)]
    Dir(#[from] DirError),
}

/// What is to be said of the token beside a certificate, before it serves again.
pub(super) fn look(token: &TokenFile) -> Token {
    let gone = token.remove && token.standing_in().is_none() && Stamp::of(&token.file).is_none();
    if gone { Token::Removed } else { Token::Kept }
}

impl Spent {
    /// Nothing has served yet; whether there is a certificate in the store.
    pub(super) fn new(durable: bool) -> Self {
        Self { served: None, durable }
    }

    /// A certificate was issued, and is `durable` or not. `token` is the file as it was before the request, if that was what
    /// it was issued for: what has come since is the next one.
    pub(super) fn issued(&mut self, token: Option<Stamp>, durable: bool) {
        *self = Self { served: token.or(self.served), durable };
    }

    /// Waits until it is worth while to try again; for ever when all is done.
    pub(super) async fn again(&self) {
        match self.served {
            Some(_) => sleep(AGAIN).await,
            None => std::future::pending().await,
        }
    }

    /// Removes the token, if so configured, when it has served or has expired. (One that has come but was not needed is the
    /// next one.) What cannot be removed stays to be removed.
    pub(super) fn settle(&mut self, wanted: &Wanted, now: SystemTime) -> Token {
        let token = &wanted.token;
        if !token.remove || !self.durable {
            return look(token);
        }
        // Stamped before it is read: one that comes in between is another, and stays.
        let stamp = Stamp::of(token.current());
        if self.served.is_none() && has_expired(token.current(), now) {
            self.served = stamp;
        }
        let Some(stamp) = self.served else { return look(token) };
        let removed = match token.standing_in() {
            Some(credential) => Err(Stays::Credential(credential.to_owned())),
            None => remove(wanted, stamp),
        };
        let cause = match removed {
            Ok(Removal::Gone | Removal::Another) => {
                self.served = None;
                return look(token);
            }
            Ok(Removal::Linked) => Stays::Linked(token.file.clone()),
            Err(cause) => cause,
        };
        Token::Stays { cause: cause.to_string() }
    }
}

fn remove(wanted: &Wanted, stamp: Stamp) -> Result<Removal, Stays> {
    let file = &wanted.token.file;
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|name| name.to_str())) else {
        return Ok(Removal::Linked);
    };
    Dir::open(&wanted.root, dir).and_then(|dir| dir.remove_seen(name, stamp)).map_err(|error| match error.kind() {
        "denied" => Stays::Denied(error, wanted.token.remedy()),
        _ => Stays::Dir(error),
    })
}

fn has_expired(file: &Path, now: SystemTime) -> bool {
    let facts = read_text(file, MAX_FILE).ok().and_then(|text| token::facts(&text).ok());
    facts.and_then(|facts| facts.expires).is_some_and(|expires| expires <= now)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{files::Root, spiffe::KeyKind};
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
                root,
                store: "/var/lib/we-agent/payments".into(),
                token: TokenFile { remove: true, ..TokenFile::new(file) },
            };
            Self(dir, wanted)
        }

        fn file(&self) -> &Path {
            &self.1.token.file
        }

        fn settle(&self, used: bool, now: u64) -> Token {
            self.after(used.then(|| Stamp::of(self.1.token.current())).flatten()).settle(&self.1, at(now))
        }

        /// After a durable certificate was issued for that token, if there is one.
        fn after(&self, token: Option<Stamp>) -> Spent {
            let mut spent = Spent::default();
            spent.issued(token, true);
            spent
        }
    }

    fn cause(token: Token) -> String {
        match token {
            Token::Stays { cause } => cause,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_has_served_or_expired_goes_and_only_if_configured() {
        let mut host = Host::new();
        assert_eq!((host.settle(false, 999), host.file().exists()), (Token::Kept, true), "not needed yet");
        assert_eq!((host.settle(false, 1001), host.file().exists()), (Token::Removed, false));
        assert_eq!((look(&host.1.token), host.settle(true, 1)), (Token::Removed, Token::Removed));
        fs::write(host.file(), token()).unwrap();
        assert_eq!(look(&host.1.token), Token::Kept);
        assert_eq!((host.settle(true, 1), host.file().exists()), (Token::Removed, false));
        fs::write(host.file(), token()).unwrap();
        host.1.token.remove = false;
        assert_eq!((host.settle(true, 2000), host.file().exists()), (Token::Kept, true));
    }

    #[test]
    fn a_token_that_came_meanwhile_is_the_next_one() {
        let host = Host::new();
        let before = Stamp::of(host.file());
        let beside = host.0.path().join("new");
        fs::write(&beside, token()).unwrap();
        fs::rename(beside, host.file()).unwrap();
        let mut spent = host.after(before);
        assert_eq!((spent.settle(&host.1, at(1)), host.file().exists()), (Token::Kept, true));
        assert_eq!(
            (spent.settle(&host.1, at(1)), host.file().exists()),
            (Token::Kept, true),
            "it never becomes that one"
        );
    }

    #[test]
    fn what_could_not_be_removed_is_removed_once_it_can_be() {
        let host = Host::new();
        let dir = host.file().parent().unwrap();
        let mode = |path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let mut spent = host.after(Stamp::of(host.file()));
        mode(dir, 0o777);
        for _ in 0..2 {
            assert!(matches!(spent.settle(&host.1, at(1)), Token::Stays { .. }) && host.file().exists());
        }
        mode(dir, 0o700);
        // As "we-agent permit" does it: another mode is no other token.
        mode(host.file(), 0o640);
        assert_eq!((spent.settle(&host.1, at(1)), host.file().exists()), (Token::Removed, false));
    }

    #[test]
    fn a_token_outlives_a_store_that_fails_and_goes_when_it_has_healed() {
        let host = Host::new();
        let mut spent = Spent::default();
        spent.issued(Stamp::of(host.file()), false);
        assert_eq!((spent.settle(&host.1, at(2000)), host.file().exists()), (Token::Kept, true));
        // The renewal is by the certificate.
        spent.issued(None, true);
        assert_eq!((spent.settle(&host.1, at(1)), host.file().exists()), (Token::Removed, false));
    }

    #[test]
    fn links_and_credentials_stay_and_are_told() {
        let mut host = Host::new();
        let elsewhere = host.0.path().join("elsewhere");
        fs::rename(host.file(), &elsewhere).unwrap();
        symlink(&elsewhere, host.file()).unwrap();
        assert!(cause(host.settle(true, 1)).contains("is a link or has a second name"));
        fs::remove_file(host.file()).unwrap();
        fs::hard_link(&elsewhere, host.file()).unwrap();
        assert!(cause(host.settle(true, 1)).contains("by hand"));
        assert!(elsewhere.exists() && host.file().exists());
        fs::remove_file(host.file()).unwrap();
        host.1.token.credential = Some(elsewhere.clone());
        assert!(cause(host.settle(true, 1)).contains("LoadCredential="));
        assert!(elsewhere.exists());
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_not_touched() {
        let host = Host::new();
        let dir = host.file().parent().unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        let cause = cause(host.settle(true, 1));
        assert!(cause.contains("everybody may write to it") && host.file().exists(), "{cause}");
    }
}
