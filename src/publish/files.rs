//! The SVID as files: `key.pem`, `cert-chain.pem` and `root-cert.pem`, the names that Istio's agent uses.
//!
//! `cert-chain.pem` holds leaf and intermediates. Istio's agent writes the root into it, too; we do not: who verifies
//! us has the root or must not trust one that we bring, TLS servers would send it with each handshake (RFC 8446
//! section 4.4.2 allows to leave it out), and `root-cert.pem` beside it has it.

mod flat;
mod generations;

use crate::{
    spiffe::{X509Bundle, X509Context},
    status::{Identity, Publication, Trouble},
    system::{Access, Dir, DirError, Root},
    time::{Backoff, Clock},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

const KEY: &str = "key.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOTS: &str = "root-cert.pem";
/// No file of ours is nearly as long.
const MAX_FILE: usize = 1 << 20;
/// How often the directory is looked at although nothing has changed: files that somebody removed come back, and old
/// generations go.
const REVIEW: Duration = Duration::from_secs(600);

/// How the three files are laid out in their directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A directory of our own: each generation in its own directory, one link `..data` to the present one, switched at
    /// once (as Kubernetes does with volumes), and the three names as links through `..data`. Who resolves `..data`
    /// once and reads there always gets a pair that matches.
    Generations,
    /// Three plain files in somebody else's directory, as Istio's agent writes them (`OUTPUT_CERTS`). Each is replaced
    /// at once, but three files cannot be; who reads may meet a new key beside an old certificate and must try again.
    Flat,
}

/// What came of publishing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The directory has changed.
    Written,
    /// The files said the same already.
    Unchanged,
}

/// Why the files could not be written. Those that were there are still there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilesError {
    /// The file system refused, or the path is not safe.
    #[error(transparent)]
    Dir(#[from] DirError),
}

impl FilesError {
    /// A stable word for metrics.
    pub fn kind(&self) -> &'static str {
        let Self::Dir(error) = self;
        error.kind()
    }
}

/// Where the files of one workload go.
#[derive(Debug, Clone)]
pub struct Files {
    root: Root,
    dir: PathBuf,
    layout: Layout,
    access: Access,
}

impl Files {
    /// Files in `dir`, looked up below `root`. With [`Layout::Generations`] the directory is made if need be; with
    /// [`Layout::Flat`] it must exist, for its owner and mode are somebody else's decision. Touches nothing yet.
    pub fn new(root: &Root, dir: impl Into<PathBuf>, layout: Layout, access: Access) -> Self {
        Self { root: root.clone(), dir: dir.into(), layout, access }
    }

    /// The directory on this host.
    pub fn path(&self) -> PathBuf {
        self.root.path(&self.dir)
    }

    /// Lets the files say what `context` says. What they say already is not written again: certificates are compared
    /// as certificates, roots as a set. What a killed run left half written is removed. Blocks on the disk.
    ///
    /// # Errors
    /// When the directory is not safe, a name is taken by something that is not ours, or the disk refuses. The old
    /// pair is still there then.
    pub fn publish(&self, context: &X509Context, now: SystemTime) -> Result<Outcome, FilesError> {
        let (root, dir) = (&self.root, Path::new(&self.dir));
        Ok(match self.layout {
            Layout::Generations => {
                generations::publish(&Dir::create(root, dir, self.access)?, context, self.access, now)?
            }
            Layout::Flat => flat::publish(&Dir::open(root, dir)?, context, self.access)?,
        })
    }
}

/// Whether the three files in `dir` say what `context` says, and may be read by those who may.
fn says(dir: &Dir, context: &X509Context, access: Access) -> bool {
    let read = |name: &str| dir.read(name, MAX_FILE).ok().flatten().filter(|_| dir.granted(name, access));
    let (Some(key), Some(chain), Some(roots)) = (read(KEY), read(CHAIN), read(ROOTS)) else { return false };
    let certificates = CertificateDer::pem_slice_iter(&chain).collect::<Result<Vec<_>, _>>();
    let roots = std::str::from_utf8(&roots).ok().and_then(|pem| X509Bundle::from_pem(pem).ok());
    key.as_slice() == context.svid.key().pem().as_bytes()
        && certificates.is_ok_and(|chain| chain == context.svid.chain())
        && roots.as_ref() == Some(&context.bundle)
}

/// The three files in the order in which they are put in place: roots first, so that nobody meets a leaf before its
/// root; the certificate last, for it is what consumers watch, and the key must be there when they look.
fn contents(context: &X509Context) -> [(&'static str, zeroize::Zeroizing<String>); 3] {
    [
        (ROOTS, context.bundle.pem().into()),
        (KEY, context.svid.key().pem().to_owned().into()),
        (CHAIN, context.svid.chain_pem().into()),
    ]
}

/// Keeps the files at the newest SVID that is valid, until `shutdown`. Files are never removed: an expired pair stays
/// until there is a better one, and a stopped agent leaves a working pair behind.
///
/// The disk is touched on a blocking thread: one fsync may take longer than a whole health probe.
pub async fn run(
    files: Files,
    mut identity: watch::Receiver<Identity>,
    fact: watch::Sender<Publication>,
    clock: Clock,
    shutdown: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(60));
    loop {
        let (now, attempted) = (clock.now(), identity.borrow().current.clone());
        let mut wait = REVIEW;
        if let Some(context) = attempted.as_ref().filter(|context| context.svid.is_valid(now)) {
            match blocking(&files, context, now).await {
                Ok(outcome) => {
                    backoff.reset();
                    tell_success(&files, &fact, context, outcome);
                }
                Err(error) => {
                    wait = backoff.next_wait();
                    tell_failure(&files, &fact, &error, now);
                }
            }
        }
        // The fact changes for other reasons, too, say a renewal that is refused: only another SVID is news here.
        let other = |news: &Identity| news.current.as_ref().map(Arc::as_ptr) != attempted.as_ref().map(Arc::as_ptr);
        tokio::select! {
            () = shutdown.cancelled() => return,
            gone = async { identity.wait_for(other).await.is_err() } => if gone { return },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn blocking(files: &Files, context: &Arc<X509Context>, now: SystemTime) -> Result<Outcome, FilesError> {
    let (files, context) = (files.clone(), Arc::clone(context));
    match tokio::task::spawn_blocking(move || files.publish(&context, now)).await {
        Ok(result) => result,
        // A bug stays a bug, wherever it ran.
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => std::future::pending().await, // cancelled: the runtime is going down
        },
    }
}

fn tell_success(files: &Files, fact: &watch::Sender<Publication>, context: &X509Context, outcome: Outcome) {
    let (serial, dir) = (context.svid.serial(), files.path());
    match outcome {
        Outcome::Written => info!(serial, dir = %dir.display(), "files written"),
        Outcome::Unchanged => debug!(serial, dir = %dir.display(), "files are up to date"),
    }
    let news = Publication { serial: Some(serial.to_owned()), trouble: None };
    fact.send_if_modified(|known| std::mem::replace(known, news.clone()) != news);
}

fn tell_failure(files: &Files, fact: &watch::Sender<Publication>, error: &FilesError, now: SystemTime) {
    let (kind, cause) = (error.kind(), error.to_string());
    fact.send_if_modified(|known| {
        let since = known.trouble.as_ref().filter(|old| old.kind == kind).map(|old| old.since);
        match since {
            None => warn!(dir = %files.path().display(), cause, "files not written, the old ones stay"),
            Some(_) => debug!(dir = %files.path().display(), cause, "files still not written"),
        }
        let news = Some(Trouble { since: since.unwrap_or(now), kind, cause });
        let changed = known.trouble != news;
        known.trouble = news;
        changed
    });
}
