//! `status` as data: what `we-agent status --json` prints, the admin socket serves, and metrics are made from. The
//! words are an interface: new ones may be added, none is changed.

mod from_facts;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

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

words! {
    /// The state of a consumer.
    ConsumerState {
        /// Nothing was sent, for there is no valid certificate; or it has not said yet whether it takes what was sent.
        #[default]
        Waiting = "waiting",
        /// It uses what it was sent last.
        Current = "current",
        /// It was sent something newer than what it uses, and has not answered.
        Behind = "behind",
        /// It has refused what it was sent last.
        Refused = "refused",
    }
}

/// One thing that a program takes from the socket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConsumerReport {
    /// `sds`.
    pub protocol: String,
    /// What it takes, say `default` or `ROOTCA`.
    pub resource: String,
    /// `waiting`, `current`, `behind` or `refused`.
    pub state: ConsumerState,
    /// Who it says it is; empty when it says nothing.
    pub node: String,
    /// The user that it runs as.
    pub uid: u32,
    /// Its process.
    pub pid: Option<i32>,
    /// The version that it uses: of a certificate the serial number.
    pub version: Option<String>,
    /// Why it has refused.
    pub cause: Option<String>,
}

words! {
    /// The state of a hook.
    ReloadState {
        /// Nothing was switched yet.
        #[default]
        None = "none",
        /// It runs, or what is served afterwards is being looked at.
        Running = "running",
        /// The program was told, and where that can be seen, it serves the newest certificate.
        Reloaded = "reloaded",
        /// The hook failed.
        Failed = "failed",
        /// The hook says that all is well, but the newest certificate is not served.
        Stale = "stale",
    }
}

words! {
    /// Why an inbound connection was refused.
    InboundRefusal {
        /// We have no certificate, or it has expired.
        #[default]
        NoIdentity = "no_identity",
        /// The peer spoke, but no TLS.
        NotTls = "not_tls",
        /// The handshake failed.
        Handshake = "handshake",
        /// The peer showed no certificate.
        NoCertificate = "no_certificate",
        /// Its certificate does not chain to the mesh's roots, or is not valid now.
        Untrusted = "untrusted",
        /// Its certificate does not name exactly one SPIFFE id.
        NoSpiffeId = "no_spiffe_id",
        /// Its trust domain is not ours, and no rule lets it in.
        TrustDomain = "trust_domain",
        /// No rule lets it in.
        NotAllowed = "not_allowed",
        /// The handshake did not end in time.
        Timeout = "timeout",
        /// Too many handshakes were in flight, and this was the oldest of the busiest address.
        Evicted = "evicted",
        /// Too many connections were open.
        TooMany = "too_many",
        /// The application does not take connections.
        Application = "application",
        /// The peer left before the end of the handshake.
        Aborted = "aborted",
    }
}

/// One inbound listener.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct InboundReport {
    /// Where it shall listen, as configured.
    pub listen: String,
    /// Where it listens; null while it does not.
    pub address: Option<SocketAddr>,
    /// Where it forwards to.
    pub forward: String,
    /// `strict` or `permissive`.
    pub mode: String,
    /// Connections that are open now.
    pub open: u64,
    /// Connections taken in.
    pub connections: u64,
    /// Connections without TLS that were let through.
    pub plain: u64,
    /// Bytes of the peers that were forwarded.
    pub bytes_in: u64,
    /// Bytes of the application that were sent.
    pub bytes_out: u64,
    /// Handshakes that have succeeded, and how long they took.
    pub handshakes: LatencyReport,
    /// How many were refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// What the last refusal said.
    pub last_refusal: Option<String>,
    /// Why it does not listen, and the fix.
    pub cause: Option<String>,
    /// What may not be as it was meant: ports that do not match those of the WorkloadGroup.
    pub notes: Vec<String>,
}

/// How long something took.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyReport {
    /// How often it was done.
    pub count: u64,
    /// The sum of the times, in seconds.
    pub seconds: f64,
    /// Upper bound in seconds, and how many were above the bound before and not above this; the rest took longer.
    pub classes: Vec<(f64, u64)>,
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
    /// What is wrong, and the fix.
    pub cause: Option<String>,
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

/// What one publisher has put out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PublicationReport {
    /// The publisher, say `files`.
    pub publisher: String,
    /// Serial of what consumers see.
    pub serial: Option<String>,
    /// Why the newest is not out.
    pub cause: Option<String>,
}

/// What came of one hook.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReloadReport {
    /// The unit, or the program that is run.
    pub hook: String,
    /// `none`, `running`, `reloaded`, `failed` or `stale`.
    pub state: ReloadState,
    /// Serial of the certificate that the program was told of.
    pub serial: Option<String>,
    /// Serial of the certificate that was seen being served; null when nobody looked, or none was seen.
    pub served: Option<String>,
    /// What is wrong, and the fix.
    pub cause: Option<String>,
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
