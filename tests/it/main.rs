//! Integration tests: one binary, real sockets, real TLS.
mod admin;
mod architecture;
mod cli;
mod config;
mod generated;
mod man;
