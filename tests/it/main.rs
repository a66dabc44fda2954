//! Integration tests: one binary, real sockets, real TLS.
mod authority;
mod crash;
mod files;
mod generated;
