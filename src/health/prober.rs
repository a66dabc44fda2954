//! One probe of any kind.

use super::{
    ProbeSettings, Unhealthy,
    dial::{Detour, Source, dial},
    exec, grpc,
    http::{self, Get},
    tls::Tls,
};
use crate::{
    command::Commands,
    host::is_of_this_host,
    workload::{ProbeMethod, ReadinessProbe},
};
use std::{net::IpAddr, time::Duration};
use tokio::time::{Instant, timeout};

/// What can be probed, ready to be run again and again.
pub(super) struct Prober {
    method: Method,
    timeout: Duration,
    localhost: bool,
    detours: Vec<Detour>,
}

enum Method {
    Http(Get),
    Tcp { host: Option<String>, port: u16 },
    Exec(Commands, Vec<String>),
    Grpc { port: u16, service: String },
}

impl Prober {
    /// A prober, or why there cannot be one on this host, and what to do.
    pub(super) fn new(probe: &ReadinessProbe, settings: ProbeSettings) -> Result<Self, String> {
        let method = match probe.method.clone() {
            ProbeMethod::Http { path, port, host, https, headers } => {
                let tls = Tls::new(settings.verify_tls);
                if https {
                    tls.connector()?;
                }
                Method::Http(Get { path, port, host, https, headers, detours: settings.detours.clone(), tls })
            }
            ProbeMethod::Tcp { host, port } => Method::Tcp { host, port },
            ProbeMethod::Exec { command } if settings.allow_exec => Method::Exec(settings.commands, command),
            ProbeMethod::Exec { .. } => {
                return Err("the readiness probe runs a command, and this host has not agreed to that: set `health: \
                            {allowExec: true}` for this workload or under `defaults` in /etc/we-agent/we-agent.yaml, \
                            or give the WorkloadGroup an httpGet, tcpSocket or grpc probe"
                    .to_owned());
            }
            ProbeMethod::Grpc { port, service } => Method::Grpc { port, service },
        };
        Ok(Self { method, timeout: probe.timeout, localhost: settings.localhost, detours: settings.detours })
    }

    /// Probes once, within the probe's timeout. `primary` is the workload's address.
    pub(super) async fn probe(&self, primary: Option<IpAddr>) -> Result<(), Unhealthy> {
        let default = match primary {
            // One that others translate to ours leads elsewhere from here.
            Some(ip) if !self.localhost && is_of_this_host(ip) => ip.to_string(),
            _ => "localhost".to_owned(),
        };
        match &self.method {
            Method::Http(get) => http::probe(get, &default, Instant::now() + self.timeout).await,
            Method::Tcp { host, port } => {
                tcp(host.as_ref().unwrap_or(&default), *port, self.timeout, &self.detours).await
            }
            Method::Exec(commands, command) => exec::probe(commands, command, self.timeout).await,
            Method::Grpc { port, service } => grpc::probe(&default, *port, service, self.timeout, &self.detours).await,
        }
    }
}

/// Connects and closes at once.
async fn tcp(host: &str, port: u16, bound: Duration, detours: &[Detour]) -> Result<(), Unhealthy> {
    match timeout(bound, dial(host, port, Source::Ordinary, detours)).await {
        Ok(Ok(_connected)) => Ok(()),
        Ok(Err(cause)) => Err(Unhealthy::new(cause)),
        Err(_) => Err(Unhealthy::new(format!("dial tcp {host}:{port}: i/o timeout"))),
    }
}
