//! What the journal says of certificate, registration and membership: each transition once, with its cause. The loops
//! behind them only speak at debug; health, addresses and files say their own.

use crate::{
    status::{Facts, Identity, Membership, Registration, Trouble},
    time::Clock,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Follows the facts of one workload until `stop`.
pub(super) async fn run(mut facts: Facts, clock: Clock, stop: CancellationToken) {
    let mut identity = Identity::default();
    let mut registration = Registration::default();
    let mut membership = Membership::default();
    let mut mismatch = None;
    let mut expired = None;
    loop {
        let now = facts.identity.borrow_and_update().clone();
        say_identity(&identity, &now);
        identity = now;
        let now = facts.registration.borrow_and_update().clone();
        say_registration(&registration, &now);
        registration = now;
        let now = facts.membership.borrow_and_update().clone();
        say_membership(&membership, &now, &mut mismatch);
        membership = now;
        tokio::select! {
            () = facts.changed() => {}
            () = expiry(&identity, clock), if serial(&identity) != expired.as_deref() => {
                warn!(cause = identity.trouble.as_ref().map(|t| t.cause.as_str()), "the certificate has expired");
                expired = serial(&identity).map(ToOwned::to_owned); // said once
            }
            () = stop.cancelled() => return,
        }
    }
}

/// Returns when the certificate ends without a successor.
async fn expiry(identity: &Identity, clock: Clock) {
    match &identity.current {
        Some(context) => clock.sleep_until(context.svid.not_after()).await,
        None => std::future::pending().await,
    }
}

fn serial(identity: &Identity) -> Option<&str> {
    identity.current.as_ref().map(|context| context.svid.serial())
}

fn say_identity(before: &Identity, now: &Identity) {
    if let Some(context) = now.current.as_ref().filter(|_| serial(before) != serial(now)) {
        let svid = &context.svid;
        let (expires, renewal) = (humantime::format_rfc3339_seconds(svid.not_after()), now.renew_at);
        let renewal = renewal.map(|at| humantime::format_rfc3339_seconds(at).to_string());
        let what = if before.current.is_some() { "certificate renewed" } else { "certificate in use" };
        info!(serial = svid.serial(), %expires, renewal, "{what}");
    }
    say_trouble(before.trouble.as_ref(), now.trouble.as_ref(), "no new certificate", "certificates are issued again");
}

/// Warns when a trouble begins or becomes another kind, informs when it ends.
fn say_trouble(before: Option<&Trouble>, now: Option<&Trouble>, begins: &str, ends: &str) {
    match (before, now) {
        (None, Some(trouble)) => warn!(cause = trouble.cause, kind = trouble.kind, "{begins}"),
        (Some(old), Some(trouble)) if old.kind != trouble.kind => {
            warn!(cause = trouble.cause, kind = trouble.kind, "{begins}");
        }
        (Some(_), None) => info!("{ends}"),
        _ => {}
    }
}

fn say_registration(before: &Registration, now: &Registration) {
    use Registration::{Absent, Asked, Lost, Parked, Registered};
    match (before, now) {
        (Registered { entry: old, trouble: was, .. }, Registered { entry, trouble, .. }) if old == entry => {
            say_kept(was.as_ref(), trouble.as_ref());
        }
        (_, Registered { entry, trouble, .. }) => {
            info!(entry, "registered");
            say_kept(None, trouble.as_ref());
        }
        (Asked { trouble: Some(old), .. }, Asked { trouble: Some(trouble), .. }) if old.kind == trouble.kind => {}
        (Lost { trouble: old, .. } | Parked { trouble: old, .. }, Lost { trouble, .. } | Parked { trouble, .. })
            if old.kind == trouble.kind => {}
        // The identity has said it already, and one line is enough.
        (_, Lost { trouble, .. } | Asked { trouble: Some(trouble), .. }) if trouble.kind == "credentials_dead" => {}
        (_, Asked { entry, trouble: Some(trouble), .. }) => {
            warn!(entry, cause = trouble.cause, kind = trouble.kind, "not registered, trying again");
        }
        (_, Lost { entry, trouble }) => {
            let what = if matches!(before, Registered { .. }) {
                "session lost, resuming"
            } else {
                "not registered, trying again"
            };
            warn!(entry, cause = trouble.cause, kind = trouble.kind, "{what}");
        }
        (_, Parked { entry, trouble }) => {
            warn!(
                entry,
                cause = trouble.cause,
                kind = trouble.kind,
                "not registered, and this will not change by itself"
            );
        }
        (Registered { entry, .. }, Absent) => info!(entry, "session closed"),
        (_, Absent | Asked { trouble: None, .. }) => {}
    }
}

/// What is wrong although the session lives.
fn say_kept(before: Option<&Trouble>, now: Option<&Trouble>) {
    let (begins, ends) = match now.or(before).map(|trouble| trouble.kind) {
        Some(Trouble::DISOWNED) => {
            ("registered, but the mesh does not show it", "the mesh shows the registration again")
        }
        _ => ("session kept on the previous credential", "the certificate is accepted"),
    };
    say_trouble(before, now, begins, ends);
}

fn say_membership(before: &Membership, now: &Membership, said: &mut Option<String>) {
    if before == now {
        return;
    }
    match now {
        Membership::Unknown { cause } => tracing::debug!(cause, "membership is not known"),
        Membership::NotSelected => warn!(
            "registered, but no Service or ServiceEntry selects this workload, so nobody in the mesh will call it; \
             compare the selectors with the labels of the WorkloadGroup's template"
        ),
        Membership::Listed(selection) => {
            let services = selection.services.join(", ");
            let tls = if selection.tls == Some(true) { "mutual TLS" } else { "plain text" };
            info!(services, tls, "listed in the mesh");
            if let Some(mismatch) = selection.mismatch.as_ref().filter(|mismatch| Some(*mismatch) != said.as_ref()) {
                warn!(cause = mismatch, "the mesh and the application do not speak the same");
            }
            said.clone_from(&selection.mismatch);
        }
        Membership::Withheld(selection) => {
            let services = selection.services.join(", ");
            warn!(services, "selected, but not listed in the mesh at present");
        }
    }
}
