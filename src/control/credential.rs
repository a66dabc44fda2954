//! The credential ladder: what may be presented at a dial, best first, each read anew.

use crate::{
    files::{MAX_FILE, ReadError, aside, read_text},
    spiffe::X509Context,
    status::Identity,
    workload::token::{self, TokenFile},
};
use std::{path::Path, sync::Arc, time::SystemTime};
use tokio::sync::watch;
use zeroize::Zeroizing;

/// One rung of the ladder.
#[derive(Debug, Clone)]
pub(crate) enum Rung {
    /// An SVID of ours, presented in the TLS handshake.
    Pair(Arc<X509Context>),
    /// The token of the bundle, sent with each call.
    Token,
}

impl Rung {
    /// Whether both mean the same credential.
    pub(crate) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pair(a), Self::Pair(b)) => a.svid.serial() == b.svid.serial(),
            (Self::Token, Self::Token) => true,
            _ => false,
        }
    }

    /// For messages: what was presented.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Pair(context) => format!("our certificate {}", context.svid.serial()),
            Self::Token => "a connection without client certificate".to_owned(),
        }
    }
}

/// Where the credentials of a workload are.
#[derive(Debug, Clone)]
pub struct Credential {
    /// The token.
    pub token: TokenFile,
    /// The identity fact.
    pub identity: watch::Receiver<Identity>,
}

impl Credential {
    /// The rungs that are good at `now`: the present pair, the previous one while it is unexpired, the token. The token
    /// is always the last resort, also when it looks expired: our clock may be the one that is wrong.
    pub(crate) fn rungs(&self, now: SystemTime) -> Vec<Rung> {
        let identity = self.identity.borrow();
        let pairs = [&identity.current, &identity.previous];
        let pairs = pairs.into_iter().flatten().filter(|context| context.svid.is_valid(now));
        pairs.map(|context| Rung::Pair(context.clone())).chain([Rung::Token]).collect()
    }

    /// The token as an `authorization` value, if there is one.
    pub(crate) async fn bearer(&self) -> Option<Zeroizing<String>> {
        let token = self.read_token().await.ok()?;
        let token = token.trim();
        (!token.is_empty()).then(|| Zeroizing::new(format!("Bearer {token}")))
    }

    async fn read_token(&self) -> Result<Zeroizing<String>, ReadError> {
        let file = self.token.current().to_owned();
        aside(&file.clone(), move || read_text(&file, MAX_FILE)).await?
    }

    /// Why the token is of no use at `now`, if that is plain from the file alone, and the fix.
    pub(crate) async fn token_is_dead(&self, now: SystemTime) -> Option<String> {
        let file = self.token.current().display();
        let why = match self.read_token().await {
            Err(ReadError::Missing) if self.token.remove => {
                format!("there is no token {file} (identity.removeToken: it is removed when it has served)")
            }
            Err(ReadError::Missing) => format!("there is no token {file}"),
            Err(ReadError::Denied) => {
                return Some(format!(
                    "no certificate is valid, and the user that we-agent runs as may not read the token {file}; {}",
                    self.token.remedy()
                ));
            }
            Err(error) => format!("the token {file} {error}"),
            Ok(text) => match token::facts(&text) {
                Err(error) => format!("{file}: {error}"),
                Ok(facts) => {
                    let expires = facts.expires.filter(|expires| *expires <= now)?;
                    format!("the token {file} expired at {}", humantime::format_rfc3339_seconds(expires))
                }
            },
        };
        Some(format!("no certificate is valid, and {why}; {}", self.new_token()))
    }

    /// How to bring a new token in.
    pub(crate) fn new_token(&self) -> String {
        let make = "make a new bundle with istioctl and put its istio-token";
        match self.token.standing_in().and_then(Path::file_name) {
            None => format!("{make} in place"),
            // A credential is copied when the service starts, and never again.
            Some(id) => format!(
                "{make} where the credential {} is loaded from, then \"systemctl restart we-agent\"; or put it to {}, which \
                 needs no restart",
                id.display(),
                self.token.file.display()
            ),
        }
    }
}
