//! What a consumer sees in the directory that the agent publishes to.
#![allow(clippy::unwrap_used)]

use crate::support::Host;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime},
};
use we_agent::spiffe::{PrivateKey, X509Context};

/// Where the files of `workload` are.
pub(crate) fn dir(host: &Host, workload: &str) -> PathBuf {
    host.path("/run/we-agent").join(workload)
}

/// Resolves `..data` once, as a careful consumer does, and reads there; none before the first publication. Fails when
/// the key is not the certificate's, when it names somebody else than `id`, or when it did not verify when it was written.
pub(crate) fn pair(dir: &Path, id: &str) -> Option<Arc<X509Context>> {
    let generation = dir.join(fs::read_link(dir.join("..data")).ok()?);
    let read = |name: &str| fs::read_to_string(generation.join(name)).unwrap();
    let written = fs::metadata(generation.join("cert-chain.pem")).unwrap().modified().unwrap();
    let key = PrivateKey::from_pem(&read("key.pem")).unwrap();
    let (chain, roots) = (read("cert-chain.pem"), read("root-cert.pem"));
    Some(X509Context::from_pem(&id.parse().unwrap(), key, &chain, &roots, written, written).unwrap())
}

/// Whether the pair in `dir` can be used now.
pub(crate) fn is_good(dir: &Path, id: &str) -> bool {
    pair(dir, id).is_some_and(|pair| pair.svid.is_valid(SystemTime::now()))
}

/// A consumer that reads all the time, in a thread of its own.
pub(crate) struct Reader {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<BTreeSet<String>>,
}

impl Reader {
    /// Starts to read. It fails at the first pair that does not match or has expired.
    pub(crate) fn start(dir: PathBuf, id: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = thread::spawn(move || {
            let mut serials = BTreeSet::new();
            while !told.load(Ordering::Relaxed) {
                let pair = pair(&dir, id).unwrap();
                assert!(pair.svid.is_valid(SystemTime::now()), "an expired pair: {}", pair.svid.serial());
                serials.insert(pair.svid.serial().to_owned());
                thread::park_timeout(Duration::from_millis(2));
            }
            serials
        });
        Self { stop, thread }
    }

    /// Ends it: the serial numbers that it has seen.
    pub(crate) fn stop(self) -> BTreeSet<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
