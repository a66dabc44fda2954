//! From what is configured to inbound listeners.

use crate::{
    config::{ForwardConfig, InboundConfig},
    inbound::{Forward, Listener, Place, Settings, Threads},
    status::{Inbound, InboundCounters, InboundPlace},
    system::{Listeners, raise_descriptor_limit},
    workload::Workload,
};
use std::{io, sync::Arc};
use tokio::sync::watch;

/// The threads of the data path, and descriptors enough for its connections.
pub(super) fn threads() -> io::Result<Threads> {
    if let Err(error) = raise_descriptor_limit() {
        tracing::warn!(cause = %error, "the limit on open descriptors stays; many connections may not find room");
    }
    Threads::start()
}

/// The listeners of a workload, each with the fact that others may read.
pub(super) fn listeners(
    workload: &Workload,
    inbound: &[InboundConfig],
    given: &Listeners,
    threads: Option<&Threads>,
) -> Vec<(Inbound, Listener)> {
    let Some(threads) = threads else { return Vec::new() };
    let listener = |inbound: &InboundConfig| {
        let settings = settings(workload, inbound);
        let (fact, place) = watch::channel(InboundPlace::Absent);
        let counters = Arc::new(InboundCounters::default());
        let known = Inbound {
            listen: inbound.listen.to_string(),
            forward: settings.forward.to_string(),
            permissive: settings.permissive,
            place,
            counters: counters.clone(),
        };
        let place = Place::new(&workload.name, inbound.listen.ip, inbound.listen.port).inherit(given);
        (known, Listener { place, settings, threads: threads.clone(), fact, counters })
    };
    inbound.iter().map(listener).collect()
}

fn settings(workload: &Workload, inbound: &InboundConfig) -> Settings {
    Settings {
        id: workload.id.clone(),
        forward: match &inbound.forward {
            ForwardConfig::Tcp(address) => Forward::Tcp(*address),
            ForwardConfig::Unix(path) => Forward::Unix(path.clone()),
        },
        permissive: inbound.permissive,
        allow: inbound.allow.clone(),
        proxy_header: inbound.proxy_header,
        max_age: inbound.max_age,
        idle: inbound.idle,
        handshake: inbound.handshake,
        max_connections: inbound.max_connections,
        max_handshakes: inbound.max_handshakes,
        drain: inbound.drain,
    }
}
