//! What istiod's refusals mean. A pure table: code and text in, cause and fix out.
//!
//! The texts are those of istiod 1.20 to 1.32; where a text is unknown the code decides.

use crate::control::{Disposition, Error};
use tonic::Code;

/// A row: what the text holds, and what it means.
struct Row {
    code: Code,
    holds: &'static str,
    disposition: Disposition,
    kind: &'static str,
    meaning: &'static str,
    fix: &'static str,
}

const fn row(
    code: Code,
    holds: &'static str,
    disposition: Disposition,
    kind: &'static str,
    meaning: &'static str,
    fix: &'static str,
) -> Row {
    Row { code, holds, disposition, kind, meaning, fix }
}

use Disposition::{Park, Reauthenticate, Retry};

const WAIT: &str = "nothing to do here, it is tried again";
const SAME_ACCOUNT: &str =
    "make the bundle from this group again, and the token for the group's own serviceAccount and namespace";
const BUG: &str = "this should not happen; please report it with the agent's version and istiod's";

/// First match wins; the empty text matches all of a code.
const TABLE: &[Row] = &[
    row(
        Code::Unauthenticated,
        "",
        Reauthenticate,
        "unauthenticated",
        "the credential was not accepted",
        "put a new istio-token in place",
    ),
    row(Code::PermissionDenied, "authorization failed", Park, "identity_mismatch", "not our identity", SAME_ACCOUNT),
    row(Code::PermissionDenied, "", Park, "denied", "denied", "ask the mesh's administrator"),
    row(
        Code::FailedPrecondition,
        "cannot find WorkloadGroup",
        Park,
        "no_group",
        "the WorkloadGroup does not exist",
        "create it (kubectl apply), or correct ISTIO_META_AUTO_REGISTER_GROUP; it is noticed within half a minute",
    ),
    row(Code::FailedPrecondition, "", Park, "precondition", "", "see the text, and istiod's log"),
    row(Code::Unknown, "the object has been modified", Retry, "conflict", "two writes of istiod met", WAIT),
    row(
        Code::Unknown,
        "requires a verified identity",
        Reauthenticate,
        "unauthenticated",
        "istiod saw no identity",
        "use its TLS port 15012 and a valid token",
    ),
    row(Code::Unknown, "namespace mismatch", Park, "identity_mismatch", "not our identity", SAME_ACCOUNT),
    row(Code::Unknown, "service account mismatch", Park, "identity_mismatch", "not our identity", SAME_ACCOUNT),
    row(
        Code::Unknown,
        "must correspond to an existing WorkloadEntry",
        Park,
        "no_entry",
        "the WorkloadEntry does not exist",
        "create it, or register automatically with ISTIO_META_AUTO_REGISTER_GROUP",
    ),
    row(
        Code::Unknown,
        "is invalid:",
        Park,
        "invalid_entry",
        "Kubernetes refuses the WorkloadEntry",
        "correct the label, network or address that the text names",
    ),
    row(Code::Unknown, "error creating WorkloadEntry", Retry, "api_server", "istiod could not write the entry", WAIT),
    row(Code::Unknown, "failed updating WorkloadEntry", Retry, "api_server", "istiod could not write the entry", WAIT),
    row(Code::Unknown, "not ready", Retry, "not_ready", "istiod is starting", WAIT),
    row(
        Code::ResourceExhausted,
        "larger than max",
        Park,
        "too_large",
        "the request is too large",
        "shorten ISTIO_METAJSON_* and labels of the bundle",
    ),
    row(
        Code::ResourceExhausted,
        "",
        Retry,
        "admission",
        "istiod admits no more streams at present",
        "if it lasts, give istiod more replicas or raise PILOT_MAX_REQUESTS_PER_SECOND",
    ),
    row(
        Code::InvalidArgument,
        "greater than the max allowed TTL",
        Park,
        "ttl",
        "the lifetime asked for is too long",
        "lower SECRET_TTL, or identity.ttl in we-agent.yaml",
    ),
    row(
        Code::InvalidArgument,
        "unable to validate SAN",
        Park,
        "identity_mismatch",
        "the signer refuses our SPIFFE id",
        "set TRUST_DOMAIN (or trustDomain in we-agent.yaml) to the mesh's trust domain",
    ),
    row(Code::InvalidArgument, "", Park, "bad_request", "istiod does not understand the request", BUG),
    row(
        Code::Unimplemented,
        "",
        Park,
        "no_service",
        "this address does not offer it",
        "point CA_ADDR and discoveryAddress to istiod's TLS port, 15012",
    ),
    row(Code::Internal, "error unmarshalling", Park, "bad_request", "istiod does not understand the request", BUG),
    row(
        Code::Internal,
        "signing certificate has expired",
        Retry,
        "ca_expired",
        "the mesh's CA certificate has expired",
        "renew the CA of the mesh",
    ),
    row(Code::Internal, "", Retry, "ca_internal", "the CA is in trouble", "see istiod's log"),
    row(Code::Unavailable, "not ready", Retry, "not_ready", "istiod is starting", WAIT),
    row(Code::Unavailable, "", Retry, "unavailable", "istiod is not available", WAIT),
];

/// The error of a refused call.
pub(super) fn classify(call: &'static str, code: Code, message: &str) -> Error {
    let found = TABLE.iter().find(|row| row.code == code && message.contains(row.holds));
    let row = found.unwrap_or(&const { row(Code::Unknown, "", Retry, "unknown", "", "see istiod's log") });
    Error::Refused {
        call,
        code: code as i32,
        message: shorten(message),
        meaning: row.meaning,
        fix: row.fix,
        disposition: row.disposition,
        kind: row.kind,
    }
}

/// istiod echoes whole node metadata in some texts; a journal line needs the beginning.
fn shorten(message: &str) -> String {
    const ENOUGH: usize = 400;
    match message.char_indices().nth(ENOUGH) {
        Some((cut, _)) => format!("{}…", &message[..cut]),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_recorded_refusal_has_its_meaning() {
        for (code, text, kind, disposition) in [
            (Code::Unauthenticated, "authentication failure", "unauthenticated", Reauthenticate),
            (Code::Unauthenticated, "request authenticate failure", "unauthenticated", Reauthenticate),
            (
                Code::PermissionDenied,
                "authorization failed: no identities ([spiffe://cluster.local/ns/gold/sa/sa2]) matched gold/sa1",
                "identity_mismatch",
                Park,
            ),
            (
                Code::FailedPrecondition,
                "auto-registration WorkloadEntry of vm1.gold failed: cannot find WorkloadGroup gold/nope",
                "no_group",
                Park,
            ),
            (
                Code::Unknown,
                "auto-registration WorkloadEntry of x failed: failed updating WorkloadEntry gold/g-10.0.0.1 err: Operation cannot be \
                 fulfilled on workloadentries: the object has been modified; please apply your changes to the latest version and try again",
                "conflict",
                Retry,
            ),
            (
                Code::Unknown,
                "auto-registration WorkloadEntry of x failed: registration of WorkloadEntry service account mismatch: \"sa1\" vs \"sa2\"",
                "identity_mismatch",
                Park,
            ),
            (
                Code::Unknown,
                "auto-registration WorkloadEntry of x failed: error creating WorkloadEntry: WorkloadEntry.networking.istio.io \
                 \"g-10.0.0.1-Net\" is invalid: metadata.name: Invalid value",
                "invalid_entry",
                Park,
            ),
            (Code::Unknown, "server is not ready to serve discovery information", "not_ready", Retry),
            (
                Code::ResourceExhausted,
                "request rate limit exceeded: rate: Wait(n=1) would exceed context deadline",
                "admission",
                Retry,
            ),
            (
                Code::ResourceExhausted,
                "grpc: received message larger than max (5000000 vs. 4194304)",
                "too_large",
                Park,
            ),
            (
                Code::InvalidArgument,
                "CSR signing error (requested TTL 2160h0m1s is greater than the max allowed TTL 2160h0m0s)",
                "ttl",
                Park,
            ),
            (Code::Unimplemented, "unknown service istio.v1.auth.IstioCertificateService", "no_service", Park),
            (Code::Internal, "CSR signing error (Istio CA is not ready)", "ca_internal", Retry),
            (Code::DataLoss, "never seen", "unknown", Retry),
        ] {
            let error = classify("test", code, text);
            assert_eq!((error.kind(), error.disposition()), (kind, disposition), "{text}");
        }
    }

    #[test]
    fn a_message_names_cause_and_fix_and_stays_short() {
        let error = classify("registration", Code::InvalidArgument, &"x".repeat(5000));
        assert!(error.to_string().len() < 700, "{error}");
        let error = classify("registration", Code::FailedPrecondition, "cannot find WorkloadGroup a/b").to_string();
        assert!(error.contains("cannot find WorkloadGroup a/b") && error.contains("kubectl apply"), "{error}");
    }
}
