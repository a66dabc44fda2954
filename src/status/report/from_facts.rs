//! From facts to the words of `status`: pure, given the time.

use super::{
    AddressReport, CandidateReport, ConsumerReport, ConsumerState, HealthReport, HealthState, IdentityReport,
    IdentityState, InboundRefusal, InboundReport, LatencyReport, MembershipReport, MembershipState, PublicationReport,
    RegistrationReport, RegistrationState, ReloadReport, ReloadState, StoreReport, Timestamp, TokenReport,
    WorkloadReport,
};
use crate::status::{
    Addresses, Consumer, Durable, HANDSHAKE_BOUNDS, Health, Identity, Inbound, InboundPlace, Membership, Published,
    Registration, Reload, Selection, Trouble, WorkloadStatus,
};
use std::{sync::atomic::Ordering::Relaxed, time::SystemTime};

/// What is said of a workload that wants no entry.
const NOBODY_ASKED: &str = "the bundle names no WorkloadGroup, so no entry is asked for: if the mesh is to send calls here, make it \
                            again with --autoregister";

impl WorkloadReport {
    pub(in crate::status) fn of(workload: &WorkloadStatus, now: SystemTime) -> Self {
        let mut report = Self {
            name: workload.name.clone(),
            spiffe_id: workload.spiffe_id.clone(),
            ready: false,
            cause: None,
            identity: IdentityReport::default(),
            registration: RegistrationReport::default(),
            membership: MembershipReport::default(),
            health: HealthReport::default(),
            address: AddressReport::default(),
            files: Vec::new(),
            consumers: Vec::new(),
            reloads: Vec::new(),
            inbound: Vec::new(),
            failures: Vec::new(),
            ignored: workload.ignored.clone(),
            broken: workload.broken.clone(),
        };
        if let Some(facts) = &workload.facts {
            let registration = facts.registration.borrow();
            report.identity = IdentityReport::of(&facts.identity.borrow(), &registration, now);
            report.identity.store = StoreReport::of(&facts.durable.borrow(), report.identity.serial.as_deref());
            report.identity.token = TokenReport::of(&facts.token.borrow());
            report.registration = RegistrationReport::of(&registration);
            if !workload.registers {
                report.registration.cause = Some(NOBODY_ASKED.to_owned());
            }
            report.membership = MembershipReport::of(&facts.membership.borrow());
            report.health = HealthReport::of(&facts.health.borrow());
            report.address = AddressReport::of(&facts.addresses.borrow());
            report.files = facts.publications.iter().map(PublicationReport::of).collect();
            report.consumers =
                facts.consumers.borrow().iter().map(|((_, takes), c)| ConsumerReport::of(takes, c)).collect();
            report.reloads = facts.reloads.iter().map(|(hook, fact)| ReloadReport::of(hook, &fact.borrow())).collect();
            report.inbound = facts.inbounds.iter().map(InboundReport::of).collect();
        }
        // Mistakes in files that were read before do not stop what runs.
        report.cause = match workload.broken.first().filter(|_| workload.facts.is_none()) {
            Some(mistake) => Some(mistake.clone()),
            None => report.missing(workload.registers),
        };
        report.ready = report.cause.is_none();
        report
    }

    /// What this workload lacks to be ready; none when it is.
    fn missing(&self, registers: bool) -> Option<String> {
        let (identity, registration) = (self.identity.state, self.registration.state);
        let certified = matches!(identity, IdentityState::Valid | IdentityState::Refused);
        let words = match identity {
            IdentityState::None => "no certificate yet",
            IdentityState::Expired => "the certificate has expired",
            _ => "neither certificate nor token is accepted any more; put a new token into place",
        };
        if !certified {
            return Some(self.identity.cause.clone().unwrap_or_else(|| words.to_owned()));
        }
        let deaf = || self.inbound.iter().find_map(|listener| listener.cause.clone());
        let words = match registration {
            // A port that the mesh calls and nobody answers at.
            RegistrationState::Registered => return deaf(),
            _ if !registers => return deaf(),
            RegistrationState::Absent => "not registered yet",
            RegistrationState::Asked => "registration asked for, no answer yet",
            RegistrationState::Lost => "registration lost",
            RegistrationState::Parked => "registration refused",
        };
        Some(self.registration.cause.clone().unwrap_or_else(|| words.to_owned()))
    }
}

fn cause(trouble: Option<&Trouble>) -> Option<String> {
    trouble.map(|trouble| trouble.cause.clone())
}

fn kind(trouble: Option<&Trouble>) -> Option<String> {
    trouble.map(|trouble| trouble.kind.to_owned())
}

impl IdentityReport {
    pub(super) fn of(identity: &Identity, registration: &Registration, now: SystemTime) -> Self {
        let refusal = match registration {
            Registration::Registered { trouble, .. } => trouble.as_ref(),
            _ => None,
        };
        let refusal = refusal.filter(|trouble| trouble.kind == Trouble::NEW_CERTIFICATE_REFUSED);
        let state = match &identity.current {
            _ if identity.credentials_dead && identity.valid(now).is_none() => IdentityState::Dead,
            None => IdentityState::None,
            Some(_) if identity.valid(now).is_none() => IdentityState::Expired,
            Some(_) if refusal.is_some() => IdentityState::Refused,
            Some(_) => IdentityState::Valid,
        };
        let svid = identity.current.as_ref().map(|context| &context.svid);
        Self {
            state,
            serial: svid.map(|svid| svid.serial().to_owned()),
            not_before: svid.map(|svid| Timestamp(svid.not_before())),
            not_after: svid.map(|svid| Timestamp(svid.not_after())),
            renew_at: identity.renew_at.map(Timestamp),
            kind: kind(identity.trouble.as_ref().or(refusal)),
            cause: cause(identity.trouble.as_ref().or(refusal)),
            ..Self::default()
        }
    }
}

impl StoreReport {
    fn of(durable: &Durable, newest: Option<&str>) -> Self {
        Self {
            durable: newest.is_some_and(|serial| durable.holds(serial)),
            kind: kind(durable.trouble.as_ref()),
            cause: cause(durable.trouble.as_ref()),
        }
    }
}

impl RegistrationReport {
    fn of(registration: &Registration) -> Self {
        let (state, entry, since, trouble) = match registration {
            Registration::Absent => return Self::default(),
            Registration::Asked { entry, since, trouble } => {
                (RegistrationState::Asked, entry, *since, trouble.as_ref())
            }
            Registration::Registered { entry, since, trouble } => {
                (RegistrationState::Registered, entry, *since, trouble.as_ref())
            }
            Registration::Lost { entry, trouble } => (RegistrationState::Lost, entry, trouble.since, Some(trouble)),
            Registration::Parked { entry, trouble } => (RegistrationState::Parked, entry, trouble.since, Some(trouble)),
        };
        Self {
            state,
            entry: Some(entry.clone()),
            since: Some(Timestamp(since)),
            kind: kind(trouble),
            cause: cause(trouble),
        }
    }
}

impl MembershipReport {
    fn of(membership: &Membership) -> Self {
        let selected = |state, selection: &Selection| Self {
            state,
            services: selection.services.clone(),
            ports: selection.ports.clone(),
            tls: selection.tls,
            cause: selection.mismatch.clone(),
        };
        let lacking = |state, cause: &str| Self { state, cause: Some(cause.to_owned()), ..Self::default() };
        match membership {
            Membership::Unknown { cause } => lacking(MembershipState::Unknown, cause),
            Membership::NotSelected => lacking(
                MembershipState::NotSelected,
                "no Service or ServiceEntry selects this workload; give one a selector that matches its labels",
            ),
            Membership::Listed(selection) => selected(MembershipState::Listed, selection),
            Membership::Withheld(selection) => selected(MembershipState::Withheld, selection),
        }
    }
}

impl HealthReport {
    fn of(health: &Health) -> Self {
        match health {
            Health::Unknown => Self { state: HealthState::Unknown, message: None },
            Health::Delayed { until } => {
                let message = format!("not probed before {}: initialDelaySeconds of the probe", Timestamp(*until));
                Self { state: HealthState::Unknown, message: Some(message) }
            }
            Health::Healthy => Self { state: HealthState::Healthy, message: None },
            Health::Unhealthy { message } => Self { state: HealthState::Unhealthy, message: Some(message.clone()) },
            Health::Parked { cause } => Self { state: HealthState::Parked, message: Some(cause.clone()) },
        }
    }
}

impl AddressReport {
    fn of(addresses: &Addresses) -> Self {
        let candidates = addresses.candidates.iter();
        Self {
            primary: addresses.primary,
            all: addresses.all.clone(),
            candidates: candidates.map(|c| CandidateReport { ip: c.ip, reason: c.reason.clone() }).collect(),
        }
    }
}

impl PublicationReport {
    fn of(published: &Published) -> Self {
        let fact = published.fact.borrow();
        // Never said of what is not there: somebody may have removed it a moment ago.
        let missing = published.paths.iter().find(|path| fact.serial.is_some() && !path.exists());
        let removed = missing.map(|path| format!("{} was removed by somebody; it is made anew", path.display()));
        Self {
            publisher: published.name.clone(),
            serial: fact.serial.clone().filter(|_| missing.is_none()),
            kind: kind(fact.trouble.as_ref()),
            cause: cause(fact.trouble.as_ref()).or(removed),
        }
    }
}

impl ConsumerReport {
    fn of(resource: &str, consumer: &Consumer) -> Self {
        let state = match (&consumer.accepted, &consumer.sent) {
            _ if consumer.refusal.is_some() => ConsumerState::Refused,
            (None, _) => ConsumerState::Waiting,
            (accepted, sent) if accepted == sent => ConsumerState::Current,
            _ => ConsumerState::Behind,
        };
        Self {
            protocol: consumer.protocol.to_owned(),
            resource: resource.to_owned(),
            state,
            node: consumer.node.clone(),
            uid: consumer.uid,
            pid: consumer.pid,
            version: consumer.accepted.as_deref().map(str::to_owned),
            cause: consumer.refusal.clone(),
        }
    }
}

impl ReloadReport {
    fn of(hook: &str, reload: &Reload) -> Self {
        let (state, serial, served, trouble) = match reload {
            Reload::None => return Self { hook: hook.to_owned(), ..Self::default() },
            Reload::Running { serial } => (ReloadState::Running, serial, None, None),
            Reload::Reloaded { serial, verified } => (ReloadState::Reloaded, serial, verified.then_some(serial), None),
            Reload::Failed { serial, trouble } => (ReloadState::Failed, serial, None, Some(trouble)),
            Reload::Stale { serial, served, trouble } => (ReloadState::Stale, serial, served.as_ref(), Some(trouble)),
        };
        Self {
            hook: hook.to_owned(),
            state,
            serial: Some(serial.clone()),
            served: served.cloned(),
            kind: kind(trouble),
            cause: cause(trouble),
        }
    }
}

impl InboundReport {
    fn of(inbound: &Inbound) -> Self {
        let counters = &inbound.counters;
        let (address, cause) = match inbound.place.borrow().clone() {
            InboundPlace::Absent => (None, None),
            InboundPlace::Bound(address) => (Some(address), None),
            InboundPlace::Deaf { at, cause } => (Some(at), Some(cause)),
            InboundPlace::Failed(cause) => (None, Some(cause)),
        };
        let (classes, micros) = counters.latency();
        let seconds = |micros: u64| std::time::Duration::from_micros(micros).as_secs_f64();
        let refused = InboundRefusal::ALL.iter().map(|kind| (kind.as_str().to_owned(), counters.refusals(*kind)));
        Self {
            listen: inbound.listen.clone(),
            address,
            forward: inbound.forward.clone(),
            mode: if inbound.permissive { "permissive" } else { "strict" }.to_owned(),
            open: counters.open.load(Relaxed),
            connections: counters.accepted.load(Relaxed),
            plain: counters.plain.load(Relaxed),
            bytes_in: counters.bytes_in.load(Relaxed),
            bytes_out: counters.bytes_out.load(Relaxed),
            handshakes: LatencyReport {
                count: classes.iter().sum(),
                seconds: seconds(micros),
                classes: HANDSHAKE_BOUNDS.iter().map(|bound| seconds(*bound)).zip(classes).collect(),
            },
            refused: refused.filter(|(_, count)| *count > 0).collect(),
            last_refusal: counters.last_refusal(),
            cause,
            notes: inbound.notes.clone(),
        }
    }
}
