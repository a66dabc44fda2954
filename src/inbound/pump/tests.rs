#![allow(clippy::unwrap_used)]
use super::{super::tls::BATCH, *};
use nix::sys::socket::{setsockopt, sockopt};
use std::{future::poll_fn, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixStream},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(20);

/// A pump without TLS, the peer, and the application.
async fn pump() -> (Pump, TcpStream, UnixStream) {
    pump_within(&Arc::default()).await
}

/// The same, with others.
async fn pump_within(budget: &Arc<Budget>) -> (Pump, TcpStream, UnixStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (application, ours) = UnixStream::pair().unwrap();
    let taken = listener.accept().await.unwrap().0;
    (Pump::new(taken, None, LocalStream::Right(ours), Vec::new(), budget.clone()), peer, application)
}

/// One turn.
async fn turn(pump: &mut Pump, counters: &InboundCounters) {
    let end = poll_fn(|cx| Poll::Ready(pump.poll(cx, counters))).await;
    assert!(end.is_pending(), "{end:?}");
}

/// Turns until `done`.
async fn until(pump: &mut Pump, done: impl Fn(&Pump) -> bool) {
    let counters = InboundCounters::default();
    let turns = async {
        while !done(pump) {
            turn(pump, &counters).await;
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, turns).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_takes_a_batch_in_parts_shows_life() {
    let (mut pump, mut peer, mut application) = pump().await;
    setsockopt(&pump.peer, sockopt::SndBuf, &(16 * 1024)).unwrap();
    let writing = tokio::spawn(async move {
        application.write_all(&vec![7; 16 << 20]).await.unwrap();
        application
    });
    until(&mut pump, |pump| pump.doing() == Doing::Moves).await;
    let reading = tokio::spawn(async move {
        let mut some = vec![0; 8 * 1024];
        while peer.read_exact(&mut some).await.is_ok() {}
    });
    let counters = InboundCounters::default();
    let mut parts = 0;
    let moving = poll_fn(|cx| {
        let (before, taken) = (pump.moved, counters.bytes_out.load(Relaxed));
        assert!(pump.poll(cx, &counters).is_pending());
        // Nothing new was taken: a part of what was held has gone.
        let part = pump.doing() == Doing::Moves && counters.bytes_out.load(Relaxed) == taken && pump.moved > before;
        parts += u32::from(part);
        if parts < 3 { Poll::Pending } else { Poll::Ready(()) }
    });
    timeout(SOON, moving).await.unwrap();
    assert_eq!(pump.doing(), Doing::Moves);
    reading.abort();
    writing.abort();
}

#[tokio::test]
async fn who_has_said_its_last_word_is_owed_an_answer() {
    let (mut pump, mut peer, mut application) = pump().await;
    peer.write_all(b"?").await.unwrap();
    until(&mut pump, |pump| pump.doing() == Doing::Owes).await;
    application.write_all(b"the beginning").await.unwrap();
    until(&mut pump, |pump| pump.doing() == Doing::Rests).await;
    peer.shutdown().await.unwrap();
    until(&mut pump, |pump| pump.inward.is_closed()).await;
    application.write_all(b" of it").await.unwrap();
    peer.read_exact(&mut [0; 13]).await.unwrap();
    until(&mut pump, |pump| !pump.asked).await;
    assert_eq!(pump.doing(), Doing::Owes);
}

#[tokio::test]
async fn who_has_said_nothing_is_owed_nothing() {
    let (mut pump, mut peer, mut application) = pump().await;
    pump.introduce(b"PROXY".to_vec());
    until(&mut pump, |pump| pump.inward.is_empty()).await;
    assert_eq!(pump.doing(), Doing::Rests);
    peer.write_all(b"?").await.unwrap();
    until(&mut pump, |pump| pump.doing() == Doing::Owes).await;
    application.read_exact(&mut [0; 6]).await.unwrap();
    application.write_all(b"!").await.unwrap();
    until(&mut pump, |pump| pump.doing() == Doing::Rests).await;
}

#[tokio::test]
async fn who_does_not_read_holds_a_bounded_amount_and_holds_up_nobody() {
    const MANY: usize = 40;
    const ENOUGH: usize = 2 * BATCH;
    let budget = Arc::new(Budget::new(ENOUGH));
    let mut stuck = Vec::new();
    for _ in 0..MANY {
        let (mut pump, peer, mut application) = pump_within(&budget).await;
        setsockopt(&pump.peer, sockopt::SndBuf, &(16 * 1024)).unwrap();
        let writing = tokio::spawn(async move { while application.write_all(&[7; BATCH]).await.is_ok() {} });
        until(&mut pump, |pump| pump.doing() == Doing::Moves).await;
        stuck.push((pump, peer, writing));
    }
    let held = budget.held();
    assert!((ENOUGH..ENOUGH + BATCH + MANY * 4096).contains(&held), "{held} bytes are held");
    // Somebody else goes on meanwhile.
    let (mut pump, peer, mut application) = pump_within(&budget).await;
    let writing = tokio::spawn(async move { application.write_all(&[7; 1 << 20]).await });
    let reading = tokio::spawn(async move {
        let (mut peer, mut all) = (peer, Vec::new());
        peer.read_to_end(&mut all).await.map(|_| all.len())
    });
    until(&mut pump, |pump| pump.outward.is_closed()).await;
    writing.await.unwrap().unwrap();
    assert_eq!(reading.await.unwrap().unwrap(), 1 << 20);
    // What was held is there, and then there is room again.
    let (mut pump, mut peer, _writing) = stuck.swap_remove(0);
    let reading = tokio::spawn(async move { peer.read_exact(&mut vec![0; 256 * 1024]).await });
    until(&mut pump, |_| reading.is_finished()).await;
    reading.await.unwrap().unwrap();
    drop((stuck, pump));
    assert_eq!((budget.held(), budget.batch()), (0, BATCH));
}
