//! istiod: its certificate service and its discovery service, on one connection where address and credential allow.

mod ads;
mod ca;
mod membership;
mod refusal;
mod session;

use super::{
    ControlPlane, Credential, Error, Post, Signed,
    credential::Rung,
    link::{Link, text},
};
use crate::{
    host::Resolver,
    proto::envoy::config::core::v3::Node,
    spiffe::Csr,
    status::{Addresses, Located},
    time::Clock,
    workload::{Authority, Endpoint, Workload, Xds},
};
use std::{
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::sync::{Mutex, watch};
use tonic::{Request, Status, metadata::MetadataValue};

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
    resolver: Resolver,
    xds: Xds,
    /// None turns membership off.
    membership: Option<MembershipSettings>,
    /// Where the platform says that we are.
    located: watch::Receiver<Located>,
    clock: Clock,
    /// Connections that somebody still holds. The one lock that is held across an `.await`: during a dial, which is
    /// bounded, so that a request for a certificate and a session that begin together share one connection.
    links: Mutex<Vec<Weak<Link>>>,
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
        Self { workload, credential, resolver, xds, membership, located, clock, links: Mutex::default() }
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

    /// A connection to `endpoint` on `rung`: one that is open already, unless a `fresh` one is asked for.
    async fn link(&self, endpoint: &Endpoint, rung: &Rung, fresh: bool) -> Result<Arc<Link>, Error> {
        let mut links = self.links.lock().await;
        links.retain(|link| link.strong_count() > 0);
        let usable = |link: &Arc<Link>| link.is_open() && link.endpoint == *endpoint && link.rung.same(rung);
        if let Some(link) = links.iter().filter_map(Weak::upgrade).find(usable).filter(|_| !fresh) {
            return Ok(link);
        }
        let roots = self.credential.trusted(&endpoint.roots).await?;
        let link = Link::dial(endpoint, rung.clone(), &roots, &self.resolver).await?;
        tracing::debug!(peer = %link.peer, credential = %rung.describe(), "connected");
        links.push(Arc::downgrade(&link));
        Ok(link)
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
            let answer = match self.link(endpoint, &rung, fresh).await {
                Ok(link) => call(link).await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(value) => return Ok(Reached { value, refused }),
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
            (None, Rung::Token) => match self.credential.token_is_dead(self.clock.now()).await {
                Some(why) => Error::Dead(why),
                None => error,
            },
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
            let mut value = MetadataValue::try_from(bearer.as_str()).map_err(|_| self.unreadable_token())?;
            value.set_sensitive(true);
            headers.insert("authorization", value);
        }
        Ok(request)
    }

    fn unreadable_token(&self) -> Error {
        Error::Invalid(format!(
            "{}: not a token (it has characters that no header can carry)",
            self.credential.token.current().display()
        ))
    }

    /// An error of a call: istiod's own answer, or a connection that broke.
    async fn failure(&self, call: &'static str, link: &Link, status: Status) -> Error {
        let transport = std::error::Error::source(&status).map(text);
        match transport {
            None => refusal::classify(call, status.code(), status.message()),
            Some(said) => {
                let cause = link.end().await.unwrap_or(said);
                Error::Dropped { address: link.address(), credential: link.rung.describe(), cause }
            }
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

impl ControlPlane for Istiod {
    async fn sign(&self, csr: &Csr, ttl: Duration) -> Result<Signed, Error> {
        ca::sign(self, csr, ttl).await
    }

    async fn session(&self, post: &mut Post) -> Result<(), Error> {
        session::hold(self, post).await
    }
}
