//! The certificate authority: a root, an intermediate that signs, and their rotation.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::{
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::Error;

/// Certificates begin this long before they are issued.
const BACKDATED: Duration = Duration::from_secs(120);
/// How long authorities live.
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);

/// The lab's certificate authority: by default a root and an intermediate that signs, both EC P-256.
pub struct Ca {
    domain: String,
    names: Vec<String>,
    state: Mutex<State>,
    changes: watch::Sender<()>,
}

struct State {
    /// The last one is the one in use; the others are in the bundle.
    roots: Vec<Authority>,
    /// In the bundle, and the next to be used.
    coming: Option<Authority>,
    /// From the one that signs up to the one under the root.
    intermediates: Vec<Authority>,
    /// Serial number of each leaf that was issued, and its place in the row.
    issued: HashMap<String, u64>,
    serving: Arc<CertifiedKey>,
    /// How many authorities were made: their names carry it.
    made: u32,
}

/// A key that may sign, and its certificate.
struct Authority {
    domain: String,
    name: String,
    pem: String,
    der: CertificateDer<'static>,
    key: KeyPair,
    not_after: OffsetDateTime,
}

/// What [`Ca::sign`] gives.
pub(crate) struct Issued {
    /// PEM of the leaf.
    pub(crate) pem: String,
    /// Hexadecimal.
    pub(crate) serial: String,
    /// Seconds since 1970.
    pub(crate) not_after: i64,
}

/// What to write into a leaf.
pub(crate) struct Leaf<'a> {
    pub(crate) identity: &'a str,
    /// The CSR asked for a common name.
    pub(crate) named: bool,
    pub(crate) life: Duration,
}

impl Ca {
    /// A new CA for a trust domain. `names` are the DNS names of the serving certificate.
    pub(crate) fn generate(domain: &str, names: Vec<String>, intermediates: usize) -> Result<Self, Error> {
        let root = Authority::root(domain, 1)?;
        let mut made = 1;
        let intermediates = root.chain(intermediates, &mut made)?;
        let serving = serve(&root, &intermediates, &names)?;
        let state = State { roots: vec![root], coming: None, intermediates, issued: HashMap::new(), serving, made };
        Ok(Self { domain: domain.to_owned(), names, state: Mutex::new(state), changes: watch::Sender::default() })
    }

    /// The bundle of roots, PEM: what `istio-ca-root-cert` holds and each chain ends in.
    pub fn root_pem(&self) -> String {
        self.root_pems().concat()
    }

    /// New intermediates (one, if there was none) under the same root sign from now on.
    pub fn rotate_intermediate(&self) -> Result<(), Error> {
        let mut state = self.lock();
        let mut made = state.made;
        let root = state.roots.last().ok_or(Error::Key("the CA"))?;
        let intermediates = root.chain(state.intermediates.len().max(1), &mut made)?;
        state.serving = serve(root, &intermediates, &self.names)?;
        (state.intermediates, state.made) = (intermediates, made);
        self.changes.send_replace(());
        Ok(())
    }

    /// Puts a new root into the bundle, which signs nothing until [`rotate_root`](Self::rotate_root): the first step
    /// of a rotation without a gap.
    pub fn add_root(&self) -> Result<(), Error> {
        let mut state = self.lock();
        state.made += 1;
        state.coming = Some(Authority::root(&self.domain, state.made)?);
        self.changes.send_replace(());
        Ok(())
    }

    /// A new root, the added one if there is one, is in use from now on, with as many intermediates as before. With
    /// `overlap` the old roots stay in the bundle until [`drop_old_roots`](Self::drop_old_roots). As with a live
    /// istiod, client certificates go on to be checked against the roots that each instance started with.
    pub fn rotate_root(&self, overlap: bool) -> Result<(), Error> {
        let mut state = self.lock();
        let mut made = state.made;
        let root = match state.coming.take() {
            Some(root) => root,
            None => {
                made += 1;
                Authority::root(&self.domain, made)?
            }
        };
        let intermediates = root.chain(state.intermediates.len(), &mut made)?;
        state.serving = serve(&root, &intermediates, &self.names)?;
        (state.intermediates, state.made) = (intermediates, made);
        if !overlap {
            state.roots.clear();
        }
        state.roots.push(root);
        self.changes.send_replace(());
        Ok(())
    }

    /// Only the root in use stays in the bundle.
    pub fn drop_old_roots(&self) {
        let mut state = self.lock();
        let old = state.roots.len().saturating_sub(1);
        state.roots.drain(..old);
        self.changes.send_replace(());
    }

    /// Each root by itself, PEM.
    pub(crate) fn root_pems(&self) -> Vec<String> {
        self.lock().bundle().map(|r| r.pem.clone()).collect()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    pub(crate) fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.lock().bundle().map(|r| r.der.clone()).collect()
    }

    /// What follows the leaf in an answer: each intermediate, then the bundle of roots as one element.
    pub(crate) fn issuers(&self) -> Vec<String> {
        let mut issuers: Vec<String> = self.lock().intermediates.iter().map(|i| i.pem.clone()).collect();
        issuers.push(self.root_pem());
        issuers
    }

    pub(crate) fn serving(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.lock().serving)
    }

    /// A serving certificate of the same authority for other names.
    pub(crate) fn serving_as(&self, names: &[String]) -> Option<Arc<CertifiedKey>> {
        let state = self.lock();
        serve(state.roots.last()?, &state.intermediates, names).ok()
    }

    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// The place in the row of the leaf with this serial number; 0 if it is not ours.
    pub(crate) fn sequence(&self, serial: &str) -> u64 {
        self.lock().issued.get(serial).copied().unwrap_or_default()
    }

    /// How many leaves were issued.
    pub(crate) fn issued(&self) -> u64 {
        self.lock().issued.len() as u64
    }

    /// Signs a leaf with the profile of istiod's own CA.
    pub(crate) fn sign(&self, key: &impl PublicKeyData, leaf: &Leaf<'_>, now: SystemTime) -> Result<Issued, Error> {
        let mut state = self.lock();
        let signer = state.intermediates.first().or(state.roots.last()).ok_or(Error::Key("the CA"))?;
        let mut params = leaf_params(now);
        let uri = leaf.identity.try_into()?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        if leaf.named && leaf.identity.len() <= 64 {
            params.distinguished_name.push(DnType::CommonName, leaf.identity);
        }
        params.not_after = (OffsetDateTime::from(now) + leaf.life).min(signer.not_after);
        let mut serial: [u8; 16] = fastrand::u128(..).to_be_bytes();
        serial[0] = serial[0] & 0x7f | 0x40;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let certificate = params.signed_by(key, &signer.issuer())?;
        let serial = hex(&serial);
        let place = state.issued.len() as u64 + 1;
        state.issued.insert(serial.clone(), place);
        Ok(Issued { pem: certificate.pem(), serial, not_after: params.not_after.unix_timestamp() })
    }

    /// Key and chain (PEM, with intermediates) for a pod of the mesh, or for one that is not what it should be: with these
    /// URIs, issued at `now` for `life`.
    pub fn pod(&self, uris: &[&str], now: SystemTime, life: Duration) -> Result<(String, String), Error> {
        let state = self.lock();
        let signer = state.intermediates.first().or(state.roots.last()).ok_or(Error::Key("the CA"))?;
        let key = KeyPair::generate()?;
        let mut params = leaf_params(now);
        params.subject_alt_names =
            uris.iter().map(|uri| Ok(SanType::URI((*uri).try_into()?))).collect::<Result<_, rcgen::Error>>()?;
        params.not_after = OffsetDateTime::from(now) + life;
        let leaf = params.signed_by(&key, &signer.issuer())?.pem();
        let chain = [leaf].into_iter().chain(state.intermediates.iter().map(|i| i.pem.clone())).collect();
        Ok((key.serialize_pem(), chain))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A CA as it is kept in a file of mode 0600: it holds private keys.
#[derive(Serialize, Deserialize)]
pub(crate) struct Kept {
    domain: String,
    names: Vec<String>,
    roots: Vec<KeptAuthority>,
    intermediates: Vec<KeptAuthority>,
}

#[derive(Serialize, Deserialize)]
struct KeptAuthority {
    name: String,
    certificate: String,
    key: String,
}

impl Ca {
    pub(crate) fn keep(&self) -> Kept {
        let keep = |a: &Authority| KeptAuthority {
            name: a.name.clone(),
            certificate: a.pem.clone(),
            key: a.key.serialize_pem(),
        };
        let state = self.lock();
        Kept {
            domain: self.domain.clone(),
            names: self.names.clone(),
            roots: state.roots.iter().map(keep).collect(),
            intermediates: state.intermediates.iter().map(keep).collect(),
        }
    }

    pub(crate) fn restore(kept: Kept) -> Result<Self, Error> {
        let restore = |a: KeptAuthority| -> Result<Authority, Error> {
            let der = CertificateDer::from_pem_slice(a.certificate.as_bytes()).map_err(|_| Error::Key("the CA"))?;
            let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|_| Error::Key("the CA"))?;
            let not_after = parsed.validity().not_after.to_datetime();
            Ok(Authority {
                domain: kept.domain.clone(),
                name: a.name,
                pem: a.certificate,
                key: KeyPair::from_pem(&a.key)?,
                not_after,
                der,
            })
        };
        let roots = kept.roots.into_iter().map(restore).collect::<Result<Vec<_>, _>>()?;
        let intermediates = kept.intermediates.into_iter().map(restore).collect::<Result<Vec<_>, _>>()?;
        let serving = serve(roots.last().ok_or(Error::Key("the CA"))?, &intermediates, &kept.names)?;
        let made = roots
            .iter()
            .chain(&intermediates)
            .filter_map(|a| a.name.rsplit(' ').next()?.parse().ok())
            .max()
            .unwrap_or(0);
        let state = State { roots, coming: None, intermediates, issued: HashMap::new(), serving, made };
        Ok(Self { domain: kept.domain, names: kept.names, state: Mutex::new(state), changes: watch::Sender::default() })
    }
}

impl State {
    fn bundle(&self) -> impl Iterator<Item = &Authority> {
        self.roots.iter().chain(&self.coming)
    }
}

impl Authority {
    /// That many intermediates under this root, the one that signs first. `made` counts on.
    fn chain(&self, length: usize, made: &mut u32) -> Result<Vec<Self>, Error> {
        let mut chain: Vec<Self> = Vec::new();
        for _ in 0..length {
            *made += 1;
            let next = chain.first().unwrap_or(self).intermediate(&self.domain, *made)?;
            chain.insert(0, next);
        }
        Ok(chain)
    }

    fn root(domain: &str, number: u32) -> Result<Self, Error> {
        let key = KeyPair::generate()?;
        let name = format!("root {number}");
        let params = authority_params(domain, &name);
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            domain: domain.to_owned(),
            name,
            pem: certificate.pem(),
            der: certificate.der().clone(),
            not_after: params.not_after,
            key,
        })
    }

    fn intermediate(&self, domain: &str, number: u32) -> Result<Self, Error> {
        let key = KeyPair::generate()?;
        let name = format!("intermediate {number}");
        let params = authority_params(domain, &name);
        let certificate = params.signed_by(&key, &self.issuer())?;
        Ok(Self {
            domain: domain.to_owned(),
            name,
            pem: certificate.pem(),
            der: certificate.der().clone(),
            not_after: params.not_after,
            key,
        })
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::new(authority_params(&self.domain, &self.name), &self.key)
    }
}

fn authority_params(domain: &str, name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, domain);
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    let now = SystemTime::now();
    params.not_before = OffsetDateTime::from(now) - BACKDATED;
    params.not_after = OffsetDateTime::from(now) + AUTHORITY_LIFE;
    params
}

/// Everything of a leaf but its names, key and end.
fn leaf_params(now: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = OffsetDateTime::from(now) - BACKDATED;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    // Said here because the library would add a subject key identifier, which istiod's leaves do not have.
    let mut not_a_ca = CustomExtension::from_oid_content(&[2, 5, 29, 19], vec![0x30, 0]);
    not_a_ca.set_criticality(true);
    params.custom_extensions = vec![not_a_ca];
    params
}

/// istiod's own certificate: leaf and intermediate, never the root.
fn serve(root: &Authority, intermediates: &[Authority], names: &[String]) -> Result<Arc<CertifiedKey>, Error> {
    let signer = intermediates.first().unwrap_or(root);
    let key = KeyPair::generate()?;
    let mut params = leaf_params(SystemTime::now());
    params.subject_alt_names =
        names.iter().map(|n| Ok(SanType::DnsName(n.as_str().try_into()?))).collect::<Result<_, rcgen::Error>>()?;
    params.not_after = signer.not_after;
    let certificate = params.signed_by(&key, &signer.issuer())?;
    let chain = [certificate.der().clone()].into_iter().chain(intermediates.iter().map(|i| i.der.clone())).collect();
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|_| Error::Key("the server"))?;
    Ok(Arc::new(CertifiedKey::new(chain, any_supported_type(&key)?)))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
