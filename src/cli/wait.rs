//! `we-agent wait`: returns when the workloads are ready. Units order themselves after it.

use super::status;
use crate::{
    files::Root,
    status::{IdentityState, PublicationReport, Report, WorkloadReport},
};
use clap::ValueEnum;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// From one question to the next: a person does not notice it, and the daemon answers from memory.
const LOOK: Duration = Duration::from_millis(250);

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum Aim {
    /// A valid certificate, a registration that the control plane has acknowledged, and no inbound listener that failed
    #[default]
    Ready,
    /// A certificate that has not expired, where programs find it; a kept one needs no control plane
    Identity,
}

/// The time is over.
#[derive(Debug, thiserror::Error)]
#[error("not ready within {}: {cause}", humantime::format_duration(*.within))]
pub(super) struct NotReady {
    within: Duration,
    cause: String,
}

/// Asks the daemon until `workloads` (all of the host, if none is named) have what is aimed for, and gives the line to say then. A
/// daemon that does not answer yet is waited for, too. Without a limit this can last for ever.
///
/// # Errors
/// When the time is over: [`NotReady`], or [`status::Unreachable`] if the daemon does not answer. At once when it is not
/// for us to ask.
pub(super) async fn wait(
    root: &Root,
    workloads: &[String],
    aim: Aim,
    limit: Option<Duration>,
) -> anyhow::Result<String> {
    let end = limit.map(|limit| Instant::now() + limit);
    loop {
        let error = match status::fetch(root).await {
            Ok(report) => match lacking(&report, workloads, aim) {
                None => return Ok(report.summary()),
                Some(cause) => anyhow::Error::from(NotReady { within: limit.unwrap_or_default(), cause }),
            },
            Err(error) if error.is_denied() => return Err(error.into()),
            Err(error) => error.into(),
        };
        match end {
            None => sleep(LOOK).await,
            Some(end) if timeout_at(end, sleep(LOOK)).await.is_err() => return Err(error),
            Some(_) => {}
        }
    }
}

/// What `workloads` lack; none when they have it.
fn lacking(report: &Report, workloads: &[String], aim: Aim) -> Option<String> {
    if workloads.is_empty() {
        let lack = report.workloads.iter().find_map(|w| lack(w, aim));
        return match aim {
            Aim::Identity if lack.is_some() => lack,
            _ => (lack.is_some() || report.workloads.is_empty()).then(|| report.summary()),
        };
    }
    workloads.iter().find_map(|name| match report.workloads.iter().find(|w| w.name == *name) {
        None => Some(format!("there is no workload {name}; put its bundle into /etc/we-agent/{name}/")),
        Some(w) => lack(w, aim),
    })
}

/// What a workload lacks; none when it has what is aimed for.
fn lack(workload: &WorkloadReport, aim: Aim) -> Option<String> {
    let certified = matches!(workload.identity.state, IdentityState::Valid | IdentityState::Refused);
    let why = match aim {
        Aim::Ready if workload.ready => return None,
        // Its cause may be that it has no registration, which nobody waits for here.
        Aim::Identity if certified => {
            let file = unpublished(workload)?;
            file.cause.clone().unwrap_or_else(|| format!("no {} yet", file.publisher))
        }
        Aim::Ready | Aim::Identity => workload.cause.clone().unwrap_or_else(|| "not ready".to_owned()),
    };
    Some(format!("{}: {why}", workload.name))
}

/// Where programs do not find a certificate. A path of `socket.also` is no such place: another program may serve it.
fn unpublished(workload: &WorkloadReport) -> Option<&PublicationReport> {
    workload.files.iter().find(|file| file.serial.is_none() && !file.publisher.starts_with("socket "))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::status::Timestamp;
    use std::time::UNIX_EPOCH;

    fn report(workloads: &[(&str, Option<&str>)]) -> Report {
        let workloads: Vec<_> = workloads
            .iter()
            .map(|(name, cause)| WorkloadReport {
                name: (*name).to_owned(),
                spiffe_id: None,
                ready: cause.is_none(),
                cause: cause.map(str::to_owned),
                identity: Default::default(),
                registration: Default::default(),
                membership: Default::default(),
                health: Default::default(),
                address: Default::default(),
                files: Vec::new(),
                consumers: Vec::new(),
                reloads: Vec::new(),
                inbound: Vec::new(),
                failures: Vec::new(),
                ignored: Vec::new(),
                broken: Vec::new(),
            })
            .collect();
        let ready = !workloads.is_empty() && workloads.iter().all(|w| w.ready);
        let cause = (!ready).then(|| "orders: no token".to_owned());
        Report { version: "1".to_owned(), time: Timestamp(UNIX_EPOCH), ready, cause, note: None, workloads }
    }

    #[test]
    fn all_or_the_named_ones_are_waited_for() {
        let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let half = report(&[("orders", Some("no token")), ("payments", None)]);
        assert_eq!(lacking(&half, &named(&["payments"]), Aim::Ready), None);
        assert_eq!(lacking(&half, &named(&["payments", "orders"]), Aim::Ready).as_deref(), Some("orders: no token"));
        let all = lacking(&half, &[], Aim::Ready).unwrap();
        assert!(all.starts_with("1 of 2 workloads ready; orders: no token"), "{all}");
        assert!(lacking(&half, &named(&["cart"]), Aim::Ready).unwrap().starts_with("there is no workload cart"));
        assert_eq!(lacking(&report(&[("payments", None)]), &[], Aim::Ready), None);
        assert!(lacking(&report(&[]), &[], Aim::Ready).is_some(), "a host without workloads is not ready");
    }

    #[test]
    fn an_identity_is_a_certificate_that_programs_find() {
        let mut report = report(&[("payments", Some("no registration"))]);
        let lacking = |report: &Report| lacking(report, &[], Aim::Identity);
        assert_eq!(lacking(&report).as_deref(), Some("payments: no registration"), "no certificate");
        report.workloads[0].identity.state = IdentityState::Valid;
        let file = PublicationReport { publisher: "files".to_owned(), serial: None, kind: None, cause: None };
        report.workloads[0].files.push(file);
        assert_eq!(lacking(&report).as_deref(), Some("payments: no files yet"));
        report.workloads[0].files[0].serial = Some("1f".to_owned());
        assert_eq!(lacking(&report), None);
        // Another program may have a path of `socket.also`; our own socket is where programs look.
        let mut add = |publisher: &str, cause: Option<&str>| {
            let (publisher, cause) = (publisher.to_owned(), cause.map(str::to_owned));
            report.workloads[0].files.push(PublicationReport { publisher, serial: None, kind: None, cause });
            lacking(&report)
        };
        assert_eq!(add("socket /run/x", Some("another program listens")), None);
        assert_eq!(add("socket", None).as_deref(), Some("payments: no socket yet"));
        report.workloads[0].files[2].cause = Some("no such group".to_owned());
        assert_eq!(lacking(&report).as_deref(), Some("payments: no such group"));
        let named = super::lacking(&report, &["payments".to_owned()], Aim::Identity);
        assert_eq!(named.as_deref(), Some("payments: no such group"));
        report.workloads[0].identity.state = IdentityState::Expired;
        assert!(lacking(&report).is_some());
        report.workloads.clear();
        assert!(lacking(&report).is_some(), "a host without workloads has none");
    }
}
