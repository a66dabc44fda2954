//! Integration tests: one binary, real sockets, real TLS.
mod admin;
mod cli;
mod config;
mod generated;
