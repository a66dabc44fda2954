//! What one caller can have of a listener.

use super::{Echo, Pod, WEB, is_refused, refused, started, vm};
use crate::{rotation::lab, support::SOON};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// A stream that is used once: it is let in.
async fn open<S: AsyncReadExt + AsyncWriteExt + Unpin>(mut stream: S) -> S {
    stream.write_all(b"x").await.unwrap();
    timeout(SOON, stream.read_exact(&mut [0])).await.expect("no answer in time").unwrap();
    stream
}

#[tokio::test]
async fn one_identity_leaves_places_for_others() {
    /// Seven eighths of sixteen.
    const SHARE: usize = 14;
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, ", maxConnections: 16")).await;
    let (greedy, other) = (Pod::new(&lab, WEB), Pod::new(&lab, "spiffe://cluster.local/ns/shop/sa/other"));
    let mut held = Vec::new();
    for _ in 0..SHARE {
        held.push(open(greedy.connect(at).await.unwrap()).await);
    }
    is_refused(&greedy, at).await;
    let text = refused(&mut agent, "too_many").await;
    assert_eq!(text, format!("{WEB} has {SHARE} connections open already (maxConnectionsPerIdentity)"));
    assert_eq!(other.echo(at, b"other").await, b"other");
    // What it gives back, it may have again.
    drop(held.pop());
    agent.until("payments", "closed", |w| w.inbound[0].open < SHARE as u64).await;
    held.push(open(greedy.connect(at).await.unwrap()).await);
    agent.stop().await;
}

#[tokio::test]
async fn clients_without_tls_leave_places_for_the_mesh() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let more = ", mode: permissive, maxConnectionsPerIdentity: 3";
    let (_host, mut agent, at) = started(vm(&lab, echo.address, more)).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(open(TcpStream::connect(at).await.unwrap()).await);
    }
    let mut one_more = TcpStream::connect(at).await.unwrap();
    one_more.write_all(b"x").await.unwrap();
    let read = timeout(SOON, one_more.read(&mut [0])).await.expect("it is held");
    assert!(matches!(read, Ok(0) | Err(_)), "it was let in");
    assert!(refused(&mut agent, "too_many").await.starts_with("clients without TLS have 3 connections"));
    assert_eq!(Pod::new(&lab, WEB).echo(at, b"mesh").await, b"mesh");
    agent.stop().await;
}
