//! Service account tokens: made and checked as the API server's TokenRequest and TokenReview do for istiod.

use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD as BASE64};
use serde_json::{Value, json};

use crate::{Error, store::uid};

/// What istiod demands, and istioctl asks for.
pub(crate) const AUDIENCE: &str = "istio-ca";
/// The API server's tolerance for clocks, in seconds.
const LEEWAY: i64 = 60;

/// The key that signs the lab's tokens.
pub(crate) struct TokenKey {
    key: EcdsaKeyPair,
    pkcs8: Vec<u8>,
}

impl TokenKey {
    pub(crate) fn generate() -> Result<Self, Error> {
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new())
            .map_err(|_| Error::Key("tokens"))?;
        Self::from_pkcs8(pkcs8.as_ref())
    }

    pub(crate) fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, Error> {
        let key =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8).map_err(|_| Error::Key("tokens"))?;
        Ok(Self { key, pkcs8: pkcs8.to_vec() })
    }

    pub(crate) fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// A token valid from `now` for `ttl` seconds; a negative one expired that long ago.
    pub(crate) fn mint(
        &self,
        namespace: &str,
        account: &str,
        audience: &str,
        ttl: i64,
        now: SystemTime,
    ) -> Result<String, Error> {
        let now = seconds(now);
        let (issued, expires) = if ttl < 0 { (now + ttl - 3600, now + ttl) } else { (now, now + ttl) };
        self.sign(&json!({
            "aud": [audience],
            "exp": expires,
            "iat": issued,
            "iss": "https://kubernetes.default.svc.cluster.local",
            "jti": uid(),
            "kubernetes.io": {"namespace": namespace, "serviceaccount": {"name": account, "uid": uid()}},
            "nbf": issued,
            "sub": format!("system:serviceaccount:{namespace}:{account}"),
        }))
    }

    /// Signs any claims.
    pub(crate) fn sign(&self, claims: &Value) -> Result<String, Error> {
        let header = BASE64.encode(r#"{"alg":"ES256","kid":"we-lab"}"#);
        let signed = format!("{header}.{}", BASE64.encode(claims.to_string()));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes()).map_err(|_| Error::Key("tokens"))?;
        Ok(format!("{signed}.{}", BASE64.encode(signature)))
    }

    /// Namespace and name of the service account, if the token is good now.
    pub(crate) fn review(&self, token: &str, now: SystemTime) -> Option<(String, String)> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (_, claims) = signed.split_once('.')?;
        let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key().as_ref());
        public.verify(signed.as_bytes(), &BASE64.decode(signature).ok()?).ok()?;
        let claims: Value = serde_json::from_slice(&BASE64.decode(claims).ok()?).ok()?;
        let now = seconds(now);
        let for_istiod = match &claims["aud"] {
            Value::String(one) => one == AUDIENCE,
            Value::Array(several) => several.iter().any(|a| a == AUDIENCE),
            _ => false,
        };
        let early = claims["nbf"].as_i64().is_some_and(|nbf| nbf > now + LEEWAY);
        let late = claims["exp"].as_i64().is_none_or(|exp| exp < now - LEEWAY);
        let (namespace, account) = claims["sub"].as_str()?.strip_prefix("system:serviceaccount:")?.split_once(':')?;
        (for_istiod && !early && !late).then(|| (namespace.to_owned(), account.to_owned()))
    }
}

fn seconds(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs().try_into().unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_token_is_good_for_its_time_and_audience_only() {
        let key = TokenKey::generate().unwrap();
        let now = SystemTime::now();
        let review = |audience, ttl| key.review(&key.mint("vms", "sa", audience, ttl, now).unwrap(), now);
        assert_eq!(review(AUDIENCE, 3600), Some(("vms".to_owned(), "sa".to_owned())));
        assert_eq!(review(AUDIENCE, -14), Some(("vms".to_owned(), "sa".to_owned())));
        assert_eq!(review(AUDIENCE, -70), None);
        assert_eq!(review("foo", 3600), None);
        let early = key.mint("vms", "sa", AUDIENCE, 3600, now + std::time::Duration::from_secs(300)).unwrap();
        assert_eq!(key.review(&early, now), None);
        assert_eq!(TokenKey::generate().unwrap().review(&key.mint("vms", "sa", AUDIENCE, 60, now).unwrap(), now), None);
        let good = key.mint("vms", "sa", AUDIENCE, 60, now).unwrap();
        assert_eq!(key.review(&format!("{}AAAA", &good[..good.len() - 4]), now), None);
    }
}
