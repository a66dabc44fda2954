//! The `we-agent` program.
fn main() {}
