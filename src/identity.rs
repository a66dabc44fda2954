//! The loop that owns the identity: decide when, ask, verify, keep, tell. A certificate that is still good is replaced
//! only by a better one, and never withdrawn.

mod schedule;
mod spent;
mod store;

use spent::Spent;
pub use store::{Loaded, PassedOver, Store, StoreError, Stored};

use crate::{
    control::{ControlPlane, Cost, Retry, Signed},
    files::{DirError, FileWatch, Root, Stamp},
    spiffe::{Csr, KeyError, KeyKind, PrivateKey, SpiffeId, SvidError, X509Bundle, X509Context},
    status::{Identity, Token, Trouble},
    time::Clock,
    workload::token::TokenFile,
};
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    sync::watch,
    task::{JoinError, spawn_blocking},
    time::{Instant, sleep, sleep_until},
};
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
    /// The token, and whether it is removed when it has served.
    pub token: TokenFile,
}

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
enum RenewalError {
    #[error(transparent)]
    Control(#[from] crate::control::Error),
    #[error("the control plane's answer is not used: {cause}{fix}", cause = .0, fix = fix(.0))]
    Answer(#[from] SvidError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("key generation was interrupted: {0}")]
    Interrupted(#[from] JoinError),
}

/// What to do about an answer that is not used, where there is something to do.
fn fix(error: &SvidError) -> &'static str {
    match error {
        SvidError::WrongIdentity { .. } => {
            "; the token belongs to another serviceAccount or the trust domain is another: make the bundle again from the \
             WorkloadGroup"
        }
        _ => "",
    }
}

impl RenewalError {
    fn kind(&self) -> &'static str {
        match self {
            Self::Control(error) => error.kind(),
            Self::Answer(SvidError::WrongIdentity { .. }) => "wrong_identity",
            Self::Answer(SvidError::WrongKey) => "wrong_key",
            Self::Answer(SvidError::ShortChain(_)) => "short_chain",
            Self::Answer(SvidError::Validity { .. }) => "validity",
            Self::Answer(_) => "bad_answer",
            Self::Key(_) | Self::Interrupted(_) => "key",
        }
    }

    /// What it has cost the control plane. An answer that is not used has cost a signature.
    fn cost(&self) -> Cost {
        match self {
            Self::Control(error) => error.cost(),
            Self::Answer(_) | Self::Key(_) | Self::Interrupted(_) => Cost::Handshake,
        }
    }
}

/// What the store holds for `wanted`, as the fact to start with. What was passed over is said in the journal.
///
/// # Errors
/// When the store's directory is not usable.
pub fn load(wanted: &Wanted, now: SystemTime) -> Result<Identity, DirError> {
    let loaded = Store::open(&wanted.root, &wanted.store)?.load(&wanted.id, now)?;
    for PassedOver { file, reason } in &loaded.passed_over {
        tracing::info!(%file, cause = %reason, "a stored certificate is not used");
    }
    let token = loaded.current.as_ref().map(|_| spent::look(&wanted.token));
    let renew_at = loaded.current.as_ref().map(|stored| renewal(&stored.context, wanted.min_interval));
    Ok(Identity {
        renew_at,
        anchors: loaded.current.as_ref().map(|stored| stored.anchors.clone()),
        current: loaded.current.map(|stored| stored.context),
        previous: loaded.previous.map(|stored| stored.context),
        token: token.unwrap_or_default(),
        ..Identity::default()
    })
}

fn renewal(context: &X509Context, min_interval: Duration) -> SystemTime {
    schedule::renew_at(context.received, context.svid.not_after(), min_interval, fastrand::f64())
}

/// Keeps `fact` at a certificate that is good, until `shutdown`. A change of the `local` files (token, roots) ends a wait at
/// once.
pub async fn run<C: ControlPlane>(
    control: Arc<C>,
    wanted: Wanted,
    fact: watch::Sender<Identity>,
    mut local: FileWatch,
    clock: Clock,
    shutdown: CancellationToken,
) {
    let mut retry = Retry::new(FLOOR, CAP);
    let mut not_before: Option<Instant> = None;
    // What is there at the start comes from the store.
    let mut spent = Spent::new(fact.borrow().current.is_some());
    loop {
        let due = due(&fact.borrow(), clock.now());
        tokio::select! {
            () = async {
                clock.sleep_until(due).await;
                if let Some(moment) = not_before {
                    // Whatever the clock does, renewals keep their distance.
                    sleep_until(moment).await;
                }
            } => {}
            // A new token beside a good certificate is not needed, but it is there; one that has served may be removable now.
            () = async { tokio::select! { () = local.changed() => {}, () = spent.again() => {} } }, if wanted.token.remove => {
                spent = settle(&wanted, &fact, spent, clock.now()).await;
                continue;
            }
            () = shutdown.cancelled() => return,
        }
        let token = Stamp::of(wanted.token.current());
        let renewed = tokio::select! {
            renewed = renew(&*control, &wanted, clock) => renewed,
            () = shutdown.cancelled() => return,
        };
        let wait = match renewed {
            Ok(renewed) => {
                retry.reset();
                not_before = Some(Instant::now() + wanted.min_interval);
                spent = keep(&wanted, &fact, renewed, (spent, token), clock).await;
                continue;
            }
            Err(error) => {
                let now = clock.now();
                tell(&fact, &error, now);
                let usual = retry.after(error.cost());
                let left = fact.borrow().valid(now).and_then(|c| c.svid.not_after().duration_since(now).ok());
                schedule::retry_in(usual, left)
            }
        };
        tokio::select! {
            () = sleep(wait) => {}
            () = local.changed() => retry.reset(),
            () = shutdown.cancelled() => return,
        }
    }
}

/// When the next request is due: now, while there is nothing good.
fn due(identity: &Identity, now: SystemTime) -> SystemTime {
    match (identity.valid(now), identity.renew_at) {
        (Some(_), Some(at)) => at,
        _ => now,
    }
}

/// A new certificate, the older one that the control plane accepted for the request, if it was one, and the operator's roots
/// that vouched.
type Renewed = (Arc<X509Context>, Option<Arc<X509Context>>, X509Bundle);

/// One request with a fresh key; what comes back is verified before anybody sees it.
async fn renew<C: ControlPlane>(control: &C, wanted: &Wanted, clock: Clock) -> Result<Renewed, RenewalError> {
    let kind = wanted.key;
    let key = match kind {
        KeyKind::EcP256 | KeyKind::EcP384 => PrivateKey::generate(kind)?,
        // 100 ms of CPU and more: not on the event loop.
        KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => {
            spawn_blocking(move || PrivateKey::generate(kind)).await??
        }
    };
    let csr = Csr::new(&wanted.id, &key)?;
    let Signed { chain, accepted, vouched } = control.sign(&csr, wanted.ttl).await?;
    Ok((X509Context::from_answer(&wanted.id, key, &chain, clock.now())?, accepted, vouched))
}

/// Makes a new certificate durable, then tells it. A disk that fails does not keep it from being used. `token` is the
/// token's file as it was before the request; with what else has served it is removed if it can be.
async fn keep(
    wanted: &Wanted,
    fact: &watch::Sender<Identity>,
    (context, accepted, anchors): Renewed,
    (mut spent, token): (Spent, Option<Stamp>),
    clock: Clock,
) -> Spent {
    let now = clock.now();
    let token = token.filter(|_| accepted.is_none());
    // Kept as the fallback is the one that is known to work: while the control plane refuses what it issues (as istiod
    // does after a live change of its CA), that is an older one than the last.
    let previous = accepted.or_else(|| fact.borrow().valid(now).cloned());
    let saved = {
        let (wanted, context, previous) = (wanted.clone(), context.clone(), previous.clone());
        let anchors = anchors.clone();
        spawn_blocking(move || {
            let saved = Store::open(&wanted.root, &wanted.store)
                .and_then(|store| store.save(&context, previous.as_deref(), &anchors));
            spent.issued(token, saved.is_ok());
            (saved, spent.settle(&wanted, now), spent)
        })
        .await
    };
    let before = fact.borrow().token.clone();
    let (trouble, token, spent) = match saved {
        Ok((Ok(()), token, spent)) => (None, token, spent),
        Ok((Err(error), token, spent)) => {
            (Some(format!("the new certificate is in use, but a restart would lose it: {error}")), token, spent)
        }
        Err(error) => {
            let cause = format!("the new certificate is in use, but saving it was interrupted: {error}");
            (Some(cause), before.clone(), Spent::default())
        }
    };
    say(&before, &token);
    fact.send_replace(Identity {
        renew_at: Some(renewal(&context, wanted.min_interval)),
        current: Some(context),
        previous,
        anchors: Some(anchors),
        trouble: trouble.map(|cause| Trouble::met(None, "store", cause, now)),
        credentials_dead: false,
        token,
    });
    spent
}

/// Tries to remove what has served, and tells what there is of the token.
async fn settle(wanted: &Wanted, fact: &watch::Sender<Identity>, mut spent: Spent, now: SystemTime) -> Spent {
    let wanted = wanted.clone();
    // It may sync a directory.
    let Ok((token, spent)) = spawn_blocking(move || (spent.settle(&wanted, now), spent)).await else {
        return Spent::default();
    };
    say(&fact.borrow().token, &token);
    fact.send_if_modified(|identity| token != std::mem::replace(&mut identity.token, token.clone()));
    spent
}

/// A token that went or stays is said once.
fn say(before: &Token, now: &Token) {
    match now {
        _ if before == now => {}
        Token::Kept => {}
        Token::Removed => tracing::info!("the token has served and was removed"),
        Token::Stays { cause } => tracing::warn!(%cause, "the token has served, but stays"),
    }
}

/// Writes what went wrong. The time is that of the first failure of its kind in a row.
fn tell(fact: &watch::Sender<Identity>, error: &RenewalError, now: SystemTime) {
    fact.send_modify(|identity| {
        identity.trouble = Some(Trouble::met(identity.trouble.as_ref(), error.kind(), error.to_string(), now));
        identity.credentials_dead = error.kind() == "credentials_dead" && identity.valid(now).is_none();
    });
}

#[cfg(test)]
mod tests;
