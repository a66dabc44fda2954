//! Certificates of others.

use super::{PrivateKey, SpiffeId, X509Bundle, X509Context, peer::id_of};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use std::time::SystemTime;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A file of roots.
pub(crate) fn roots(text: &str) {
    match X509Bundle::from_pem(text) {
        Ok(roots) => {
            let again = X509Bundle::from_pem(&roots.pem());
            assert!(again.is_ok_and(|again| again == roots), "what was read is what is written");
            let _ = roots.ended(SystemTime::now()).map(shown);
        }
        Err(error) => drop(error.to_string()),
    }
}

/// An answer of the CA, to whoever has the key and the id of its leaf.
pub(crate) fn chain(text: &str) {
    let now = SystemTime::now();
    let leaf = CertificateDer::from_pem_slice(text.as_bytes()).ok();
    let public = leaf.as_ref().and_then(|der| Some(X509Certificate::from_der(der).ok()?.1.public_key().raw.to_vec()));
    let id: Option<SpiffeId> = leaf.as_ref().and_then(id_of).or_else(|| "spiffe://td/ns/a/sa/b".parse().ok());
    let (Some(id), Ok(key)) = (id, PrivateKey::claiming(&public.unwrap_or_default())) else { return };
    let elements: Vec<_> = text.split_inclusive("-----END CERTIFICATE-----\n").map(str::to_owned).collect();
    match X509Context::from_answer(&id, key, &elements, now) {
        Ok(context) => {
            drop((context.svid.chain_pem(), context.bundle.pem()));
            let _ = [context.svid.not_before(), context.svid.not_after()].map(shown);
        }
        Err(error) => drop(error.to_string()),
    }
}

fn shown(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
