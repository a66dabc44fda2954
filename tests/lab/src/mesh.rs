//! What the instances of one control plane share: the store, the CA and the key of the tokens.

use std::{fs, io::Write, os::unix::fs::OpenOptionsExt, path::Path, time::SystemTime};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use crate::{
    Error,
    ca::{Ca, Kept},
    store::Store,
    token::TokenKey,
};

/// One control plane, of one or more instances.
pub(crate) struct Mesh {
    pub(crate) trust_domain: String,
    pub(crate) cluster: String,
    pub(crate) store: Store,
    pub(crate) ca: Ca,
    pub(crate) tokens: TokenKey,
}

/// A service account in the trust domain: who a caller was found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) namespace: String,
    pub(crate) account: String,
    /// The SPIFFE ID.
    pub(crate) uri: String,
}

impl Identity {
    pub(crate) fn new(trust_domain: &str, namespace: &str, account: &str) -> Self {
        let uri = format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}");
        Self { namespace: namespace.to_owned(), account: account.to_owned(), uri }
    }

    /// Reads `spiffe://TD/ns/NS/sa/SA` of this trust domain.
    pub(crate) fn parse(trust_domain: &str, uri: &str) -> Option<Self> {
        let path = uri.strip_prefix("spiffe://")?.strip_prefix(trust_domain)?.strip_prefix("/ns/")?;
        let (namespace, account) = path.split_once("/sa/")?;
        (!namespace.contains('/') && !account.contains('/')).then(|| Self::new(trust_domain, namespace, account))
    }
}

/// What `we-lab serve --dir` leaves for `we-lab bundle --dir`, besides the address.
#[derive(Serialize, Deserialize)]
struct KeptMesh {
    trust_domain: String,
    cluster: String,
    token_key: String,
    ca: Kept,
}

impl Mesh {
    /// Identity of a bearer token that is good now and whose account still exists.
    pub(crate) fn review(&self, token: &str, now: SystemTime) -> Option<Identity> {
        let account = self.tokens.review(token, now)?;
        let exists = !self.store.read().deleted_accounts.contains(&account);
        exists.then(|| Identity::new(&self.trust_domain, &account.0, &account.1))
    }

    /// Writes keys and certificates to `dir/mesh.json`, mode 0600.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), Error> {
        let kept = KeptMesh {
            trust_domain: self.trust_domain.clone(),
            cluster: self.cluster.clone(),
            token_key: BASE64_STANDARD.encode(self.tokens.pkcs8()),
            ca: self.ca.keep(),
        };
        fs::create_dir_all(dir)?;
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(dir.join("mesh.json"))?;
        file.write_all(serde_json::to_string(&kept).map_err(|_| Error::Key("the lab"))?.as_bytes())?;
        Ok(())
    }

    /// Reads what [`save`](Self::save) wrote; groups and services are not kept.
    pub(crate) fn load(dir: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(dir.join("mesh.json"))?;
        // The cause is left out: it could quote a key.
        let kept: KeptMesh = serde_json::from_str(&text).map_err(|_| Error::Key("the lab"))?;
        let key = BASE64_STANDARD.decode(&kept.token_key).map_err(|_| Error::Key("tokens"))?;
        let (ca, tokens) = (Ca::restore(kept.ca)?, TokenKey::from_pkcs8(&key)?);
        Ok(Self { trust_domain: kept.trust_domain, cluster: kept.cluster, store: Store::new(), ca, tokens })
    }
}
