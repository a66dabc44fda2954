//! PKCS#12 (RFC 7292) for Java, .NET and whoever else wants one file with a password.
//!
//! PBES2 with AES-256 and HMAC-SHA-256 is what OpenSSL 3 and Java's keytool write today, and both read it. The key with
//! its chain has the alias `identity`; the mesh's roots are in it as trusted certificates (Java's own attribute), so
//! that one file is key store and trust store.

use super::FilesError;
use crate::{
    files::{ReadError, read},
    spiffe::X509Context,
};
use p12_keystore::{Certificate, KeyStore, KeyStoreEntry, Pkcs12Archive, PrivateKey, PrivateKeyChain};
use std::{collections::BTreeSet, path::Path};
use zeroize::Zeroizing;

/// Of the key and its chain.
const ALIAS: &str = "identity";
/// More than this is no password, in bytes.
const MAX_PASSWORD: usize = 1024;

/// What opens the file. Printable ASCII: programs differ in how they encode anything else.
pub(super) struct Password(Zeroizing<String>);

impl Password {
    /// Reads the first line of `path`. Read at each publication: a new password is a new file.
    ///
    /// # Errors
    /// When it cannot be read, when everybody may read it, or when it is no password that all programs take.
    pub(super) fn read(path: &Path) -> Result<Self, FilesError> {
        let wrong = |why: String| FilesError::Password { path: path.to_owned(), why };
        let form = || wrong("it must hold one line of 1 to 1024 printable ASCII characters".to_owned());
        let unread = |error| match error {
            ReadError::TooLong(_) => form(),
            error => wrong(format!("{error}; put the password there for our user to read")),
        };
        let file = read(path, MAX_PASSWORD).map_err(unread)?;
        let (mode, text) = (file.mode, file.text().map_err(unread)?);
        if mode & 0o007 != 0 {
            return Err(wrong(format!("everybody may read it (mode {:04o}); chmod o-rwx", mode & 0o777)));
        }
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.is_empty() || !line.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            return Err(form());
        }
        Ok(Self(Zeroizing::new(line.to_owned())))
    }
}

/// The file's content. Salts are random, so no two are the same: compare with [`says`].
pub(super) fn encode(context: &X509Context, password: &Password) -> Result<Zeroizing<Vec<u8>>, FilesError> {
    let failed = |error: p12_keystore::error::Error| FilesError::Pkcs12(error.to_string());
    let key = PrivateKey::from_der(context.svid.key().pkcs8().secret_der()).map_err(failed)?;
    let chain: Result<Vec<_>, _> = context.svid.chain().iter().map(|der| Certificate::from_der(der)).collect();
    let mut store = KeyStore::new();
    let chain = PrivateKeyChain::new(context.svid.serial(), key, chain.map_err(failed)?);
    store.add_entry(ALIAS, KeyStoreEntry::PrivateKeyChain(chain));
    for (number, root) in (1..).zip(context.bundle.roots()) {
        let root = Certificate::from_der(&root).map_err(failed)?;
        store.add_entry(&format!("root-{number}"), KeyStoreEntry::Certificate(root));
    }
    store.writer(&password.0).write().map(Zeroizing::new).map_err(failed)
}

/// Whether `bytes` open with `password` and hold what `context` holds.
pub(super) fn says(bytes: &[u8], password: &Password, context: &X509Context) -> bool {
    let Ok(archive) = Pkcs12Archive::from_pkcs12(bytes, &password.0) else { return false };
    let of = |trusted: bool| -> BTreeSet<_> {
        archive.certs.iter().filter(|bag| bag.trusted == trusted).map(|bag| bag.cert.as_der().to_vec()).collect()
    };
    let [key] = &archive.keys[..] else { return false };
    key.key.as_der() == context.svid.key().pkcs8().secret_der()
        && of(false) == context.svid.chain().iter().map(|der| der.to_vec()).collect()
        && of(true) == context.bundle.roots().map(|der| der.to_vec()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        authority::{Authority, Leaf},
        spiffe::{KeyKind, PrivateKey},
    };
    use proptest::prelude::*;
    use std::{sync::LazyLock, time::SystemTime};

    struct Written {
        context: std::sync::Arc<X509Context>,
        password: Password,
        bytes: Vec<u8>,
    }

    static WRITTEN: LazyLock<Written> = LazyLock::new(|| {
        let (id, now) = ("spiffe://cluster.local/ns/vms/sa/payments", SystemTime::now());
        let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
        let answer = Authority::root("mesh").intermediate("istiod").issue(key.pem(), &Leaf::new(&[id], now));
        let context = X509Context::from_answer(&id.parse().unwrap(), key, &answer, now).unwrap();
        let password = Password(Zeroizing::new("a password".to_owned()));
        let bytes = encode(&context, &password).unwrap().to_vec();
        Written { context, password, bytes }
    });

    #[test]
    fn what_is_written_is_recognised_and_nothing_else() {
        let Written { context, password, bytes } = &*WRITTEN;
        assert!(says(bytes, password, context));
        assert!(!says(bytes, &Password(Zeroizing::new("another".to_owned())), context));
        assert!(!says(&bytes[..bytes.len() - 1], password, context));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn no_bytes_make_it_panic(at in any::<prop::sample::Index>(), with in any::<u8>(), cut in any::<bool>()) {
            let Written { context, password, bytes } = &*WRITTEN;
            let mut bytes = bytes.clone();
            let at = at.index(bytes.len());
            bytes[at] = with;
            if cut {
                bytes.truncate(at + 1);
            }
            let _ = says(&bytes, password, context);
        }
    }
}
