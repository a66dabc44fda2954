//! Integration tests: one binary, real sockets, real TLS.
mod config;
mod generated;
