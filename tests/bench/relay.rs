//! A relay between the agent and its control plane: it forwards bytes, and counts what it forwards. So the figures are
//! of the wire, and the same for every control plane.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// What went over a relay until now.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) connections: u32,
    /// By the agent, in bytes.
    pub(crate) sent: u64,
    /// By the agent, in bytes.
    pub(crate) received: u64,
    /// How often the agent spoke after it had listened; its first word counts.
    pub(crate) turns: u32,
    agent_spoke_last: bool,
}

/// It lives as long as the process.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    traffic: Arc<Mutex<Traffic>>,
}

impl Relay {
    /// A relay to `target`, on a port of its own.
    pub(crate) fn start(target: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, traffic) = (listener.local_addr()?, Arc::new(Mutex::default()));
        let shared = Arc::clone(&traffic);
        thread::spawn(move || {
            for agent in listener.incoming().flatten() {
                // A control plane that is away is not measured; the agent sees a closed connection.
                let _ = relay(agent, target, &shared);
            }
        });
        Ok(Self { address, traffic })
    }

    pub(crate) fn traffic(&self) -> Traffic {
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn relay(agent: TcpStream, target: SocketAddr, traffic: &Arc<Mutex<Traffic>>) -> std::io::Result<()> {
    let server = TcpStream::connect(target)?;
    agent.set_nodelay(true)?;
    server.set_nodelay(true)?;
    note(traffic, |traffic| traffic.connections += 1);
    let (from_agent, to_agent) = (agent.try_clone()?, agent);
    let (from_server, to_server) = (server.try_clone()?, server);
    let counted = Arc::clone(traffic);
    thread::spawn(move || {
        forward(from_agent, to_server, |bytes| {
            note(&counted, |traffic| {
                traffic.sent += bytes;
                traffic.turns += u32::from(!traffic.agent_spoke_last);
                traffic.agent_spoke_last = true;
            });
        });
    });
    let counted = Arc::clone(traffic);
    thread::spawn(move || {
        forward(from_server, to_agent, |bytes| {
            note(&counted, |traffic| {
                traffic.received += bytes;
                traffic.agent_spoke_last = false;
            });
        });
    });
    Ok(())
}

fn note(traffic: &Mutex<Traffic>, change: impl FnOnce(&mut Traffic)) {
    change(&mut traffic.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Until one side ends or breaks.
fn forward(mut from: TcpStream, mut to: TcpStream, count: impl Fn(u64)) {
    let mut buffer = [0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        count(length as u64);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
