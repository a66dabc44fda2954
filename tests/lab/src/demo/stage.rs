//! Everything that takes part, and waiting for it with a deadline.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{agent::Agent, app::App, pair::Reader, pod::Pod};
use crate::{Fault, Group, Lab, Service, WorkloadEntry};

/// How long a step may take.
const LIMIT: Duration = Duration::from_secs(25);
/// From one look at the state of things to the next.
const LOOK: Duration = Duration::from_millis(40);
/// How long the first certificates live, so that a rotation is seen now and not at noon.
pub(super) const SHORT: Duration = Duration::from_secs(8);
/// How long an entry outlives its agent; a real istiod's default is ten seconds.
const GRACE: Duration = Duration::from_secs(2);

pub(super) const TRUST_DOMAIN: &str = "cluster.local";
pub(super) const NAMESPACE: &str = "vms";
pub(super) const SPIFFE_ID: &str = "spiffe://cluster.local/ns/vms/sa/payments-sa";
pub(super) const ENTRY: &str = "payments-127.0.0.1";
pub(super) const HOST: &str = "payments.example.com";
/// The three files, below the folder of evidence.
pub(super) const FILES: &str = "host/run/we-agent/payments";

/// Nothing is written in it that a user would not write, or could not: the address is the only one there is without a
/// network, and certificates of seconds are renewed after seconds.
const CONFIG: &str = "\
# Written by the demo.
admin: {address: \"127.0.0.1:0\"}
defaults:
  platform: \"off\"
  renewal: {minInterval: 1s}
";

/// The control plane and the VM.
pub(super) struct Stage {
    pub(super) out: PathBuf,
    pub(super) lab: Lab,
    pub(super) app: App,
    pub(super) reader: Reader,
    /// How many calls of the pod were answered.
    pub(super) calls: u32,
    pod: Pod,
    program: PathBuf,
    agent: Option<Agent>,
}

impl Stage {
    /// The control plane with its objects, the application and its reader.
    pub(super) async fn new(program: &Path, out: &Path) -> anyhow::Result<Self> {
        let files = out.join(FILES);
        let app = App::start(files.clone(), TRUST_DOMAIN).await?;
        // The delay lets the entry be seen before the first verdict.
        let probe =
            json!({"initialDelaySeconds": 1, "periodSeconds": 1, "httpGet": {"path": "/healthz", "port": app.health}});
        let group = Group::new(NAMESPACE, "payments").service_account("payments-sa").port("https", app.port);
        let group = group.label("app", "payments").probe(probe);
        let service = Service::new(HOST).named_port("https", 443, app.port).selector([("app", "payments")]);
        let lab = Lab::builder().trust_domain(TRUST_DOMAIN).grace(GRACE).group(group).service(service).spawn().await?;
        lab.inject(Fault::ShortLife(SHORT));
        let reader = Reader::start(files, TRUST_DOMAIN);
        let (pod, out, program) = (Pod::new(&lab, SPIFFE_ID)?, out.to_owned(), program.to_owned());
        Ok(Self { out, lab, app, reader, calls: 0, pod, program, agent: None })
    }

    /// What an operator does on the VM, before the agent is started.
    pub(super) fn write_bundle(&self) -> anyhow::Result<()> {
        let place = self.out.join("host/etc/we-agent");
        self.lab.bundle(NAMESPACE, "payments").internal_ip("127.0.0.1").write(place.join("payments"))?;
        fs::write(place.join("we-agent.yaml"), CONFIG).context("we-agent.yaml could not be written")
    }

    pub(super) fn start_agent(&mut self) -> anyhow::Result<&Agent> {
        Ok(self.agent.insert(Agent::start(&self.program, &self.out)?))
    }

    pub(super) fn agent(&mut self) -> anyhow::Result<&mut Agent> {
        self.agent.as_mut().context("the agent was not started")
    }

    /// Waits until `look` finds something. It fails after a while, and at once when the agent has ended by itself.
    pub(super) async fn until<T>(
        &mut self,
        what: &str,
        mut look: impl AsyncFnMut(&mut Self) -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(found) = look(self).await? {
                return Ok(found);
            }
            self.agent()?.check()?;
            if Instant::now() > end {
                bail!("{what}: not within {} s", LIMIT.as_secs());
            }
            sleep(LOOK).await;
        }
    }

    /// Waits for a status of the agent; the workload's.
    pub(super) async fn until_status(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        self.until(what, async |stage| Ok(Some(stage.agent()?.workload().await).filter(&wanted))).await
    }

    /// Waits for a state of the entry.
    pub(super) async fn until_entry(
        &mut self,
        what: &str,
        wanted: impl Fn(&WorkloadEntry) -> bool,
    ) -> anyhow::Result<WorkloadEntry> {
        self.until(what, async |stage| Ok(stage.lab.entry(NAMESPACE, ENTRY).filter(&wanted))).await
    }

    /// Waits until the mesh sends callers to the VM, or nobody any more.
    pub(super) async fn until_listed(&mut self, listed: bool) -> anyhow::Result<()> {
        let what = if listed { "the mesh lists the VM" } else { "the mesh lists the VM no more" };
        self.until(what, async |stage| Ok((stage.lab.listed(HOST).is_empty() != listed).then_some(()))).await
    }

    /// The pod calls where the mesh sends it; the answer.
    pub(super) async fn call(&mut self) -> anyhow::Result<String> {
        let place = self.lab.listed(HOST).first().copied().context("the mesh knows nobody to call")?;
        let answer = self.pod.call(place).await?;
        self.calls += 1;
        Ok(answer)
    }

    /// Leaves a file among the evidence.
    pub(super) fn keep(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.out.join(name);
        fs::write(&path, text).with_context(|| format!("{} could not be written", path.display()))
    }

    pub(super) async fn keep_status(&mut self, name: &str) -> anyhow::Result<()> {
        let text = self.agent()?.status_text(true).await?;
        self.keep(&format!("status-{name}.json"), &text)
    }

    /// Ends the agent, whatever has happened, and writes what the control plane has seen.
    pub(super) async fn close(&mut self) -> anyhow::Result<()> {
        if let Some(agent) = &mut self.agent {
            agent.end().await;
        }
        let mut log = String::new();
        for event in self.lab.events() {
            log.push_str(&serde_json::to_string(&event)?);
            log.push('\n');
        }
        self.keep("events.jsonl", &log)
    }

    /// For a reader of a failure: what the agent said last.
    pub(super) fn last_words(&self) -> String {
        self.agent.as_ref().map(|agent| agent.last_words(15)).unwrap_or_default()
    }
}
