//! Whether istiod accepts a certificate of ours. A handshake alone does not tell: in TLS 1.3 the client has finished before
//! the server has looked at its certificate. An answer tells, whatever it says; the question is one that every gRPC server
//! answers, and that costs it nothing.

use super::{Istiod, origin};
use crate::{
    control::{Error, credential::Rung, link::Link},
    proto::grpc::health::v1::{HealthCheckRequest, health_client::HealthClient},
    spiffe::X509Context,
};
use std::{sync::Arc, time::Duration};
use tokio::time::timeout;
use tonic::Code;

const CALL: &str = "health check";
const DEADLINE: Duration = Duration::from_secs(10);

/// Shows `certificate` where certificates are issued, and where the workload is registered, if that is elsewhere.
pub(super) async fn accepts(istiod: &Istiod, certificate: &Arc<X509Context>) -> Result<(), Error> {
    let (ca, discovery) = (&istiod.workload.ca, &istiod.workload.discovery);
    for endpoint in [Some(ca), Some(discovery).filter(|discovery| *discovery != ca)].into_iter().flatten() {
        let link = istiod.links.get(endpoint, &Rung::Pair(certificate.clone()), false).await?;
        answers(istiod, &link).await?;
    }
    Ok(())
}

async fn answers(istiod: &Istiod, link: &Arc<Link>) -> Result<(), Error> {
    let mut client = HealthClient::with_origin(link.channel(), origin(&link.endpoint.authority));
    match timeout(DEADLINE, client.check(HealthCheckRequest::default())).await {
        Ok(Ok(_)) => Ok(()),
        // istiod has no such service, and says so to those whom it has let in.
        Ok(Err(status)) if matches!(status.code(), Code::Unimplemented | Code::NotFound) => Ok(()),
        Ok(Err(status)) => Err(istiod.failure(CALL, link, status).await),
        Err(_) => Err(Error::Timeout { call: CALL, address: link.address(), within: DEADLINE }),
    }
}
