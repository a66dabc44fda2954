//! X.509-SVIDs and the roots they chain to (SPIFFE X.509-SVID standard; Istio's answer format).

use super::{
    BundleError, KeyError, PrivateKey, SpiffeId, X509Bundle,
    roots::{pem_block, wall},
};
use rustls::{
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    sign::CertifiedKey,
};
use std::{sync::Arc, time::SystemTime};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

/// Why an answer of the certificate authority is not accepted, or a stored SVID not used.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// Fewer than two elements: istiod sends the leaf first and its root bundle last.
    #[error("the answer has {0} chain element(s); a leaf and at least a root bundle are needed")]
    ShortChain(usize),
    /// An element is no PEM certificate.
    #[error("the certificate chain cannot be read: {0}")]
    Unreadable(String),
    /// The last element holds no root.
    #[error("root bundle: {0}")]
    Roots(#[from] BundleError),
    /// The leaf is for another key.
    #[error("the certificate is not for our key")]
    WrongKey,
    /// The leaf names somebody else, nobody, or more than one.
    #[error("the certificate names [{got}], not exactly {expected}")]
    WrongIdentity {
        /// What was asked for.
        expected: SpiffeId,
        /// Every URI in the certificate.
        got: String,
    },
    /// The leaf may sign certificates or revocations (forbidden by the X.509-SVID standard, sections 4.1 and 4.3).
    #[error("the certificate is a certificate authority")]
    Authority,
    /// No path to the roots, wrong usage, or outside its validity.
    #[error("the certificate does not verify: {0}")]
    Chain(webpki::Error),
    /// The leaf is not valid on our clock.
    #[error("{}", out_of_validity(*.not_before, *.not_after, *.now))]
    Validity {
        /// Start of validity.
        not_before: SystemTime,
        /// End of validity.
        not_after: SystemTime,
        /// Our wall clock.
        now: SystemTime,
    },
    /// The key cannot be read.
    #[error(transparent)]
    Key(#[from] KeyError),
}

fn out_of_validity(not_before: SystemTime, not_after: SystemTime, now: SystemTime) -> String {
    let [not_before_text, not_after, now_text] = [not_before, not_after, now].map(humantime::format_rfc3339_seconds);
    if now < not_before {
        format!("the certificate is valid from {not_before_text}, but it is {now_text} here: check the clocks")
    } else {
        format!("the certificate expired at {not_after}, and it is {now_text} here")
    }
}

/// A certificate with its key: leaf and intermediates, without the root. It was verified when it was made.
#[derive(Debug)]
pub struct X509Svid {
    id: SpiffeId,
    key: PrivateKey,
    pair: Arc<CertifiedKey>,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl X509Svid {
    /// The only door. Checks that the leaf is for `key`, names exactly `id`, is no authority, chains to `roots` for
    /// client and server use, and is valid at `now`.
    ///
    /// # Errors
    /// The first of these that does not hold.
    pub fn new(
        id: &SpiffeId,
        key: PrivateKey,
        chain: Vec<CertificateDer<'static>>,
        roots: &X509Bundle,
        now: SystemTime,
    ) -> Result<Self, SvidError> {
        let Some((leaf, intermediates)) = chain.split_first() else { return Err(SvidError::ShortChain(0)) };
        let (_, cert) = X509Certificate::from_der(leaf).map_err(|e| SvidError::Unreadable(e.to_string()))?;
        if cert.public_key().raw != key.public() {
            return Err(SvidError::WrongKey);
        }
        let uris = uris(&cert);
        if uris != [id.as_str()] {
            return Err(SvidError::WrongIdentity { expected: id.clone(), got: uris.join(", ") });
        }
        if cert.is_ca() || may_sign(&cert) {
            return Err(SvidError::Authority);
        }
        let (not_before, not_after) = (wall(cert.validity().not_before), wall(cert.validity().not_after));
        if now < not_before || now >= not_after {
            return Err(SvidError::Validity { not_before, not_after, now });
        }
        verify(leaf, intermediates, roots, now).map_err(SvidError::Chain)?;
        let serial = serial(&cert);
        let pair = Arc::new(CertifiedKey::new(chain, key.signer()));
        Ok(Self { id: id.clone(), key, pair, serial, not_before, not_after })
    }

    /// Who it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The private key.
    pub fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// Leaf first, then the intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.pair.cert
    }

    /// Chain and key as TLS takes them; all connections share one.
    pub fn pair(&self) -> Arc<CertifiedKey> {
        self.pair.clone()
    }

    /// The chain as PEM, leaf first.
    pub fn chain_pem(&self) -> String {
        self.chain().iter().map(|der| pem_block(der)).collect()
    }

    /// The leaf's serial number in lower-case hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Start of validity (istiod sets it two minutes before it signs).
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whether the certificate can still be used at `now`.
    pub fn is_valid(&self, now: SystemTime) -> bool {
        now < self.not_after
    }
}

/// An SVID with the roots it came with: what consumers are given, always as one.
#[derive(Debug)]
pub struct X509Context {
    /// Certificate and key.
    pub svid: X509Svid,
    /// The mesh's roots, as the certificate authority sent them.
    pub bundle: X509Bundle,
    /// When the answer was received, on our clock. Rotation is planned from here: `NotBefore` is backdated.
    pub received: SystemTime,
}

impl X509Context {
    /// Reads an answer of `CreateCertificate`, which must come over a connection whose server was verified by the roots
    /// in force: that is what makes the roots in the answer ours. Leaf, intermediates (each its own element, or several in one, as istiod
    /// up to 1.25 sent them), root bundle. Roots that are repeated among the intermediates are left out of the chain.
    ///
    /// # Errors
    /// When the answer is incomplete or the certificate does not pass [`X509Svid::new`].
    pub fn from_answer(
        id: &SpiffeId,
        key: PrivateKey,
        elements: &[String],
        now: SystemTime,
    ) -> Result<Arc<Self>, SvidError> {
        let [chain @ .., roots] = elements else { return Err(SvidError::ShortChain(0)) };
        if chain.is_empty() {
            return Err(SvidError::ShortChain(1));
        }
        Self::from_pem(id, key, &chain.join("\n"), roots, now, now)
    }

    /// Puts a stored SVID together again, with all checks, at `now`.
    ///
    /// # Errors
    /// As [`X509Context::from_answer`].
    pub fn from_pem(
        id: &SpiffeId,
        key: PrivateKey,
        chain: &str,
        roots: &str,
        received: SystemTime,
        now: SystemTime,
    ) -> Result<Arc<Self>, SvidError> {
        let bundle = X509Bundle::from_pem(roots)?;
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| SvidError::Unreadable(e.to_string()))?
            .into_iter()
            .filter(|der| !bundle.has(der))
            .collect();
        let svid = X509Svid::new(id, key, chain, &bundle, now)?;
        Ok(Arc::new(Self { svid, bundle, received }))
    }
}

/// The serial number of any certificate in lower-case hexadecimal, as [`X509Svid::serial`] has it; none when it cannot be
/// read.
pub fn serial_of(der: &CertificateDer<'_>) -> Option<String> {
    X509Certificate::from_der(der).ok().map(|(_, cert)| serial(&cert))
}

fn serial(cert: &X509Certificate<'_>) -> String {
    cert.raw_serial_as_string().replace(':', "")
}

/// Every URI among the subject alternative names.
pub(super) fn uris<'a>(cert: &'a X509Certificate<'_>) -> Vec<&'a str> {
    let names = cert.extensions().iter().filter_map(|e| match e.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(san) => Some(&san.general_names),
        _ => None,
    });
    names.flatten().filter_map(|n| if let GeneralName::URI(uri) = n { Some(*uri) } else { None }).collect()
}

/// Whether the key usage names what only an authority may do.
pub(super) fn may_sign(cert: &X509Certificate<'_>) -> bool {
    cert.key_usage().ok().flatten().is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign())
}

fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &X509Bundle,
    now: SystemTime,
) -> Result<(), webpki::Error> {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let roots: Vec<_> = roots.roots().collect();
    let anchors: Vec<_> = roots.iter().filter_map(|der| anchor_from_trusted_cert(der).ok()).collect();
    let leaf = EndEntityCert::try_from(leaf)?;
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        let time = UnixTime::since_unix_epoch(since);
        leaf.verify_for_usage(ALL_VERIFICATION_ALGS, &anchors, intermediates, time, usage, None, None)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
