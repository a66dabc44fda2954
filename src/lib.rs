//! we-agent

pub mod bundle;
mod proto;
pub mod spiffe;
pub mod status;
pub mod system;
pub mod time;
pub mod workload;
