//! How often what has failed, counted from the facts: each names its trouble, and how often that was met.

use super::{Facts, FailureReport, Published, Registration, Reload, Trouble, Workloads};
use std::{collections::BTreeMap, time::SystemTime};

/// What fails: a word for each room that tells of trouble.
type What = &'static str;

/// The counters of all workloads.
#[derive(Debug, Default)]
pub(super) struct Failures {
    counts: BTreeMap<String, BTreeMap<(What, &'static str), u64>>,
    /// The trouble that was seen last, by workload, and there by who is in it.
    seen: BTreeMap<(String, String), Seen>,
}

#[derive(Debug, Clone, PartialEq)]
struct Seen {
    since: SystemTime,
    kind: &'static str,
    times: u64,
}

impl Failures {
    /// Counts what has happened since the last look. Workloads that are gone are forgotten.
    pub(super) fn look(&mut self, workloads: &Workloads) {
        let there = |name: &String| workloads.list.iter().any(|workload| workload.name == *name);
        self.counts.retain(|name, _| there(name));
        self.seen.retain(|(name, _), _| there(name));
        for workload in &workloads.list {
            let Some(facts) = &workload.facts else { continue };
            for (what, who, trouble) in troubles(facts) {
                let news = self.seen(&workload.name, who, &trouble);
                if news > 0 {
                    let counts = self.counts.entry(workload.name.clone()).or_default();
                    *counts.entry((what, trouble.kind)).or_default() += news;
                }
            }
        }
    }

    /// How often it was met since it was seen last.
    fn seen(&mut self, workload: &str, who: String, trouble: &Trouble) -> u64 {
        let now = Seen { since: trouble.since, kind: trouble.kind, times: trouble.times };
        match self.seen.insert((workload.to_owned(), who), now.clone()) {
            Some(before) if (before.since, before.kind) == (now.since, now.kind) => {
                now.times.saturating_sub(before.times)
            }
            _ => now.times,
        }
    }

    /// Those of one workload.
    pub(super) fn of(&self, workload: &str) -> Vec<FailureReport> {
        let counts = self.counts.get(workload).into_iter().flatten();
        let report = |((what, kind), count): (&(What, &str), &u64)| FailureReport {
            what: (*what).to_owned(),
            kind: (*kind).to_owned(),
            count: *count,
        };
        counts.map(report).collect()
    }
}

/// The troubles of one workload: what fails, who is in it, and the trouble.
fn troubles(facts: &Facts) -> Vec<(What, String, Trouble)> {
    let mut all = Vec::new();
    let mut add = |what: What, who: &str, trouble: Option<&Trouble>| {
        all.extend(trouble.map(|trouble| (what, format!("{what} {who}"), trouble.clone())));
    };
    add("identity", "", facts.identity.borrow().trouble.as_ref());
    add("store", "", facts.durable.borrow().trouble.as_ref());
    let registration = facts.registration.borrow();
    add(
        "registration",
        "",
        match &*registration {
            Registration::Absent => None,
            Registration::Asked { trouble, .. } | Registration::Registered { trouble, .. } => trouble.as_ref(),
            Registration::Lost { trouble, .. } | Registration::Parked { trouble, .. } => Some(trouble),
        },
    );
    for Published { name, fact, .. } in &facts.publications {
        add("publication", name, fact.borrow().trouble.as_ref());
    }
    for (name, fact) in &facts.reloads {
        match &*fact.borrow() {
            Reload::Failed { trouble, .. } | Reload::Stale { trouble, .. } => add("hook", name, Some(trouble)),
            Reload::None | Reload::Running { .. } | Reload::Reloaded { .. } => {}
        }
    }
    all
}
