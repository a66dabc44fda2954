//! Certificate signing requests as istiod's own CA reads them: the public key and the proof of its possession, nothing else.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA384_ASN1, ECDSA_P256_SHA512_ASN1, ECDSA_P384_SHA256_ASN1,
    ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA512_ASN1, ECDSA_P521_SHA256_ASN1, ECDSA_P521_SHA384_ASN1,
    ECDSA_P521_SHA512_ASN1, ED25519, RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY,
    RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY, UnparsedPublicKey, VerificationAlgorithm,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use rcgen::{
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512, PKCS_ED25519, PKCS_RSA_SHA256,
    PublicKeyData, SignatureAlgorithm,
};
use x509_parser::prelude::{FromDer, X509CertificationRequest};

/// What is of interest in a request.
pub(crate) struct Csr {
    algorithm: &'static SignatureAlgorithm,
    key: Vec<u8>,
    /// It asks for a common name.
    pub(crate) named: bool,
}

/// Texts of Go's library, which istiod passes on.
pub(crate) const NOT_PEM: &str = "certificate signing request is not properly encoded";
const NOT_A_CSR: &str = "failed to parse X.509 certificate signing request";

impl Csr {
    pub(crate) fn parse(pem: &str) -> Result<Self, &'static str> {
        let der = first_block(pem).ok_or(NOT_PEM)?;
        let (rest, csr) = X509CertificationRequest::from_der(&der).map_err(|_| NOT_A_CSR)?;
        if !rest.is_empty() {
            return Err(NOT_A_CSR);
        }
        let info = &csr.certification_request_info;
        let key = &info.subject_pki;
        let kind = key.algorithm.algorithm.to_id_string();
        let curve = key
            .algorithm
            .parameters
            .as_ref()
            .and_then(|p| p.as_oid().ok())
            .map(|o| o.to_id_string())
            .unwrap_or_default();
        let public = UnparsedPublicKey::new(
            verifier(&csr.signature_algorithm.algorithm.to_id_string(), &curve).ok_or(NOT_A_CSR)?,
            key.subject_public_key.data.as_ref(),
        );
        let (algorithm, failure): (&'static SignatureAlgorithm, _) = match (kind.as_str(), curve.as_str()) {
            ("1.2.840.10045.2.1", P256) => (&PKCS_ECDSA_P256_SHA256, "x509: ECDSA verification failure"),
            ("1.2.840.10045.2.1", P384) => (&PKCS_ECDSA_P384_SHA384, "x509: ECDSA verification failure"),
            ("1.2.840.10045.2.1", P521) => (&PKCS_ECDSA_P521_SHA512, "x509: ECDSA verification failure"),
            ("1.2.840.113549.1.1.1", _) => (&PKCS_RSA_SHA256, "crypto/rsa: verification error"),
            ("1.3.101.112", _) => (&PKCS_ED25519, "x509: Ed25519 verification failure"),
            _ => return Err(NOT_A_CSR),
        };
        public.verify(info.raw, &csr.signature_value.data).map_err(|_| failure)?;
        Ok(Self {
            algorithm,
            key: key.subject_public_key.data.to_vec(),
            named: info.subject.iter_common_name().any(|n| n.as_str().is_ok_and(|n| !n.is_empty())),
        })
    }
}

impl PublicKeyData for Csr {
    fn der_bytes(&self) -> &[u8] {
        &self.key
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

const P256: &str = "1.2.840.10045.3.1.7";
const P384: &str = "1.3.132.0.34";
const P521: &str = "1.3.132.0.35";

fn verifier(signature: &str, curve: &str) -> Option<&'static dyn VerificationAlgorithm> {
    Some(match (signature, curve) {
        ("1.2.840.10045.4.3.2", P256) => &ECDSA_P256_SHA256_ASN1,
        ("1.2.840.10045.4.3.3", P256) => &ECDSA_P256_SHA384_ASN1,
        ("1.2.840.10045.4.3.4", P256) => &ECDSA_P256_SHA512_ASN1,
        ("1.2.840.10045.4.3.2", P384) => &ECDSA_P384_SHA256_ASN1,
        ("1.2.840.10045.4.3.3", P384) => &ECDSA_P384_SHA384_ASN1,
        ("1.2.840.10045.4.3.4", P384) => &ECDSA_P384_SHA512_ASN1,
        ("1.2.840.10045.4.3.2", P521) => &ECDSA_P521_SHA256_ASN1,
        ("1.2.840.10045.4.3.3", P521) => &ECDSA_P521_SHA384_ASN1,
        ("1.2.840.10045.4.3.4", P521) => &ECDSA_P521_SHA512_ASN1,
        ("1.2.840.113549.1.1.11", _) => &RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY,
        ("1.2.840.113549.1.1.13", _) => &RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY,
        ("1.3.101.112", _) => &ED25519,
        _ => return None,
    })
}

/// The content of the first PEM block, whatever its label, text before it, and line ends.
fn first_block(pem: &str) -> Option<Vec<u8>> {
    let (_, from_label) = pem.split_once("-----BEGIN ")?;
    let (_, body) = from_label.split_once("-----")?;
    let (body, _) = body.split_once("-----END ")?;
    let body: String = body.split_ascii_whitespace().collect();
    BASE64_STANDARD.decode(body).ok().filter(|der| !der.is_empty())
}
