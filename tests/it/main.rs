//! Integration tests: one binary, real sockets, real TLS.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod address;
mod admin;
mod architecture;
mod authority;
mod cli;
mod config;
mod crash;
mod daemon;
mod demo;
mod faults;
mod files;
mod generated;
mod golden_bundle;
mod golden_first_request;
mod golden_probes;
mod man;
mod membership;
mod onboarding;
mod published;
mod registration;
mod rotation;
mod secrets;
mod several_workloads;
mod shutdown;
mod support;
