//! Integration tests: one binary, real sockets, real TLS.
mod admin;
mod config;
mod generated;
