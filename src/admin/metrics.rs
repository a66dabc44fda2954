//! OpenMetrics, made from a [`Report`] at each scrape: there is no second place that counts.

mod inbound;

use crate::status::{Report, State, Timestamp, WorkloadReport};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use std::{
    collections::BTreeMap,
    sync::atomic::AtomicU64,
    time::{SystemTime, UNIX_EPOCH},
};

/// Of what [`render`] returns.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;

/// The metrics of every workload, how many lines of the log were dropped, and how many tasks the daemon has.
pub(super) fn render(report: &Report, dropped: u64, tasks: usize) -> String {
    let mut registry = Registry::default();
    let ready = Gauge::<f64, AtomicU64>::default();
    ready.set(flag(report.ready));
    registry.register("we_agent_ready", "Whether there is a workload and all are ready", ready);
    let lines = Counter::<u64>::default();
    lines.inc_by(dropped);
    registry.register("we_agent_log_dropped", "Lines of the log that were dropped because nobody took them", lines);
    let alive = Gauge::<f64, AtomicU64>::default();
    alive.set(tasks as f64);
    registry.register("we_agent_tasks", "Tasks of the daemon; steady while nothing changes", alive);
    let mut gauges = |name: &'static str, help: &'static str| {
        let gauges = Gauges::default();
        registry.register(name, help, gauges.clone());
        gauges
    };
    let info = gauges("we_agent_build", "The version of the daemon; always 1");
    put(&info, vec![("version", report.version.clone())], 1.0);
    let ready = gauges("we_agent_workload_ready", "Whether identity, registration and listeners are there");
    let broken = gauges("we_agent_bundle_mistakes", "Mistakes in the bundle; nothing runs while there are any");
    let not_before =
        gauges("we_agent_certificate_not_before_timestamp_seconds", "Start of validity; changes at renewal");
    let not_after = gauges("we_agent_certificate_not_after_timestamp_seconds", "End of validity");
    let remaining = gauges("we_agent_certificate_remaining_seconds", "Validity that is left; negative once expired");
    let age = gauges("we_agent_certificate_age_seconds", "Time since the certificate began to be valid");
    let renewal = gauges("we_agent_certificate_renewal_timestamp_seconds", "When the next renewal is due");
    let durable = gauges("we_agent_certificate_durable", "Whether a restart would find the newest certificate");
    let since = gauges("we_agent_registration_since_timestamp_seconds", "Since when the registration is in its state");
    let identity = gauges("we_agent_identity_state", "1 for the state of the identity, 0 for the others");
    let registration = gauges("we_agent_registration_state", "1 for the state of the registration, 0 for the others");
    let membership = gauges("we_agent_membership_state", "1 for the state of the membership, 0 for the others");
    let health = gauges("we_agent_health_state", "1 for the state of the application, 0 for the others");
    let services = gauges("we_agent_membership_services", "Services that select the workload");
    let published = gauges("we_agent_publication_current", "Whether consumers see the newest certificate");
    let consumers = gauges("we_agent_consumers", "Programs on the socket, by what they take and whether they use it");
    let reload = gauges("we_agent_reload_state", "1 for the state of the hook, 0 for the others");
    let istio = gauges("istio_agent_cert_expiry_seconds", "Validity that is left, under the name of Istio's own agent");

    for w in &report.workloads {
        put(&ready, of(w), flag(w.ready));
        put(&broken, of(w), w.broken.len() as f64);
        let named = || [of(w), vec![("spiffe_id", w.spiffe_id.clone().unwrap_or_default())]].concat();
        put_time(&not_before, named(), w.identity.not_before);
        put_time(&not_after, named(), w.identity.not_after);
        if let Some(end) = w.identity.not_after {
            let left = seconds(end.0) - seconds(report.time.0);
            put(&remaining, of(w), left);
            put(&istio, [vec![("resource_name", "default".to_owned())], of(w)].concat(), left);
        }
        if let Some(start) = w.identity.not_before {
            put(&age, of(w), seconds(report.time.0) - seconds(start.0));
        }
        put_time(&renewal, of(w), w.identity.renew_at);
        put(&durable, of(w), flag(w.identity.store.durable));
        put_time(&since, of(w), w.registration.since);
        put_state(&identity, of(w), w.identity.state);
        put_state(&registration, of(w), w.registration.state);
        put_state(&membership, of(w), w.membership.state);
        put_state(&health, of(w), w.health.state);
        put(&services, of(w), w.membership.services.len() as f64);
        let mut counts = BTreeMap::new();
        for c in &w.consumers {
            *counts.entry((c.protocol.as_str(), c.resource.as_str(), c.state.as_str())).or_insert(0.0) += 1.0;
        }
        for ((protocol, resource, state), count) in counts {
            let named = [("protocol", protocol), ("resource", resource), ("state", state)];
            let labels = named.map(|(label, word)| (label, word.to_owned()));
            put(&consumers, [of(w), labels.to_vec()].concat(), count);
        }
        for p in &w.files {
            let labels = [of(w), vec![("publisher", p.publisher.clone())]].concat();
            put(&published, labels, flag(p.serial.is_some() && p.serial == w.identity.serial));
        }
        for r in &w.reloads {
            put_state(&reload, [of(w), vec![("hook", r.hook.clone())]].concat(), r.state);
        }
    }
    let failures = Family::<Labels, Counter>::default();
    for w in &report.workloads {
        for f in &w.failures {
            let labels = [of(w), vec![("what", f.what.clone()), ("kind", f.kind.clone())]].concat();
            failures.get_or_create(&labels).inc_by(f.count);
        }
    }
    registry.register("we_agent_failures", "What has failed so far, by the kind of trouble", failures);
    registry.register_collector(Box::new(inbound::Listeners::of(report)));
    let mut text = String::new();
    // Writing to a String does not fail; were it to, half a page without its end mark is refused by the scraper.
    let _ = encode(&mut text, &registry);
    text
}

fn of(workload: &WorkloadReport) -> Labels {
    vec![("workload", workload.name.clone())]
}

fn put(gauges: &Gauges, labels: Labels, value: f64) {
    gauges.get_or_create(&labels).set(value);
}

fn put_time(gauges: &Gauges, labels: Labels, time: Option<Timestamp>) {
    if let Some(time) = time {
        put(gauges, labels, seconds(time.0));
    }
}

fn put_state<S: State>(gauges: &Gauges, labels: Labels, current: S) {
    for state in S::ALL {
        let word = vec![("state", state.as_str().to_owned())];
        put(gauges, [labels.clone(), word].concat(), flag(*state == current));
    }
}

fn flag(yes: bool) -> f64 {
    if yes { 1.0 } else { 0.0 }
}

/// Seconds since 1970, negative before.
fn seconds(time: SystemTime) -> f64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => after.as_secs_f64(),
        Err(before) => -before.duration().as_secs_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{
        FailureReport, IdentityReport, IdentityState, RegistrationReport, RegistrationState, ReloadState,
    };
    use std::time::Duration;

    fn at(seconds: u64) -> Timestamp {
        Timestamp(UNIX_EPOCH + Duration::from_secs(seconds))
    }

    fn report(identity: IdentityReport) -> Report {
        let registration = RegistrationReport { state: RegistrationState::Lost, ..Default::default() };
        let workload = WorkloadReport {
            name: "payments".to_owned(),
            spiffe_id: Some("spiffe://td/ns/a/sa/b".to_owned()),
            ready: true,
            cause: None,
            identity,
            registration,
            membership: Default::default(),
            health: Default::default(),
            address: Default::default(),
            files: Vec::new(),
            consumers: Vec::new(),
            reloads: vec![crate::status::ReloadReport {
                hook: "nginx.service".to_owned(),
                state: ReloadState::Stale,
                ..Default::default()
            }],
            inbound: Vec::new(),
            failures: vec![FailureReport { what: "hook".to_owned(), kind: "reload_stale".to_owned(), count: 3 }],
            ignored: Vec::new(),
            broken: Vec::new(),
        };
        Report {
            version: "1".to_owned(),
            time: at(100),
            ready: true,
            cause: None,
            note: None,
            workloads: vec![workload],
        }
    }

    #[test]
    fn a_certificate_has_its_dates_and_a_state_its_word() {
        let identity = IdentityReport {
            state: IdentityState::Expired,
            not_before: Some(at(10)),
            not_after: Some(at(70)),
            ..Default::default()
        };
        let text = render(&report(identity), 7, 3);
        for line in [
            "# TYPE we_agent_ready gauge",
            "we_agent_ready 1.0",
            "we_agent_log_dropped_total 7",
            "we_agent_tasks 3.0",
            "we_agent_failures_total{workload=\"payments\",what=\"hook\",kind=\"reload_stale\"} 3",
            "we_agent_certificate_remaining_seconds{workload=\"payments\"} -30.0",
            "we_agent_certificate_age_seconds{workload=\"payments\"} 90.0",
            "istio_agent_cert_expiry_seconds{resource_name=\"default\",workload=\"payments\"} -30.0",
            "we_agent_identity_state{workload=\"payments\",state=\"expired\"} 1.0",
            "we_agent_identity_state{workload=\"payments\",state=\"valid\"} 0.0",
            "we_agent_registration_state{workload=\"payments\",state=\"lost\"} 1.0",
            "we_agent_reload_state{workload=\"payments\",hook=\"nginx.service\",state=\"stale\"} 1.0",
            "we_agent_reload_state{workload=\"payments\",hook=\"nginx.service\",state=\"reloaded\"} 0.0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn what_is_not_known_is_not_said() {
        let text = render(&report(IdentityReport::default()), 0, 0);
        assert!(!text.lines().any(|l| l.starts_with("we_agent_certificate_remaining_seconds{")), "{text}");
        assert!(!text.lines().any(|l| l.starts_with("istio_agent_cert_expiry_seconds{")), "{text}");
    }
}
