//! The CA service: one signing request, one answer.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::KeyPair;

use super::{Istiod, admission::Caller};
use crate::{
    ca::{Issued, Leaf},
    csr::Csr,
    event::{Credential, Outcome, What},
    fault::{Fault, Shape},
    grpc::{End, Reader, Status, Writer, code},
    mesh::Identity,
    proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse},
};

/// istiod's `DEFAULT_WORKLOAD_CERT_TTL`.
const DEFAULT_LIFE: Duration = Duration::from_secs(24 * 3600);

impl Istiod {
    /// Answers `CreateCertificate`.
    pub(super) async fn create_certificate(self: Arc<Self>, caller: Caller, mut reader: Reader, mut writer: Writer) {
        let request: IstioCertificateRequest = match reader.next().await {
            Ok(request) => request,
            Err(End::Refused(status)) => return writer.finish(&status),
            Err(End::Half | End::Lost) => return,
        };
        let (identity, credential) = self.authenticate(&caller).await;
        let log = |outcome| {
            let identity = identity.as_ref().map(|i| i.uri.clone());
            self.log.push(What::Csr { connection: caller.connection, identity, credential, outcome });
        };
        if self.faults.has(Fault::CaHangs) {
            log(Outcome::Hung);
            return writer.given_up().await;
        }
        match self.sign(&request, identity.as_ref(), credential) {
            Ok((issued, mut issuers)) => {
                let mut cert_chain = vec![issued.pem];
                cert_chain.append(&mut issuers);
                log(Outcome::Issued { serial: issued.serial, not_after: issued.not_after });
                writer.send(&IstioCertificateResponse { cert_chain });
                writer.finish(&Status::new(code::OK, ""));
            }
            Err(status) => {
                log(Outcome::Refused { code: status.code, message: status.message.clone() });
                writer.finish(&status);
            }
        }
    }

    /// The leaf, and the elements that follow it.
    fn sign(
        &self,
        request: &IstioCertificateRequest,
        identity: Option<&Identity>,
        credential: Credential,
    ) -> Result<(Issued, Vec<String>), Status> {
        if self.faults.has(Fault::CaDown) {
            return Err(Status::new(code::UNAVAILABLE, "the CA is down"));
        }
        if let Some(code) = self.faults.find(|f| if let Fault::CaRefuses(code) = f { Some(*code) } else { None }) {
            return Err(Status::new(code, "refused on request"));
        }
        let identity = identity.filter(|_| credential != Credential::None);
        let identity = identity.ok_or_else(|| Status::new(code::UNAUTHENTICATED, "request authenticate failure"))?;
        let impersonated =
            request.metadata.as_ref().and_then(|m| m.fields.get("ImpersonatedIdentity")).and_then(|v| v.kind.as_ref());
        if let Some(prost_types::value::Kind::StringValue(who)) = impersonated
            && !who.is_empty()
        {
            return Err(Status::new(code::UNAUTHENTICATED, "request impersonation authentication failure"));
        }
        let refuse = |cause: String| Status::new(code::INVALID_ARGUMENT, format!("CSR signing error ({cause})"));
        let csr = Csr::parse(&request.csr).map_err(|cause| refuse(cause.to_owned()))?;
        let mut life = self.life(request.validity_duration).map_err(refuse)?;
        if let Some(short) = self.faults.find(|f| if let Fault::ShortLife(life) = f { Some(*life) } else { None }) {
            life = short;
        }
        let stranger = Identity::new(&self.mesh.trust_domain, "somebody", "else");
        let identity = if self.faults.has(Fault::WrongIdentity) { &stranger } else { identity };
        let leaf = Leaf { identity: &identity.uri, named: csr.named, life };
        let internal = |e: crate::Error| Status::new(code::INTERNAL, format!("CSR signing error ({e})"));
        let now = SystemTime::now();
        let issued = if self.faults.has(Fault::WrongKey) {
            let other = KeyPair::generate().map_err(|e| internal(e.into()))?;
            self.mesh.ca.sign(&other, &leaf, now).map_err(internal)?
        } else {
            self.mesh.ca.sign(&csr, &leaf, now).map_err(internal)?
        };
        Ok((issued, self.issuers()))
    }

    /// What follows the leaf.
    fn issuers(&self) -> Vec<String> {
        if self.faults.has(Fault::ShortChain) {
            return Vec::new();
        }
        let mut issuers = self.mesh.ca.issuers();
        match self.faults.find(|f| if let Fault::Chain(shape) = f { Some(*shape) } else { None }) {
            None => {}
            Some(Shape::Concatenated) => {
                let roots = issuers.split_off(issuers.len().saturating_sub(1));
                issuers = [issuers.concat()].into_iter().filter(|i| !i.is_empty()).chain(roots).collect();
            }
            Some(Shape::SplitRoots) => {
                issuers.pop();
                issuers.append(&mut self.mesh.ca.root_pems());
            }
            Some(Shape::RootTwice) => issuers.push(self.mesh.ca.root_pem()),
        }
        issuers
    }

    /// Seconds become 64-bit nanoseconds unchecked, as in istiod; what is not positive then is the default;
    /// what is above the cap is refused, not shortened. The lab's own `ttl` shortens without a word.
    fn life(&self, seconds: i64) -> Result<Duration, String> {
        let nanos = seconds.wrapping_mul(1_000_000_000);
        let asked = u64::try_from(nanos).ok().filter(|n| *n > 0).map_or(DEFAULT_LIFE, Duration::from_nanos);
        let cap = self.settings.ttl_cap;
        if asked > cap {
            return Err(format!(
                "requested TTL {} is greater than the max allowed TTL {}",
                go_duration(asked),
                go_duration(cap)
            ));
        }
        Ok(self.settings.ttl.map_or(asked, |ttl| asked.min(ttl)))
    }
}

/// Whole seconds as Go prints a duration: `2160h0m1s`, `1m0s`, `5s`.
fn go_duration(d: Duration) -> String {
    let (h, m, s) = (d.as_secs() / 3600, d.as_secs() / 60 % 60, d.as_secs() % 60);
    match (h, m) {
        (0, 0) => format!("{s}s"),
        (0, m) => format!("{m}m{s}s"),
        (h, m) => format!("{h}h{m}m{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_printed_as_go_does() {
        for (seconds, text) in [(7_776_001, "2160h0m1s"), (60, "1m0s"), (5, "5s"), (9_223_372_036, "2562047h47m16s")] {
            assert_eq!(go_duration(Duration::from_secs(seconds)), text);
        }
    }
}
