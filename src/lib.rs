//! we-agent

pub mod admin;
pub mod agent;
pub mod cli;
pub mod config;
mod proto;
pub mod spiffe;
pub mod status;
pub mod system;
pub mod telemetry;
pub mod time;
pub mod workload;
