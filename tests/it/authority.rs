//! A certificate authority in a dozen lines, for unit and integration tests alike: PEM in, PEM out.
#![allow(dead_code, clippy::unwrap_used)]

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SignatureAlgorithm, date_time_ymd,
};
use std::time::{Duration, SystemTime};
use x509_parser::prelude::{FromDer, X509CertificationRequest};

/// A signer, and the certificates from its own up to the root.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    path: Vec<String>,
}

/// What a leaf shall say.
pub(crate) struct Leaf<'a> {
    pub(crate) uris: &'a [&'a str],
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
    pub(crate) ca: bool,
    /// The usage of an authority, without being one.
    pub(crate) signs: bool,
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl<'a> Leaf<'a> {
    /// As istiod would issue it at `now` for an hour: backdated by two minutes.
    pub(crate) fn new(uris: &'a [&'a str], now: SystemTime) -> Self {
        Self {
            uris,
            not_before: now - Duration::from_secs(120),
            not_after: now + Duration::from_secs(3600),
            ca: false,
            signs: false,
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }
}

fn authority(name: &str) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params, KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap())
}

impl Authority {
    pub(crate) fn root(name: &str) -> Self {
        let (params, key) = authority(name);
        let path = vec![params.self_signed(&key).unwrap().pem()];
        Self { issuer: Issuer::new(params, key), path }
    }

    /// An authority below this one.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        let (mut params, key) = authority(name);
        params.use_authority_key_identifier_extension = true;
        let own = params.signed_by(&key, &self.issuer).unwrap().pem();
        Self { issuer: Issuer::new(params, key), path: [&[own], self.path.as_slice()].concat() }
    }

    pub(crate) fn root_pem(&self) -> &str {
        self.path.last().unwrap()
    }

    /// An answer of `CreateCertificate`: leaf, intermediates, root. Of `key` only the public half is used.
    pub(crate) fn issue(&self, key: &str, leaf: &Leaf<'_>) -> Vec<String> {
        self.sign(&KeyPair::from_pem(key).unwrap(), leaf)
    }

    /// The same to a request in PEM, for a P-256 key. It is not looked at otherwise.
    pub(crate) fn answer(&self, csr: &str, leaf: &Leaf<'_>) -> Vec<String> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(csr.as_bytes()).unwrap();
        let (_, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let key = csr.certification_request_info.subject_pki.subject_public_key.data.to_vec();
        self.sign(&PublicKey(key), leaf)
    }

    fn sign(&self, key: &impl PublicKeyData, leaf: &Leaf<'_>) -> Vec<String> {
        let at = |time: SystemTime| date_time_ymd(1970, 1, 1) + time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = leaf.uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        (params.not_before, params.not_after) = (at(leaf.not_before), at(leaf.not_after));
        params.is_ca = if leaf.ca { IsCa::Ca(BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        if leaf.signs {
            params.key_usages.push(KeyUsagePurpose::KeyCertSign);
        }
        params.extended_key_usages.clone_from(&leaf.usages);
        params.use_authority_key_identifier_extension = true;
        let own = params.signed_by(key, &self.issuer).unwrap().pem();
        [&[own], self.path.as_slice()].concat()
    }
}

/// The public half of a P-256 key.
struct PublicKey(Vec<u8>);

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}
