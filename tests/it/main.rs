//! Integration tests: one binary, real sockets, real TLS.
mod admin;
mod architecture;
mod cli;
mod config;
mod authority;
mod crash;
mod files;
mod generated;
mod golden_bundle;
mod golden_first_request;
mod man;
