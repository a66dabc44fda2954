//! The parts of a workload at work: what each is made from, and its loop. Two equal ones are the same part, and whatever
//! else changes, it goes on: its sockets, its connections, its registration.

use super::{
    control::Control,
    facts::Writers,
    hooks,
    host::Host,
    inbound, journal,
    outputs::{configured, outputs},
};
use crate::{
    address,
    config::{HealthConfig, SocketConfig, WorkloadConfig},
    control::Post,
    files::Root,
    health::{self, ProbeSettings},
    host::Resolver,
    inbound::Settings,
    locality::{self, Platform},
    publish::{self, Files, Hook, HookSettings, Policy, Switches},
    spiffe::SpiffeId,
    status::{Addresses, Facts, Inbound, Published},
    systemd::Units,
    time::Clock,
    workload::{Hosts, ReadinessProbe, Workload},
};
use std::{net::IpAddr, path::PathBuf, pin::Pin, sync::Arc, time::Duration};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;

/// One part.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Part {
    /// Finds the addresses of this host.
    Address { given: Vec<IpAddr>, control_plane: (String, u16), hosts: Hosts },
    /// Asks the platform where this host stands.
    Locality { platform: Platform },
    /// Tells the journal what changes.
    Journal,
    /// Writes one output.
    Files { name: String, files: Files },
    /// Tells programs of a switch of `files`.
    Hook { name: String, hook: HookSettings, files: Vec<String> },
    /// Serves the identity on a socket.
    Socket { name: String, path: PathBuf, id: SpiffeId, settings: SocketConfig },
    /// Answers the mesh for the application.
    Inbound { id: SpiffeId, settings: Settings },
    /// Probes the application, and not what is `inbound` of it.
    Health { probe: Option<ReadinessProbe>, localhost: bool, settings: HealthConfig, inbound: Vec<Settings> },
    /// Keeps certificate and registration.
    Control(Box<Control>),
}

/// The part that is there before it is clear that the workload may run.
pub(super) fn address(workload: &Workload) -> Part {
    let authority = &workload.discovery.authority;
    Part::Address {
        given: workload.given.clone(),
        control_plane: (authority.host.clone(), authority.port),
        hosts: workload.hosts.clone(),
    }
}

/// All parts of `workload`, in the order in which they are started.
pub(super) fn parts(workload: &Arc<Workload>, settings: &WorkloadConfig, root: &Root) -> Vec<Part> {
    let outputs = outputs(workload, settings, root);
    let names: Vec<_> = outputs.iter().map(|(name, _)| name.clone()).collect();
    let hook = |(name, hook): (String, &HookSettings)| Part::Hook { name, hook: hook.clone(), files: names.clone() };
    let socket = |(name, place): (String, publish::Place)| Part::Socket {
        name,
        path: place.path(),
        id: workload.id.clone(),
        settings: settings.socket.clone(),
    };
    let inbound = |inbound: &Settings| Part::Inbound { id: workload.id.clone(), settings: inbound.clone() };
    let health = Part::Health {
        probe: workload.probe.clone(),
        localhost: workload.probe_localhost,
        settings: settings.health.clone(),
        inbound: settings.inbound.clone(),
    };
    // What is configured needs nobody's word.
    let platform = if workload.locality.is_some() { Platform::Off } else { settings.platform };
    let mut parts = vec![address(workload), Part::Locality { platform }, Part::Journal];
    parts.extend(hooks::named(&settings.hooks).map(hook));
    parts.extend(outputs.into_iter().map(|(name, files)| Part::Files { name, files }));
    parts.extend(configured(&workload.name, &settings.socket, root).map(socket));
    parts.extend(settings.inbound.iter().map(inbound));
    parts.extend([health, Part::Control(Box::new(Control::new(workload, settings)))]);
    parts
}

/// The reading ends of what `parts` write.
pub(super) fn facts(writers: &mut Writers, workload: &Workload, settings: &WorkloadConfig, parts: &[Part]) -> Facts {
    let (mut publications, mut reloads) = (Vec::new(), Vec::new());
    for part in parts {
        match part {
            Part::Files { name, files } => {
                let fact = writers.publication(name).subscribe();
                publications.push(Published { name: name.clone(), fact, paths: files.paths() });
            }
            Part::Socket { name, path, .. } => {
                let fact = writers.publication(name).subscribe();
                publications.push(Published { name: name.clone(), fact, paths: vec![path.clone()] });
            }
            Part::Hook { name, .. } => reloads.push((name.clone(), writers.reload(name).subscribe())),
            _ => {}
        }
    }
    let notes = inbound::notes(workload, &settings.inbound);
    let inbounds = settings.inbound.iter().zip(notes).map(|(inbound, notes)| {
        let (place, counters) = writers.inbound(&inbound.listen.to_string());
        Inbound {
            listen: inbound.listen.to_string(),
            forward: inbound.forward.to_string(),
            permissive: inbound.permissive,
            notes,
            place: place.subscribe(),
            counters,
        }
    });
    let inbounds = inbounds.collect();
    Facts {
        identity: writers.identity.subscribe(),
        durable: writers.durable.subscribe(),
        token: writers.token.subscribe(),
        registration: writers.registration.subscribe(),
        membership: writers.membership.subscribe(),
        health: writers.health.subscribe(),
        addresses: writers.addresses.subscribe(),
        publications,
        consumers: writers.consumers.subscribe(),
        reloads,
        inbounds,
    }
}

/// A loop that ends when it is told to.
pub(super) type Loop = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What the parts of one workload share.
pub(super) struct Shared<'a> {
    pub(super) workload: &'a Arc<Workload>,
    pub(super) settings: &'a WorkloadConfig,
    pub(super) host: &'a Host,
    /// The address that is registered.
    pub(super) registered: watch::Receiver<Addresses>,
    /// Whether the workload shall be taken out of service when it stops.
    pub(super) leaving: watch::Receiver<bool>,
    /// Of several hooks one acts at a time.
    pub(super) turn: &'a Arc<Mutex<()>>,
    pub(super) clock: Clock,
}

impl Part {
    /// Names it in the journal.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Address { .. } => "address",
            Self::Locality { .. } => "locality",
            Self::Journal => "journal",
            Self::Files { .. } => "files",
            Self::Hook { .. } => "hook",
            Self::Socket { .. } => "socket",
            Self::Inbound { .. } => "inbound",
            Self::Health { .. } => "health",
            Self::Control(_) => "control",
        }
    }

    /// How long its open connections may take to end.
    pub(super) fn drain(&self) -> Duration {
        if let Self::Inbound { settings, .. } = self { settings.drain } else { Duration::ZERO }
    }

    /// Where it listens for the mesh, as configured.
    pub(super) fn listens(&self) -> Option<String> {
        if let Self::Inbound { settings, .. } = self { Some(settings.listen.to_string()) } else { None }
    }

    /// What its socket is called when it is handed on.
    pub(super) fn socket(&self, workload: &str) -> Option<String> {
        match self {
            Self::Socket { path, .. } => path.to_str().map(str::to_owned),
            Self::Inbound { settings, .. } => Some(inbound::place(workload, settings).name().to_owned()),
            _ => None,
        }
    }

    /// Its loop, which ends at `stop`; none where the host lacks something, which is said.
    pub(super) fn start(&self, shared: &Shared<'_>, writers: &mut Writers, stop: CancellationToken) -> Option<Loop> {
        let &Shared { workload, settings, host, clock, .. } = shared;
        let identity = writers.identity.subscribe();
        Some(match self.clone() {
            Self::Address { given, control_plane, hosts } => {
                let resolver = Resolver::new(hosts);
                Box::pin(address::run(given, control_plane, resolver, writers.addresses.clone(), stop))
            }
            Self::Locality { platform } => {
                let (root, addresses) = (host.root.clone(), writers.addresses.subscribe());
                Box::pin(locality::run(platform, root, addresses, writers.located.clone(), stop))
            }
            Self::Journal => {
                let facts = facts(writers, workload, settings, &[]);
                Box::pin(journal::run(facts, clock, stop))
            }
            Self::Files { name, files } => {
                let (fact, looks) = (writers.publication(&name), host.looks.subscribe());
                Box::pin(publish::run(files, identity, fact, looks, clock, stop))
            }
            Self::Hook { name, hook: settings, files } => {
                let files = files.iter().map(|name| writers.publication(name).subscribe()).collect();
                let (switches, fact) = (Switches::new(files, identity), writers.reload(&name));
                let (commands, root) = (host.commands.clone(), host.root.clone());
                let hook = Hook { name, settings, commands, root };
                Box::pin(hook.run(switches, shared.turn.clone(), fact, clock, stop))
            }
            Self::Socket { name, settings, .. } => {
                let mut places = configured(&workload.name, &settings, &host.root);
                let (_, place) = places.find(|(other, _)| *other == name)?;
                let place = place.inherit(&workload.name, &host.listeners).looked_after(host.looks.subscribe());
                let policy = Policy::new(&workload.name, settings.allow.clone(), Units::new(&host.root));
                let (fact, consumers) = (writers.publication(&name), writers.consumers.clone());
                Box::pin(publish::serve(place, policy, identity, fact, consumers, clock, stop))
            }
            Self::Inbound { id, settings } => {
                let facts = writers.inbound(&settings.listen.to_string());
                let threads = host.threads().map_err(|error| inbound::no_threads(&facts.0, &error)).ok()?;
                let listener = inbound::listener(&workload.name, &id, &settings, &host.listeners, threads, facts);
                Box::pin(listener.run(identity, clock, stop))
            }
            Self::Health { probe, localhost, settings, inbound } => {
                let place = |settings: &Settings, writers: &mut Writers| {
                    inbound::detour(settings, writers.inbound(&settings.listen.to_string()).0.subscribe())
                };
                let probes = ProbeSettings {
                    allow_exec: settings.allow_exec,
                    commands: host.commands.clone(),
                    verify_tls: settings.verify_tls,
                    localhost,
                    detours: inbound.iter().map(|settings| place(settings, writers)).collect(),
                };
                Box::pin(health::run(probe, probes, writers.addresses.subscribe(), writers.health.clone(), stop))
            }
            Self::Control(control) => {
                let post = Post {
                    health: writers.health.subscribe(),
                    addresses: shared.registered.clone(),
                    registration: writers.registration.clone(),
                    membership: writers.membership.clone(),
                    stop,
                    leaving: shared.leaving.clone(),
                };
                let (local, located) = (writers.local.subscribe(), writers.located.subscribe());
                Box::pin(control.run(host.root.clone(), writers.kept(), local, located, post, clock))
            }
        })
    }
}
