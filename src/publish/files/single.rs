//! One file that holds everything its reader needs, replaced at once by a rename: who opens it has one whole content.

use super::{Access, Content, Dir, DirError, FilesError, MAX_FILE, Outcome, SingleFile, certificates, pkcs12};
use crate::{
    files::Root,
    spiffe::{X509Bundle, X509Context},
};
use rustls::pki_types::CertificateDer;
use zeroize::Zeroizing;

/// Before the file's own name while it is written.
const UNFINISHED: &str = ".we-agent-unfinished-";

pub(super) fn publish(
    dir: &Dir,
    root: &Root,
    file: &SingleFile,
    context: &X509Context,
    access: Access,
) -> Result<Outcome, FilesError> {
    let (name, unfinished) = (&file.name, format!("{UNFINISHED}{}", file.name));
    dir.remove(&unfinished)?;
    let content = Recipe::of(&file.content, root)?;
    if !dir.is_free_or_file(name) {
        return Err(DirError::InTheWay(dir.path().join(name)).into());
    }
    let present = dir.read(name, MAX_FILE).ok().flatten().filter(|_| dir.granted(name, access));
    if present.is_some_and(|bytes| content.is_said_by(&bytes, context)) {
        return Ok(Outcome::Unchanged);
    }
    let bytes = content.bytes(context)?;
    if let Err(error) = dir.write(&unfinished, &bytes, access).and_then(|()| dir.rename(&unfinished, name)) {
        let _ = dir.remove(&unfinished); // the first error is the one to tell
        return Err(error.into());
    }
    dir.sync()?;
    Ok(Outcome::Written)
}

/// A content with all that is needed to write it, read afresh for each publication.
enum Recipe {
    Combined,
    Pkcs12(pkcs12::Password),
    Trust,
}

impl Recipe {
    fn of(content: &Content, root: &Root) -> Result<Self, FilesError> {
        Ok(match content {
            Content::Combined => Self::Combined,
            Content::Pkcs12 { password_file } => Self::Pkcs12(pkcs12::Password::read(&root.path(password_file))?),
            Content::Trust => Self::Trust,
        })
    }

    fn bytes(&self, context: &X509Context) -> Result<Zeroizing<Vec<u8>>, FilesError> {
        Ok(match self {
            Self::Combined => {
                let (key, chain) = (context.svid.key().pem(), context.svid.chain_pem());
                let mut bytes = Zeroizing::new(Vec::with_capacity(key.len() + chain.len()));
                bytes.extend_from_slice(key.as_bytes());
                bytes.extend_from_slice(chain.as_bytes());
                bytes
            }
            Self::Pkcs12(password) => pkcs12::encode(context, password)?,
            Self::Trust => Zeroizing::new(context.bundle.pem().into_bytes()),
        })
    }

    /// Whether `bytes` say what `context` says, in whatever spelling.
    fn is_said_by(&self, bytes: &[u8], context: &X509Context) -> bool {
        match self {
            Self::Combined => bytes
                .strip_prefix(context.svid.key().pem().as_bytes())
                .is_some_and(|chain| certificates(chain).is_some_and(|chain| is_chain(&chain, context))),
            Self::Pkcs12(password) => pkcs12::says(bytes, password, context),
            Self::Trust => std::str::from_utf8(bytes)
                .is_ok_and(|pem| X509Bundle::from_pem(pem).is_ok_and(|bundle| bundle == context.bundle)),
        }
    }
}

/// Whether these are the certificates of `context`: the leaf first, the intermediates in any order.
pub(super) fn is_chain(chain: &[CertificateDer<'_>], context: &X509Context) -> bool {
    let sorted = |chain: &[CertificateDer<'_>]| {
        let mut rest: Vec<_> = chain.iter().skip(1).map(|der| der.to_vec()).collect();
        rest.sort_unstable();
        rest.dedup();
        rest
    };
    let ours = context.svid.chain();
    chain.first() == ours.first() && sorted(chain) == sorted(ours)
}
