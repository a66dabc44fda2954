//! `we-lab`: the miniature control plane as a program.
//!
//! `serve` prints one JSON object a line: first the address, then each event. With `--dir` it keeps its keys and its
//! address in a folder, from which `bundle` writes what a VM needs. Faults are injected with the flag, and while it
//! runs by lines on standard input: `inject ca-down`, `heal ca-down`, `heal-all`, `entries`.

use std::{
    fs,
    io::{ErrorKind, IsTerminal, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use we_lab::{Fault, Group, Lab, Service};

#[derive(Parser)]
#[command(version, about = "A miniature Istio control plane on loopback.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until interrupted; print the address and every event as JSON lines.
    Serve(Serve),
    /// Write the five files of a bundle for a lab that keeps its keys in a folder.
    Bundle(Bundle),
    /// Show the agent at work: a control plane, an application and the agent on this machine, step by step.
    Demo(Demo),
}

/// The groups of both commands.
#[derive(Args)]
struct Groups {
    /// A WorkloadGroup, NAMESPACE/NAME; its service account is NAME-sa unless said with =ACCOUNT.
    #[arg(long = "group", value_name = "NS/NAME[=ACCOUNT]")]
    groups: Vec<String>,
    /// A file with a WorkloadGroup in YAML.
    #[arg(long = "group-file", value_name = "FILE")]
    files: Vec<PathBuf>,
}

#[derive(Args)]
struct Serve {
    #[command(flatten)]
    groups: Groups,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// A service that selects entries: HOST:PORT:TARGET:LABEL=VALUE.
    #[arg(long = "service", value_name = "HOST:PORT:TARGET:LABEL=VALUE")]
    services: Vec<String>,
    /// Certificates live at most this long.
    #[arg(long, value_parser = humantime::parse_duration)]
    ttl: Option<Duration>,
    /// Connections are told to go away at this age.
    #[arg(long, value_parser = humantime::parse_duration)]
    max_connection_age: Option<Duration>,
    /// How long an entry outlives its last stream.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "10s")]
    grace: Duration,
    /// The instance's name.
    #[arg(long, default_value = "istiod-0")]
    name: String,
    /// The trust domain.
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// The cluster's id.
    #[arg(long, default_value = "Kubernetes")]
    cluster: String,
    /// A fault from the beginning: ca-down, short-life=3s, conflict=2 ...
    #[arg(long = "fault", value_name = "FAULT")]
    faults: Vec<Fault>,
    /// Write the port here when it is open.
    #[arg(long)]
    port_file: Option<PathBuf>,
    /// Keep keys and address in this folder, or take them from it.
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Args)]
struct Bundle {
    #[command(flatten)]
    groups: Groups,
    /// The folder of the lab.
    #[arg(long)]
    dir: PathBuf,
    /// Where the files go.
    #[arg(short, long)]
    output: PathBuf,
    /// The lab's address, if it is not in the folder.
    #[arg(long)]
    address: Option<SocketAddr>,
    /// The VM's address.
    #[arg(long = "internalIP", alias = "internal-ip")]
    internal_ip: Option<String>,
    /// The VM's address behind a NAT.
    #[arg(long = "externalIP", alias = "external-ip", conflicts_with = "internal_ip")]
    external_ip: Option<String>,
    /// The control plane's revision.
    #[arg(short, long, default_value = "")]
    revision: String,
    /// The cluster's id.
    #[arg(long = "clusterID", alias = "cluster-id")]
    cluster_id: Option<String>,
    /// Seconds that the token is good for; negative: it expired so long ago.
    #[arg(long = "tokenDuration", alias = "token-duration", default_value_t = 3600, allow_negative_numbers = true)]
    token_duration: i64,
    /// Without automatic registration.
    #[arg(long)]
    no_autoregister: bool,
    /// Without DNS capture.
    #[arg(long)]
    no_capture_dns: bool,
}

#[derive(Args)]
struct Demo {
    /// The program we-agent.
    #[arg(long, value_name = "PATH")]
    agent: PathBuf,
    /// Where the evidence goes; what an earlier demo left there is removed.
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    out: PathBuf,
}

impl Groups {
    fn read(&self) -> anyhow::Result<Vec<Group>> {
        let mut groups = Vec::new();
        for text in &self.groups {
            let (name, account) =
                text.split_once('=').map_or((text.as_str(), None), |(name, account)| (name, Some(account)));
            let (namespace, name) =
                name.split_once('/').with_context(|| format!("--group {text}: write it as NAMESPACE/NAME"))?;
            let account = account.map_or(format!("{name}-sa"), str::to_owned);
            groups.push(Group::new(namespace, name).service_account(&account).port("http", 8080).label("app", name));
        }
        for path in &self.files {
            let text = fs::read_to_string(path).with_context(|| format!("{}: not read", path.display()))?;
            groups.push(Group::from_yaml(&text).with_context(|| path.display().to_string())?);
        }
        Ok(groups)
    }
}

fn service(text: &str) -> anyhow::Result<Service> {
    let parts: Vec<&str> = text.splitn(4, ':').collect();
    let [host, port, target, selector] = parts[..] else {
        bail!("--service {text}: write it as HOST:PORT:TARGET:LABEL=VALUE")
    };
    let number = |n: &str| n.parse().with_context(|| format!("--service {text}: {n:?} is no port"));
    let selector =
        selector.split_once('=').with_context(|| format!("--service {text}: {selector:?} is no LABEL=VALUE"))?;
    Ok(Service::new(host).port(number(port)?, number(target)?).selector([selector]))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse().command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not by returning it: that prints a backtrace, too, where the environment asks for one.
            _ = writeln!(std::io::stderr(), "we-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => serve(args).await,
        Command::Bundle(args) => bundle(&args),
        Command::Demo(args) => {
            let live = std::io::stdout().is_terminal();
            Ok(we_lab::demo(&args.agent, &args.out, anstream::stdout(), live).await?)
        }
    }
}

async fn serve(args: Serve) -> anyhow::Result<()> {
    let mut builder = Lab::builder().listen(args.listen).grace(args.grace).name(&args.name);
    builder = builder.trust_domain(&args.trust_domain).cluster(&args.cluster);
    for group in args.groups.read()? {
        builder = builder.group(group);
    }
    for text in &args.services {
        builder = builder.service(service(text)?);
    }
    if let Some(ttl) = args.ttl {
        builder = builder.ttl(ttl);
    }
    if let Some(age) = args.max_connection_age {
        builder = builder.max_connection_age(age);
    }
    if let Some(dir) = &args.dir {
        builder = builder.keep(dir);
    }
    let lab = builder.spawn().await.context("the lab did not start")?;
    for fault in args.faults {
        lab.inject(fault);
    }
    if let Some(path) = &args.port_file {
        replace(path, &lab.address().port().to_string())?;
    }
    if let Some(dir) = &args.dir {
        replace(&dir.join("address"), &lab.address().to_string())?;
        replace(&dir.join("root-cert.pem"), &lab.root_pem())?;
    }
    if !print(&json!({"address": lab.address()}))? {
        return Ok(());
    }
    let mut lengths = lab.lengths();
    let mut printed = 0;
    let mut orders = orders();
    let mut listening = true;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    loop {
        for event in lab.events_since(printed) {
            printed += 1;
            if !print(&serde_json::to_value(event)?)? {
                return Ok(());
            }
        }
        tokio::select! {
            changed = lengths.changed() => changed?,
            order = orders.recv(), if listening => match order {
                Some(order) => if !print(&obey(&lab, &order))? { return Ok(()) },
                None => listening = false,
            },
            _ = terminate.recv() => return Ok(()),
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

/// The lines of standard input. A thread reads them, since a read that waits would hold up the end of a runtime.
fn orders() -> mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || std::io::stdin().lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    receiver
}

/// One line of standard input, and what to say of it.
fn obey(lab: &Lab, order: &str) -> Value {
    let (verb, what) = order.trim().split_once(' ').unwrap_or((order.trim(), ""));
    // To heal, the name is enough.
    let named = |value| format!("{what}={value}").parse().ok().filter(|_| verb == "heal");
    match (verb, what.parse::<Fault>().or_else(|error| named("1s").or_else(|| named("1")).ok_or(error))) {
        ("inject", Ok(fault)) => {
            lab.inject(fault);
            json!({"injected": what})
        }
        ("heal", Ok(fault)) => {
            lab.heal(fault);
            json!({"healed": what})
        }
        ("inject" | "heal", Err(error)) => json!({"error": error.to_string()}),
        ("heal-all", _) => {
            lab.heal_all();
            json!({"healed": "all"})
        }
        ("entries", _) => json!({"entries": lab.entries().iter().map(we_lab::WorkloadEntry::json).collect::<Vec<_>>()}),
        ("counters", _) => json!({"counters": lab.counters()}),
        _ => json!({"error": format!("{order:?}: say inject FAULT, heal FAULT, heal-all, entries or counters")}),
    }
}

fn bundle(args: &Bundle) -> anyhow::Result<()> {
    let mut groups = args.groups.read()?;
    let (Some(group), true) = (groups.pop(), groups.is_empty()) else {
        bail!("say which group: one --group or --group-file")
    };
    let address = match args.address {
        Some(address) => address,
        None => {
            let path = args.dir.join("address");
            let text = fs::read_to_string(&path)
                .with_context(|| format!("{}: not read; does the lab run with --dir?", path.display()))?;
            text.trim().parse().with_context(|| format!("{}: no address", path.display()))?
        }
    };
    let lab = we_lab::bundle_of(&args.dir, group, address)
        .with_context(|| format!("{}: no lab's folder", args.dir.display()))?;
    let mut bundle = lab.revision(&args.revision).autoregister(!args.no_autoregister).dns_capture(!args.no_capture_dns);
    if let Some(ip) = &args.internal_ip {
        bundle = bundle.internal_ip(ip);
    }
    if let Some(ip) = &args.external_ip {
        bundle = bundle.external_ip(ip);
    }
    if let Some(id) = &args.cluster_id {
        bundle = bundle.cluster_id(id);
    }
    let seconds = Duration::from_secs(args.token_duration.unsigned_abs());
    bundle = if args.token_duration < 0 { bundle.expired_token(seconds) } else { bundle.token_ttl(seconds) };
    bundle.write(&args.output).with_context(|| format!("{}: the bundle was not written", args.output.display()))
}

/// Writes a file whole or not at all: somebody may be waiting for it.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, text)
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("{}: not written", path.display()))
}

/// Whether anybody still reads.
fn print(value: &Value) -> anyhow::Result<bool> {
    match writeln!(std::io::stdout(), "{value}").and_then(|()| std::io::stdout().flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        other => Ok(other.map(|()| true)?),
    }
}
