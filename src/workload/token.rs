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
    let since_epoch = |s: f64| Duration::try_from_secs_f64(s).ok();
    Ok(TokenFacts {
        subject: claims.sub,
        audiences: match claims.aud {
            Audiences::One(one) => vec![one],
            Audiences::Many(many) => many,
            Audiences::None => Vec::new(),
        },
        expires: claims.exp.and_then(since_epoch).and_then(|d| SystemTime::UNIX_EPOCH.checked_add(d)),
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
        let none = TokenFacts { subject: None, audiences: vec![], expires: None };
        assert_eq!(facts(&token("{}")).unwrap(), none);
        assert_eq!(facts(&token(r#"{"exp":-5}"#)).unwrap(), none);
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
