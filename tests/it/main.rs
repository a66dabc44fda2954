//! Integration tests: one binary, real sockets, real TLS.
mod address;
mod admin;
mod architecture;
mod authority;
mod cli;
mod config;
mod crash;
mod demo;
mod files;
mod generated;
mod golden_bundle;
mod golden_first_request;
mod golden_probes;
mod man;
mod onboarding;
mod support;
