//! The loops that own the identity: decide when, ask, verify, keep, tell. A certificate that is still good is replaced
//! only by a better one, and never withdrawn.
//!
//! Three facts have a loop each: the certificate (here), whether the store has it (`disk`), and what has become of the
//! token (`token`). Each acts on what is true now, so what failed once is mended as soon as it can be.

mod disk;
mod error;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod schedule;
mod store;
mod token;

use disk::Disk;
pub use store::{Loaded, PassedOver, Store, StoreError, Stored};

use crate::{
    aside::aside,
    control::{ControlPlane, Retry, Signed},
    files::{Root, Stamp, Versions},
    spiffe::{Csr, KeyKind, PrivateKey, SpiffeId, X509Bundle, X509Context},
    status::{Durable, Identity, Token, Trouble},
    time::Clock,
    workload::token::TokenFile,
};
use error::RenewalError;
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Waits between rounds of requests.
const FLOOR: Duration = Duration::from_millis(500);
const CAP: Duration = Duration::from_secs(60);

/// What is asked for, and where it is kept.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Who we are.
    pub id: SpiffeId,
    /// The kind of key.
    pub key: KeyKind,
    /// The lifetime to ask for; the control plane may give less.
    pub ttl: Duration,
    /// The least time between two renewals.
    pub min_interval: Duration,
    /// Below which the store is.
    pub root: Root,
    /// Directory of the store.
    pub store: PathBuf,
    /// From one look at the store to the next, in beats.
    pub looks: Duration,
    /// The token, and whether it is removed when it has served.
    pub token: TokenFile,
}

/// The facts that are told, each by one loop.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The certificate.
    pub identity: watch::Sender<Identity>,
    /// Whether the store has it.
    pub durable: watch::Sender<Durable>,
    /// What has become of the token.
    pub token: watch::Sender<Token>,
}

/// A new certificate.
struct Issued {
    context: Arc<X509Context>,
    /// The older one that the control plane accepted for the request; none when it was the token.
    accepted: Option<Arc<X509Context>>,
    /// The operator's roots that vouched for the control plane.
    anchors: X509Bundle,
}

/// What the store holds for `wanted`, as the fact to start with. What was passed over is said in the journal; that the store
/// cannot be read is told by the loop that looks after it.
pub fn load(wanted: &Wanted, now: SystemTime) -> Identity {
    let loaded = Store::open(&wanted.root, &wanted.store).and_then(|store| store.load(&wanted.id, now));
    let loaded = loaded.unwrap_or_default();
    for PassedOver { file, reason } in &loaded.passed_over {
        tracing::info!(%file, cause = %reason, "a stored certificate is not used");
    }
    restored(loaded).unwrap_or_default()
}

fn restored(loaded: Loaded) -> Option<Identity> {
    let current = loaded.current?;
    Some(Identity {
        renew_at: Some(renewal(&current.context)),
        anchors: Some(current.anchors),
        current: Some(current.context),
        previous: loaded.previous.map(|stored| stored.context),
        ..Identity::default()
    })
}

fn renewal(context: &X509Context) -> SystemTime {
    schedule::renew_at(context.received, context.svid.not_after(), fastrand::f64())
}

/// Keeps the facts true until `shutdown`. A change of the `local` files (token, roots) ends a wait at once.
pub async fn run<C: ControlPlane>(
    control: Arc<C>,
    wanted: Wanted,
    facts: Facts,
    local: watch::Receiver<Versions>,
    clock: Clock,
    shutdown: CancellationToken,
) {
    let disk = Disk::new(&wanted);
    let (exchanged, served) = watch::channel(None);
    let kept = disk.keep(facts.identity.subscribe(), facts.durable.clone(), clock, &shutdown);
    let removal = token::run(&*control, &wanted, &facts, served, local.clone(), clock);
    let fact = facts.identity.clone();
    let renewals = Renewals { control: &*control, wanted: &wanted, disk: &disk, fact, exchanged, clock };
    tokio::join!(renewals.run(local, &shutdown), kept, shutdown.run_until_cancelled(removal));
}

/// The loop of the certificate itself.
struct Renewals<'a, C> {
    control: &'a C,
    wanted: &'a Wanted,
    disk: &'a Disk,
    fact: watch::Sender<Identity>,
    /// Tells which token was exchanged for a certificate.
    exchanged: watch::Sender<Option<Stamp>>,
    clock: Clock,
}

impl<C: ControlPlane> Renewals<'_, C> {
    async fn run(&self, mut local: watch::Receiver<Versions>, shutdown: &CancellationToken) {
        let mut retry = Retry::new(FLOOR, CAP);
        loop {
            self.forget_trouble();
            tokio::select! {
                () = self.clock.until(|now| due(&self.fact.borrow(), now)) => {}
                () = shutdown.cancelled() => return,
            }
            // It may have been passed over because of the clock, or the disk was not there.
            if self.valid().is_none() && self.restore().await {
                continue;
            }
            let token = Stamp::of(self.wanted.token.current());
            let issued = tokio::select! {
                issued = self.renew() => issued,
                () = shutdown.cancelled() => return,
            };
            let wait = match issued {
                Ok(issued) => {
                    retry.reset();
                    let life = schedule::life(issued.context.received, issued.context.svid.not_after());
                    self.accept(issued, token).await;
                    schedule::distance(self.wanted.min_interval, life)
                }
                Err(error) => {
                    let now = self.clock.now();
                    self.tell(&error, now);
                    let usual = retry.after(error.cost());
                    let left = self.valid().and_then(|context| context.svid.not_after().duration_since(now).ok());
                    let wait = schedule::retry_in(usual, left);
                    // Certificates were issued, only not for long enough: those keep their distance.
                    if error.is_about_life() { wait.max(self.wanted.min_interval.min(CAP)) } else { wait }
                }
            };
            tokio::select! {
                () = self.clock.sleep(wait) => {}
                Ok(()) = local.changed(), if self.fact.borrow().trouble.is_some() => retry.reset(),
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Takes what the store has, if it is valid by now. Whether it is.
    async fn restore(&self) -> bool {
        let restored = self.disk.read(self.clock.now()).await.and_then(restored);
        let found = restored.is_some();
        restored.into_iter().for_each(|identity| _ = self.fact.send_replace(identity));
        found
    }

    fn valid(&self) -> Option<Arc<X509Context>> {
        self.fact.borrow().valid(self.clock.now()).cloned()
    }

    /// One request with a fresh key; what comes back is verified before anybody sees it.
    async fn renew(&self) -> Result<Issued, RenewalError> {
        let kind = self.wanted.key;
        let key = match kind {
            KeyKind::EcP256 | KeyKind::EcP384 => PrivateKey::generate(kind)?,
            // 100 ms of CPU and more: not on the event loop.
            KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => {
                aside(format!("key of {}", self.wanted.id), move || PrivateKey::generate(kind)).await?
            }
        };
        let csr = Csr::new(&self.wanted.id, &key)?;
        let Signed { chain, accepted, vouched: anchors } = self.control.sign(&csr, self.wanted.ttl).await?;
        let context = X509Context::from_answer(&self.wanted.id, key, &chain, self.clock.now())?;
        match schedule::life(context.received, context.svid.not_after()) {
            life if life < schedule::SHORTEST => Err(RenewalError::ShortLived(life)),
            _ => Ok(Issued { context, accepted, anchors }),
        }
    }

    /// Makes a new certificate durable, then tells it. A disk that fails or hangs does not keep it from being used: what
    /// the disk has is looked at, and mended, by the store's loop. `token` is the token's file as it was before the request.
    async fn accept(&self, Issued { context, accepted, anchors }: Issued, token: Option<Stamp>) {
        let by_token = accepted.is_none();
        let identity = Identity {
            renew_at: Some(renewal(&context)),
            current: Some(context),
            // Kept as the fallback is the one that is known to work: while the control plane refuses what it issues (as
            // istiod does after a live change of its CA), that is an older one than the last.
            previous: accepted.or_else(|| self.valid()),
            anchors: Some(anchors),
            ..Identity::default()
        };
        _ = self.disk.ensure(&identity).await;
        self.fact.send_replace(identity);
        if by_token {
            self.exchanged.send_replace(token);
        }
    }

    /// A certificate that is valid and not yet due lacks nothing, whatever was said while the clock was wrong.
    fn forget_trouble(&self) {
        let now = self.clock.now();
        self.fact.send_if_modified(|identity| {
            let over = identity.trouble.is_some() && due(identity, now) > now;
            if over {
                identity.trouble = None;
                identity.credentials_dead = false;
            }
            over
        });
    }

    /// Writes what went wrong. The time is that of the first failure of its kind in a row.
    fn tell(&self, error: &RenewalError, now: SystemTime) {
        self.fact.send_modify(|identity| {
            identity.trouble = Some(Trouble::met(identity.trouble.as_ref(), error.kind(), error.to_string(), now));
            identity.credentials_dead = error.kind() == "credentials_dead" && identity.valid(now).is_none();
        });
    }
}

/// When the next request is due: now, while there is nothing good.
fn due(identity: &Identity, now: SystemTime) -> SystemTime {
    match (identity.valid(now), identity.renew_at) {
        (Some(_), Some(at)) => at,
        _ => now,
    }
}

#[cfg(test)]
mod tests;
