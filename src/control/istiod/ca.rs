//! `CreateCertificate`, in rounds.

use super::{Istiod, origin};
use crate::{
    control::{Disposition, Error, Signed, credential::Rung, link::Link},
    proto::istio::v1::auth::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    spiffe::Csr,
    time::between,
};
use prost_types::{Struct, Value, value::Kind};
use std::{sync::Arc, time::Duration};
use tokio::time::{sleep, timeout};

const CALL: &str = "CreateCertificate";
/// Bound on one call: the CA answers in milliseconds or is in trouble.
const DEADLINE: Duration = Duration::from_secs(10);
/// A chain with a few hundred roots; more is no answer of a CA.
const MAX_ANSWER: usize = 1 << 20;
/// Waits between the attempts of a round, each ±10 %: Istio's agent has the same.
const WAITS: [Duration; 4] =
    [Duration::from_millis(100), Duration::from_millis(200), Duration::from_millis(400), Duration::from_millis(800)];

/// One round: up to five attempts with the same request, only after errors that a moment may mend.
pub(super) async fn sign(istiod: &Istiod, csr: &Csr, ttl: Duration) -> Result<Signed, Error> {
    let endpoint = &istiod.workload.ca;
    let mut waits = WAITS.iter();
    loop {
        let rungs = istiod.credential.rungs(istiod.clock.now());
        let error = match istiod.climb(endpoint, rungs, false, |link| create(istiod, link, csr, ttl)).await {
            Ok(reached) => return Ok(reached.value),
            Err(error) => error,
        };
        match waits.next().filter(|_| is_passing(&error)) {
            Some(wait) => {
                tracing::debug!(cause = %error, "certificate request failed, trying again in this round");
                sleep(between(wait.mul_f64(0.9), wait.mul_f64(1.1))).await;
            }
            None => return Err(error),
        }
    }
}

/// Aborted, Internal, Unavailable: what Istio's agent retries in effect. Who asks for patience has it, and who is not
/// there is looked for at leisure.
fn is_passing(error: &Error) -> bool {
    matches!(error, Error::Refused { code: 10 | 13 | 14, disposition: Disposition::Retry, .. })
}

async fn create(istiod: &Istiod, link: Arc<Link>, csr: &Csr, ttl: Duration) -> Result<Signed, Error> {
    // Istio's agent always sends the key; an empty signer is the built-in one.
    let signer = Value { kind: Some(Kind::StringValue(String::new())) };
    let message = IstioCertificateRequest {
        csr: csr.pem().to_owned(),
        validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
        metadata: Some(Struct { fields: [("CertSigner".to_owned(), signer)].into() }),
    };
    let request = istiod.request(message, &link).await?;
    let mut client = IstioCertificateServiceClient::with_origin(link.channel(), origin(&link.endpoint.authority))
        .max_decoding_message_size(MAX_ANSWER);
    match timeout(DEADLINE, client.create_certificate(request)).await {
        Ok(Ok(answer)) => {
            let accepted = match &link.rung {
                Rung::Pair(context) => Some(context.clone()),
                Rung::Token => None,
            };
            Ok(Signed { chain: answer.into_inner().cert_chain, accepted, vouched: link.roots.file.clone() })
        }
        Ok(Err(status)) => Err(istiod.failure(CALL, &link, status).await),
        Err(_) => Err(Error::Timeout { call: CALL, address: link.address(), within: DEADLINE }),
    }
}
