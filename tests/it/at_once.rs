//! A reload, a renewal, another root, lost streams and a stop, at once and in any order: seeded, so that an order that
//! failed can be had again.

use crate::{
    authority::Authority,
    daemon::Daemon,
    published,
    rotation::{ID, host, issued, lab},
    support::{Host, SOON},
};
use nix::sys::signal::Signal;
use std::{fs, time::Duration};
use tokio::time::sleep;
use we_agent::status::WorkloadReport;
use we_lab::{Fault, Lab};

const ROUNDS: u64 = 5;

#[derive(Debug, Clone, Copy)]
enum Act {
    Reload,
    Renewal,
    Roots,
    Loss,
}

async fn act(act: Act, round: u64, daemon: &Daemon<'_>, host: &Host, lab: &Lab) {
    match act {
        Act::Reload => {
            fs::write(host.path("/etc/we-agent/we-agent.yaml"), config(round)).unwrap();
            daemon.signal(Signal::SIGHUP);
        }
        Act::Renewal => {
            let renewed = lab.until_since(lab.mark(), SOON, |e| issued(e).is_some()).await;
            assert!(renewed.is_some(), "it does not renew\n{}", daemon.log());
        }
        Act::Roots => {
            let both = format!("{}{}", lab.root_pem(), Authority::root(&format!("of round {round}")).root_pem());
            fs::write(host.path("/etc/we-agent/payments/root-cert.pem"), both).unwrap();
        }
        Act::Loss => lab.inject(Fault::DropConnections),
    }
}

fn config(round: u64) -> String {
    format!("admin: {{address: off}}\ndefaults: {{renewal: {{minInterval: 1s}}, labels: {{round: \"{round}\"}}}}\n")
}

#[tokio::test]
async fn reload_renewal_another_root_and_a_stop() {
    let lab = lab().ttl(Duration::from_secs(6)).spawn().await.unwrap();
    let host = host(&lab).config(&config(ROUNDS));
    let dir = published::dir(&host, "payments");
    let out =
        |w: &WorkloadReport| w.ready && w.files.iter().all(|p| p.serial.is_some() && p.serial == w.identity.serial);
    for round in 0..ROUNDS {
        let mut chance = fastrand::Rng::with_seed(round);
        let daemon = Daemon::start(&host, &[], &[]);
        daemon.until("payments", out).await;
        let mut acts = [Act::Reload, Act::Renewal, Act::Roots, Act::Loss];
        chance.shuffle(&mut acts);
        for one in acts {
            act(one, round, &daemon, &host, &lab).await;
            sleep(Duration::from_micros(chance.u64(0..20_000))).await;
        }
        let log = daemon.log();
        daemon.signal(Signal::SIGTERM);
        daemon.ended().await;
        assert!(!log.contains("this is a bug"), "round {round}: {acts:?}\n{log}");
        // It fails at a pair that does not match.
        assert!(published::pair(&dir, ID).is_some(), "round {round}: {acts:?}");
    }
    let daemon = Daemon::start(&host, &[], &[]);
    daemon.until("payments", out).await;
    daemon.signal(Signal::SIGTERM);
    daemon.ended().await;
}
