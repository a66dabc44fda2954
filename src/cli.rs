//! The words of the command line, and what each exit status means.

mod status;

use crate::{
    admin::AdminError,
    agent::Agent,
    config::{Config, ConfigError},
    system::{self, Commands, Listeners, Root},
    telemetry::{self, LogFilter, LogFormat},
};
use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use std::{io::Write, os::fd::AsFd, path::PathBuf, process::ExitCode};

/// Brings this machine into an Istio mesh, and keeps it there.
///
/// Put the bundle that "istioctl x workload entry configure" wrote into /etc/we-agent/NAME/ and run the daemon; it
/// obtains and renews the workload's certificate, registers the workload, and reports its health.
#[derive(Debug, Parser)]
#[command(name = "we-agent", version, after_long_help = EXIT_STATUS)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_STATUS: &str = "\
Exit status:
  0   success
  1   the system refused something
  64  the command line is wrong
  69  the daemon cannot be reached, or another one runs already
  70  a bug in we-agent
  78  the configuration is wrong; every mistake is told with its place";

/// A subcommand.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon
    Run(RunArgs),
    /// Show what the daemon knows of every workload
    Status(StatusArgs),
    /// Run one command for the daemon; systemd starts this (we-agent-exec@.service) for each probe and hook
    Exec,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Configuration file, taken as it is; the default is /etc/we-agent/we-agent.yaml below the root, if it exists
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How to write the log
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
    /// What to log: error, warn, info, debug, trace, or target=level pairs; wins over log.level of the configuration
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<LogFilter>,
    /// Socket of the runner that commands of probes and hooks are handed to (we-agent-exec.socket), taken as it is;
    /// without one, the daemon runs them itself
    #[arg(long, value_name = "PATH", env = "WE_AGENT_EXEC_SOCKET")]
    exec_socket: Option<PathBuf>,
}

/// Options of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct HostArgs {
    /// Directory that every path of the agent is looked up below
    #[arg(long, value_name = "DIR", default_value = "/", env = "WE_AGENT_ROOT")]
    root: PathBuf,
}

impl HostArgs {
    fn root(&self) -> Root {
        Root::new(&self.root)
    }
}

/// The whole program. What failed is said on stderr, in one place.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no mistakes. A closed pipe is not ours to complain about.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    // A panic has been told by the hook already.
    match std::panic::catch_unwind(|| dispatch(cli)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            let _ = writeln!(std::io::stderr(), "we-agent: {error:#}");
            ExitCode::from(exit_status(&error))
        }
        Err(_) => ExitCode::from(70),
    }
}

/// sysexits.h.
fn exit_status(error: &anyhow::Error) -> u8 {
    if error.is::<ConfigError>() {
        78
    } else if error.is::<status::Unreachable>() || matches!(error.downcast_ref(), Some(AdminError::AnotherAgent(_))) {
        69
    } else {
        1
    }
}

/// One thread is enough: nothing here computes for long.
fn dispatch(cli: Cli) -> anyhow::Result<()> {
    // Before the runtime opens descriptors of its own.
    let listeners = match &cli.command {
        Command::Run(_) => Listeners::from_service_manager().context(
            "the sockets of the service manager (LISTEN_FDS) cannot be taken over; unset LISTEN_PID to start without",
        )?,
        Command::Status(_) | Command::Exec => Listeners::default(),
    };
    system::spare_memory();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match cli.command {
            Command::Run(args) => run(args, listeners).await,
            Command::Status(args) => show(args).await,
            Command::Exec => Ok(system::serve_command(std::io::stdin().as_fd()).await?),
        }
    })
}

async fn run(args: RunArgs, listeners: Listeners) -> anyhow::Result<()> {
    let root = args.host.root();
    let config = Config::load(&root, args.config.as_deref())?;
    telemetry::init(args.log_format, args.log_level.or(config.log_level.clone()).unwrap_or_default());
    let stop = system::shutdown()?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "starting");
    let commands = args.exec_socket.map_or(Commands::Direct, Commands::Runner);
    let agent = Agent::bind(&root, config).await?.with_listeners(listeners).with_commands(commands);
    if let Some(address) = agent.admin_address() {
        tracing::info!("readiness and metrics are on http://{address}");
    }
    agent.run(stop).await;
    tracing::info!("stopped");
    Ok(())
}

async fn show(args: StatusArgs) -> anyhow::Result<()> {
    let report = status::fetch(&args.host.root()).await?;
    let text = if args.json { format!("{}\n", serde_json::to_string_pretty(&report)?) } else { status::text(&report) };
    match anstream::stdout().lock().write_all(text.as_bytes()) {
        // `we-agent status | head` is no failure.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
