//! The daemon under measurement, and what the kernel says of it.

use crate::control::Bundle;
use anyhow::{Context, bail};
use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A running daemon with one workload; killed when dropped.
pub(crate) struct Agent {
    child: Child,
    root: PathBuf,
    /// The moment before its exec; the host root was ready.
    pub(crate) started: Instant,
}

impl Agent {
    /// Starts `binary` below `root`, with a copy of `bundle`; `settings` are lines of `defaults`.
    pub(crate) fn start(binary: &Path, root: &Path, bundle: &Bundle, settings: &str) -> anyhow::Result<Self> {
        bundle.copy(&root.join("etc/we-agent/payments"))?;
        Self::spawn(binary, root, settings)
    }

    /// The same with the bundles that are below `root` already.
    pub(crate) fn spawn(binary: &Path, root: &Path, settings: &str) -> anyhow::Result<Self> {
        // As systemd prepares a host for the service (RuntimeDirectory, StateDirectory).
        fs::create_dir_all(root.join("run/we-agent"))?;
        fs::create_dir_all(root.join("var/lib/we-agent"))?;
        let config = format!("admin: {{address: off}}\ndefaults:\n  platform: off\n{settings}");
        fs::write(root.join("etc/we-agent/we-agent.yaml"), config)?;
        let log = fs::File::create(root.join("log"))?;
        let mut command = Command::new(binary);
        command.args(["run", "--root"]).arg(root).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let started = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("{}: not started; cargo build --release -p we-agent", binary.display()))?;
        Ok(Self { child, root: root.to_owned(), started })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where consumers find what it publishes.
    pub(crate) fn published(&self) -> PathBuf {
        self.root.join("run/we-agent/payments")
    }

    /// Names the generation of the pair that consumers see; each has its own.
    pub(crate) fn certificate(&self) -> Option<PathBuf> {
        let dir = self.published();
        fs::read_link(dir.join("..data"))
            .ok()
            .filter(|_| dir.join("cert-chain.pem").exists() && dir.join("key.pem").exists())
    }

    pub(crate) fn is_registered(&self) -> anyhow::Result<bool> {
        let Ok(status) = self.told("/status") else { return Ok(false) };
        let report: serde_json::Value = serde_json::from_str(&status)?;
        Ok(report["workloads"][0]["registration"]["state"] == "registered")
    }

    /// What it answers on its socket.
    pub(crate) fn told(&self, path: &str) -> anyhow::Result<String> {
        let mut socket = UnixStream::connect(self.root.join("run/we-agent/admin.sock"))?;
        socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer to {path}"))?;
        Ok(body.to_owned())
    }

    /// Looks twice a millisecond until `reached`.
    pub(crate) fn until(
        &self,
        limit: Duration,
        what: &str,
        reached: impl Fn(&Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        while !reached(self)? {
            if Instant::now() > deadline {
                let log = fs::read_to_string(self.root.join("log")).unwrap_or_default();
                bail!("{what}: not within {limit:?}; the log says\n{log}");
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// Ends it as systemd would, and waits for that.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { bail!("the daemon ended with {status}") }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process has used, and what it holds.
#[derive(Debug)]
pub(crate) struct Sample {
    /// On a processor, all threads that there are; what was done by one that has ended is in [`used`] alone.
    pub(crate) cpu: Duration,
    /// Voluntary and not, of the same.
    pub(crate) switches: u64,
    pub(crate) threads: u64,
    /// Bytes.
    pub(crate) resident: u64,
    /// Bytes.
    pub(crate) private_dirty: u64,
}

impl Sample {
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let status = fs::read_to_string(proc.join("status"))?;
        let memory = fs::read_to_string(proc.join("smaps_rollup")).context("its memory is for root alone to see")?;
        let (mut cpu, mut switches) = (Duration::ZERO, 0);
        for task in fs::read_dir(proc.join("task"))? {
            let task = task?.path();
            let read = |file| fs::read_to_string(task.join(file));
            // A thread may end at any moment.
            let (Ok(times), Ok(status)) = (read("schedstat"), read("status")) else { continue };
            let nanoseconds = times.split(' ').next().context("schedstat")?.parse()?;
            cpu += Duration::from_nanos(nanoseconds);
            switches += field(&status, "voluntary_ctxt_switches")? + field(&status, "nonvoluntary_ctxt_switches")?;
        }
        Ok(Self {
            cpu,
            switches,
            threads: field(&status, "Threads")?,
            resident: field(&status, "VmRSS")? * 1024,
            private_dirty: field(&memory, "Private_Dirty")? * 1024,
        })
    }
}

/// What a process has used of a processor until now, with its threads that have ended. In ticks of 10 ms, so only for
/// what takes seconds.
pub(crate) fn used(pid: u32) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the name, in parentheses; utime and stime are the 14th and 15th (proc_pid_stat(5)).
    let (_, rest) = stat.rsplit_once(") ").context("stat")?;
    let times: Vec<_> = rest.split(' ').skip(11).take(2).collect();
    let [user, system] = times[..] else { bail!("stat is short") };
    Ok(Duration::from_millis((user.parse::<u64>()? + system.parse::<u64>()?) * 10))
}

/// The number behind `name:`.
fn field(text: &str, name: &str) -> anyhow::Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|rest| rest.split_whitespace().next()).with_context(|| format!("no {name}"))?;
    Ok(number.parse()?)
}
