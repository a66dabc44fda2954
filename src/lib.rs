//! we-agent

pub mod address;
pub mod health;
pub mod locality;
mod proto;
pub mod spiffe;
pub mod status;
pub mod system;
pub mod time;
pub mod workload;
