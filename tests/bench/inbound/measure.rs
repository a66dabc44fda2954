//! One measurement of one contestant.

use super::{
    application::Exchange,
    client::{self, Connection, Target, ask},
    contestant::Contestant,
};
use crate::process::{Sample, used};
use std::time::Duration;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

/// What is asked again and again.
pub(crate) const SMALL: Exchange = Exchange { request: 120, answer: 512 };
/// A megabyte to the application, and one from it.
pub(crate) const UP: Exchange = Exchange { request: 1 << 20, answer: 8 };
pub(crate) const DOWN: Exchange = Exchange { request: 8, answer: 1 << 20 };

/// Load that goes on for a while.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) exchange: Exchange,
    /// How many exchanges are under way at any time.
    pub(crate) clients: usize,
    /// Whether their connections are kept, or there is a new one for each exchange.
    pub(crate) kept: bool,
}

/// What a load came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    /// Exchanges for a second of a processor that the contestant used.
    pub(crate) per_core: f64,
    /// The part of a core that it used.
    pub(crate) busy: f64,
    pub(crate) exchanges: u64,
}

impl Load {
    /// Puts the load on for `time`. Connections that are kept are open before, and were used once.
    pub(crate) async fn put(self, on: &Contestant, time: Duration) -> anyhow::Result<Rate> {
        let mut connections = Vec::new();
        while self.kept && connections.len() < self.clients {
            connections.push(open(&on.target).await?);
        }
        let mut tasks = JoinSet::new();
        let (before, began) = (used(on.pid())?, Instant::now());
        let end = began + time;
        for _ in 0..self.clients {
            match connections.pop() {
                Some(connection) => tasks.spawn(client::repeat(connection, self.exchange, end)),
                None => tasks.spawn(client::reconnect(on.target.clone(), self.exchange, end)),
            };
        }
        let mut exchanges = 0;
        while let Some(done) = tasks.join_next().await {
            exchanges += done??;
        }
        let (cpu, time) = ((used(on.pid())? - before).as_secs_f64(), began.elapsed().as_secs_f64());
        Ok(Rate { per_core: exchanges as f64 / cpu, busy: cpu / time, exchanges })
    }
}

/// How long small exchanges take in microseconds, one after the other, for each of `targets`. They take turns, so that
/// what disturbs one disturbs all.
pub(crate) async fn delays(targets: &[Target], turns: usize) -> anyhow::Result<Vec<Vec<f64>>> {
    const TURN: usize = 200;
    let mut connections = Vec::new();
    for target in targets {
        connections.push(open(target).await?);
    }
    let request = SMALL.bytes();
    let mut delays = vec![Vec::with_capacity(turns * TURN); targets.len()];
    for _ in 0..turns {
        for (connection, delays) in connections.iter_mut().zip(&mut delays) {
            for _ in 0..TURN {
                let began = Instant::now();
                ask(connection, &request, SMALL.answer).await?;
                delays.push(began.elapsed().as_secs_f64() * 1e6);
            }
        }
    }
    Ok(delays)
}

/// Opens `count` connections to one that has just started; each is used once. What they cost, in bytes: private and
/// resident memory that was added, then the same as it is with all connections.
pub(crate) async fn idle(on: &Contestant, count: usize) -> anyhow::Result<[f64; 4]> {
    // Something is always done for the first time.
    for _ in 0..16 {
        open(&on.target).await?;
    }
    sleep(SETTLED).await;
    let before = Sample::of(on.pid())?;
    let mut connections = Vec::new();
    for _ in 0..count {
        connections.push(open(&on.target).await?);
    }
    sleep(SETTLED).await;
    let after = Sample::of(on.pid())?;
    // They are all still there.
    for connection in &mut connections {
        ask(connection, &SMALL.bytes(), SMALL.answer).await?;
    }
    let (private, resident) = (after.private_dirty as f64, after.resident as f64);
    Ok([private - before.private_dirty as f64, resident - before.resident as f64, private, resident])
}

/// Until what is freed has been given back, if it ever is.
const SETTLED: Duration = Duration::from_secs(2);

async fn open(target: &Target) -> anyhow::Result<Connection> {
    let mut connection = target.connect().await?;
    ask(&mut connection, &SMALL.bytes(), SMALL.answer).await?;
    Ok(connection)
}
