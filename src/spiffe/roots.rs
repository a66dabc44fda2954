//! The roots that certificates chain to.

use rustls::pki_types::{
    CertificateDer,
    pem::{self as blocks, PemObject},
};
use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};
use webpki::anchor_from_trusted_cert;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Why a file or an answer holds no usable roots.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// No block of the text is a certificate.
    #[error("no certificate in it (expected PEM blocks that begin with -----BEGIN CERTIFICATE-----)")]
    Empty,
    /// A block that does not decode. All or nothing: a set that was shortened silently fails later, and elsewhere.
    #[error("certificate {number} in it is damaged ({cause})")]
    Damaged {
        /// Which one, from 1.
        number: usize,
        /// What is wrong with it.
        cause: String,
    },
    /// Blocks that a reader of PEM does not see: with blanks before them, or of another label (`TRUSTED CERTIFICATE`).
    #[error(
        "{begun} blocks of certificates begin in it, and {read} can be read: no blanks before the lines, and the label is CERTIFICATE"
    )]
    Unseen {
        /// How many begin.
        begun: usize,
        /// How many can be read.
        read: usize,
    },
    /// The text ends within a block.
    #[error("it ends within certificate {0}, so a part of it is missing")]
    CutOff(usize),
}

/// Trust anchors, a set: order and repetition do not matter, and it is never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct X509Bundle {
    roots: BTreeSet<Vec<u8>>,
}

impl X509Bundle {
    /// Reads PEM. What is between the blocks and blocks that are no certificates are passed over.
    ///
    /// # Errors
    /// When there is no certificate, or one that can be no trust anchor.
    pub fn from_pem(pem: &str) -> Result<Self, BundleError> {
        let last = pem.trim_end().lines().next_back().unwrap_or_default();
        let cut = last.starts_with('-') && !(last.starts_with("-----END ") && last.ends_with("-----"));
        let mut roots = BTreeSet::new();
        let mut number = 0;
        for block in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            number += 1;
            let der = match block {
                Ok(der) => der,
                Err(blocks::Error::MissingSectionEnd { .. }) => return Err(BundleError::CutOff(number)),
                Err(blocks::Error::IllegalSectionStart { .. }) if cut => return Err(BundleError::CutOff(number)),
                Err(blocks::Error::IllegalSectionStart { .. }) => {
                    return Err(BundleError::Damaged {
                        number,
                        cause: "the line that begins it is not whole".to_owned(),
                    });
                }
                Err(error) => return Err(BundleError::Damaged { number, cause: error.to_string() }),
            };
            anchor_from_trusted_cert(&der)
                .map_err(|error| BundleError::Damaged { number, cause: error.to_string() })?;
            roots.insert(der.to_vec());
        }
        // A beginning that is cut off itself is not known for one.
        if cut {
            return Err(BundleError::CutOff(number + 1));
        }
        let begins = |line: &&str| line.trim_start().starts_with("-----BEGIN ") && line.contains("CERTIFICATE");
        let begun = pem.lines().filter(begins).count();
        if begun != number {
            return Err(BundleError::Unseen { begun, read: number });
        }
        if roots.is_empty() { Err(BundleError::Empty) } else { Ok(Self { roots }) }
    }

    /// When the last of them ended, if all have by `now`. They stand as trust anchors all the same, for our clock may be the one
    /// that is wrong; others refuse them.
    pub fn ended(&self, now: SystemTime) -> Option<SystemTime> {
        let end = |der: &Vec<u8>| X509Certificate::from_der(der).ok().map(|(_, root)| wall(root.validity().not_after));
        let last = self.roots.iter().map(end).collect::<Option<Vec<_>>>()?.into_iter().max()?;
        (last <= now).then_some(last)
    }

    /// The roots of both.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self { roots: self.roots.union(&other.roots).cloned().collect() }
    }

    /// Whether each root of the other is in this one, too.
    pub fn includes(&self, other: &Self) -> bool {
        self.roots.is_superset(&other.roots)
    }

    /// Whether the certificate is one of them.
    pub(super) fn has(&self, der: &CertificateDer<'_>) -> bool {
        self.roots.contains(der.as_ref())
    }

    /// DER of each root, in a fixed order.
    pub fn roots(&self) -> impl Iterator<Item = CertificateDer<'_>> {
        self.roots.iter().map(|der| CertificateDer::from(der.as_slice()))
    }

    /// PEM of all roots, each block ending in a line feed.
    pub fn pem(&self) -> String {
        self.roots.iter().map(|der| pem_block(der)).collect()
    }
}

pub(super) fn pem_block(der: &[u8]) -> String {
    let unix = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der), unix)
}

/// A moment in a certificate. One before 1970 cannot be shown as ours can, and there is no clock to compare it with: it
/// counts as 1970.
pub(super) fn wall(time: x509_parser::time::ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::authority::Authority;

    #[test]
    fn a_bundle_is_a_set_and_never_empty() {
        let (a, b) = (Authority::root("a"), Authority::root("b"));
        let read = |pem: &str| X509Bundle::from_pem(pem);
        let both = read(&format!("{}{}", a.root_pem(), b.root_pem())).unwrap();
        assert_eq!(both, read(&format!("# second first\n{}{}{}", b.root_pem(), a.root_pem(), b.root_pem())).unwrap());
        assert_eq!(both, read(a.root_pem()).unwrap().union(&read(b.root_pem()).unwrap()));
        assert_eq!(both, read(&both.pem()).unwrap());
        assert_eq!((both.roots().count(), both.pem().matches("-----BEGIN ").count()), (2, 2));
        assert_ne!(both, read(a.root_pem()).unwrap());
        for nothing in ["", "no pem", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"] {
            assert_eq!(read(nothing), Err(BundleError::Empty), "{nothing:?}");
        }
    }

    #[test]
    fn a_bundle_is_never_shortened_silently() {
        let (a, b) = (Authority::root("a"), Authority::root("b"));
        let (a, b) = (a.root_pem(), b.root_pem());
        let read = |pem: &str| X509Bundle::from_pem(pem);
        let both = read(&format!("{a}{b}")).unwrap();
        let key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        for same in [
            format!("{a}{b}").replace('\n', "\r\n"),
            format!("{a}{}", b.trim_end()),
            format!("subject=a\n{a}\n\nsubject=b\n{b}# the end\n"),
            format!("{a}{key}{b}"),
        ] {
            assert_eq!(read(&same).as_ref(), Ok(&both), "{same}");
        }
        let junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let damaged = |pem: &str| match read(pem) {
            Err(BundleError::Damaged { number, .. }) => number,
            other => panic!("{pem}: {other:?}"),
        };
        assert_eq!((damaged(junk), damaged(&format!("{a}{junk}{b}")), damaged(&format!("{a}{b}{junk}"))), (1, 2, 3));
        assert_eq!(damaged(&format!("{a}{}", b.replacen('M', "*", 1))), 2);
        let unended = a.replace("-----END CERTIFICATE-----\n", "");
        assert_eq!(damaged(&format!("{unended}{b}")), 1);
        for unseen in [b.replace("CERTIFICATE", "TRUSTED CERTIFICATE"), b.replace("-----BEGIN", " -----BEGIN")] {
            assert_eq!(read(&format!("{a}{unseen}")), Err(BundleError::Unseen { begun: 2, read: 1 }), "{unseen}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_cut_off_is_whole_or_told(at in proptest::prelude::any::<proptest::sample::Index>()) {
            static TWO: std::sync::LazyLock<[String; 2]> =
                std::sync::LazyLock::new(|| [Authority::root("a"), Authority::root("b")].map(|a| a.root_pem().to_owned()));
            let [a, b] = &*TWO;
            let text = format!("{a}{b}");
            let cut = &text[..at.index(text.len())];
            match X509Bundle::from_pem(cut) {
                Ok(bundle) if cut.trim_end().len() == text.trim_end().len() => assert_eq!(bundle.roots().count(), 2),
                Ok(bundle) => {
                    assert_eq!(bundle.roots().count(), 1);
                    assert_eq!(cut.trim_end(), a.trim_end());
                }
                Err(BundleError::Empty) => assert!(cut.is_empty()),
                Err(BundleError::CutOff(number)) => assert_eq!(number, if cut.len() < a.len() { 1 } else { 2 }),
                Err(error) => panic!("{error}: {cut}"),
            }
        }
    }

    #[test]
    fn that_all_roots_have_ended_is_known() {
        let root = |name: &str, year: i32| {
            let mut params = rcgen::CertificateParams::default();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
        };
        let at = |text: &str| humantime::parse_rfc3339(text).unwrap();
        let now = at("2026-01-01T00:00:00Z");
        let ended = |pem: &str| X509Bundle::from_pem(pem).unwrap().ended(now);
        assert_eq!(ended(&(root("a", 2020) + &root("b", 2021))), Some(at("2021-01-01T00:00:00Z")));
        assert_eq!(ended(&(root("a", 2020) + &root("b", 2030))), None);
        assert_eq!(ended(&root("a", 1960)), Some(SystemTime::UNIX_EPOCH), "what can be shown");
    }
}
