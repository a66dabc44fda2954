//! Opening a stream: from the ladder's best rung to the answer that acknowledges the registration.

use super::OVERLAP;
use crate::{
    control::{
        Error,
        credential::Rung,
        istiod::{
            Istiod, Reached,
            ads::{self, Answer, Stream},
        },
        link::Link,
    },
    status::{Addresses, Health},
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

/// How long an answer to the first request is awaited; a refusal for want of an API server takes istiod 44 s.
const ANSWER: Duration = Duration::from_secs(60);
/// A session's answers hold the endpoints of the services that select us.
const MAX_ANSWER: usize = 16 << 20;
/// A stream that istiod has answered.
pub(super) struct Live {
    pub(super) stream: Stream,
    /// The answer: endpoints of the services that select us, where they are known already.
    pub(super) answer: Answer,
    /// The addresses it was registered with.
    pub(super) addresses: Addresses,
    /// The certificate or token that it was opened with was not the best one: why.
    pub(super) refused: Option<Error>,
    /// How long istiod took to answer.
    pub(super) took: Duration,
}

/// `namespace/name` of the entry at these addresses.
pub(super) fn entry(istiod: &Istiod, addresses: &Addresses) -> Result<String, Error> {
    let primary = addresses.primary.ok_or_else(|| Error::Invalid("this host has no usable address yet".to_owned()))?;
    match istiod.workload.entry(primary) {
        Ok(Some(entry)) => Ok(entry),
        Ok(None) => {
            Err(Error::Invalid("the bundle names no WorkloadGroup (ISTIO_META_AUTO_REGISTER_GROUP)".to_owned()))
        }
        Err(error) => Err(Error::Invalid(error.to_string())),
    }
}

/// Opens a stream and waits for the answer that acknowledges the registration. Verdicts are reported meanwhile.
pub(super) async fn open(
    istiod: &Istiod,
    addresses: Addresses,
    rungs: Vec<Rung>,
    fresh: bool,
    names: BTreeSet<String>,
    health: watch::Receiver<Health>,
) -> Result<Live, Error> {
    let begin = Instant::now();
    let (ours, watched, verdict) = (&addresses, &names, &health);
    let attempt = |link: Arc<Link>| async move {
        let node = istiod.node(ours, true);
        let mut stream = Stream::new(istiod, link.clone(), node, MAX_ANSWER).await?;
        stream.watch_endpoints(watched.clone());
        let mut health = verdict.clone();
        stream.report(&health.borrow_and_update());
        let answered = async {
            loop {
                tokio::select! {
                    answer = stream.next(istiod) => return answer,
                    Ok(()) = health.changed() => stream.report(&health.borrow_and_update()),
                }
            }
        };
        let late = || Error::Timeout { call: ads::CALL, address: link.address(), within: ANSWER };
        let answer = timeout(ANSWER, answered).await.map_err(|_| late())??;
        Ok((stream, answer))
    };
    let endpoint = &istiod.workload.discovery;
    let mut reached = istiod.climb(endpoint, rungs.clone(), fresh, attempt).await;
    if matches!(&reached, Err(error) if error.is_conflict()) {
        // Two of istiod's own writes have met; a moment later they do not.
        sleep(OVERLAP).await;
        reached = istiod.climb(endpoint, rungs, fresh, attempt).await;
    }
    let Reached { value: (stream, answer), refused } = reached?;
    Ok(Live { stream, answer, refused, took: begin.elapsed(), addresses })
}
