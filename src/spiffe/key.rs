//! Private keys and the certificate requests that they sign.

use super::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData, RsaKeySize, SanType};
use rustls::{
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::SigningKey,
};
use std::{fmt, sync::Arc};
use zeroize::Zeroizing;

/// The kind of key to make. istiod would sign RSA-1024 too; we keep the floor ourselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyKind {
    /// ECDSA on P-256, the default: a key costs some 20 µs.
    #[default]
    EcP256,
    /// ECDSA on P-384.
    EcP384,
    /// RSA with 2048 bits; a key costs some 100 ms of CPU.
    Rsa2048,
    /// RSA with 3072 bits.
    Rsa3072,
    /// RSA with 4096 bits.
    Rsa4096,
}

/// Why a key could not be made or read. The key itself is never part of the text.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The crypto library refused.
    #[error("key: {0}")]
    Crypto(#[from] rcgen::Error),
    /// TLS has no use for it.
    #[error("key: {0}")]
    Tls(#[from] rustls::Error),
}

/// A private key. It prints as dots and is wiped when dropped. Its bytes are here alone: who needs them is lent them, and who
/// signs shares one [`PrivateKey::signer`]. What may be left of it, `host/memory.rs` says.
pub struct PrivateKey {
    pem: Zeroizing<String>,
    der: Zeroizing<Vec<u8>>,
    signer: Arc<dyn SigningKey>,
    /// SubjectPublicKeyInfo, DER.
    public: Vec<u8>,
}

impl PrivateKey {
    /// A fresh key. RSA takes long (see [`KeyKind`]): call it off the event loop.
    ///
    /// # Errors
    /// When the crypto library fails.
    pub fn generate(kind: KeyKind) -> Result<Self, KeyError> {
        let pair = match kind {
            KeyKind::EcP256 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?,
            KeyKind::EcP384 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384)?,
            KeyKind::Rsa2048 => KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_2048)?,
            KeyKind::Rsa3072 => KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_3072)?,
            KeyKind::Rsa4096 => KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_4096)?,
        };
        Self::from_pair(&pair, Zeroizing::new(pair.serialize_pem()))
    }

    /// Reads a PKCS#8 PEM key.
    ///
    /// # Errors
    /// When the text is no such key.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        let pair = KeyPair::from_pem(pem)?;
        Self::from_pair(&pair, Zeroizing::new(pem.to_owned()))
    }

    /// A key that claims to be the private half of `public`: recordings have no private keys.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn claiming(public: &[u8]) -> Result<Self, KeyError> {
        Ok(Self { public: public.to_owned(), ..Self::generate(KeyKind::EcP256)? })
    }

    fn from_pair(pair: &KeyPair, pem: Zeroizing<String>) -> Result<Self, KeyError> {
        let der = Zeroizing::new(pair.serialize_der());
        let signer = any_supported_type(&PrivatePkcs8KeyDer::from(der.as_slice()).into())?;
        Ok(Self { pem, der, signer, public: pair.subject_public_key_info() })
    }

    /// PKCS#8, PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// PKCS#8, DER.
    pub fn pkcs8(&self) -> PrivateKeyDer<'_> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.der.as_slice()))
    }

    /// What signs with it, for TLS.
    pub fn signer(&self) -> Arc<dyn SigningKey> {
        self.signer.clone()
    }

    /// The public half as SubjectPublicKeyInfo (DER), to compare with a certificate's.
    pub fn public(&self) -> &[u8] {
        &self.public
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

/// A certificate request: one critical URI SAN, an empty subject, no other extension. Istio's registration-authority
/// modes refuse anything else, its own CA looks at the public key alone.
#[derive(Debug, Clone)]
pub struct Csr {
    pem: String,
}

impl Csr {
    /// A request for `id`, signed with `key`.
    ///
    /// # Errors
    /// When the crypto library fails.
    pub fn new(id: &SpiffeId, key: &PrivateKey) -> Result<Self, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        let pair = KeyPair::from_pem(&key.pem)?;
        Ok(Self { pem: params.serialize_request(&pair)?.pem()? })
    }

    /// PEM, one `CERTIFICATE REQUEST` block.
    pub fn pem(&self) -> &str {
        &self.pem
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use x509_parser::prelude::*;

    #[test]
    fn a_request_asks_for_one_critical_uri_and_nothing_else() {
        let id: SpiffeId = "spiffe://cluster.local/ns/vms/sa/payments".parse().unwrap();
        for kind in [KeyKind::EcP256, KeyKind::EcP384, KeyKind::Rsa2048] {
            let key = PrivateKey::generate(kind).unwrap();
            let csr = Csr::new(&id, &key).unwrap();
            let (_, pem) = parse_x509_pem(csr.pem().as_bytes()).unwrap();
            assert_eq!(pem.label, "CERTIFICATE REQUEST");
            let (_, request) = X509CertificationRequest::from_der(&pem.contents).unwrap();
            let info = &request.certification_request_info;
            assert_eq!(info.subject_pki.raw, key.public());
            assert_eq!(info.subject.iter_attributes().count(), 0);
            let extensions: Vec<_> = info
                .iter_attributes()
                .filter_map(|a| match a.parsed_attribute() {
                    ParsedCriAttribute::ExtensionRequest(r) => Some(&r.extensions),
                    _ => None,
                })
                .flatten()
                .collect();
            assert_eq!(extensions.len(), 1);
            assert!(extensions[0].critical);
            let ParsedExtension::SubjectAlternativeName(san) = extensions[0].parsed_extension() else { panic!() };
            assert_eq!(san.general_names, [GeneralName::URI(id.as_str())]);
        }
    }

    #[test]
    fn a_key_is_read_back_as_it_was_written() {
        for kind in [KeyKind::EcP256, KeyKind::EcP384, KeyKind::Rsa2048] {
            let key = PrivateKey::generate(kind).unwrap();
            let read = PrivateKey::from_pem(key.pem()).unwrap();
            assert_eq!((read.public(), read.pem(), read.pkcs8()), (key.public(), key.pem(), key.pkcs8()));
            assert_eq!(read.signer().public_key().unwrap().as_ref(), key.public());
        }
    }
}
