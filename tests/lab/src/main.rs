//! `we-lab`: the miniature control plane as a program.
fn main() {}
