//! The `we-agent` program.

use std::process::ExitCode;
use we_agent::host::Wiping;

/// Keys and tokens leave nothing behind.
#[global_allocator]
static MEMORY: Wiping = Wiping;

fn main() -> ExitCode {
    we_agent::cli::main()
}
