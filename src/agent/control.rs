//! The two loops that talk to the control plane. They share its connections.

use crate::{
    config::{ControlPlaneConfig, IdentityConfig, MembershipConfig, WorkloadConfig},
    control::{Credential, Istiod, MembershipSettings, Post},
    files::{Root, Versions},
    host::Resolver,
    identity::{self, Wanted},
    session,
    status::Located,
    time::{BEAT, Clock},
    workload::{Overrides, Workload},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::watch;

/// What they do for one workload.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Control {
    workload: Arc<Workload>,
    control_plane: ControlPlaneConfig,
    identity: IdentityConfig,
    membership: MembershipConfig,
    /// The ports at which this agent itself answers for the application.
    served: Vec<u16>,
}

impl Control {
    pub(super) fn new(workload: &Arc<Workload>, settings: &WorkloadConfig) -> Self {
        // What only others obey is left out, so that a change of it is none here.
        let workload = Workload { output_certs: None, ignored: Vec::new(), ..Workload::clone(workload) };
        Self {
            workload: Arc::new(workload),
            control_plane: settings.control_plane.clone(),
            identity: settings.identity.clone(),
            membership: settings.membership.clone(),
            served: settings.inbound.iter().map(|inbound| inbound.listen.port).collect(),
        }
    }

    /// Keeps certificate and registration until `post.stop`; `files` says what its [files](local) are, `place` where this host
    /// stands.
    pub(super) async fn run(
        self,
        root: Root,
        facts: identity::Facts,
        files: watch::Receiver<Versions>,
        mut place: watch::Receiver<Located>,
        post: Post,
        clock: Clock,
    ) {
        let Self { workload, control_plane, identity: settings, membership, served } = self;
        let wanted = wanted(&workload, &settings, &root);
        let resolver = Resolver::new(workload.hosts.clone());
        let credential =
            Credential { token: workload.token.clone(), identity: facts.identity.subscribe(), files: files.clone() };
        let MembershipConfig { enabled, max_bytes } = membership;
        let membership = enabled.then_some(MembershipSettings { max_bytes, served });
        let xds = control_plane.xds;
        let control =
            Arc::new(Istiod::new(workload.clone(), credential, resolver, xds, membership, place.clone(), clock));
        // Each has a place of its own: futures as large as both would pass over the stack, whose pages stay.
        let kept = Box::pin(identity::run(control.clone(), wanted, facts, files.clone(), clock, post.stop.clone()));
        if workload.registers() {
            let registered = Box::pin(async {
                // An entry keeps the locality that it was made with.
                let _ = post.stop.run_until_cancelled(place.wait_for(|place| *place != Located::Soon)).await;
                session::run(control, post, files, clock).await;
            });
            tokio::join!(kept, registered);
        } else {
            kept.await;
        }
    }
}

/// What its token and its roots are now: whoever waits for others of them reads this, and looks at none.
pub(super) fn local(workload: &Workload) -> Versions {
    Versions::of(workload.token.paths().chain([workload.ca.roots.as_path(), workload.discovery.roots.as_path()]))
}

/// Where the certificate of a workload is kept.
fn store(workload: &str) -> PathBuf {
    Path::new("/var/lib/we-agent").join(workload)
}

/// What the identity loop asks for.
pub(super) fn wanted(workload: &Workload, settings: &IdentityConfig, root: &Root) -> Wanted {
    Wanted {
        id: workload.id.clone(),
        key: workload.key,
        ttl: workload.ttl,
        min_interval: settings.min_interval,
        looks: 2 * BEAT,
        root: root.clone(),
        store: store(&workload.name),
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
