//! Many workloads and one control plane that goes away and comes back. Agents hold some dozens each, all with loops and
//! connections of their own: to the control plane they are as many agents.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::{
    rotation::lab,
    support::{Host, Running},
};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep, timeout};
use we_lab::{Event, Fault, Lab, What};

/// How long a fleet may take to come up on a machine that does something else.
const UP: Duration = Duration::from_secs(600);

/// The workloads of one agent.
const EACH: u16 = 50;

struct Fleet {
    lab: Lab,
    agents: Vec<(Host, Running)>,
    uids: BTreeMap<String, String>,
}

impl Fleet {
    async fn start(size: u16) -> Self {
        we_agent::host::raise_descriptor_limit().unwrap();
        let lab = lab().admission(10_000.0).spawn().await.unwrap();
        let mut agents = Vec::new();
        for first in (0..size).step_by(EACH.into()) {
            let mut host = Host::new();
            for n in first..size.min(first + EACH) {
                let address = format!("127.0.{}.{}", 10 + n / 200, 1 + n % 200);
                host = host.bundle(&format!("w{n}"), &lab.bundle("vms", "payments").internal_ip(&address));
            }
            let agent = host.start().await;
            agents.push((host, agent));
        }
        let mut fleet = Self { lab, agents, uids: BTreeMap::new() };
        fleet.registered(size).await;
        fleet.ready().await;
        fleet.uids = fleet.entries();
        assert_eq!(fleet.uids.len(), usize::from(size));
        fleet
    }

    fn entries(&self) -> BTreeMap<String, String> {
        self.lab.entries().into_iter().map(|entry| (entry.name, entry.uid)).collect()
    }

    /// Waits until the control plane has an entry of each.
    async fn registered(&self, size: u16) {
        let mut made = 0;
        let all = |event: &Event| {
            made += u16::from(matches!(event.what, What::EntryCreated { .. }));
            made == size
        };
        assert!(self.lab.until(UP, all).await.is_some(), "{made} of {size} came up");
    }

    /// Waits until each has its certificate, too. One report of an agent for all: it is long.
    async fn ready(&mut self) {
        let end = Instant::now() + UP;
        for (_, agent) in &mut self.agents {
            while !agent.report().workloads.iter().all(|w| w.ready) {
                assert!(Instant::now() < end, "not all are ready in time");
                let _ = timeout(Duration::from_secs(1), agent.status.changed()).await;
            }
        }
    }

    async fn stop(self) {
        for (_host, agent) in self.agents {
            agent.stop().await;
        }
    }

    /// Kills the control plane for a while, and gives the time from its return to the last entry that was taken up again.
    async fn outage(&self, away: Duration) -> Duration {
        self.lab.stop().await;
        sleep(away).await;
        let mark = self.lab.mark();
        self.lab.restart().await;
        let (back, size) = (Instant::now(), self.uids.len());
        let mut taken = 0;
        let all = |event: &Event| {
            taken += usize::from(matches!(event.what, What::EntryConnected { .. }));
            taken == size
        };
        assert!(self.lab.until_since(mark, UP, all).await.is_some(), "not all came back");
        let took = back.elapsed();
        let lost = |e: &Event| matches!(e.what, What::EntryDeleted { .. } | What::EntryCreated { .. });
        assert!(!self.lab.events_since(mark).iter().any(lost), "an entry was lost");
        assert_eq!(self.entries(), self.uids);
        took
    }
}

/// Looking for a control plane that is away costs it nothing, so it is looked for all the time.
#[tokio::test]
async fn two_dozen_are_back_within_seconds() {
    let fleet = Fleet::start(24).await;
    let took = fleet.outage(Duration::from_secs(8)).await;
    assert!(took <= Duration::from_secs(5), "{took:?}");
    fleet.stop().await;
}

/// The control plane admits so many streams a second: nobody is lost, and it hardly ever waits for us. `make soak` has 500
/// and 20 a second.
#[tokio::test]
async fn a_fleet_is_back_as_fast_as_it_is_admitted() {
    let size: u16 = std::env::var("WE_AGENT_FLEET").ok().map_or(60, |size| size.parse().unwrap());
    let rate = f64::from(size) / 25.0;
    let fleet = Fleet::start(size).await;
    fleet.lab.inject(Fault::Admission(rate));
    let took = fleet.outage(Duration::from_secs(3)).await;
    eprintln!("{size} workloads at {rate} streams a second: {took:?}");
    assert!(took <= Duration::from_secs(25).mul_f64(1.3), "{took:?}");
    fleet.stop().await;
}
