//! The vocabulary of facts, and [`Status`]: all of them, read at once.
//!
//! Each fact has one writer (see the crate's picture) and lives in a `tokio::sync::watch`; everyone else reads. The
//! words of the states are the same in JSON, metrics and journal.

mod failures;
mod inbound;
mod report;
mod snapshot;

pub use inbound::{HANDSHAKE_BOUNDS, Inbound, InboundCounters, InboundPlace};
pub use report::{
    AddressReport, ConsumerReport, ConsumerState, FailureReport, HealthReport, HealthState, IdentityReport,
    IdentityState, InboundRefusal, InboundReport, LatencyReport, MembershipReport, MembershipState, Mood,
    PublicationReport, RegistrationReport, RegistrationState, ReloadReport, ReloadState, Report, State, StoreReport,
    Timestamp, TokenReport, TokenState, WorkloadReport,
};
pub(crate) use snapshot::any_news;
pub use snapshot::{Status, WorkloadStatus, Workloads};

use crate::{
    spiffe::{X509Bundle, X509Context},
    workload::Locality,
};
use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc, time::SystemTime};
use tokio::sync::watch;

/// Writes a fact, if it is news: readers are woken for nothing else.
pub fn tell<T: PartialEq>(fact: &watch::Sender<T>, news: T) {
    fact.send_if_modified(|now| {
        let differs = *now != news;
        *now = news;
        differs
    });
}

/// Something that goes wrong at present: since when, a stable word for metrics, and one line with cause and fix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// When this kind of trouble began.
    pub since: SystemTime,
    /// How often it was met since then.
    pub times: u64,
    /// A stable word for metrics and for telling a repetition from news.
    pub kind: &'static str,
    /// One line that names the cause and the fix. Never holds a secret.
    pub cause: String,
}

impl Trouble {
    /// Trouble of this kind, met at `now`. What is of the same kind as `before` is the same trouble, once more.
    pub fn met(before: Option<&Self>, kind: &'static str, cause: String, now: SystemTime) -> Self {
        match before.filter(|before| before.kind == kind) {
            Some(Self { since, times, .. }) => Self { since: *since, times: times.saturating_add(1), kind, cause },
            None => Self { since: now, times: 1, kind, cause },
        }
    }

    /// The kind of a new certificate that the control plane does not accept although it has not expired. The session
    /// lives on with the previous one, and `status` calls the identity `refused`.
    pub const NEW_CERTIFICATE_REFUSED: &str = "new_certificate_refused";
    /// The kind of a mesh whose list contradicts our verdict while the workload cannot be registered anew.
    pub const DISOWNED: &str = "disowned";
}

/// The identity fact; its only writer is the identity loop.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// The newest verified SVID. It may have expired: readers ask [`crate::spiffe::X509Svid::is_valid`].
    pub current: Option<Arc<X509Context>>,
    /// The one before it, kept while it is valid, in case the control plane refuses the newest.
    pub previous: Option<Arc<X509Context>>,
    /// When the next renewal is due.
    pub renew_at: Option<SystemTime>,
    /// Why the last request for a certificate failed; none after a success.
    pub trouble: Option<Trouble>,
    /// The operator's root file as it was when `current` was issued; a file that differs beats the CA's roots.
    pub anchors: Option<X509Bundle>,
    /// Neither certificate nor token is accepted any more: only a new token file helps.
    pub credentials_dead: bool,
}

/// What a restart would find of the identity; written by the loop that looks after the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Durable {
    /// Serial of the certificate that the store has.
    pub serial: Option<String>,
    /// Why it has not the newest.
    pub trouble: Option<Trouble>,
}

impl Durable {
    /// Whether the store has this certificate.
    pub fn holds(&self, serial: &str) -> bool {
        self.serial.as_deref() == Some(serial)
    }
}

/// What has become of the bundle's token; written by the loop that removes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Token {
    /// It stays where it was put, or has not served yet.
    #[default]
    Kept,
    /// It has served and was removed, as configured.
    Removed,
    /// It has served and was to be removed, but could not be.
    Stays {
        /// Why, and what to do.
        cause: String,
    },
}

impl Identity {
    /// The newest SVID, if it is valid at `now`.
    pub fn valid(&self, now: SystemTime) -> Option<&Arc<X509Context>> {
        self.current.as_ref().filter(|context| context.svid.is_valid(now))
    }
}

/// The registration fact; its only writer is the session loop.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Registration {
    /// Nothing was asked: just started, told to leave, or the bundle names no WorkloadGroup.
    #[default]
    Absent,
    /// Asked, no answer yet, or no good one so far.
    Asked {
        /// `namespace/name` of the WorkloadEntry.
        entry: String,
        /// Since when the answer is awaited.
        since: SystemTime,
        /// Why the last attempt came to nothing.
        trouble: Option<Trouble>,
    },
    /// The control plane has answered, and the session lives.
    Registered {
        /// `namespace/name` of the WorkloadEntry.
        entry: String,
        /// When this entry was first acknowledged without a gap since.
        since: SystemTime,
        /// What is wrong although the session lives, say a new certificate that is refused.
        trouble: Option<Trouble>,
    },
    /// It was registered once; the session ended, and is being resumed.
    Lost {
        /// `namespace/name` of the WorkloadEntry.
        entry: String,
        /// Since when, and why.
        trouble: Trouble,
    },
    /// Refused in a way that will not change by itself; asked again rarely, and at once when a local file changes.
    Parked {
        /// `namespace/name` of the WorkloadEntry.
        entry: String,
        /// Since when, and why.
        trouble: Trouble,
    },
}

/// Whether the mesh sends anybody to us; written by the session loop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Membership {
    /// Not looked yet, turned off, or it could not be found out.
    Unknown {
        /// Why it is not known.
        cause: &'static str,
    },
    /// No Service or ServiceEntry selects this workload.
    NotSelected,
    /// Selected, and the mesh lists our address as an endpoint of at least one of the services.
    Listed(Selection),
    /// Selected, but not listed at present (unhealthy, or no healthy report yet).
    Withheld(Selection),
}

impl Default for Membership {
    fn default() -> Self {
        Self::Unknown { cause: "not looked yet" }
    }
}

/// What selects us, and how the mesh will speak to us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// `host:port` of each service that selects us, sorted.
    pub services: Vec<String>,
    /// The ports on this host that the mesh was told, sorted; empty while none is listed.
    pub ports: Vec<u16>,
    /// Whether pods will speak mutual TLS to those ports (`tlsMode: istio`); none while not listed.
    pub tls: Option<bool>,
    /// Set when the mesh will speak TLS to a port that answers no TLS handshake: says so, and the remedies.
    pub mismatch: Option<String>,
}

/// Where this host stands, as its platform says; written by the locality loop.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Located {
    /// To be asked, as soon as there is an address to ask from.
    #[default]
    Soon,
    /// Nobody is to be asked, or nobody has answered so far.
    Unknown,
    /// The platform has said so.
    Known(Locality),
}

/// The verdict on the application; its only writer is the health loop.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Health {
    /// No verdict yet, or no probe is configured. Never reported.
    #[default]
    Unknown,
    /// The application was given time to start, and is not probed before that is over. Never reported.
    Delayed {
        /// Until when.
        until: SystemTime,
    },
    /// The probe succeeds.
    Healthy,
    /// The probe fails.
    Unhealthy {
        /// The probe's own text.
        message: String,
    },
    /// The probe cannot run until a person decides; never reported, so the entry is no endpoint.
    Parked {
        /// Why, and what to do.
        cause: String,
    },
}

/// What one publisher has put out; written by that publisher.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Publication {
    /// Serial of the SVID that consumers see.
    pub serial: Option<String>,
    /// Why the newest is not out; none when it is.
    pub trouble: Option<Trouble>,
}

/// What one publisher puts out, and where. Whether it is still there is asked of the disk.
#[derive(Debug, Clone)]
pub struct Published {
    /// The publisher, say `files`.
    pub name: String,
    /// Written by the publisher.
    pub fact: watch::Receiver<Publication>,
    /// What is there on this host, once it is out.
    pub paths: Vec<PathBuf>,
}

/// One thing that a program takes from the socket, say Envoy the secret `default`; written by the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    /// `sds` or `workload_api`.
    pub protocol: &'static str,
    /// Who it says it is, say the node id of an Envoy; empty when it says nothing.
    pub node: String,
    /// The user that it runs as, as the kernel says.
    pub uid: u32,
    /// Its process, as the kernel says; none when that is hidden from us.
    pub pid: Option<i32>,
    /// The version that it was sent last; none while it waits for the first.
    pub sent: Option<Arc<str>>,
    /// The version that it uses, as far as it has said; a client of the Workload API cannot say, so what it was sent.
    pub accepted: Option<Arc<str>>,
    /// Why it does not use what it was sent last.
    pub refusal: Option<String>,
}

/// The consumers of one socket, by their number and what they take.
pub type Consumers = BTreeMap<(u64, &'static str), Consumer>;

/// What came of a hook after the last switch of the files; written by that hook.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Reload {
    /// Nothing was switched yet.
    #[default]
    None,
    /// It runs, or what is served afterwards is being looked at.
    Running {
        /// Serial of the certificate that the files have.
        serial: String,
    },
    /// The program was told, and where that can be seen, it serves this certificate.
    Reloaded {
        /// Serial of the certificate that the files have.
        serial: String,
        /// Whether a connection has shown it.
        verified: bool,
    },
    /// The hook could not be run, or says that it failed; it is tried again.
    Failed {
        /// Serial of the certificate that the files have.
        serial: String,
        /// Since when, and why.
        trouble: Trouble,
    },
    /// The hook says that all is well, but another certificate is served, or none; it is tried again.
    Stale {
        /// Serial of the certificate that the files have.
        serial: String,
        /// Serial of the certificate that is served instead, if any.
        served: Option<String>,
        /// Since when, and why.
        trouble: Trouble,
    },
}

/// One address that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The address.
    pub ip: IpAddr,
    /// Why it was taken, or was not.
    pub reason: String,
}

/// The addresses of this host as the mesh shall know them; written by the address loop.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// The one that names the WorkloadEntry; none while no usable address is there.
    pub primary: Option<IpAddr>,
    /// All usable ones, the primary first.
    pub all: Vec<IpAddr>,
    /// Everything that was looked at, and the reasons.
    pub candidates: Vec<Candidate>,
}

/// The reading ends of one workload's facts.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Written by the identity loop.
    pub identity: watch::Receiver<Identity>,
    /// Written by the loop that looks after the store.
    pub durable: watch::Receiver<Durable>,
    /// Written by the loop that removes the token.
    pub token: watch::Receiver<Token>,
    /// Written by the session loop.
    pub registration: watch::Receiver<Registration>,
    /// Written by the session loop.
    pub membership: watch::Receiver<Membership>,
    /// Written by the health loop.
    pub health: watch::Receiver<Health>,
    /// Written by the address loop.
    pub addresses: watch::Receiver<Addresses>,
    /// One per publisher.
    pub publications: Vec<Published>,
    /// Written by the socket.
    pub consumers: watch::Receiver<Consumers>,
    /// One per hook, in the order of the configuration: its name and what came of it.
    pub reloads: Vec<(String, watch::Receiver<Reload>)>,
    /// One per inbound listener, in the order of the configuration.
    pub inbounds: Vec<Inbound>,
}
