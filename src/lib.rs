//! we-agent

pub mod address;
pub mod admin;
pub mod bundle;
pub mod config;
pub mod control;
pub mod health;
pub mod identity;
mod proto;
pub mod publish;
pub mod session;
pub mod spiffe;
pub mod status;
pub mod system;
pub mod time;
pub mod workload;

#[cfg(test)]
#[path = "../tests/it/authority.rs"]
mod authority;
