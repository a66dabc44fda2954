//! we-agent

pub mod admin;
pub mod config;
mod proto;
pub mod spiffe;
pub mod status;
pub mod system;
pub mod time;
pub mod workload;
