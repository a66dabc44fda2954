//! The words of the command line, and what each exit status means.

mod reload;
mod status;
mod wait;

use crate::{
    admin::AdminError,
    agent::{Agent, BindError},
    aside, bundle,
    command::{self, Commands},
    config::{Config, ConfigError},
    files::{Root, is_root_asked},
    host,
    systemd::Listeners,
    telemetry::{self, LogFilter, LogFormat},
};
use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use std::{io::Write, os::fd::AsFd, path::PathBuf, process::ExitCode, time::Duration};
use tokio::time::sleep;

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
  75  not ready in time
  78  the configuration is wrong; every mistake is told with its place";

/// Before we end for a wrong configuration with sockets of the service manager: who waits there has us started again at
/// once, and a socket unit that starts its service 20 times in 2 s fails for good (systemd.socket(5), TriggerLimitBurst=).
const PATIENCE: Duration = Duration::from_secs(1);

/// How long threads of the runtime may take to end when all is done. By then nobody hears signals any more.
const LAST_BREATH: Duration = Duration::from_secs(1);

/// A subcommand.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon
    Run(RunArgs),
    /// Show what the daemon knows of every workload
    Status(StatusArgs),
    /// Have the daemon read its configuration again
    ///
    /// Only the workloads whose settings have changed are touched. A file with a mistake changes nothing: each is told with
    /// its place, and the exit status is 78. "systemctl reload we-agent" runs this, and SIGHUP does the same.
    Reload(ReloadArgs),
    /// Return when the workloads are ready
    ///
    /// A workload is ready when it holds a valid certificate, is registered, and none of its inbound listeners has failed to
    /// listen. we-agent-online.service runs this with "--for identity", so that other units can order themselves after it.
    Wait(WaitArgs),
    /// Let the daemon's group read the bundles, and nobody else
    ///
    /// Gives the files of each bundle in /etc/we-agent to the user that runs this and the group (mode 0640, directories
    /// 0750), and removes the tokens that the daemon asks to have removed, where the configuration says so
    /// (identity.removeToken). A unit runs it as root: before each start of we-agent.service, and when the daemon asks, say
    /// because a bundle has come that it may not read, or that others may. It follows no link.
    Permit(PermitArgs),
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

/// Options of `reload`.
#[derive(Debug, Args)]
pub struct ReloadArgs {
    #[command(flatten)]
    host: HostArgs,
}

/// Options of `wait`.
#[derive(Debug, Args)]
pub struct WaitArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Give up after this time, for example 90s or 5min; the default is never
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// What to wait for
    #[arg(long = "for", value_name = "WHAT", value_enum, default_value_t)]
    aim: wait::Aim,
    /// The workloads to wait for; the default is all
    #[arg(value_name = "WORKLOAD")]
    workloads: Vec<String>,
}

/// Options of `permit`.
#[derive(Debug, Args)]
pub struct PermitArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Configuration file, as that of run: it says whose token is to be removed
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The group that the daemon runs as, by name or number
    #[arg(long, value_name = "GROUP", default_value = "we-agent")]
    group: String,
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
    let done = std::panic::catch_unwind(|| dispatch(cli));
    telemetry::flush();
    match done {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            let _ = writeln!(std::io::stderr(), "we-agent: {}", chain(&error));
            ExitCode::from(exit_status(&error))
        }
        Err(_) => ExitCode::from(70),
    }
}

/// The error and its causes in one line. Many say their cause themselves; nothing is said twice.
fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for words in error.chain().map(ToString::to_string).filter(|words| !words.is_empty()) {
        if line.is_empty() {
            line = words;
        } else if !line.contains(&words) {
            line = format!("{line}: {words}");
        }
    }
    line
}

/// sysexits.h.
fn exit_status(error: &anyhow::Error) -> u8 {
    let another =
        matches!(error.downcast_ref(), Some(BindError::Locked(_) | BindError::Admin(AdminError::AnotherAgent(_))));
    if error.is::<ConfigError>() || error.is::<reload::Refused>() {
        78
    } else if error.is::<status::Unreachable>() || another {
        69
    } else if error.is::<wait::NotReady>() {
        75
    } else {
        1
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    host::hide_memory().context("the memory of this process cannot be hidden from others (PR_SET_DUMPABLE)")?;
    match cli.command {
        Command::Run(args) => {
            // Before the runtime opens descriptors of its own.
            let listeners = Listeners::from_service_manager().context(
                "the sockets of the service manager (LISTEN_FDS) cannot be taken over; unset LISTEN_PID to start without",
            )?;
            host::spare_memory();
            wait_for(run(args, listeners))
        }
        Command::Status(args) => wait_for(show(args)),
        Command::Exec => wait_for(async { Ok(command::serve_command(std::io::stdin().as_fd()).await?) }),
        Command::Reload(args) => {
            wait_for(async move { print(&format!("{}\n", reload::reload(&args.host.root()).await?)) })
        }
        Command::Wait(args) => wait_for(wait(args)),
        Command::Permit(args) => permit(&args),
    }
}

/// One thread is enough: nothing here computes for long. What is still done [aside] at the end (a name service
/// that hangs) is not waited for: who writes has waited for that itself.
fn wait_for(task: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(aside::MOST)
        .thread_keep_alive(aside::IDLE)
        .build()?;
    let done = runtime.block_on(task);
    runtime.shutdown_timeout(LAST_BREATH);
    done
}

async fn run(args: RunArgs, listeners: Listeners) -> anyhow::Result<()> {
    let root = args.host.root();
    // First of all: whoever says "read it again" does not mean "end".
    let mut hangups = host::hangups()?;
    let config = match Config::load(&root, args.config.as_deref()) {
        Err(error) if !listeners.is_empty() => {
            sleep(PATIENCE).await;
            return Err(error.into());
        }
        loaded => loaded?,
    };
    let level = args.log_level.or(config.log_level.clone()).unwrap_or_default();
    telemetry::init(args.log_format, level).context("the log cannot be written to stderr")?;
    // The sockets of workloads and inbound listeners may each have thousands of connections.
    if let Err(error) = host::raise_descriptor_limit() {
        tracing::warn!(cause = %error, "the limit on open descriptors stays; many connections may not find room");
    }
    let stop = host::shutdown(telemetry::flush)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "starting");
    if std::process::id() == 1 {
        tokio::spawn(host::reap_orphans());
    }
    let commands = args.exec_socket.map_or(Commands::Direct, Commands::Runner);
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let agent = Agent::bind_with(&root, config, args.config)
        .await?
        .with_listeners(listeners)
        .with_commands(commands)
        .with_credentials(credentials);
    if let Some(address) = agent.admin_address() {
        tracing::info!("readiness and metrics are on http://{address}");
    }
    let reload = agent.reload();
    let asks = async move {
        while hangups.recv().await.is_some() {
            let (reply, told) = tokio::sync::oneshot::channel();
            // What came of it is told in the journal.
            if reload.send(reply).await.is_ok() {
                let _ = told.await;
            }
        }
    };
    tokio::select! {
        () = agent.run(stop) => {}
        () = asks => {}
    }
    tracing::info!("stopped");
    Ok(())
}

async fn show(args: StatusArgs) -> anyhow::Result<()> {
    let report = status::fetch(&args.host.root()).await?;
    print(&if args.json { format!("{}\n", serde_json::to_string_pretty(&report)?) } else { status::text(&report) })
}

async fn wait(args: WaitArgs) -> anyhow::Result<()> {
    print(&format!("{}\n", wait::wait(&args.host.root(), &args.workloads, args.aim, args.timeout).await?))
}

/// From one answer to the next, for who asks again and again, or leaves a request that cannot be taken away.
const PACE: Duration = Duration::from_secs(1);

/// What is left alone is told, and is no failure: the other workloads shall start.
fn permit(args: &PermitArgs) -> anyhow::Result<()> {
    let root = args.host.root();
    // Mistakes in the configuration are told by the daemon, which then does not run.
    let config = Config::load(&root, args.config.as_deref()).unwrap_or_default();
    let removable = |name: &str| config.workload(name).identity.remove_token;
    let done = bundle::permit(&root, crate::files::group_number(&args.group)?, removable)?;
    let removed = done.removed.iter().map(|name| format!("the token of {name} has served and was removed"));
    for line in removed.chain(done.left.iter().map(ToString::to_string)) {
        let _ = writeln!(std::io::stderr(), "we-agent: {line}");
    }
    if is_root_asked(&root) {
        std::thread::sleep(PACE);
    }
    Ok(())
}

fn print(text: &str) -> anyhow::Result<()> {
    match anstream::stdout().lock().write_all(text.as_bytes()) {
        // `we-agent status | head` is no failure.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::{sync::mpsc, time::Instant};

    #[test]
    fn a_thread_that_hangs_does_not_hold_up_the_end() {
        const HANGS: Duration = Duration::from_secs(20);
        let begun = Instant::now();
        let (_never, hangs) = mpsc::channel::<()>();
        let ended = wait_for(async {
            let (starts, started) = tokio::sync::oneshot::channel();
            tokio::spawn(aside::aside("hangs", move || starts.send(()).map(|()| hangs.recv_timeout(HANGS))));
            Ok(started.await?)
        });
        ended.unwrap();
        assert!(begun.elapsed() < HANGS);
    }
}
