//! `status` as data: what `we-agent status --json` prints, the admin socket serves, and metrics are made from. The
//! words are an interface: new ones may be added, none is changed.

#[macro_use]
mod words;
mod from_facts;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use std::{fmt, net::IpAddr, time::SystemTime};

/// A moment; RFC 3339 in UTC with seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub SystemTime);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_rfc3339_seconds(self.0).fmt(f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_rfc3339(&text).map(Self).map_err(D::Error::custom)
    }
}

/// The whole of `status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the daemon.
    pub version: String,
    /// When this was said.
    pub time: Timestamp,
    /// Whether there is a workload and all are ready.
    pub ready: bool,
    /// Why it is not ready; says at least one cause.
    pub cause: Option<String>,
    /// What concerns the host as a whole, say a configuration file that is not the one in force.
    #[serde(default)]
    pub note: Option<String>,
    /// In the order of their names.
    pub workloads: Vec<WorkloadReport>,
}

/// One workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkloadReport {
    /// The name of its directory.
    pub name: String,
    /// Who it is; null while its bundle is broken.
    pub spiffe_id: Option<String>,
    /// A valid identity, and an accepted registration if it shall be registered.
    pub ready: bool,
    /// Why it is not ready.
    pub cause: Option<String>,
    /// Its certificate.
    pub identity: IdentityReport,
    /// Its WorkloadEntry.
    pub registration: RegistrationReport,
    /// Whether the mesh sends anybody to it.
    pub membership: MembershipReport,
    /// What is reported of the application.
    pub health: HealthReport,
    /// Its addresses.
    pub address: AddressReport,
    /// What each publisher has put out.
    pub files: Vec<PublicationReport>,
    /// Who takes it from the socket.
    #[serde(default)]
    pub consumers: Vec<ConsumerReport>,
    /// What came of each hook.
    #[serde(default)]
    pub reloads: Vec<ReloadReport>,
    /// What the inbound listeners do.
    #[serde(default)]
    pub inbound: Vec<InboundReport>,
    /// How often what has failed since the daemon was started.
    #[serde(default)]
    pub failures: Vec<FailureReport>,
    /// Keys of the bundle that are not obeyed.
    pub ignored: Vec<String>,
    /// Mistakes of the bundle. While there is one, nothing new runs; what ran before goes on as it was.
    pub broken: Vec<String>,
}

mod inbound;
mod published;
mod token;
pub use inbound::{InboundRefusal, InboundReport, LatencyReport};
pub use published::{ConsumerReport, ConsumerState, PublicationReport, ReloadReport, ReloadState};
pub use token::{TokenReport, TokenState};
pub use words::{Mood, State};

states! {
    /// The state of an identity.
    IdentityState {
        /// No certificate yet.
        #[default]
        None = "none": Waits,
        /// An unexpired certificate.
        Valid = "valid": Good,
        /// An unexpired certificate that the control plane does not accept.
        Refused = "refused": Bad,
        /// The certificate has expired and there is no new one.
        Expired = "expired": Bad,
        /// Neither certificate nor token is accepted any more; only a new token helps.
        Dead = "dead": Bad,
    }
}

states! {
    /// The state of a registration.
    RegistrationState {
        /// Nothing was asked.
        #[default]
        Absent = "absent": Waits,
        /// Asked, no answer yet.
        Asked = "asked": Waits,
        /// The control plane has acknowledged it.
        Registered = "registered": Good,
        /// The session was lost and is being resumed.
        Lost = "lost": Bad,
        /// Refused in a way that will not change by itself.
        Parked = "parked": Bad,
    }
}

states! {
    /// The state of a membership.
    MembershipState {
        /// Not found out.
        #[default]
        Unknown = "unknown": Plain,
        /// No Service or ServiceEntry selects this workload.
        NotSelected = "not_selected": Bad,
        /// The mesh lists it.
        Listed = "listed": Good,
        /// Selected, but not listed at present.
        Withheld = "withheld": Waits,
    }
}

states! {
    /// The state of the application.
    HealthState {
        /// No verdict.
        #[default]
        Unknown = "unknown": Plain,
        /// The probe succeeds.
        Healthy = "healthy": Good,
        /// The probe fails.
        Unhealthy = "unhealthy": Bad,
        /// The probe cannot run until a person decides.
        Parked = "parked": Bad,
    }
}

/// How often something has failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureReport {
    /// `identity`, `registration`, `publication` or `hook`.
    pub what: String,
    /// The kind of trouble: a stable word.
    pub kind: String,
    /// So many times.
    pub count: u64,
}

/// The certificate.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct IdentityReport {
    /// One of [`IdentityState`].
    pub state: IdentityState,
    /// Serial number in lower-case hexadecimal.
    pub serial: Option<String>,
    /// Start of validity.
    pub not_before: Option<Timestamp>,
    /// End of validity.
    pub not_after: Option<Timestamp>,
    /// When the next renewal is due.
    pub renew_at: Option<Timestamp>,
    /// What kind of trouble it is: a stable word.
    #[serde(default)]
    pub kind: Option<String>,
    /// What is wrong, and the fix.
    pub cause: Option<String>,
    /// Whether a restart would find it.
    #[serde(default)]
    pub store: StoreReport,
    /// What has become of the token.
    #[serde(default)]
    pub token: TokenReport,
}

/// The store in `/var/lib/we-agent`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreReport {
    /// Whether it has the newest certificate.
    pub durable: bool,
    /// The stable word for what is wrong.
    pub kind: Option<String>,
    /// Why not, and the fix.
    pub cause: Option<String>,
}

/// The registration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RegistrationReport {
    /// One of [`RegistrationState`].
    pub state: RegistrationState,
    /// `namespace/name` of the WorkloadEntry.
    pub entry: Option<String>,
    /// Since when it is in this state.
    pub since: Option<Timestamp>,
    /// What kind of trouble it is: a stable word.
    #[serde(default)]
    pub kind: Option<String>,
    /// What is wrong, and the fix.
    pub cause: Option<String>,
}

/// The membership.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MembershipReport {
    /// One of [`MembershipState`].
    pub state: MembershipState,
    /// `host:port` of each service that selects the workload.
    pub services: Vec<String>,
    /// The ports on this host that the mesh was told.
    pub ports: Vec<u16>,
    /// Whether pods will speak mutual TLS to them; null while not listed.
    pub tls: Option<bool>,
    /// Why it is not known, or what to do.
    pub cause: Option<String>,
}

/// The verdict on the application.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HealthReport {
    /// One of [`HealthState`].
    pub state: HealthState,
    /// The probe's own text, or why it is parked.
    pub message: Option<String>,
}

/// The addresses.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AddressReport {
    /// The one that names the WorkloadEntry.
    pub primary: Option<IpAddr>,
    /// All usable ones, the primary first.
    pub all: Vec<IpAddr>,
    /// Everything that was looked at, and the reasons.
    pub candidates: Vec<CandidateReport>,
}

/// One address that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CandidateReport {
    /// The address.
    pub ip: IpAddr,
    /// Why it was taken, or was not.
    pub reason: String,
}

impl Report {
    pub(super) fn new(workloads: Vec<WorkloadReport>, note: Option<String>, now: SystemTime) -> Self {
        let unready = || workloads.iter().find(|w| !w.ready);
        let cause = note.clone().or_else(|| match unready() {
            Some(w) => Some(format!("{}: {}", w.name, w.cause.as_deref().unwrap_or("not ready"))),
            None if workloads.is_empty() => Some("there is no workload".to_owned()),
            None => None,
        });
        let ready = !workloads.is_empty() && unready().is_none();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { version, time: Timestamp(now), ready, cause, note, workloads }
    }

    /// One line for the service manager: `2 of 3 workloads ready; payments: token refused, …`.
    pub fn summary(&self) -> String {
        let ready = self.workloads.iter().filter(|w| w.ready).count();
        let count = match self.workloads.len() {
            0 => "no workload".to_owned(),
            all => format!("{ready} of {all} workload{} ready", if all == 1 { "" } else { "s" }),
        };
        match &self.cause {
            Some(cause) if self.workloads.is_empty() => cause.clone(),
            Some(cause) => format!("{count}; {cause}"),
            None => count,
        }
    }
}

#[cfg(test)]
mod tests;
