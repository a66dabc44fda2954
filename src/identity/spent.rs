//! The token, once it has served. With `identity.removeToken` it is removed, so that nobody finds it later; whatever cannot
//! be removed safely stays, and that is told.

use super::Wanted;
use crate::{
    status::Token,
    system::{Dir, DirError, Removal, Stamp},
    workload::token::{self, TokenFile},
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};
use zeroize::Zeroizing;

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
    #[error("{cause}{hint}", cause = .0, hint = if .0.kind() == "denied" { " (\"we-agent permit\", run as root, does)" } else { "" })]
    Dir(#[from] DirError),
}

/// What is to be said of the token beside a certificate, before it serves again.
pub(super) fn look(token: &TokenFile) -> Token {
    let gone = token.remove && token.standing_in().is_none() && Stamp::of(&token.file).is_none();
    if gone { Token::Removed } else { Token::Kept }
}

/// Removes the token, if so configured, when it has served: when it was `used`, or has expired. (One that has come but was
/// not needed is the next one.) `before` is the file as it was before the request: what has come since is not removed.
pub(super) fn settle(wanted: &Wanted, before: Option<Stamp>, used: bool, now: SystemTime) -> Token {
    let token = &wanted.token;
    if !token.remove || !(used || has_expired(token.current(), now)) {
        return look(token);
    }
    let removed = match (token.standing_in(), before) {
        (Some(credential), _) => Err(Stays::Credential(credential.to_owned())),
        (None, None) => Ok(Removal::Another),
        (None, Some(stamp)) => remove(wanted, stamp),
    };
    match removed {
        Ok(Removal::Linked) => Token::Stays { cause: Stays::Linked(token.file.clone()).to_string() },
        Ok(Removal::Gone | Removal::Another) => look(token),
        Err(error) => Token::Stays { cause: error.to_string() },
    }
}

fn remove(wanted: &Wanted, stamp: Stamp) -> Result<Removal, Stays> {
    let file = &wanted.token.file;
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|name| name.to_str())) else {
        return Ok(Removal::Linked);
    };
    Ok(Dir::open(&wanted.root, dir)?.remove_seen(name, stamp)?)
}

fn has_expired(file: &Path, now: SystemTime) -> bool {
    let text = fs::read_to_string(file).map(Zeroizing::new);
    let facts = text.ok().and_then(|text| token::facts(&text).ok());
    facts.and_then(|facts| facts.expires).is_some_and(|expires| expires <= now)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{spiffe::KeyKind, system::Root};
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use std::{
        os::unix::fs::{PermissionsExt, symlink},
        time::Duration,
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
            settle(&self.1, Stamp::of(self.file()), used, at(now))
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
        assert_eq!((settle(&host.1, before, true, at(1)), host.file().exists()), (Token::Kept, true));
        assert_eq!((settle(&host.1, None, true, at(1)), host.file().exists()), (Token::Kept, true));
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
