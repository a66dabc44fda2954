//! One workload at work: its loops, its facts, and nothing shared with another.

use super::{
    hooks::hooks,
    inbound, journal,
    outputs::{outputs, places},
};
use crate::{
    address,
    command::Commands,
    config::{MembershipConfig, WorkloadConfig},
    control::{Credential, Istiod, MembershipSettings, Post},
    files::{FileWatch, Root},
    health::{self, ProbeSettings},
    host::Resolver,
    identity::{self, Wanted},
    inbound::Threads,
    locality::{self, Platform},
    publish::{self, Policy, Switches},
    session,
    status::{
        Addresses, Consumers, Facts, Health, Identity, Located, Membership, Publication, Registration, Reload, Trouble,
        WorkloadStatus,
    },
    systemd::{Listeners, Units},
    time::Clock,
    workload::{Overrides, Workload},
};
use std::{path::Path, sync::Arc, time::Duration};
use tokio::{
    sync::{Mutex, watch},
    task::{JoinHandle, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// What a workload finds on this host.
pub(super) struct Ground<'a> {
    pub(super) root: &'a Root,
    pub(super) listeners: &'a Listeners,
    pub(super) commands: &'a Commands,
    /// Of the inbound data path; none when nobody needs it.
    pub(super) threads: Option<&'a Threads>,
    /// Tells each look of the floor: the process is awake then.
    pub(super) looks: &'a watch::Sender<Instant>,
}

/// A running workload.
#[derive(Debug)]
pub(super) struct Unit {
    workload: Arc<Workload>,
    facts: Facts,
    drain: Duration,
    task: JoinHandle<()>,
}

impl Unit {
    /// Starts the loops of `workload`. They end when `stop` is cancelled; `leaving` says whether the machine goes down.
    pub(super) fn start(
        workload: Workload,
        settings: WorkloadConfig,
        ground: &Ground<'_>,
        stop: &CancellationToken,
        leaving: &watch::Receiver<bool>,
    ) -> Self {
        let &Ground { root, listeners, commands, threads, looks } = ground;
        let workload = Arc::new(workload);
        let clock = Clock::default();
        let wanted = wanted(&workload, &settings, root);
        let identity = identity::load(&wanted, clock.now()).unwrap_or_else(|error| Identity {
            trouble: Some(Trouble::met(None, "store", error.to_string(), clock.now())),
            ..Identity::default()
        });
        let (identity, registration, membership) = (
            watch::Sender::new(identity),
            watch::Sender::new(Registration::default()),
            watch::Sender::new(Membership::default()),
        );
        let (health, addresses) = (watch::Sender::new(Health::default()), watch::Sender::new(Addresses::default()));
        let outputs: Vec<_> = outputs(&workload, &settings, root)
            .into_iter()
            .map(|(name, files)| (name, files, watch::Sender::new(Publication::default())))
            .collect();
        let places = places(&workload, &settings, root, listeners, looks);
        let consumers = watch::Sender::new(Consumers::default());
        let mut publications: Vec<_> = outputs.iter().map(|(name, _, fact)| (name.clone(), fact.subscribe())).collect();
        publications.extend(places.iter().map(|(name, _, fact)| (name.clone(), fact.subscribe())));
        let hooks: Vec<_> = hooks(&settings.hooks, root, commands)
            .into_iter()
            .map(|hook| (hook, watch::Sender::new(Reload::None)))
            .collect();
        let drain = settings.inbound.iter().map(|inbound| inbound.drain).max().unwrap_or_default();
        let inbounds = inbound::listeners(&workload, &settings.inbound, listeners, threads);
        let facts = Facts {
            identity: identity.subscribe(),
            registration: registration.subscribe(),
            membership: membership.subscribe(),
            health: health.subscribe(),
            addresses: addresses.subscribe(),
            publications,
            consumers: consumers.subscribe(),
            reloads: hooks.iter().map(|(hook, fact)| (hook.name.clone(), fact.subscribe())).collect(),
            inbounds: inbounds.iter().map(|(fact, _)| fact.clone()).collect(),
        };

        let stop = stop.child_token();
        let mut loops = JoinSet::new();
        let span = || tracing::info_span!("workload", workload = %workload.name, spiffe_id = %workload.id);
        loops.spawn(journal::run(facts.clone(), clock, stop.clone()).instrument(span()));
        let switches =
            Switches::new(outputs.iter().map(|(_, _, fact)| fact.subscribe()).collect(), facts.identity.clone());
        let turn = Arc::new(Mutex::new(()));
        for (hook, fact) in hooks {
            loops.spawn(hook.run(switches.clone(), turn.clone(), fact, clock, stop.clone()).instrument(span()));
        }
        for (_, files, fact) in outputs {
            loops.spawn(publish::run(files, facts.identity.clone(), fact, clock, stop.clone()).instrument(span()));
        }
        for (_, place, fact) in places {
            let policy = Policy::new(&workload.name, settings.socket.allow.clone(), Units::new(root));
            let (identity, consumers) = (facts.identity.clone(), consumers.clone());
            let served = publish::serve(place, policy, identity, fact, consumers, clock, stop.clone());
            loops.spawn(served.instrument(span()));
        }
        for (_, listener) in inbounds {
            loops.spawn(listener.run(facts.identity.clone(), clock, stop.clone()).instrument(span()));
        }
        let resolver = Resolver::new(workload.hosts.clone());
        let authority = &workload.discovery.authority;
        let target = (authority.host.clone(), authority.port);
        loops.spawn(
            address::run(workload.given.clone(), target, resolver.clone(), addresses, stop.clone()).instrument(span()),
        );
        let probes = ProbeSettings {
            allow_exec: settings.health.allow_exec,
            commands: commands.clone(),
            verify_tls: settings.health.verify_tls,
            localhost: workload.probe_localhost,
            detours: inbound::detours(&settings.inbound, &facts.inbounds),
        };
        loops.spawn(
            health::run(workload.probe.clone(), probes, facts.addresses.clone(), health, stop.clone())
                .instrument(span()),
        );
        let post = Post {
            health: facts.health.clone(),
            addresses: facts.addresses.clone(),
            registration,
            membership,
            stop: stop.clone(),
            leaving: leaving.clone(),
        };
        let connected = connected(workload.clone(), settings, wanted, resolver, identity, post, clock);
        loops.spawn(connected.instrument(span()));
        let task = tokio::spawn(join(loops, stop).instrument(span()));
        Self { workload, facts, drain, task }
    }

    /// Whether it ended although nobody told it to: a bug.
    pub(super) fn has_failed(&self) -> bool {
        self.task.is_finished()
    }

    /// How long its open connections may take to end.
    pub(super) fn drain(&self) -> Duration {
        self.drain
    }

    /// Waits for its end.
    pub(super) async fn ended(self) {
        let _ = self.task.await;
    }

    pub(super) fn status(&self, name: &str) -> WorkloadStatus {
        WorkloadStatus {
            name: name.to_owned(),
            spiffe_id: Some(self.workload.id.to_string()),
            registers: self.workload.registers(),
            broken: Vec::new(),
            ignored: self.workload.ignored.clone(),
            facts: Some(self.facts.clone()),
        }
    }
}

/// The two loops that talk to the control plane. They share its connections.
async fn connected(
    workload: Arc<Workload>,
    settings: WorkloadConfig,
    wanted: Wanted,
    resolver: Resolver,
    identity: watch::Sender<Identity>,
    post: Post,
    clock: Clock,
) {
    let credential = Credential { token: workload.token.clone(), identity: identity.subscribe() };
    let xds = settings.control_plane.xds;
    let MembershipConfig { enabled, max_bytes } = settings.membership;
    let served = settings.inbound.iter().map(|inbound| inbound.listen.port).collect();
    let membership = enabled.then_some(MembershipSettings { max_bytes, served });
    let platform = if workload.locality.is_some() { Platform::Off } else { settings.platform };
    let (located, mut place) = watch::channel(Located::default());
    let asked = locality::run(platform, wanted.root.clone(), post.addresses.clone(), located, post.stop.clone());
    let control = Arc::new(Istiod::new(workload.clone(), credential, resolver, xds, membership, place.clone(), clock));
    let roots = [&workload.ca.roots, &workload.discovery.roots].into_iter().cloned();
    let local = FileWatch::new(workload.token.paths().map(Path::to_owned).chain(roots));
    let kept = identity::run(control.clone(), wanted, identity, local.clone(), clock, post.stop.clone());
    if workload.registers() {
        let registered = async {
            // An entry keeps the locality that it was made with.
            let _ = post.stop.run_until_cancelled(place.wait_for(|place| *place != Located::Soon)).await;
            session::run(control, post, local, clock).await;
        };
        tokio::join!(asked, kept, registered);
    } else {
        kept.await;
    }
}

/// Waits for all loops. One that panicked takes the others of its workload with it, in order, and nobody else's.
async fn join(mut loops: JoinSet<()>, stop: CancellationToken) {
    while let Some(ended) = loops.join_next().await {
        if !stop.is_cancelled() {
            match ended {
                Ok(()) => tracing::error!("a loop ended by itself, which is a bug; the workload is started again"),
                Err(error) => {
                    tracing::error!(cause = %error, "a loop failed, which is a bug; the workload is started again")
                }
            }
            stop.cancel();
        }
    }
}

fn wanted(workload: &Workload, settings: &WorkloadConfig, root: &Root) -> Wanted {
    Wanted {
        id: workload.id.clone(),
        key: workload.key,
        ttl: workload.ttl,
        min_interval: settings.identity.min_interval,
        root: root.clone(),
        store: Path::new("/var/lib/we-agent").join(&workload.name),
        token: workload.token.clone(),
    }
}

/// What our own configuration says over the bundle.
pub(super) fn overrides(settings: &WorkloadConfig) -> Overrides {
    let control = &settings.control_plane;
    Overrides {
        addresses: settings.address.clone(),
        trust_domain: settings.trust_domain.clone(),
        key: settings.identity.key,
        ttl: settings.identity.ttl,
        remove_token: settings.identity.remove_token,
        output_certs: settings.files.output_certs,
        discovery: control.discovery_address.clone(),
        ca: control.ca_address.clone(),
        server_name: control.server_name.clone(),
        locality: settings.locality.clone(),
        cluster_id: settings.cluster_id.clone(),
        network: settings.network.clone(),
        labels: settings.labels.clone(),
    }
}
