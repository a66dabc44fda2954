//! From what is configured to inbound listeners.

use crate::{
    command::words,
    health::Detour,
    host::Local,
    inbound::{Listener, Place, Settings, Threads},
    spiffe::SpiffeId,
    status::{InboundCounters, InboundPlace, tell},
    systemd::Listeners,
    workload::{ProbeMethod, ReadinessProbe, Workload},
};
use serde_json::Value;
use std::{collections::BTreeSet, io, sync::Arc};
use tokio::sync::watch;

/// The listener of a workload at one of its places, with the ends of its facts.
pub(super) fn listener(
    workload: &str,
    id: &SpiffeId,
    inbound: &Settings,
    given: &Listeners,
    threads: Threads,
    (fact, counters): (watch::Sender<InboundPlace>, Arc<InboundCounters>),
) -> Listener {
    let place = place(workload, inbound).inherit(given);
    Listener { place, id: id.clone(), settings: inbound.clone(), threads, fact, counters }
}

/// A listener without threads is one that cannot listen, and is told as such.
pub(super) fn no_threads(fact: &watch::Sender<InboundPlace>, error: &io::Error) {
    let cause = format!(
        "the system gives no threads for inbound connections, so nobody listens: {}; raise its bound (TasksMax= of the service)",
        words(error)
    );
    let news = InboundPlace::Failed(cause.clone());
    if *fact.borrow() != news {
        tracing::error!(cause, "no inbound listener, tried again");
    }
    tell(fact, news);
}

/// Where a workload listens.
pub(super) fn place(workload: &str, inbound: &Settings) -> Place {
    Place::new(workload, inbound.listen)
}

/// What may not be as it was meant, of each listener.
pub(super) fn notes(workload: &Workload, inbound: &[Settings]) -> Vec<Vec<String>> {
    let announced = announced(workload);
    let served: Vec<_> = inbound.iter().map(|inbound| inbound.listen.port).collect();
    let notes = |(i, inbound): (usize, &Settings)| {
        let mut notes = Vec::from_iter(unannounced(inbound.listen.port, &announced));
        if i == 0 {
            notes.extend(unserved(&announced, &served));
        }
        let probe = workload.probe.as_ref();
        notes.extend(endless(&inbound.forward));
        notes.extend(probe.and_then(|probe| misplaced(probe, workload.probe_localhost, inbound, &served)));
        notes
    };
    inbound.iter().enumerate().map(notes).collect()
}

/// The ports of the WorkloadGroup's template, as far as its bundle has them (`ISTIO_META_POD_PORTS`).
fn announced(workload: &Workload) -> Vec<u16> {
    let ports = match workload.metadata.get("POD_PORTS") {
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_default(),
        _ => Value::Null,
    };
    let port = |port: &Value| u16::try_from(port.get("containerPort")?.as_u64()?).ok();
    let ports: BTreeSet<_> = ports.as_array().into_iter().flatten().filter_map(port).collect();
    ports.into_iter().collect()
}

/// What to say when we listen at a port that the group does not name. A Service may name it all the same.
fn unannounced(port: u16, announced: &[u16]) -> Option<String> {
    (port != 0 && !announced.is_empty() && !announced.contains(&port)).then(|| {
        format!(
            "the WorkloadGroup announces {}, not {port}: nobody in the mesh will call {port} unless a Service or \
             ServiceEntry has it as targetPort",
            list(announced)
        )
    })
}

/// What to say when the group names a port at which nobody answers for the application.
fn unserved(announced: &[u16], served: &[u16]) -> Option<String> {
    let unserved: Vec<_> = announced.iter().copied().filter(|port| !served.contains(port)).collect();
    (!unserved.is_empty() && !served.contains(&0)).then(|| {
        format!(
            "the WorkloadGroup announces {}, where no entry of inbound listens: the mesh will speak mutual TLS to the \
             application itself there",
            list(&unserved)
        )
    })
}

/// What to say when the probe asks the workload's address for the port that the application has on a loopback address.
fn misplaced(probe: &ReadinessProbe, localhost: bool, inbound: &Settings, served: &[u16]) -> Option<String> {
    let (host, port) = match &probe.method {
        ProbeMethod::Http { host, port, .. } | ProbeMethod::Tcp { host, port } => (host.is_some(), *port),
        ProbeMethod::Grpc { port, .. } => (false, *port),
        ProbeMethod::Exec { .. } => return None,
    };
    let Local::Tcp(forward) = &inbound.forward else { return None };
    (port == forward.port() && !host && !localhost && !served.contains(&port)).then(|| {
        format!(
            "the probe asks port {port} at the workload's own address, and the application is at {forward}: let the probe of the \
             WorkloadGroup ask port {}, which leads there, too",
            inbound.listen.port
        )
    })
}

/// What to say when the application cannot be told that its caller did not end in order: no reset can be sent there.
fn endless(forward: &Local) -> Option<String> {
    matches!(forward, Local::Unix(_)).then(|| {
        format!(
            "to an application on a unix socket, a caller whose TLS is cut off looks like one that has said all it had to say: let \
             it listen on a loopback address instead of {forward}, unless its protocol tells where a message ends (HTTP does)"
        )
    })
}

fn list(ports: &[u16]) -> String {
    let texts: Vec<_> = ports.iter().map(u16::to_string).collect();
    format!("port{} {}", if texts.len() == 1 { "" } else { "s" }, texts.join(", "))
}

/// The probe asks the application, not our listener in front of it. `place` says where that is.
pub(super) fn detour(inbound: &Settings, place: watch::Receiver<InboundPlace>) -> Detour {
    Detour {
        listen: (inbound.listen.ip, inbound.listen.port),
        place,
        to: inbound.forward.clone(),
        proxy_header: inbound.proxy_header,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::Config;
    use std::{path::Path, time::Duration};

    #[test]
    fn ports_are_compared_with_those_of_the_group() {
        assert_eq!(unannounced(8443, &[8443, 80]), None);
        assert_eq!(unannounced(8443, &[]), None);
        assert!(
            unannounced(9, &[8443, 80])
                .is_some_and(|note| note.starts_with("the WorkloadGroup announces ports 8443, 80, not 9"))
        );
        assert_eq!(unserved(&[8443], &[80, 8443]), None);
        assert!(
            unserved(&[8443, 80], &[80])
                .is_some_and(|note| note.starts_with("the WorkloadGroup announces port 8443, where"))
        );
        assert_eq!(unserved(&[], &[80]), None);
    }

    #[test]
    fn without_threads_nobody_is_served() {
        let fact = watch::Sender::default();
        no_threads(&fact, &io::ErrorKind::WouldBlock.into());
        assert!(fact.borrow().unserved().is_some_and(|cause| cause.contains("TasksMax=")));
    }

    #[test]
    fn who_cannot_be_told_of_a_cut_is_named() {
        assert_eq!(endless(&Local::Tcp("127.0.0.1:80".parse().unwrap())), None);
        assert!(endless(&Local::Unix("/run/app.sock".into())).is_some_and(|note| note.contains("unix:/run/app.sock")));
    }

    #[test]
    fn a_probe_that_goes_past_the_listener_is_noticed() {
        let text = "workloads: {a: {inbound: [{listen: 8080, forward: 8081}]}}";
        let inbound = Config::parse(Path::new("x"), text).unwrap().workload("a").inbound.remove(0);
        let probe = |host: Option<&str>, port: u16| ReadinessProbe {
            initial_delay: Duration::ZERO,
            timeout: Duration::from_secs(1),
            period: Duration::from_secs(1),
            success_threshold: 1,
            failure_threshold: 1,
            method: ProbeMethod::Tcp { host: host.map(str::to_owned), port },
        };
        assert!(
            misplaced(&probe(None, 8081), false, &inbound, &[8080]).is_some_and(|note| note.contains("ask port 8080"))
        );
        assert_eq!(misplaced(&probe(None, 8081), true, &inbound, &[8080]), None);
        assert_eq!(misplaced(&probe(Some("localhost"), 8081), false, &inbound, &[8080]), None);
        assert_eq!(misplaced(&probe(None, 8080), false, &inbound, &[8080]), None);
    }
}
