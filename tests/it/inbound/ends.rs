//! Each end is heard to its last byte, also when the other listens no more.

use super::{Pod, WEB, inbound, started, vm};
use crate::{rotation::lab, support::SOON};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket, UnixListener},
    task::JoinHandle,
    time::timeout,
};

/// How often each is tried: which of two things happens first is chance.
const TIMES: usize = 10;
/// More than the kernel takes on the way to who does not read.
const UPLOAD: usize = 32 << 20;
/// What the application reads of it.
const BEGINNING: usize = 1000;

/// What applications say before they close on somebody who is still sending: HTTP/1.1 refuses a body; HTTP/2 lets the
/// stream before it end and takes no other.
fn answers() -> [Vec<u8>; 2] {
    let refusal = [b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\n\r\n".as_slice(), &[b'.'; 8000]].concat();
    let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    let data = [&[0, 0x1f, 0x40, 0, 1, 0, 0, 0, 1][..], &[b'.'; 8000]].concat();
    [refusal, [&goaway[..], &data].concat()]
}

async fn answer_early(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: &[u8]) {
    stream.read_exact(&mut [0; BEGINNING]).await.unwrap();
    stream.write_all(answer).await.unwrap();
}

/// An application that answers early, on both kinds of socket.
fn applications(tcp: TcpListener, unix: UnixListener) -> JoinHandle<()> {
    tokio::spawn(async move {
        for answer in answers() {
            for _ in 0..TIMES {
                answer_early(tcp.accept().await.unwrap().0, &answer).await;
            }
        }
        for answer in answers() {
            for _ in 0..TIMES {
                answer_early(unix.accept().await.unwrap().0, &answer).await;
            }
        }
    })
}

#[tokio::test]
async fn an_application_that_answers_early_is_heard() {
    let lab = lab().spawn().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (tcp, path) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), dir.path().join("app.sock"));
    let forward = tcp.local_addr().unwrap();
    let applications = applications(tcp, UnixListener::bind(&path).unwrap());
    for host in [vm(&lab, forward, ""), vm(&lab, format!("unix:{}", path.display()), "")] {
        let (_host, mut agent, at) = started(host).await;
        let pod = Pod::new(&lab, WEB);
        let mut heard = Vec::new();
        for answer in answers() {
            for _ in 0..TIMES {
                let (mut read, mut write) = tokio::io::split(pod.connect(at).await.unwrap());
                let sending = tokio::spawn(async move { write.write_all(&vec![7; UPLOAD]).await });
                let mut got = Vec::new();
                let _ = timeout(SOON, read.read_to_end(&mut got)).await.expect("it is held"); // it may be a reset
                heard.push(got == answer);
                // Nobody waits for a caller that goes on.
                let _ = timeout(SOON, sending).await.expect("the caller is held").unwrap();
            }
        }
        assert!(heard.iter().all(|heard| *heard), "{heard:?}");
        agent.until("payments", "closed", |w| w.inbound[0].open == 0).await;
        agent.stop().await;
    }
    applications.await.unwrap();
}

#[tokio::test]
async fn a_caller_that_has_said_all_and_gone_is_heard() {
    const SIZE: usize = 200_000;
    let lab = lab().spawn().await.unwrap();
    // The application's side of the kernel has room for a small part.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(8).unwrap();
    let (_host, mut agent, at) = started(vm(&lab, listener.local_addr().unwrap(), "")).await;
    let (mut taken, mut answered) = (0, 0);
    for _ in 0..TIMES {
        let mut caller = Pod::new(&lab, WEB).connect(at).await.unwrap();
        let (mut application, _) = listener.accept().await.unwrap();
        caller.write_all(&[7; SIZE]).await.unwrap();
        caller.shutdown().await.unwrap();
        taken += SIZE as u64;
        agent.until("payments", "taken", |w| w.inbound[0].bytes_in == taken).await;
        drop(caller);
        // It is not there any more: to the first word its kernel says so, the next cannot be sent.
        for _ in 0..2 {
            answered += 5;
            application.write_all(b"thank").await.unwrap();
            agent.until("payments", "answered", |w| w.inbound[0].bytes_out == answered).await;
        }
        let mut heard = Vec::new();
        let _ = timeout(SOON, application.read_to_end(&mut heard)).await.expect("it is held");
        assert_eq!(heard.len(), SIZE);
    }
    agent.until("payments", "closed", |w| w.inbound[0].open == 0).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_application_on_a_unix_socket_is_served_too() {
    let lab = lab().spawn().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
    });
    let (_host, agent, at) = started(vm(&lab, format!("unix:{}", path.display()), "")).await;
    assert_eq!(Pod::new(&lab, WEB).echo(at, b"hello").await, b"hello");
    task.await.unwrap();
    // What it cannot be told is said.
    assert!(inbound(&agent).notes.iter().any(|note| note.contains("is cut off")), "{:?}", inbound(&agent).notes);
    agent.stop().await;
}
