//! Trust domains and SPIFFE ids, by the rules of the SPIFFE-ID standard, sections 2 and 2.1–2.4.

use std::{fmt, str::FromStr};

/// The longest SPIFFE id a consumer must accept, in bytes (SPIFFE-ID, section 2.3).
const MAX_ID: usize = 2048;
/// The longest trust domain name, in bytes (SPIFFE-ID, section 2.1).
const MAX_TRUST_DOMAIN: usize = 255;

/// Why a text is no SPIFFE id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// There is no trust domain.
    #[error("the trust domain is empty")]
    EmptyTrustDomain,
    /// A character that the standard does not allow in a trust domain.
    #[error("trust domain {0:?} has a character other than a-z, 0-9, '.', '-' and '_', or is longer than 255 bytes")]
    TrustDomain(String),
    /// The text does not begin with `spiffe://`.
    #[error("{0:?} does not begin with spiffe://")]
    Scheme(String),
    /// A path segment is empty, `.` or `..`, or has a character that the standard does not allow.
    #[error(
        "path segment {0:?} is empty, a dot segment, or has a character other than a-z, A-Z, 0-9, '.', '-' and '_'"
    )]
    Segment(String),
    /// The id is longer than 2048 bytes.
    #[error("the id is longer than 2048 bytes")]
    TooLong,
}

/// The name of a trust domain: lower-case letters, digits, `.`, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// The name, without a scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(SpiffeIdError::EmptyTrustDomain);
        }
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
        if text.len() > MAX_TRUST_DOMAIN || !text.chars().all(legal) {
            return Err(SpiffeIdError::TrustDomain(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SPIFFE id: `spiffe://<trust domain>/<path>`. The path may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: String,
    /// Length of the trust domain inside `text`.
    domain: usize,
}

const SCHEME: &str = "spiffe://";

impl SpiffeId {
    /// The id that Istio gives to a service account: `spiffe://<td>/ns/<namespace>/sa/<service account>`.
    ///
    /// # Errors
    /// When namespace or service account is no legal path segment.
    pub fn workload(domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, SpiffeIdError> {
        format!("{SCHEME}{domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The whole id as a URI.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..SCHEME.len() + self.domain]
    }

    /// Namespace and service account, if it has the form that Istio gives to ids.
    pub fn workload_parts(&self) -> Option<(&str, &str)> {
        let path = self.text[SCHEME.len() + self.domain..].strip_prefix("/ns/")?;
        let (namespace, account) = path.split_once("/sa/")?;
        (!namespace.contains('/') && !account.contains('/')).then_some((namespace, account))
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| SpiffeIdError::Scheme(text.to_owned()))?;
        if text.len() > MAX_ID {
            return Err(SpiffeIdError::TooLong);
        }
        let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let domain: TrustDomain = domain.parse()?;
        for segment in path.split('/').skip(1) {
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            if segment.is_empty() || matches!(segment, "." | "..") || !segment.chars().all(legal) {
                return Err(SpiffeIdError::Segment(segment.to_owned()));
            }
        }
        Ok(Self { text: text.to_owned(), domain: domain.0.len() })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_workload_id_is_what_istio_writes() {
        let id = SpiffeId::workload(&"cluster.local".parse().unwrap(), "vms", "payments-sa").unwrap();
        assert_eq!(id.as_str(), "spiffe://cluster.local/ns/vms/sa/payments-sa");
        assert_eq!(id.trust_domain(), "cluster.local");
        assert_eq!(id.workload_parts(), Some(("vms", "payments-sa")));
        for other in ["spiffe://a", "spiffe://a/ns/b", "spiffe://a/ns/b/c/sa/d", "spiffe://a/ns/b/sa/c/d"] {
            assert_eq!(other.parse::<SpiffeId>().unwrap().workload_parts(), None, "{other}");
        }
    }

    #[test]
    fn refusals_name_the_broken_rule() {
        for (text, error) in [
            ("", SpiffeIdError::Scheme(String::new())),
            ("https://a/b", SpiffeIdError::Scheme("https://a/b".into())),
            ("spiffe:///ns/a", SpiffeIdError::EmptyTrustDomain),
            ("spiffe://A/ns", SpiffeIdError::TrustDomain("A".into())),
            ("spiffe://a:80/ns", SpiffeIdError::TrustDomain("a:80".into())),
            ("spiffe://a/ns//b", SpiffeIdError::Segment(String::new())),
            ("spiffe://a/ns/", SpiffeIdError::Segment(String::new())),
            ("spiffe://a/..", SpiffeIdError::Segment("..".into())),
            ("spiffe://a/b%20c", SpiffeIdError::Segment("b%20c".into())),
        ] {
            assert_eq!(text.parse::<SpiffeId>(), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_parses_prints_the_same(text in "spiffe://[a-z0-9._-]{0,8}(/[a-zA-Z0-9._-]{0,4}){0,4}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.as_str(), &text);
                prop_assert!(id.trust_domain().parse::<TrustDomain>().is_ok());
            }
        }
    }
}
