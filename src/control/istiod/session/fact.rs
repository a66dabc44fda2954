//! What is told of the registration while a session lives.

use super::{Session, live::entry};
use crate::{
    control::{Disposition, Error},
    status::{self, Membership, Registration, Trouble},
};

impl Session<'_> {
    pub(super) fn refusal(&self, error: &Error) -> Trouble {
        let cause = format!(
            "the control plane refuses our newest certificate, so the previous credential stays in use: {error}; if the \
             mesh's CA was just changed, restart istiod"
        );
        self.trouble_of(Trouble::NEW_CERTIFICATE_REFUSED, cause)
    }

    /// Trouble of a kind: since it began.
    pub(super) fn trouble_of(&self, kind: &'static str, cause: String) -> Trouble {
        Trouble::met(self.trouble.as_ref(), kind, cause, self.istiod.clock.now())
    }

    /// The mesh does not list us as it should, and we could not be registered anew.
    pub(super) fn disowned(&mut self, error: &Error) {
        let cause =
            format!("the mesh's list contradicts the verdict, and the workload cannot be registered anew: {error}");
        self.trouble = Some(self.trouble_of(Trouble::DISOWNED, cause));
    }

    /// Writes the fact while a stream lives.
    pub(super) fn tell(&self) {
        let Some(live) = &self.live else { return };
        let Ok(entry) = entry(self.istiod, &live.addresses) else { return };
        let refused = self.error.as_ref().is_some_and(|error| error.disposition() == Disposition::Park);
        let fact = match &self.trouble {
            // The entry is not there, and will not be.
            Some(trouble) if refused && trouble.kind == Trouble::DISOWNED => {
                Registration::Parked { entry, trouble: trouble.clone() }
            }
            trouble => Registration::Registered { entry, since: self.since, trouble: trouble.clone() },
        };
        status::tell(&self.post.registration, fact);
    }

    /// No stream lives, and none was answered in time.
    pub(super) fn lose(&self) {
        let (kind, cause) = match &self.error {
            Some(error) => (error.kind(), error.to_string()),
            None => ("ended", "the session ended".to_owned()),
        };
        self.post.registration.send_modify(|fact| {
            if let Registration::Registered { entry, .. } = fact {
                let cause = format!("{cause}; the next stream is not answered yet");
                let trouble = Trouble::met(None, kind, cause, self.istiod.clock.now());
                *fact = Registration::Lost { entry: std::mem::take(entry), trouble };
            }
        });
        status::tell(&self.post.membership, Membership::Unknown { cause: "no session with the control plane" });
    }
}

/// Whether the fact tells of an attempt that came to nothing.
pub(super) fn followed_a_failure(fact: &Registration) -> bool {
    match fact {
        Registration::Asked { trouble, .. } => trouble.is_some(),
        Registration::Lost { .. } | Registration::Parked { .. } => true,
        Registration::Absent | Registration::Registered { .. } => false,
    }
}
