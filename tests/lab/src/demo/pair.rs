//! A program that uses the certificate: it reads the files again and again, and checks what it gets.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustls::{
    RootCertStore,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
};

use crate::tls;

/// From one look to the next.
const PAUSE: Duration = Duration::from_millis(1);

/// One generation of the files that was found good.
pub(super) struct Pair {
    pub(super) key: Arc<CertifiedKey>,
    /// Verifies others by the same roots.
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
    pub(super) serial: String,
}

/// Reads a generation and checks it: the key is the certificate's, the chain leads to the roots beside it, and it is
/// valid now. `None` before the first one was written; the error says what is wrong.
///
/// The link `..data` is resolved once and everything read behind it, as with a volume of Kubernetes: the three names
/// beside it are links, too, but opened one after the other they may be of two generations.
pub(super) fn load(dir: &Path, trust_domain: &str) -> Result<Option<Pair>, String> {
    let generation = match dir.join("..data").canonicalize() {
        Ok(generation) => generation,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let read = |name: &str| fs::read(generation.join(name)).map_err(|error| format!("{name}: {error}"));
    let certificates = |name: &str| {
        let pem = read(name)?;
        CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>().map_err(|error| format!("{name}: {error}"))
    };
    let (chain, anchors) = (certificates("cert-chain.pem")?, certificates("root-cert.pem")?);
    // The cause is left out: it could quote the key.
    let key = PrivateKeyDer::from_pem_slice(&read("key.pem")?).map_err(|_| "key.pem: no key".to_owned())?;
    check(chain, key, anchors, trust_domain).map(Some)
}

fn check(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    anchors: Vec<CertificateDer<'static>>,
    trust_domain: &str,
) -> Result<Pair, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let provider: Arc<CryptoProvider> = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for anchor in anchors {
        roots.add(anchor).map_err(|e| text(&e))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let verifier = verifier.build().map_err(|e| text(&e))?;
    let (leaf, issuers) = chain.split_first().ok_or("cert-chain.pem: no certificate")?;
    verifier.verify_client_cert(leaf, issuers, UnixTime::now()).map_err(|e| text(&e))?;
    let (_, serial) =
        tls::subject(leaf, trust_domain).ok_or("cert-chain.pem: not one SPIFFE ID of our trust domain")?;
    let key = provider.key_provider.load_private_key(key).map_err(|_| "key.pem: no usable key".to_owned())?;
    let key = CertifiedKey::new(chain, key);
    key.keys_match().map_err(|_| format!("key.pem is not the key of certificate {serial}"))?;
    Ok(Pair { key: Arc::new(key), verifier, serial })
}

/// What the reader has met.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub(super) reads: u64,
    /// Each certificate once, in the order of their appearance.
    pub(super) serials: Vec<String>,
    /// Reads that gave no good pair although there had been one.
    pub(super) bad: u64,
    pub(super) first_bad: Option<String>,
}

/// A thread that reads until it is dropped.
pub(super) struct Reader {
    tally: Arc<Mutex<Tally>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    pub(super) fn start(dir: PathBuf, trust_domain: &'static str) -> Self {
        let (tally, stop) = (Arc::<Mutex<Tally>>::default(), Arc::new(AtomicBool::new(false)));
        let (seen, ending) = (Arc::clone(&tally), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !ending.load(Ordering::Relaxed) {
                count(&mut lock(&seen), load(&dir, trust_domain).map(|pair| pair.map(|pair| pair.serial)));
                std::thread::sleep(PAUSE);
            }
        });
        Self { tally, stop, thread: Some(thread) }
    }

    pub(super) fn tally(&self) -> Tally {
        lock(&self.tally).clone()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

/// Takes one read in. What is bad before the first good one is bad, too; only absence is not.
fn count(tally: &mut Tally, read: Result<Option<String>, String>) {
    let bad = match read {
        Ok(None) if tally.serials.is_empty() => return,
        Ok(None) => Some("the files are gone".to_owned()),
        Ok(Some(serial)) => {
            if tally.serials.last() != Some(&serial) {
                tally.serials.push(serial);
            }
            None
        }
        Err(cause) => Some(cause),
    };
    tally.reads += 1;
    if let Some(cause) = bad {
        tally.bad += 1;
        tally.first_bad.get_or_insert(cause);
    }
}

fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rcgen::{CertificateParams, KeyPair, SanType};

    #[test]
    fn a_key_of_another_generation_is_noticed() {
        let (ours, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI("spiffe://td/ns/n/sa/a".try_into().unwrap())];
        let authority = KeyPair::generate().unwrap();
        let mut root = CertificateParams::default();
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let anchor = root.self_signed(&authority).unwrap().der().clone();
        let leaf = params.signed_by(&ours, &rcgen::Issuer::new(root, authority)).unwrap().der().clone();
        let read = |key: &KeyPair| {
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            check(vec![leaf.clone()], key, vec![anchor.clone()], "td").map(|pair| pair.serial)
        };
        assert!(read(&ours).is_ok(), "{:?}", read(&ours));
        assert!(read(&other).unwrap_err().contains("is not the key"));
    }

    #[test]
    fn absence_counts_only_after_the_first_pair() {
        let mut tally = Tally::default();
        count(&mut tally, Ok(None));
        assert_eq!((tally.reads, tally.bad), (0, 0));
        for read in [Ok(Some("a".to_owned())), Ok(Some("a".to_owned())), Ok(Some("b".to_owned())), Ok(None)] {
            count(&mut tally, read);
        }
        assert_eq!((tally.reads, tally.bad, tally.serials), (4, 1, vec!["a".to_owned(), "b".to_owned()]));
    }
}
