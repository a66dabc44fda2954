//! A relay between the agent and its control plane. It counts what it forwards, so the figures are of the wire and the
//! same for every control plane; and it forwards late, so that the round trips can be told from the time.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

/// What went over a relay until now.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) connections: u32,
    /// By the agent, in bytes.
    pub(crate) sent: u64,
    /// By the agent, in bytes.
    pub(crate) received: u64,
}

/// It lives as long as the process.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    traffic: Arc<Mutex<Traffic>>,
}

impl Relay {
    /// A relay to `target`, on a port of its own; every byte takes `delay`.
    pub(crate) fn start(target: SocketAddr, delay: Duration) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, traffic) = (listener.local_addr()?, Arc::new(Mutex::default()));
        let shared = Arc::clone(&traffic);
        thread::spawn(move || {
            for agent in listener.incoming().flatten() {
                // A control plane that is away is not measured; the agent sees a closed connection.
                let _ = relay(agent, target, delay, &shared);
            }
        });
        Ok(Self { address, traffic })
    }

    pub(crate) fn traffic(&self) -> Traffic {
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn relay(agent: TcpStream, target: SocketAddr, delay: Duration, traffic: &Arc<Mutex<Traffic>>) -> std::io::Result<()> {
    let server = TcpStream::connect(target)?;
    agent.set_nodelay(true)?;
    server.set_nodelay(true)?;
    note(traffic, |traffic| traffic.connections += 1);
    let counted = Arc::clone(traffic);
    forward(agent.try_clone()?, server.try_clone()?, delay, move |bytes| note(&counted, |t| t.sent += bytes));
    let counted = Arc::clone(traffic);
    forward(server, agent, delay, move |bytes| note(&counted, |t| t.received += bytes));
    Ok(())
}

fn note(traffic: &Mutex<Traffic>, change: impl FnOnce(&mut Traffic)) {
    change(&mut traffic.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Until one side ends or breaks. Two threads, so that what comes close together goes close together.
fn forward(mut from: TcpStream, mut to: TcpStream, delay: Duration, count: impl Fn(u64) + Send + 'static) {
    let (sender, late) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            count(length as u64);
            if sender.send((Instant::now() + delay, buffer[..length].to_vec())).is_err() {
                break;
            }
        }
    });
    thread::spawn(move || {
        for (due, bytes) in late {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
