//! `status` as data: what `we-agent status --json` prints, the admin socket serves, and metrics are made from. The
//! words are an interface: new ones may be added, none is changed.

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
    /// Mistakes of the bundle; while there is one, nothing runs.
    pub broken: Vec<String>,
}

/// Words of an enum in JSON, text and metrics, from one list.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// Every state.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The word of this state.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }
    };
}

mod inbound;
mod published;
mod token;
pub use inbound::{InboundRefusal, InboundReport, LatencyReport};
pub use published::{ConsumerReport, ConsumerState, PublicationReport, ReloadReport, ReloadState};
pub use token::{TokenReport, TokenState};

words! {
    /// The state of an identity.
    IdentityState {
        /// No certificate yet.
        #[default]
        None = "none",
        /// An unexpired certificate.
        Valid = "valid",
        /// An unexpired certificate that the control plane does not accept.
        Refused = "refused",
        /// The certificate has expired and there is no new one.
        Expired = "expired",
        /// Neither certificate nor token is accepted any more; only a new token helps.
        Dead = "dead",
    }
}

words! {
    /// The state of a registration.
    RegistrationState {
        /// Nothing was asked.
        #[default]
        Absent = "absent",
        /// Asked, no answer yet.
        Asked = "asked",
        /// The control plane has acknowledged it.
        Registered = "registered",
        /// The session was lost and is being resumed.
        Lost = "lost",
        /// Refused in a way that will not change by itself.
        Parked = "parked",
    }
}

words! {
    /// The state of a membership.
    MembershipState {
        /// Not found out.
        #[default]
        Unknown = "unknown",
        /// No Service or ServiceEntry selects this workload.
        NotSelected = "not_selected",
        /// The mesh lists it.
        Listed = "listed",
        /// Selected, but not listed at present.
        Withheld = "withheld",
    }
}

words! {
    /// The state of the application.
    HealthState {
        /// No verdict.
        #[default]
        Unknown = "unknown",
        /// The probe succeeds.
        Healthy = "healthy",
        /// The probe fails.
        Unhealthy = "unhealthy",
        /// The probe cannot run until a person decides.
        Parked = "parked",
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
    /// `none`, `valid`, `refused`, `expired` or `dead`.
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
    /// What has become of the token.
    #[serde(default)]
    pub token: TokenReport,
}

/// The registration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RegistrationReport {
    /// `absent`, `asked`, `registered`, `lost` or `parked`.
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
    /// `unknown`, `not_selected`, `listed` or `withheld`.
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
    /// `unknown`, `healthy`, `unhealthy` or `parked`.
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
        Self { version, time: Timestamp(now), ready, cause, workloads }
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
