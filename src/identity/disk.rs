//! The store's disk, and the loop that looks after what is on it. A disk may be full, read-only, gone or hang, and heal
//! again; the certificate is to survive a restart as soon as it can.

use super::{Loaded, PassedOver, Store, Wanted};
use crate::{
    aside::within,
    files::{DirError, Root, Versions},
    spiffe::{SpiffeId, X509Context},
    status::{self, Durable, Identity, Trouble},
    time::{Backoff, Clock, next_beat},
};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// How long anybody waits for the disk. What it was asked for goes on aside.
const PATIENCE: Duration = Duration::from_secs(2);

/// The disk with the store of one workload. What is done on it is done aside.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    root: Root,
    dir: PathBuf,
    id: SpiffeId,
    /// From one look at the store to the next, in beats.
    every: Duration,
    /// What was said of files that are passed over.
    said: Arc<Mutex<BTreeSet<String>>>,
    held: Arc<Mutex<Option<Held>>>,
}

/// The certificate that the store has, and what the files were when it was seen there.
type Held = (Arc<X509Context>, Versions);

/// What [`Disk::ensure`] met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Met {
    /// There is no certificate to be kept, and the store can be used.
    Nothing,
    /// The store had it.
    Held,
    /// The store had it not, and has it now.
    Saved,
}

impl Disk {
    /// Where `wanted` says. Nothing is touched yet.
    pub(super) fn new(wanted: &Wanted) -> Self {
        Self {
            root: wanted.root.clone(),
            dir: wanted.store.clone(),
            id: wanted.id.clone(),
            every: wanted.looks,
            said: Arc::default(),
            held: Arc::default(),
        }
    }

    /// What `act` makes of the store, if it opens it; none when the disk does not answer in time.
    async fn with<T: Send + 'static>(&self, act: impl FnOnce(&Root, &Path) -> T + Send + 'static) -> Option<T> {
        let (root, dir) = (self.root.clone(), self.dir.clone());
        within(PATIENCE, self.root.path(&self.dir), move || act(&root, &dir)).await.ok()
    }

    /// What a restart would find at `now`; none when nothing can be read. What is passed over is said once.
    pub(super) async fn read(&self, now: SystemTime) -> Option<Loaded> {
        let id = self.id.clone();
        let loaded = self.with(move |root, dir| Store::open(root, dir)?.load(&id, now)).await?.ok()?;
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        for PassedOver { file, reason } in &loaded.passed_over {
            if said.insert(file.clone()) {
                info!(%file, cause = %reason, "a stored certificate is not used");
            }
        }
        Some(loaded)
    }

    /// Sees to it that the store has the certificate of `identity`; none when the disk does not answer in time. What was seen
    /// there is not read again before its files are others.
    pub(super) async fn ensure(&self, identity: &Identity) -> Option<Result<Met, DirError>> {
        let Identity { current, previous, anchors, .. } = identity.clone();
        let held = self.held.clone();
        self.with(move |root, dir| {
            let Some(current) = current else { return Store::open(root, dir).map(|_| Met::Nothing) };
            let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((kept, mut files)) = held.take()
                && Arc::ptr_eq(&kept, &current)
                && !files.have_changed()
            {
                *held = Some((kept, files));
                return Ok(Met::Held);
            }
            let store = Store::open(root, dir)?;
            let place = root.path(dir);
            let files = || Some(Versions::of([place.join(store.file_of(&current)?), place.clone()]));
            let anchors = anchors.unwrap_or_else(|| current.bundle.clone());
            // What they are before they are read.
            let mut seen = files();
            let met = if store.holds(&current, &anchors) {
                Met::Held
            } else {
                store.save(&current, previous.as_deref(), &anchors)?;
                seen = files();
                Met::Saved
            };
            *held = seen.map(|files| (current, files));
            Ok(met)
        })
        .await
    }

    /// Compares the store with the newest certificate, again and again, and writes `fact`, whose only writer it is.
    pub(super) async fn keep(
        &self,
        mut identity: watch::Receiver<Identity>,
        fact: watch::Sender<Durable>,
        clock: Clock,
        shutdown: &CancellationToken,
    ) {
        let mut backoff = Backoff::new(Duration::from_millis(500), self.every.min(PATIENCE * 4));
        loop {
            let wanted = identity.borrow_and_update().clone();
            let met = self.ensure(&wanted).await;
            let again = match &met {
                Some(Ok(_)) => {
                    backoff.reset();
                    next_beat(self.every)
                }
                _ => Instant::now() + backoff.next_wait(),
            };
            let news = self.durable(&wanted, met, &fact.borrow(), clock.now());
            status::tell(&fact, news);
            tokio::select! {
                () = sleep_until(again) => {}
                Ok(()) = identity.changed() => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// What is to be told of the store. It says in the journal what is news.
    fn durable(
        &self,
        identity: &Identity,
        met: Option<Result<Met, DirError>>,
        before: &Durable,
        now: SystemTime,
    ) -> Durable {
        let serial = identity.current.as_ref().map(|context| context.svid.serial().to_owned());
        let (kind, error) = match met {
            Some(Ok(met)) => {
                if before.trouble.is_some() {
                    info!(dir = %self.root.path(&self.dir).display(), "certificates are kept again");
                } else if met == Met::Saved && before.serial == serial {
                    warn!(dir = %self.root.path(&self.dir).display(), "the stored certificate was gone or another, and is saved anew");
                }
                return Durable { serial, trouble: None };
            }
            Some(Err(error)) => (error.kind(), error.to_string()),
            None => {
                let (dir, bound) = (self.root.path(&self.dir), humantime::format_duration(PATIENCE));
                ("disk_hangs", format!("{} does not answer within {bound}: see what its disk waits for", dir.display()))
            }
        };
        let cause = match serial {
            Some(_) => format!("the certificate is in use, but a restart would lose it: {error}"),
            None => format!("a certificate could not be kept: {error}"),
        };
        let trouble = Trouble::met(before.trouble.as_ref(), kind, cause, now);
        match trouble.times {
            1 => warn!(cause = trouble.cause, kind, "the store fails, tried again"),
            _ => debug!(cause = trouble.cause, kind, "the store still fails"),
        }
        let serial = before.serial.clone().filter(|_| before.serial == serial && kind == "disk_hangs");
        Durable { serial, trouble: Some(trouble) }
    }
}
