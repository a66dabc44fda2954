//! Who may come in: the rate of new streams, and who a caller is.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::{Istiod, ads::Id, subscription::Rpc};
use crate::{
    event::{Credential, What},
    fault::Fault,
    grpc::{Reader, Status, Writer, code},
    mesh::Identity,
};

/// By what a call may be authenticated.
#[derive(Clone)]
pub(super) struct Caller {
    pub(super) connection: u64,
    /// The identity of the client certificate.
    pub(super) certificate: Option<Identity>,
    pub(super) headers: HeaderMap,
}

impl Istiod {
    /// Rate limit, then authentication; refusals come before the first message is looked at.
    pub(super) async fn admit(
        self: Arc<Self>,
        rpc: Rpc,
        id: Id,
        caller: Caller,
        reader: Reader,
        writer: Writer,
        down: CancellationToken,
    ) {
        let admitted = async {
            if let Some(wait) =
                self.faults.find(|f| if let Fault::SlowAdmission(wait) = f { Some(*wait) } else { None })
            {
                tokio::time::sleep(wait).await;
            }
            if let Some(code) =
                self.faults.find(|f| if let Fault::RefuseStreams(code) = f { Some(*code) } else { None })
            {
                return Err(Status::new(code, "refused on request"));
            }
            let turn = self.turn().ok_or_else(|| {
                Status::new(
                    code::RESOURCE_EXHAUSTED,
                    "request rate limit exceeded: rate: Wait(n=1) would exceed context deadline",
                )
            })?;
            sleep_until(turn).await;
            self.authenticate(&caller)
                .await
                .0
                .ok_or_else(|| Status::new(code::UNAUTHENTICATED, "authentication failure"))
        };
        match admitted.await {
            Ok(identity) => self.serve_stream(rpc, id, identity, reader, writer, down).await,
            Err(status) => {
                self.log.push(What::StreamRefused {
                    connection: id.connection,
                    stream: id.stream,
                    code: status.code,
                    message: status.message.clone(),
                });
                writer.finish(&status);
            }
        }
    }

    /// When the next stream may go on; `None` if that is more than a second away.
    fn turn(&self) -> Option<Instant> {
        let rate = self
            .faults
            .find(|f| if let Fault::Admission(rate) = f { Some(*rate) } else { None })
            .unwrap_or(self.settings.admission);
        let now = Instant::now();
        let mut next = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = next.map_or(now, |n| n.max(now));
        if turn - now > Duration::from_secs(1) {
            return None;
        }
        *next = Some(turn + Duration::from_secs_f64(1.0 / rate));
        Some(turn)
    }

    /// Who calls: the client certificate's identity if there was one, else the token's.
    pub(super) async fn authenticate(&self, caller: &Caller) -> (Option<Identity>, Credential) {
        if let Some(identity) = &caller.certificate {
            return (Some(identity.clone()), Credential::Certificate);
        }
        let Some(token) = caller.headers.get("authorization").and_then(|h| h.to_str().ok()?.strip_prefix("Bearer "))
        else {
            return (None, Credential::None);
        };
        if let Some(wait) = self.api_is_down() {
            tokio::time::sleep(wait).await;
            return (None, Credential::None);
        }
        let mut clusters = caller.headers.get_all("clusterid").iter();
        let foreign = match (clusters.next(), clusters.next()) {
            (Some(one), None) => !one.is_empty() && one.as_bytes() != self.mesh.cluster.as_bytes(),
            _ => false,
        };
        let reviewed = self
            .mesh
            .review(token.trim_end(), SystemTime::now())
            .filter(|_| !foreign && !self.faults.has(Fault::RefuseToken));
        let credential = if reviewed.is_some() { Credential::Token } else { Credential::None };
        (reviewed, credential)
    }
}
