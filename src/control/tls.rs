//! The TLS side of a dial: one configuration for each rung, never reused.

use super::credential::Rung;
use crate::spiffe::X509Bundle;
use rustls::{
    ClientConfig, RootCertStore, SignatureScheme,
    client::{ResolvesClientCert, Resumption},
    crypto::aws_lc_rs,
    sign::CertifiedKey,
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// What is presented when the server asks who we are, and whether it has: then its part of the handshake is done, and paid for.
#[derive(Debug)]
pub(crate) struct Presented {
    pair: Option<Arc<CertifiedKey>>,
    asked: AtomicBool,
}

impl Presented {
    pub(crate) fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

impl ResolvesClientCert for Presented {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.asked.store(true, Ordering::Relaxed);
        self.pair.clone()
    }

    fn has_certs(&self) -> bool {
        self.pair.is_some()
    }
}

/// A configuration that trusts `roots` alone and presents `rung`. It has no session store: a resumed session would
/// carry the identity of an older handshake, and the handshake of a new pair is its proof.
pub(crate) fn client_config(roots: &X509Bundle, rung: &Rung) -> Result<(ClientConfig, Arc<Presented>), rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots.roots() {
        store.add(root)?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let pair = match rung {
        Rung::Pair(context) => Some(context.svid.pair()),
        Rung::Token => None,
    };
    let presented = Arc::new(Presented { pair, asked: AtomicBool::new(false) });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_client_cert_resolver(presented.clone());
    // istiod closes a connection that did not agree on h2 (RFC 7301 makes it optional, istiod does not).
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok((config, presented))
}
