//! Who may have a workload's key: whoever the host's own configuration names, and nobody else.

use super::refusals::Refusals;
use crate::{
    host::{Allow, Peer, user_name},
    systemd::{UnitError, Units},
};
use std::{fmt, sync::Arc};
use tokio::task::spawn_blocking;
use tonic::Status;

/// Decides who may connect to the socket of one workload. Root and the agent's own user always may: they could read the
/// key anyway. For everybody else it takes an entry of `socket.allow`.
#[derive(Debug)]
pub struct Policy {
    workload: String,
    allow: Arc<[Allow]>,
    own: u32,
    units: Units,
    refusals: Refusals,
}

/// Why a peer was refused.
#[derive(Debug)]
pub struct Denied {
    workload: String,
    who: Who,
    why: Why,
}

/// Whom a refusal is about.
#[derive(Debug)]
struct Who {
    peer: String,
    user: Option<String>,
    unit: Option<String>,
}

#[derive(Debug)]
enum Why {
    /// Its user has as many connections as it may have.
    Crowded(usize),
    /// No entry names it.
    Stranger,
    /// Its process ended before it could be looked at.
    Gone,
    /// An entry names a unit, but its unit could not be told.
    Unknown(UnitError),
}

impl Policy {
    /// A policy for `workload`: what `socket.allow` says, with `units` to ask for units.
    pub fn new(workload: &str, allow: Vec<Allow>, units: Units) -> Self {
        Self {
            workload: workload.to_owned(),
            allow: allow.into(),
            own: nix::unistd::geteuid().as_raw(),
            units,
            refusals: Refusals::default(),
        }
    }

    /// Whether `peer` may have the key. Takes two seconds at most, unless the directory that names of users and groups
    /// come from is slower. A refusal is in the journal when this returns, once a minute for each user, so the caller
    /// only closes the connection.
    ///
    /// # Errors
    /// When it may not.
    pub async fn admit(&self, peer: &Peer) -> Result<(), Denied> {
        let (unit, why) = match self.judge(peer).await {
            Verdict::Admitted => return Ok(()),
            Verdict::Refused(unit, why) => (unit, why),
        };
        let uid = peer.uid;
        // A thread of its own: a user directory may be slow.
        let user = spawn_blocking(move || user_name(uid)).await.ok().flatten();
        Err(self.deny(peer, user, unit, why))
    }

    /// Tells that `peer` is not even judged, for its user has `most` connections already.
    pub(super) fn crowded(&self, peer: &Peer, most: usize) {
        self.deny(peer, None, None, Why::Crowded(most));
    }

    /// A refusal, told.
    fn deny(&self, peer: &Peer, user: Option<String>, unit: Option<String>, why: Why) -> Denied {
        let denied = Denied { workload: self.workload.clone(), who: Who { peer: peer.to_string(), user, unit }, why };
        match self.refusals.due(peer.uid) {
            Some(0) => tracing::warn!("{denied}"),
            Some(before) => tracing::warn!(before, "{denied}; {before} times more in the minute before"),
            None => tracing::debug!("{denied}"),
        }
        denied
    }

    async fn judge(&self, peer: &Peer) -> Verdict {
        // Not even root's: the socket of a process that has ended was handed to somebody whom nobody has looked at.
        if peer.has_gone() {
            return Verdict::Refused(None, Why::Gone);
        }
        if peer.uid == 0 || peer.uid == self.own {
            return Verdict::Admitted;
        }
        let (allow, uid, groups) = (self.allow.clone(), peer.uid, peer.groups.clone());
        let fits = spawn_blocking(move || allow.iter().any(|entry| entry.fits(uid, &groups)));
        if fits.await.unwrap_or(false) {
            return Verdict::Admitted;
        }
        // systemd is asked only where its answer can change something.
        if !self.allow.iter().any(|entry| matches!(entry, Allow::Unit(_))) {
            return Verdict::Refused(None, Why::Stranger);
        }
        match self.units.of(peer).await {
            Ok(unit) if self.allow.iter().any(|entry| matches!(entry, Allow::Unit(name) if *name == unit)) => {
                Verdict::Admitted
            }
            Ok(unit) => Verdict::Refused(Some(unit), Why::Stranger),
            Err(UnitError::Gone) => Verdict::Refused(None, Why::Gone),
            Err(error) => Verdict::Refused(None, Why::Unknown(error)),
        }
    }
}

enum Verdict {
    Admitted,
    Refused(Option<String>, Why),
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workload, who, why } = self;
        write!(f, "refused {who}: ")?;
        match why {
            Why::Crowded(most) => {
                return write!(f, "this user has {most} connections already, which is the most; end some of them");
            }
            Why::Gone => return write!(f, "its process has ended, and who has its connection now is not known"),
            Why::Unknown(error) => write!(f, "its unit cannot be told ({error}), and nothing else lets it in")?,
            Why::Stranger => write!(f, "no entry of socket.allow lets it in")?,
        }
        let entry = match (&who.unit, &who.user) {
            (Some(unit), _) => format!("{{unit: {unit}}}"),
            (None, Some(user)) => format!("{{user: {user}}}"),
            (None, None) => "{user: ...}, {group: ...} or {unit: ...}".to_owned(),
        };
        write!(f, "; if it should have the key, add {entry} to workloads.{workload}.socket.allow in we-agent.yaml")
    }
}

impl std::error::Error for Denied {}

impl Denied {
    /// What the peer is told. Permission denied is final: on it, a SPIFFE client throws away the identity that it has.
    pub(super) fn status(&self) -> Status {
        let words = self.to_string();
        match &self.why {
            Why::Unknown(error) if !error.is_final() => Status::unavailable(words),
            Why::Crowded(_) => Status::resource_exhausted(words),
            Why::Stranger | Why::Gone | Why::Unknown(_) => Status::permission_denied(words),
        }
    }
}

/// `uid 1000 (mallory), gid 100, pid 4711, unit cron.service`.
impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.peer)?;
        if let Some(user) = &self.user {
            write!(f, ", user {user}")?;
        }
        self.unit.as_ref().map_or(Ok(()), |unit| write!(f, ", unit {unit}"))
    }
}

#[cfg(test)]
mod tests;
