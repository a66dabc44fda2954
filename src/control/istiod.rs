//! istiod: its certificate service and its discovery service, on one connection where address and credential allow.

mod accepts;
mod ads;
mod ca;
mod membership;
mod refusal;
mod session;

#[cfg(feature = "fuzz")]
pub(crate) use ads::fuzz;

use super::{
    ControlPlane, Cost, Credential, Error, Post, Signed,
    credential::{Refusal, Rung},
    error::text,
    link::Link,
    links::Links,
    trust::Trust,
};
use crate::{
    host::Resolver,
    proto::envoy::config::core::v3::Node,
    spiffe::{Csr, X509Context},
    status::{Addresses, Located},
    time::Clock,
    workload::{
        Authority, Endpoint, Workload, Xds,
        token::{self, Expected, TokenFacts},
    },
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Request, Status, metadata::MetadataValue};

/// How long an istiod that has pushed back is spared what can wait.
const PUSHED_BACK: Duration = Duration::from_secs(30);

/// How the mesh is asked whether it lists us.
#[derive(Debug, Clone)]
pub struct MembershipSettings {
    /// Bound on an answer, in bytes; beyond it membership stays unknown.
    pub max_bytes: usize,
    /// The ports at which this agent itself answers for the application: what they speak need not be found out.
    pub served: Vec<u16>,
}

/// istiod, for one workload.
#[derive(Debug)]
pub struct Istiod {
    workload: Arc<Workload>,
    credential: Credential,
    links: Links,
    xds: Xds,
    /// None turns membership off.
    membership: Option<MembershipSettings>,
    /// Where the platform says that we are.
    located: watch::Receiver<Located>,
    clock: Clock,
    /// What the last token that was accepted said of itself.
    accepted: Mutex<Option<TokenFacts>>,
    /// When a stream was pushed back last.
    pushed_back: Mutex<Option<Instant>>,
}

/// What a climb of the ladder has reached.
struct Reached<T> {
    value: T,
    /// Why better rungs were passed over; none when the first one held.
    refused: Option<Error>,
}

impl Istiod {
    /// The control plane of `workload`. Nothing is dialled yet.
    pub fn new(
        workload: Arc<Workload>,
        credential: Credential,
        resolver: Resolver,
        xds: Xds,
        membership: Option<MembershipSettings>,
        located: watch::Receiver<Located>,
        clock: Clock,
    ) -> Self {
        let trust = Trust::new(workload.ca.roots.clone(), credential.identity.clone(), credential.files.clone());
        let links = Links::new(resolver, trust);
        Self {
            workload,
            credential,
            links,
            xds,
            membership,
            located,
            clock,
            accepted: Mutex::default(),
            pushed_back: Mutex::default(),
        }
    }

    /// What a first request says of us. Not `registering`: an observer.
    fn node(&self, addresses: &Addresses, registering: bool) -> Node {
        let located = self.located.borrow();
        let platform = match &*located {
            Located::Known(locality) => Some(locality),
            Located::Soon | Located::Unknown => None,
        };
        (&self.workload.node(&addresses.all, platform, registering)).into()
    }

    /// Makes `call` on the best credential that is accepted: steps down when a connection breaks before the first
    /// answer or the answer is about the credential, and stops at any other error.
    async fn climb<T, F: Future<Output = Result<T, Error>>>(
        &self,
        endpoint: &Endpoint,
        rungs: Vec<Rung>,
        fresh: bool,
        call: impl Fn(Arc<Link>) -> F,
    ) -> Result<Reached<T>, Error> {
        let mut refused: Option<Error> = None;
        for rung in rungs {
            let answer = match self.links.get(endpoint, &rung, fresh).await {
                Ok(link) => {
                    let answer = call(link.clone()).await;
                    // A stream that istiod has no time for is asked for again on this connection.
                    if answer.as_ref().is_err_and(|e| e.cost() == Cost::Stream) {
                        *self.pushed_back.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                    }
                    let again = answer.as_ref().is_err_and(|e| e.cost() == Cost::Stream || e.is_conflict());
                    self.links.keep(link, again);
                    answer
                }
                Err(error) => Err(error),
            };
            match answer {
                Ok(value) => {
                    if let Rung::Token = rung
                        && let Some(facts) = self.credential.token_facts().await
                    {
                        *self.accepted() = Some(facts);
                    }
                    return Ok(Reached { value, refused });
                }
                Err(error) if error.is_about_credential() => {
                    tracing::debug!(cause = %error, credential = %rung.describe(), "credential not accepted");
                    refused = Some(self.weigh(refused, error, &rung).await);
                }
                Err(error) => return Err(error),
            }
        }
        Err(refused
            .unwrap_or_else(|| Error::Dead(format!("neither certificate nor token; {}", self.credential.new_token()))))
    }

    /// Which of two refusals is told: the first, as it is about the better credential, unless everything is dead.
    async fn weigh(&self, first: Option<Error>, error: Error, rung: &Rung) -> Error {
        match (first, rung) {
            (None, Rung::Token) => {
                let accepted = self.accepted().clone();
                let Workload { namespace, service_account, .. } = &*self.workload;
                let expected = Expected { namespace, service_account, accepted: accepted.as_ref() };
                match self.credential.diagnose(expected, self.clock.now()).await {
                    Refusal::Dead(why) => Error::Dead(why),
                    Refusal::Wrong(why) => error.because(why),
                }
            }
            (first, _) => first.unwrap_or(error),
        }
    }

    /// A request with the headers istiod looks at: the cluster, and on the token's rung the token, read anew.
    async fn request<M>(&self, message: M, link: &Link) -> Result<Request<M>, Error> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        let cluster = &self.workload.cluster_id;
        let value = MetadataValue::try_from(cluster)
            .map_err(|_| Error::Invalid(format!("cluster id {cluster:?} cannot be sent as a header")))?;
        headers.insert("clusterid", value);
        if let Rung::Token = link.rung
            && let Some(bearer) = self.credential.bearer().await
        {
            let mut value = MetadataValue::try_from(bearer.as_str()).map_err(|_| self.unreadable(&bearer))?;
            value.set_sensitive(true);
            headers.insert("authorization", value);
        }
        Ok(request)
    }

    fn accepted(&self) -> MutexGuard<'_, Option<TokenFacts>> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a stream was pushed back a moment ago: others wait, too.
    fn is_pushing_back(&self) -> bool {
        let pushed_back = *self.pushed_back.lock().unwrap_or_else(PoisonError::into_inner);
        pushed_back.is_some_and(|at| at.elapsed() < PUSHED_BACK)
    }

    fn unreadable(&self, bearer: &str) -> Error {
        let why = match token::facts(bearer.trim_start_matches("Bearer ")) {
            Err(error) => error.to_string(),
            Ok(_) => "not a token (it has characters that no header can carry)".to_owned(),
        };
        Error::Invalid(format!("{}: {why}", self.credential.token.current().display()))
    }

    /// An error of a call: istiod's own answer, or a connection that broke.
    async fn failure(&self, call: &'static str, link: &Link, status: Status) -> Error {
        match std::error::Error::source(&status).map(text) {
            None => refusal::classify(call, status.code(), status.message()),
            Some(said) => link.broke(said).await,
        }
    }
}

/// The URI that the generated stubs put before their paths; istiod does not look at it.
fn origin(authority: &Authority) -> http::Uri {
    http::Uri::builder()
        .scheme("https")
        .authority(authority.to_string())
        .path_and_query("/")
        .build()
        .unwrap_or_default()
}

/// Waits for the work in `slot`, if there is any, and puts it away.
async fn finished<W: Future + Unpin>(slot: &mut Option<W>) -> W::Output {
    let Some(work) = slot else { return std::future::pending().await };
    let done = work.await;
    *slot = None;
    done
}

impl ControlPlane for Istiod {
    async fn sign(&self, csr: &Csr, ttl: Duration) -> Result<Signed, Error> {
        ca::sign(self, csr, ttl).await
    }

    async fn accepts(&self, certificate: &Arc<X509Context>) -> Result<(), Error> {
        accepts::accepts(self, certificate).await
    }

    async fn session(&self, post: &mut Post) -> Result<(), Error> {
        session::hold(self, post).await
    }
}
