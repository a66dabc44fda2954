//! The `we-agent` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    we_agent::cli::main()
}
