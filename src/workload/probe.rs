//! The readiness probe of a WorkloadGroup (istio/api `networking.v1alpha3.ReadinessProbe`), with the agent's defaults
//! filled in: what exists can be run.

use std::time::Duration;

/// A probe and its thresholds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadinessProbe {
    /// Wait before the first probe, from the start of the agent.
    pub initial_delay: Duration,
    /// Bound of one probe; 1 s by default.
    pub timeout: Duration,
    /// From one probe to the next; 10 s by default.
    pub period: Duration,
    /// Successes in a row that make it healthy; 1 by default.
    pub success_threshold: u32,
    /// Failures in a row that make it unhealthy; 1 by default (as istio-agent does, although its API says 3).
    pub failure_threshold: u32,
    /// What is done.
    pub method: ProbeMethod,
}

/// What a probe does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeMethod {
    /// GET; healthy on 200–399.
    Http {
        /// Path with optional query; `/` by default.
        path: String,
        /// Port, 1–65535.
        port: u16,
        /// Host to dial and to name in the Host header; the workload's address by default.
        host: Option<String>,
        /// TLS. The certificate is not verified, as in Kubernetes, unless the configuration asks for it.
        https: bool,
        /// Headers in the given order; repetitions are sent.
        headers: Vec<(String, String)>,
    },
    /// Connect; healthy when connected.
    Tcp {
        /// Host to dial; the workload's address by default.
        host: Option<String>,
        /// Port, 1–65535.
        port: u16,
    },
    /// Run a command without a shell; healthy on exit status 0. Needs local consent (`allowExec`).
    Exec {
        /// Program and arguments; never empty.
        command: Vec<String>,
    },
    /// `grpc.health.v1.Health/Check`; healthy on SERVING.
    Grpc {
        /// Port, 1–65535.
        port: u16,
        /// Service to ask for; empty means the whole server.
        service: String,
    },
}
