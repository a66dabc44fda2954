//! The SVID as files: three PEM files (`key.pem`, `cert-chain.pem` and `root-cert.pem`, the names that Istio's agent
//! uses), one file with key and chain, PKCS#12, or the roots alone.
//!
//! What a reader may rely on: a single file is always whole, and a generation directory, once resolved, never changes
//! and stays for a while (see [`Layout::Generations`]). What nobody can give is a pair to who opens two *paths* one
//! after the other: a switch may come in between, whatever we do, and the key is then not the certificate's. Such a
//! reader compares and reads again, resolves `..data` first, takes the combined file, or reads only when it is told to.
//!
//! A chain holds leaf and intermediates. Istio's agent writes the root into it, too; we do not: who verifies us has the
//! root or must not trust one that we bring, TLS servers would send it with each handshake (RFC 8446 section 4.4.2
//! allows to leave it out), and `root-cert.pem` beside it has it.

mod flat;
mod generations;
mod output;
mod pkcs12;
mod single;

pub use output::Output;

use crate::{
    aside::within,
    files::{Access, Dir, DirError, Grant, Root, Versions},
    spiffe::{X509Bundle, X509Context},
    status::{self, Identity, Publication, Trouble},
    time::{Backoff, Clock},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

const KEY: &str = "key.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOTS: &str = "root-cert.pem";
/// No file of ours is nearly as long.
const MAX_FILE: usize = 1 << 20;
/// How often all is looked at although nothing has changed: old generations go.
const REVIEW: Duration = Duration::from_secs(600);

/// How long anybody waits for the disk. What it was asked for goes on aside.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is written, and how it is laid out in its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// A directory of our own: each generation in its own directory, one link `..data` to the present one, switched at
    /// once (as Kubernetes does with volumes), and the three names as links through `..data`. Who resolves `..data`
    /// once and reads there always gets a pair that matches.
    Generations,
    /// Three plain files in somebody else's directory, as Istio's agent writes them (`OUTPUT_CERTS`). Each is replaced
    /// at once, but three files cannot be; who reads may meet a new key beside an old certificate and must try again.
    Flat,
    /// One file, replaced at once. It needs no generations: a reader that has it open keeps the old one, whole.
    Single(SingleFile),
}

/// An output that is one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SingleFile {
    /// Its name in the directory.
    pub name: String,
    /// What is in it.
    pub content: Content,
}

/// What one file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// The private key, then leaf and intermediates, PEM: what haproxy's `crt`, stunnel's `cert` and many others take.
    Combined,
    /// Key, chain and roots as PKCS#12; the password is the one line in this file.
    Pkcs12 {
        /// Looked up below the root.
        password_file: PathBuf,
    },
    /// The roots, PEM. No secret.
    Trust,
}

/// Whose the directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Folder {
    /// `/run/we-agent/<workload>`: made if need be, and its mode kept at 0755. Outputs for several groups, and the
    /// workload's socket, stand side by side in it; each guards itself, and their names are no secret.
    Own,
    /// Configured: made if need be, with the access of the output; one that is there stays as it is.
    Given,
    /// Must be there.
    Theirs,
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
    /// The password of a PKCS#12 output cannot be used.
    #[error("password file {}: {why}", .path.display())]
    Password {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the fix.
        why: String,
    },
    /// The disk does not answer.
    #[error("{} was not written within {}s: see what its disk waits for", .0.display(), PATIENCE.as_secs())]
    Slow(PathBuf),
    /// It cannot be put into PKCS#12.
    #[error("cannot write PKCS#12: {0}; configure another format and report this")]
    Pkcs12(String),
}

impl FilesError {
    /// A stable word for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Dir(error) => error.kind(),
            Self::Password { .. } => "password",
            Self::Slow(_) => "disk_hangs",
            Self::Pkcs12(_) => "pkcs12",
        }
    }
}

/// One output of a workload: what, where, and who may read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    root: Root,
    dir: PathBuf,
    folder: Folder,
    layout: Layout,
    grant: Grant,
}

impl Files {
    /// Files in `dir`, looked up below `root`. Touches nothing yet.
    pub fn new(root: &Root, dir: impl Into<PathBuf>, folder: Folder, layout: Layout, grant: Grant) -> Self {
        Self { root: root.clone(), dir: dir.into(), folder, layout, grant }
    }

    /// The directory on this host.
    pub fn path(&self) -> PathBuf {
        self.root.path(&self.dir)
    }

    /// What is its own among the outputs of a directory.
    fn place(&self) -> PathBuf {
        match &self.layout {
            Layout::Generations | Layout::Flat => self.path(),
            Layout::Single(file) => self.path().join(&file.name),
        }
    }

    /// What is there once it was published.
    pub fn paths(&self) -> Vec<PathBuf> {
        let dir = self.path();
        match &self.layout {
            Layout::Generations | Layout::Flat => [KEY, CHAIN, ROOTS].map(|name| dir.join(name)).into(),
            Layout::Single(file) => vec![dir.join(&file.name)],
        }
    }

    /// Lets the files say what `context` says. What they say already is not written again: certificates are compared
    /// as certificates, roots and intermediates as sets. What a killed run left half written is removed. Owner, group
    /// and mode of a file are set before its first byte is in it. Blocks on the disk and on the name service.
    ///
    /// # Errors
    /// When the directory is not safe, a name is taken by something that is not ours, an account is unknown, the
    /// password cannot be had, or the disk refuses. What was there is still there then.
    pub fn publish(&self, context: &X509Context, now: SystemTime) -> Result<Outcome, FilesError> {
        let (root, dir, access) = (&self.root, Path::new(&self.dir), self.grant.resolve()?);
        let dir = match self.folder {
            Folder::Own => Dir::create(root, dir, Access::EVERYBODY)?,
            Folder::Given => Dir::open_or_create(root, dir, access)?,
            Folder::Theirs => Dir::open(root, dir)?,
        };
        match &self.layout {
            Layout::Generations => Ok(generations::publish(&dir, context, access, now)?),
            Layout::Flat => Ok(flat::publish(&dir, context, access)?),
            Layout::Single(file) => single::publish(&dir, root, file, context, access),
        }
    }
}

/// Whether the three files in `dir` say what `context` says, and may be read by those who may.
fn says(dir: &Dir, context: &X509Context, access: Access) -> bool {
    let read = |name: &str| dir.read(name, MAX_FILE).ok().flatten().filter(|_| dir.granted(name, access));
    let (Some(key), Some(chain), Some(roots)) = (read(KEY), read(CHAIN), read(ROOTS)) else { return false };
    let roots = std::str::from_utf8(&roots).ok().and_then(|pem| X509Bundle::from_pem(pem).ok());
    key.as_slice() == context.svid.key().pem().as_bytes()
        && certificates(&chain).is_some_and(|chain| single::is_chain(&chain, context))
        && roots.as_ref() == Some(&context.bundle)
}

/// All certificates of a PEM text; none when it is broken.
fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()
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
/// until there is a better one, and a stopped agent leaves a working pair behind. At each of the `looks`, when the process
/// is awake anyway, they are looked at: what somebody has removed or changed is made anew.
///
/// The disk is touched aside: one fsync may take longer than a whole health probe.
pub async fn run(
    files: Files,
    mut identity: watch::Receiver<Identity>,
    fact: watch::Sender<Publication>,
    mut looks: watch::Receiver<Instant>,
    clock: Clock,
    shutdown: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(60));
    let mut written: Option<Versions> = None;
    loop {
        let (now, attempted) = (clock.now(), identity.borrow().current.clone());
        let mut wait = REVIEW;
        if let Some(context) = attempted.as_ref().filter(|context| context.svid.is_valid(now)) {
            match publish(&files, context, now).await {
                Ok(outcome) => {
                    backoff.reset();
                    tell_success(&files, &fact, context, outcome);
                    written = Some(Versions::of(files.paths()));
                }
                Err(error) => {
                    wait = backoff.next_wait();
                    written = None;
                    tell_failure(&files, &fact, &error, now);
                }
            }
        }
        // The fact changes for other reasons, too, say a renewal that is refused: only another SVID is news here.
        let other = |news: &Identity| news.current.as_ref().map(Arc::as_ptr) != attempted.as_ref().map(Arc::as_ptr);
        tokio::select! {
            () = shutdown.cancelled() => return,
            gone = async { identity.wait_for(other).await.is_err() } => if gone { return },
            () = touched(&mut written, &mut looks) => {
                warn!(dir = %files.path().display(), "the files were removed or changed by somebody, so they are looked after");
            }
            () = clock.sleep(wait) => {}
        }
    }
}

/// Waits for a look that finds other files than were written; for ever while none are.
async fn touched(written: &mut Option<Versions>, looks: &mut watch::Receiver<Instant>) {
    let Some(written) = written else { return std::future::pending().await };
    // They may have been removed before they were looked at first.
    while !written.have_changed() && written.are_there() {
        if looks.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn publish(files: &Files, context: &Arc<X509Context>, now: SystemTime) -> Result<Outcome, FilesError> {
    let grant = files.grant.by_number().await?;
    let (place, files, context) = (files.place(), Files { grant, ..files.clone() }, Arc::clone(context));
    let written = within(PATIENCE, &place, move || files.publish(&context, now)).await;
    written.unwrap_or(Err(FilesError::Slow(place)))
}

fn tell_success(files: &Files, fact: &watch::Sender<Publication>, context: &X509Context, outcome: Outcome) {
    let (serial, dir) = (context.svid.serial(), files.path());
    match outcome {
        Outcome::Written => info!(serial, dir = %dir.display(), "files written"),
        Outcome::Unchanged => debug!(serial, dir = %dir.display(), "files are up to date"),
    }
    status::tell(fact, Publication { serial: Some(serial.to_owned()), trouble: None });
}

fn tell_failure(files: &Files, fact: &watch::Sender<Publication>, error: &FilesError, now: SystemTime) {
    let (kind, cause) = (error.kind(), error.to_string());
    fact.send_modify(|known| {
        let trouble = Trouble::met(known.trouble.as_ref(), kind, cause, now);
        match trouble.times {
            1 => warn!(dir = %files.path().display(), cause = trouble.cause, "files not written, the old ones stay"),
            _ => debug!(dir = %files.path().display(), cause = trouble.cause, "files still not written"),
        }
        known.trouble = Some(trouble);
    });
}
