//! The credential ladder: what may be presented at a dial, best first, each read anew.

use crate::{
    files::{MAX_FILE, ReadError, Versions, read_aside},
    spiffe::X509Context,
    status::Identity,
    workload::token::{self, Expected, TokenError, TokenFacts, TokenFile},
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

/// Why a token was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is of no use, whatever istiod does.
    Dead(String),
    /// What is wrong with it, or with whom it was shown to.
    Wrong(String),
}

/// Where the credentials of a workload are.
#[derive(Debug, Clone)]
pub struct Credential {
    /// The token.
    pub token: TokenFile,
    /// The identity fact.
    pub identity: watch::Receiver<Identity>,
    /// What the files of the token and of the roots are.
    pub files: watch::Receiver<Versions>,
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
        read_aside(self.token.current(), MAX_FILE).await
    }

    /// What the token says of itself; none when it cannot be read.
    pub(crate) async fn token_facts(&self) -> Option<TokenFacts> {
        token::facts(&self.read_token().await.ok()?).ok()
    }

    /// Why the token was refused, as far as its file tells.
    pub(crate) async fn diagnose(&self, expected: Expected<'_>, now: SystemTime) -> Refusal {
        let file = self.token.current().display();
        let dead = |why: String| Refusal::Dead(format!("no certificate is valid, and {why}; {}", self.new_token()));
        let text = match self.read_token().await {
            Ok(text) => text,
            Err(ReadError::Missing) if self.token.remove => {
                return dead(format!(
                    "there is no token {file} (identity.removeToken: it is removed when it has served)"
                ));
            }
            Err(ReadError::Missing) => return dead(format!("there is no token {file}")),
            Err(ReadError::Denied) => {
                return Refusal::Dead(format!(
                    "no certificate is valid, and the user that we-agent runs as may not read the token {file}; {}",
                    self.token.remedy()
                ));
            }
            Err(error) => return dead(format!("the token {file} {error}")),
        };
        let facts = match token::facts(&text) {
            Ok(facts) => facts,
            // Nothing else is needed than what it says.
            Err(error @ TokenError::More) => {
                return Refusal::Dead(format!("no certificate is valid, and {file}: {error}"));
            }
            Err(error) => return dead(format!("{file}: {error}")),
        };
        match facts.wrong(expected, now) {
            Some(why) if facts.expires.is_some_and(|expires| expires <= now) => dead(format!("the token {file} {why}")),
            Some(why) => Refusal::Wrong(format!("the token {file} {why}; {}", self.new_token())),
            None => {
                let elsewhere = if expected.accepted.is_some() { "" } else { ", it is of another cluster" };
                Refusal::Wrong(format!(
                    "nothing is wrong with the token {file} as far as it can be seen from here: istiod cannot reach its Kubernetes \
                     API{elsewhere}, or the serviceAccount was deleted or made anew; if it lasts, {}",
                    self.new_token()
                ))
            }
        }
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
