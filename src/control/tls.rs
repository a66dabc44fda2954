//! The TLS side of a dial: one configuration for each rung, never reused.

use super::credential::Rung;
use crate::spiffe::X509Bundle;
use rustls::{ClientConfig, RootCertStore, client::Resumption, crypto::aws_lc_rs};
use std::sync::Arc;

/// A configuration that trusts `roots` alone and presents `rung`. It has no session store: a resumed session would
/// carry the identity of an older handshake, and the handshake of a new pair is its proof.
pub(crate) fn client_config(roots: &X509Bundle, rung: &Rung) -> Result<ClientConfig, rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots.roots() {
        store.add(root)?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store);
    let mut config = match rung {
        Rung::Pair(context) => {
            builder.with_client_auth_cert(context.svid.chain().to_vec(), context.svid.key().pkcs8().clone_key())?
        }
        Rung::Token => builder.with_no_client_auth(),
    };
    // istiod closes a connection that did not agree on h2 (RFC 7301 makes it optional, istiod does not).
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}
