//! Who may have a workload's key: whoever the host's own configuration names, and nobody else.

use super::refusals::Refusals;
use crate::{
    aside::{Questions, within},
    host::{Allow, Peer, user_name},
    systemd::{UnitError, Units},
};
use std::{fmt, sync::Arc, time::Duration};
use tokio::time::timeout;
use tonic::Status;

/// How long the names of users and groups may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Decides who may connect to the socket of one workload. Root and the agent's own user always may: they could read the
/// key anyway. For everybody else it takes an entry of `socket.allow`.
#[derive(Debug)]
pub struct Policy {
    workload: String,
    allow: Arc<[Allow]>,
    /// What the names in `allow` mean: the same for all who wait at the door, so it is asked once for all of them.
    meant: Questions<Arc<[Allow]>>,
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
    uid: u32,
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
    /// An entry names a user or a group, and the system does not say which that is.
    Nameless,
}

impl Policy {
    /// A policy for `workload`: what `socket.allow` says, with `units` to ask for units.
    pub fn new(workload: &str, allow: Vec<Allow>, units: Units) -> Self {
        Self {
            workload: workload.to_owned(),
            allow: allow.into(),
            meant: Questions::default(),
            own: nix::unistd::geteuid().as_raw(),
            units,
            refusals: Refusals::default(),
        }
    }

    /// Whether `peer` may have the key. Takes some seconds at most. A refusal is in the journal when this returns, once a
    /// minute for each user, so the caller only closes the connection.
    ///
    /// # Errors
    /// When it may not.
    pub async fn admit(&self, peer: &Peer) -> Result<(), Denied> {
        let (unit, why) = match self.judge(peer).await {
            Verdict::Admitted => return Ok(()),
            Verdict::Refused(unit, why) => (unit, why),
        };
        let (uid, due) = (peer.uid, self.refusals.due(peer.uid));
        // The name is for the journal alone, so whoever knocks again and again has it looked up once.
        let user = match due {
            Some(_) => within(PATIENCE, "the name of a user", move || user_name(uid)).await.ok().flatten(),
            None => None,
        };
        Err(self.deny(peer, user, unit, why, due))
    }

    /// Tells that `peer` is not even judged, for its user has `most` connections already.
    pub(super) fn crowded(&self, peer: &Peer, most: usize) {
        self.deny(peer, None, None, Why::Crowded(most), self.refusals.due(peer.uid));
    }

    /// A refusal, told when it is `due`.
    fn deny(&self, peer: &Peer, user: Option<String>, unit: Option<String>, why: Why, due: Option<u64>) -> Denied {
        let who = Who { peer: peer.to_string(), uid: peer.uid, user, unit };
        let denied = Denied { workload: self.workload.clone(), who, why };
        match due {
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
        let fits = |allow: &[Allow]| allow.iter().any(|entry| entry.fits(peer.uid, &peer.groups));
        if fits(&self.allow) {
            return Verdict::Admitted;
        }
        let by_name = self.by_name().await;
        if by_name.as_deref().is_some_and(fits) {
            return Verdict::Admitted;
        }
        // systemd is asked only where its answer can change something.
        if !self.allow.iter().any(|entry| matches!(entry, Allow::Unit(_))) {
            return Verdict::Refused(None, if by_name.is_some() { Why::Stranger } else { Why::Nameless });
        }
        match self.units.of(peer).await {
            Ok(unit) if self.allow.iter().any(|entry| matches!(entry, Allow::Unit(name) if *name == unit)) => {
                Verdict::Admitted
            }
            Err(UnitError::Gone) => Verdict::Refused(None, Why::Gone),
            // Whatever systemd says, a name may still let it in.
            _ if by_name.is_none() => Verdict::Refused(None, Why::Nameless),
            Ok(unit) => Verdict::Refused(Some(unit), Why::Stranger),
            Err(error) => Verdict::Refused(None, Why::Unknown(error)),
        }
    }

    /// The entries with names, by number; none when the system does not say in time.
    async fn by_name(&self) -> Option<Arc<[Allow]>> {
        let names: Vec<_> = self.allow.iter().filter(|entry| entry.is_by_name()).cloned().collect();
        if names.is_empty() {
            return Some(Arc::default());
        }
        let ask = move || names.iter().map(Allow::resolved).collect();
        timeout(PATIENCE, self.meant.ask(&format!("socket.allow of {}", self.workload), ask)).await.ok()
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
            Why::Nameless => {
                return write!(
                    f,
                    "the names in socket.allow cannot be looked up, for the name service does not answer"
                );
            }
            Why::Unknown(error) => write!(f, "its unit cannot be told ({error}), and nothing else lets it in")?,
            Why::Stranger => write!(f, "no entry of socket.allow lets it in")?,
        }
        let entry = match (&who.unit, &who.user) {
            (Some(unit), _) => format!("{{unit: {unit}}}"),
            (None, Some(user)) => format!("{{user: {user}}}"),
            (None, None) => format!("{{user: {}}}", who.uid),
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
            Why::Nameless => Status::unavailable(words),
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
