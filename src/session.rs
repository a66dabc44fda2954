//! The loop that owns the registration: it holds a session, and resumes it when it was lost.

use crate::{
    control::{ControlPlane, Disposition, Error, Post, Retry},
    files::Versions,
    status::{self, Membership, Registration, Trouble},
    time::Clock,
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::watch, time::Instant};

/// Waits between attempts that are refused, as Envoy's are.
const FLOOR: Duration = Duration::from_millis(500);
const CAP: Duration = Duration::from_secs(30);

/// Holds the workload's session until `post.stop`. A change of the `local` files (token, roots) ends a wait at once.
pub async fn run<C: ControlPlane>(control: Arc<C>, mut post: Post, mut local: watch::Receiver<Versions>, clock: Clock) {
    let mut retry = Retry::new(FLOOR, CAP);
    let mut held = false;
    loop {
        tokio::select! {
            Ok(_) = post.addresses.wait_for(|addresses| addresses.primary.is_some()) => {}
            () = post.stop.cancelled() => break,
        }
        let begun = Instant::now();
        let error = match control.session(&mut post).await {
            Ok(()) => break,
            Err(error) => error,
        };
        let was_registered = matches!(&*post.registration.borrow(), Registration::Registered { .. });
        let wait = match was_registered {
            true => retry.after_life(begun.elapsed(), error.cost()),
            false => retry.after(error.cost()),
        };
        held |= matches!(&*post.registration.borrow(), Registration::Registered { .. } | Registration::Lost { .. });
        tell(&post, &error, held, clock);
        forget(&post.membership);
        tracing::debug!(cause = %error, wait = ?wait, "session ended");
        tokio::select! {
            () = clock.sleep(wait) => {}
            Ok(()) = local.changed() => tracing::debug!("a local file has changed, trying again now"),
            Ok(()) = post.addresses.changed() => {}
            () = post.stop.cancelled() => break,
        }
    }
    post.registration.send_replace(Registration::Absent);
    forget(&post.membership);
}

/// Without a session nobody tells us what the mesh knows.
fn forget(membership: &watch::Sender<Membership>) {
    status::tell(membership, Membership::Unknown { cause: "no session with the control plane" });
}

/// Writes the fact: lost is only what was `held` once. The time is that of the first failure of its kind in a row.
fn tell(post: &Post, error: &Error, held: bool, clock: Clock) {
    post.registration.send_modify(|fact| {
        let (entry, asked, before) = match fact {
            Registration::Absent => (String::new(), None, None),
            Registration::Asked { entry, since, trouble } => (entry.clone(), Some(*since), trouble.clone()),
            Registration::Registered { entry, .. } => (entry.clone(), None, None),
            Registration::Lost { entry, trouble } | Registration::Parked { entry, trouble } => {
                (entry.clone(), None, Some(trouble.clone()))
            }
        };
        let trouble = Trouble::met(before.as_ref(), error.kind(), error.to_string(), clock.now());
        let since = trouble.since;
        *fact = match error.disposition() {
            Disposition::Park => Registration::Parked { entry, trouble },
            Disposition::Retry | Disposition::Reauthenticate if held => Registration::Lost { entry, trouble },
            Disposition::Retry | Disposition::Reauthenticate => {
                Registration::Asked { entry, since: asked.unwrap_or(since), trouble: Some(trouble) }
            }
        };
    });
}

#[cfg(test)]
mod tests;
