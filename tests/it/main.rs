//! Integration tests: one binary, real sockets, real TLS.
mod generated;
mod golden_probes;
