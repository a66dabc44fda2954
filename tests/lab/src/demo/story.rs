//! The story: each step waits for what it shows.

use std::{fs, io::Write, time::Duration};

use anyhow::{Context, bail, ensure};
use tokio::time::{Instant, sleep};

use super::{
    pair::Tally,
    screen::Screen,
    stage::{ENTRY, FILES, HOST, NAMESPACE, SHORT, SPIFFE_ID, Stage},
};
use crate::{Fault, What, WorkloadEntry};

/// After the rotation certificates live as long as the demo.
const LONG: Duration = Duration::from_secs(3600);
/// How long the control plane is away at least.
const OUTAGE: Duration = Duration::from_secs(2);
/// How many certificates the reader meets.
const CERTIFICATES: usize = 4;

/// All of it. The stage is set; the agent runs from here to the last step.
pub(super) async fn tell<W: Write>(stage: &mut Stage, screen: &mut Screen<W>) -> anyhow::Result<()> {
    screen.begin("Bundle on the VM, as istioctl writes it");
    stage.write_bundle()?;
    screen.done("host/etc/we-agent/payments: cluster.env, mesh.yaml, istio-token, root-cert.pem, hosts");

    screen.begin("Agent started");
    let id = stage.start_agent()?.id();
    screen.done(&format!("we-agent run --root host (process {id})"));

    identity(stage, screen).await?;
    let uid = registration(stage, screen).await?;
    health(stage, screen).await?;
    rotation(stage, screen).await?;
    outage(stage, screen, &uid).await?;
    goodbye(stage, screen, &uid).await
}

async fn identity<W: Write>(stage: &mut Stage, screen: &mut Screen<W>) -> anyhow::Result<()> {
    screen.begin("1 Identity issued");
    let published =
        |w: &serde_json::Value| w["identity"]["state"] == "valid" && w["files"][0]["serial"] == w["identity"]["serial"];
    let w = stage.until_status("a certificate in the files", published).await?;
    let chain = fs::read_to_string(stage.out.join(FILES).join("cert-chain.pem")).context("cert-chain.pem")?;
    stage.keep("cert-chain-1-first.pem", &chain)?;
    stage.keep_status("1-issued").await?;
    ensure!(w["spiffe_id"] == SPIFFE_ID, "the identity is {}", w["spiffe_id"]);
    let text = |key: &str| w["identity"][key].as_str().unwrap_or("?").to_owned();
    screen.done(&format!(
        "{SPIFFE_ID}\nserial {}, expires {}\n{FILES}: key.pem, cert-chain.pem, root-cert.pem",
        text("serial"),
        text("not_after")
    ));
    Ok(())
}

/// Gives the entry's UID.
async fn registration<W: Write>(stage: &mut Stage, screen: &mut Screen<W>) -> anyhow::Result<String> {
    screen.begin("2 WorkloadEntry created");
    let entry = stage.until_entry("a WorkloadEntry", |_| true).await?;
    stage.keep("entry-1-created.yaml", &entry.yaml())?;
    stage.until_status("registered", |w| w["registration"]["state"] == "registered").await?;
    screen.done(&entry.yaml());

    screen.begin("3 Listed in the mesh");
    stage.until_listed(true).await?;
    let w = stage.until_status("membership listed", |w| w["membership"]["state"] == "listed").await?;
    ensure!(w["membership"]["tls"] == true, "the mesh would not speak mutual TLS to the VM: {}", w["membership"]);
    let places: Vec<String> = stage.lab.listed(HOST).iter().map(ToString::to_string).collect();
    let answer = stage.call().await?;
    screen.done(&format!(
        "{HOST}:443 -> {} by mutual TLS; we-agent status says so, too\na pod calls, and the answer is: {answer}",
        places.join(", ")
    ));

    screen.begin("4 Healthy=True");
    let entry = stage.until_entry("Healthy=True", |e| e.healthy() == Some(true)).await?;
    stage.keep("entry-2-healthy.yaml", &entry.yaml())?;
    stage.keep_status("2-ready").await?;
    screen.done(&condition(&entry));
    Ok(entry.uid)
}

async fn health<W: Write>(stage: &mut Stage, screen: &mut Screen<W>) -> anyhow::Result<()> {
    screen.begin("5 The application breaks: Healthy=False, not listed");
    stage.app.set_healthy(false);
    let entry = stage.until_entry("Healthy=False", |e| e.healthy() == Some(false)).await?;
    stage.until_listed(false).await?;
    stage.until_status("membership withheld", |w| w["membership"]["state"] == "withheld").await?;
    stage.keep("entry-3-unhealthy.yaml", &entry.yaml())?;
    stage.keep_status("3-unhealthy").await?;
    ensure!(
        entry.health_message().is_some_and(|text| text.contains("503")),
        "the probe's text is missing from {}",
        entry.yaml()
    );
    screen.done(&condition(&entry));

    screen.begin("6 It heals: Healthy=True, listed again");
    stage.app.set_healthy(true);
    let entry = stage.until_entry("Healthy=True again", |e| e.healthy() == Some(true)).await?;
    stage.until_listed(true).await?;
    stage.until_status("membership listed again", |w| w["membership"]["state"] == "listed").await?;
    stage.keep("entry-4-healed.yaml", &entry.yaml())?;
    screen.done(&condition(&entry));
    Ok(())
}

async fn rotation<W: Write>(stage: &mut Stage, screen: &mut Screen<W>) -> anyhow::Result<()> {
    screen.begin("7 Certificate rotates under a reader and a caller");
    let calls = stage.calls;
    stage
        .until("several certificates", async |stage| {
            stage.call().await?;
            Ok((good(&stage.reader.tally())?.serials.len() + 1 >= CERTIFICATES).then_some(()))
        })
        .await?;
    stage.lab.inject(Fault::ShortLife(LONG));
    let longer = |w: &serde_json::Value| {
        let lifetime = |key| humantime::parse_rfc3339(w["identity"][key].as_str()?).ok();
        let life =
            lifetime("not_after").zip(lifetime("not_before")).and_then(|(end, start)| end.duration_since(start).ok());
        life.is_some_and(|life| life > LONG / 2) && w["files"][0]["serial"] == w["identity"]["serial"]
    };
    let w = stage.until_status("a certificate that lives longer", longer).await?;
    let last = w["identity"]["serial"].as_str().unwrap_or_default().to_owned();
    let tally = stage
        .until("the reader meets the last certificate", async |stage| {
            Ok(Some(good(&stage.reader.tally())?).filter(|tally| tally.serials.contains(&last)))
        })
        .await?;
    let chain = fs::read_to_string(stage.out.join(FILES).join("cert-chain.pem")).context("cert-chain.pem")?;
    stage.keep("cert-chain-2-rotated.pem", &chain)?;
    stage.keep_status("4-rotated").await?;
    screen.done(&format!(
        "{} certificates, those of {} s renewed at half of their life\n{} reads of key, chain and roots: each a pair that matches and is valid\n{} calls of the pod meanwhile, none failed",
        tally.serials.len(),
        SHORT.as_secs(),
        tally.reads,
        stage.calls - calls
    ));
    Ok(())
}

async fn outage<W: Write>(stage: &mut Stage, screen: &mut Screen<W>, uid: &str) -> anyhow::Result<()> {
    screen.begin("8 The control plane dies for a while: nothing is lost");
    let before = stage.agent()?.workload().await["identity"]["serial"].clone();
    stage.lab.inject(Fault::Down);
    let back = Instant::now() + OUTAGE;
    let w = stage.until_status("the loss in status", |w| w["registration"]["state"] == "lost").await?;
    ensure!(w["identity"]["state"] == "valid", "the certificate was lost with the control plane: {}", w["identity"]);
    let cause = w["registration"]["cause"].as_str().filter(|cause| !cause.contains('\n'));
    let cause = cause.context("status does not name the cause in one line")?.to_owned();
    stage.keep_status("5-outage").await?;
    stage.call().await.context("the VM cannot be called without a control plane")?;
    sleep(back.saturating_duration_since(Instant::now())).await;
    good(&stage.reader.tally())?;

    let mark = stage.lab.mark();
    stage.lab.heal(Fault::Down);
    let w = stage.until_status("registered again", |w| w["registration"]["state"] == "registered").await?;
    stage.until_listed(true).await?;
    let entry = stage.until_entry("the entry, taken up again", |e| e.connected_at().is_some()).await?;
    ensure!(entry.uid == uid, "the entry is another one: UID {} became {}", uid, entry.uid);
    ensure!(w["identity"]["serial"] == before, "the certificate is another one");
    let gone = |event: &crate::Event| matches!(event.what, What::EntryDeleted { .. } | What::EntryCreated { .. });
    ensure!(!stage.lab.events_since(mark).iter().any(gone), "the entry was deleted and created again");
    stage.keep("entry-5-after-outage.yaml", &entry.yaml())?;
    stage.keep_status("6-recovered").await?;
    screen.done(&format!(
        "meanwhile, in we-agent status: {cause}\nmeanwhile, a pod calls the VM as before\nafterwards the same certificate, the same entry (UID {uid})"
    ));
    Ok(())
}

async fn goodbye<W: Write>(stage: &mut Stage, screen: &mut Screen<W>, uid: &str) -> anyhow::Result<()> {
    screen.begin("9 The agent stops (SIGTERM): the entry goes after its grace");
    let agent = stage.agent()?;
    agent.signal_to_end()?;
    let ended = agent.ended().await?;
    ensure!(ended.success(), "the agent ended with {ended}");
    let Some(entry) = stage.lab.entry(NAMESPACE, ENTRY) else { bail!("the entry went without its grace") };
    let Some(at) = entry.disconnected_at() else { bail!("the entry was not marked:\n{}", entry.yaml()) };
    stage.keep("entry-6-disconnected.yaml", &entry.yaml())?;
    let deleted = |event: &crate::Event| matches!(&event.what, What::EntryDeleted { uid: gone, .. } if gone == uid);
    stage.lab.until(Duration::from_secs(20), deleted).await.context("the entry is still there 20 s after the agent")?;
    ensure!(stage.lab.entries().is_empty() && stage.lab.listed(HOST).is_empty(), "something is left in the mesh");
    good(&stage.reader.tally())?;
    screen.done(&format!("disconnectedAt {at}, then deleted; the files stay: stopping is not leaving"));
    Ok(())
}

/// The reader's tally, if it has met nothing bad.
fn good(tally: &Tally) -> anyhow::Result<Tally> {
    match &tally.first_bad {
        Some(cause) => bail!("{} of {} reads were bad; the first one: {cause}", tally.bad, tally.reads),
        None => Ok(tally.clone()),
    }
}

/// The condition `Healthy` of an entry, on one line.
fn condition(entry: &WorkloadEntry) -> String {
    let status = match entry.healthy() {
        Some(true) => "True",
        Some(false) => "False",
        None => "unknown",
    };
    match entry.health_message() {
        None | Some("") => format!("status.conditions: Healthy is {status}"),
        Some(message) => format!("status.conditions: Healthy is {status}: {message}"),
    }
}
