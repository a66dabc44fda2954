//! Integration tests: one binary, real sockets, real TLS.
mod address;
mod generated;
mod golden_probes;
