//! Where the token is, and what it says of itself. Nothing is verified here, that is istiod's work; it explains a refusal
//! to a person.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// Where the token of a workload is. It is read anew each time and never kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenFile {
    /// The file of the bundle. It may be missing.
    pub file: PathBuf,
    /// The credential of our service that stands in for a missing file: a copy that systemd made when the service started
    /// (systemd.exec(5), `LoadCredential=`).
    pub credential: Option<PathBuf>,
    /// Whether the file is removed when it has served.
    pub remove: bool,
}

impl TokenFile {
    /// A file that stays, and no credential.
    pub fn new(file: PathBuf) -> Self {
        Self { file, credential: None, remove: false }
    }

    /// The one that counts at present.
    pub fn current(&self) -> &Path {
        self.standing_in().unwrap_or(&self.file)
    }

    /// The credential, if it counts at present.
    pub fn standing_in(&self) -> Option<&Path> {
        let missing = self.file.symlink_metadata().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
        self.credential.as_deref().filter(|_| missing)
    }

    /// What to do when the user that we run as may not read or remove the file: `we-agent permit` is for `/etc/we-agent` alone.
    pub fn remedy(&self) -> &'static str {
        let ours = self.file.ancestors().nth(2).is_some_and(|dir| dir.ends_with("etc/we-agent"));
        match (ours, self.remove) {
            (true, _) => "\"we-agent permit\", run as root, mends that",
            (false, false) => "give the file to root and the group of we-agent, mode 0640",
            (false, true) => {
                "give the file to root and the group of we-agent, mode 0640, and let that group write to its directory"
            }
        }
    }

    /// Both places, to watch for changes.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        [&self.file].into_iter().chain(&self.credential).map(PathBuf::as_path)
    }
}

/// Unverified claims of a token; never the token itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenFacts {
    /// `sub`: `system:serviceaccount:<namespace>:<service account>`.
    pub subject: Option<String>,
    /// `aud`: `istio-ca` must be among them.
    pub audiences: Vec<String>,
    /// `exp`: until when it is good.
    pub expires: Option<SystemTime>,
    /// `nbf`: from when on it is good.
    pub begins: Option<SystemTime>,
    /// `iss`: the cluster that issued it.
    pub issuer: Option<String>,
}

/// What is known of the tokens that istiod accepts.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Namespace of the service account that the bundle names.
    pub namespace: &'a str,
    /// The service account that the bundle names.
    pub service_account: &'a str,
    /// The last one that was accepted.
    pub accepted: Option<&'a TokenFacts>,
}

/// What istiod demands of a token, unless it was told otherwise.
const AUDIENCE: &str = "istio-ca";
/// The API server's tolerance for clocks.
const LEEWAY: Duration = Duration::from_secs(60);
/// The end of the year 9999, in seconds: the latest moment that can be written down. Milliseconds in the place of seconds are
/// later.
const LATEST: f64 = 253_402_300_799.0;

impl TokenFacts {
    /// The one thing that is wrong with it at `now`, to be read on after its name; none if nothing is that can be seen here.
    pub fn wrong(&self, expected: Expected<'_>, now: SystemTime) -> Option<String> {
        let time = humantime::format_rfc3339_seconds;
        if let Some(expires) = self.expires.filter(|expires| *expires <= now) {
            return Some(format!("expired at {}", time(expires)));
        }
        if let Some(begins) = self.begins.filter(|begins| *begins > now + LEEWAY) {
            return Some(format!("is valid from {} on, but it is {} here: check the clocks", time(begins), time(now)));
        }
        let accepted = expected.accepted;
        let audiences: Vec<_> = match accepted {
            Some(accepted) if !accepted.audiences.is_empty() => accepted.audiences.iter().map(String::as_str).collect(),
            _ => vec![AUDIENCE],
        };
        if !self.audiences.iter().any(|audience| audiences.contains(&audience.as_str())) {
            let ours = if self.audiences.is_empty() { "none".to_owned() } else { self.audiences.join(", ") };
            return Some(format!("is for another audience ({}, not {})", shown(&ours), audiences.join(", ")));
        }
        let wanted = format!("system:serviceaccount:{}:{}", expected.namespace, expected.service_account);
        if let Some(subject) = self.subject.as_ref().filter(|subject| **subject != wanted) {
            return Some(format!("is of another account ({}, not {wanted})", shown(subject)));
        }
        match (&self.issuer, accepted.and_then(|accepted| accepted.issuer.as_ref())) {
            (Some(ours), Some(theirs)) if ours != theirs => Some(format!(
                "is of another cluster (issuer {}, that of the last one was {})",
                shown(ours),
                shown(theirs)
            )),
            _ => None,
        }
    }
}

/// As much of a foreign text as a line has room for.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(100).collect()
}

/// Why a text is no token. The text is never part of the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Nothing but white space.
    #[error("the token file is empty")]
    Empty,
    /// Not three parts with dots between.
    #[error("the token file holds no JWT (three parts with dots between)")]
    Shape,
    /// More than a token, say `Bearer ` before it or quotes around it.
    #[error("the token file holds more than a token: remove what stands before, after or within it")]
    More,
    /// The middle part does not decode.
    #[error("the token's claims cannot be read")]
    Claims,
}

#[derive(Deserialize)]
struct Claims {
    sub: Option<String>,
    #[serde(default)]
    aud: Audiences,
    exp: Option<f64>,
    nbf: Option<f64>,
    iss: Option<String>,
}

/// One audience may be written without a list (RFC 7519, section 4.1.3).
#[derive(Deserialize, Default)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Many(Vec<String>),
    #[default]
    None,
}

/// Reads the claims of the token in `text`, surrounding white space aside.
///
/// # Errors
/// When it is no JWT.
pub fn facts(text: &str) -> Result<TokenFacts, TokenError> {
    let token = text.trim();
    if token.is_empty() {
        return Err(TokenError::Empty);
    }
    let [header, claims, _] = token.split('.').collect::<Vec<_>>()[..] else { return Err(TokenError::Shape) };
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let header =
        URL_SAFE_NO_PAD.decode(header).ok().and_then(|json| serde_json::from_slice::<Map<String, Value>>(&json).ok());
    if header.is_none() || !token.chars().all(legal) {
        return Err(TokenError::More);
    }
    let bytes = URL_SAFE_NO_PAD.decode(claims).map_err(|_| TokenError::Claims)?;
    let claims: Claims = serde_json::from_slice(&bytes).map_err(|_| TokenError::Claims)?;
    let at = |seconds: Option<f64>| {
        let since = Duration::try_from_secs_f64(seconds?.min(LATEST)).ok()?;
        Some(SystemTime::UNIX_EPOCH + since)
    };
    Ok(TokenFacts {
        subject: claims.sub,
        audiences: match claims.aud {
            Audiences::One(one) => vec![one],
            Audiences::Many(many) => many,
            Audiences::None => Vec::new(),
        },
        expires: at(claims.exp),
        begins: at(claims.nbf),
        issuer: claims.iss,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn token(claims: &str) -> String {
        format!("e30.{}.c2ln\n", URL_SAFE_NO_PAD.encode(claims))
    }

    #[test]
    fn claims_are_read() {
        let found =
            facts(&token(r#"{"sub":"system:serviceaccount:vms:a","aud":["istio-ca","x"],"exp":1700000000}"#)).unwrap();
        assert_eq!(found.subject.as_deref(), Some("system:serviceaccount:vms:a"));
        assert_eq!(found.audiences, ["istio-ca", "x"]);
        assert_eq!(found.expires, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)));
        assert_eq!(facts(&token(r#"{"aud":"istio-ca"}"#)).unwrap().audiences, ["istio-ca"]);
        let none = TokenFacts { subject: None, audiences: vec![], expires: None, begins: None, issuer: None };
        assert_eq!(facts(&token("{}")).unwrap(), none);
        assert_eq!(facts(&token(r#"{"exp":-5}"#)).unwrap(), none);
        let late = facts(&token(r#"{"aud":"istio-ca","exp":1e300,"nbf":1700000000000}"#)).unwrap();
        let expected = Expected { namespace: "vms", service_account: "a", accepted: None };
        let said = late.wrong(expected, SystemTime::now()).unwrap();
        assert!(said.starts_with("is valid from 9999-12-31T23:59:59Z on, but it is "), "{said}");
        assert_eq!(late.expires, late.begins);
    }

    #[test]
    fn the_one_thing_that_is_wrong_is_named() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let good = r#"{"sub":"system:serviceaccount:vms:a","aud":["istio-ca"],"exp":1700003600,"nbf":1700000030,"iss":"https://one"}"#;
        let read = |claims: &str| facts(&token(claims)).unwrap();
        let accepted = read(good);
        let wrong = |from: &str, to: &str| {
            let expected = Expected { namespace: "vms", service_account: "a", accepted: Some(&accepted) };
            assert!(good.contains(from));
            read(&good.replace(from, to)).wrong(expected, now).unwrap_or_default()
        };
        assert_eq!(wrong("istio-ca", "istio-ca"), "", "nbf is within the API server's tolerance");
        assert_eq!(wrong("1700003600", "1699999999"), "expired at 2023-11-14T22:13:19Z");
        assert!(
            wrong("1700000030", "1700000300")
                .starts_with("is valid from 2023-11-14T22:18:20Z on, but it is 2023-11-14T22:13:20Z")
        );
        assert_eq!(wrong("[\"istio-ca\"]", "[\"vault\",\"x\"]"), "is for another audience (vault, x, not istio-ca)");
        assert_eq!(wrong("[\"istio-ca\"]", "[]"), "is for another audience (none, not istio-ca)");
        assert_eq!(
            wrong("vms:a", "vms:b"),
            "is of another account (system:serviceaccount:vms:b, not system:serviceaccount:vms:a)"
        );
        assert_eq!(
            wrong("one", "two"),
            "is of another cluster (issuer https://two, that of the last one was https://one)"
        );
        // A mesh may have an audience of its own: what was accepted is right.
        let own = read(&good.replace("istio-ca", "mesh"));
        let expected = Expected { namespace: "vms", service_account: "a", accepted: Some(&own) };
        assert_eq!(own.wrong(expected, now), None);
        assert!(accepted.wrong(expected, now).unwrap().contains("(istio-ca, not mesh)"));
    }

    #[test]
    fn the_remedy_is_one_that_helps() {
        let remedy = |file: &str, remove| TokenFile { remove, ..TokenFile::new(file.into()) }.remedy();
        for file in ["/etc/we-agent/payments/istio-token", "/srv/root/etc/we-agent/payments/istio-token"] {
            assert!(remedy(file, false).contains("we-agent permit"), "{file}");
        }
        let elsewhere = remedy("/var/run/secrets/tokens/istio-token", true);
        assert!(!elsewhere.contains("we-agent permit") && elsewhere.contains("its directory"), "{elsewhere}");
    }

    #[test]
    fn what_is_no_token_is_refused_without_showing_it() {
        for (text, error) in [
            (" \n".to_owned(), TokenError::Empty),
            ("s3cret".to_owned(), TokenError::Shape),
            ("s3cret.s3cret".to_owned(), TokenError::Shape),
            ("a.b.c.d".to_owned(), TokenError::Shape),
            ("s3cret.e30.s3cret".to_owned(), TokenError::More),
            (format!("Bearer {}", token("{}")), TokenError::More),
            (format!("token={}", token("{}")), TokenError::More),
            (format!("x{}", token("{}")), TokenError::More),
            (format!("\"{}\"", token("{}").trim()), TokenError::More),
            (token("{}").replacen('.', "\n.", 1), TokenError::More),
            (token("{}").replace(".c2ln", ".c2\0ln"), TokenError::More),
            (format!("{}s3cret", token("{}")), TokenError::More),
            ("e30.s3cret.s3cret".to_owned(), TokenError::Claims),
            (token("[]s3cret"), TokenError::Claims),
        ] {
            assert_eq!(facts(&text), Err(error), "{text:?}");
            assert!(!error.to_string().contains("s3cret"));
        }
    }
}
