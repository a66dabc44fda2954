//! Who may call, what a caller may speak, and what the application learns of it.

use super::{Echo, Pod, WEB, inbound, is_refused, refused, started, vm};
use crate::{
    rotation::{ID, lab},
    support::SOON,
};
use std::time::{Duration, SystemTime};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use we_lab::Lab;

#[tokio::test]
async fn strangers_are_refused_and_told_apart() {
    const HOUR: Duration = Duration::from_secs(3600);
    let lab = lab().spawn().await.unwrap();
    let other = Lab::builder().spawn().await.unwrap();
    let echo = Echo::start().await;
    let allow = ", allow: [{namespace: shop}, {id: 'spiffe://partner.example/billing'}]";
    let (_host, mut agent, at) = started(vm(&lab, echo.address, allow)).await;
    let now = SystemTime::now();
    let elsewhere = "spiffe://elsewhere.local/ns/shop/sa/web";
    for (pod, reason, said) in [
        (Pod::stranger(&lab), "no_certificate", "shows no certificate"),
        (Pod::foreign(&other, &lab, WEB), "untrusted", "leads to none of our roots"),
        (Pod::with(&lab, &[WEB], now - 2 * HOUR, HOUR), "untrusted", "it expired at "),
        (Pod::with(&lab, &[WEB], now + HOUR, HOUR), "untrusted", "check the clocks"),
        (Pod::with(&lab, &[WEB, ID], now, HOUR), "no_spiffe_id", "names 2 URIs"),
        (Pod::with(&lab, &[], now, HOUR), "no_spiffe_id", "names 0 URIs"),
        (Pod::with(&lab, &["https://a/b"], now, HOUR), "no_spiffe_id", "https://a/b"),
        (Pod::new(&lab, elsewhere), "trust_domain", elsewhere),
        (Pod::new(&lab, "spiffe://cluster.local/ns/other/sa/web"), "not_allowed", "ns/other/sa/web may not call"),
    ] {
        let before = inbound(&agent).refused.get(reason).copied().unwrap_or_default();
        is_refused(&pod, at).await;
        let counted = |w: &we_agent::status::WorkloadReport| w.inbound[0].refused.get(reason) > Some(&before);
        agent.until("payments", reason, counted).await;
        let text = refused(&mut agent, reason).await;
        assert!(text.contains(said), "{reason}: {text}");
    }
    // Plain text, and who is let in.
    let mut plain = TcpStream::connect(at).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(matches!(timeout(SOON, plain.read(&mut [0; 9])).await.unwrap(), Ok(0) | Err(_)));
    assert!(refused(&mut agent, "not_tls").await.contains("does not speak TLS"));
    for id in [WEB, "spiffe://cluster.local/ns/shop/sa/other", "spiffe://partner.example/billing"] {
        assert_eq!(Pod::new(&lab, id).echo(at, b"hello").await, b"hello", "{id}");
    }
    let seen = inbound(&agent);
    assert_eq!((seen.handshakes.count, seen.bytes_in), (3, 15), "{seen:?}");
    agent.stop().await;
}

#[tokio::test]
async fn a_permissive_listener_takes_both() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, mut agent, at) = started(vm(&lab, echo.address, ", mode: permissive")).await;
    assert_eq!(Pod::new(&lab, WEB).echo(at, b"over TLS").await, b"over TLS");
    let mut plain = TcpStream::connect(at).await.unwrap();
    plain.write_all(b"plain").await.unwrap();
    plain.shutdown().await.unwrap();
    let mut answer = String::new();
    timeout(SOON, plain.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, "plain");
    // Who speaks TLS must be somebody.
    is_refused(&Pod::stranger(&lab), at).await;
    refused(&mut agent, "no_certificate").await;
    let seen = inbound(&agent);
    assert_eq!((seen.plain, seen.handshakes.count, seen.mode.as_str()), (1, 1, "permissive"));
    agent.stop().await;
}

#[tokio::test]
async fn a_client_that_waits_for_the_servers_word_gets_it() {
    let lab = lab().spawn().await.unwrap();
    let greeter = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_host, agent, at) = started(vm(&lab, greeter.local_addr().unwrap(), ", mode: permissive")).await;
    let greeting = tokio::spawn(async move { greeter.accept().await.unwrap().0.write_all(b"220 hello").await });
    let mut plain = TcpStream::connect(at).await.unwrap();
    let mut word = [0; 9];
    timeout(SOON, plain.read_exact(&mut word)).await.unwrap().unwrap();
    assert_eq!(&word, b"220 hello");
    greeting.await.unwrap().unwrap();
    agent.stop().await;
}

#[tokio::test]
async fn the_application_may_learn_who_calls() {
    let lab = lab().spawn().await.unwrap();
    let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let more = ", proxyProtocol: v2";
    let (_host, agent, at) = started(vm(&lab, application.local_addr().unwrap(), more)).await;
    let mut pod = Pod::new(&lab, WEB);
    pod.config.alpn_protocols = vec![b"istio-http/1.1".to_vec(), b"istio".to_vec(), b"http/1.1".to_vec()];
    let mut stream = pod.connect(at).await.unwrap();
    let from = stream.get_ref().0.local_addr().unwrap();
    stream.write_all(b"then this").await.unwrap();
    let (mut taken, _) = application.accept().await.unwrap();
    let mut head = [0; 16];
    taken.read_exact(&mut head).await.unwrap();
    assert_eq!(head[..14], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
    let mut body = vec![0; usize::from(u16::from_be_bytes([head[14], head[15]]))];
    taken.read_exact(&mut body).await.unwrap();
    let ports = [from.port().to_be_bytes(), at.port().to_be_bytes()].concat();
    assert_eq!(body[..12], [&[127, 0, 0, 1, 127, 0, 0, 1][..], &ports].concat());
    let fields = fields(&body[12..]);
    let get = |kind: u8| fields.iter().find(|(k, _)| *k == kind).map(|(_, value)| value.as_slice());
    assert_eq!(get(0x01), Some(&b"http/1.1"[..]));
    assert_eq!(get(0x02), Some(&b"outbound_.19080_._.payments.vms.svc"[..]));
    assert_eq!(get(0xE0), Some(WEB.as_bytes()));
    let ssl = get(0x20).unwrap();
    assert_eq!(ssl[..5], [3, 0, 0, 0, 0]);
    assert_eq!(self::fields(&ssl[5..]), [(0x21, b"TLSv1.3".to_vec()), (0x22, WEB.as_bytes().to_vec())]);
    let mut rest = [0; 9];
    taken.read_exact(&mut rest).await.unwrap();
    assert_eq!(&rest, b"then this");
    agent.stop().await;
}

/// Kind and value of each additional field.
fn fields(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut fields = Vec::new();
    while let [kind, high, low, rest @ ..] = bytes {
        let (value, more) = rest.split_at(usize::from(u16::from_be_bytes([*high, *low])));
        fields.push((*kind, value.to_vec()));
        bytes = more;
    }
    fields
}

#[tokio::test]
async fn protocols_are_agreed_to_as_in_the_mesh() {
    let lab = lab().spawn().await.unwrap();
    let echo = Echo::start().await;
    let (_host, agent, at) = started(vm(&lab, echo.address, "")).await;
    for (offered, agreed) in [
        (&["istio-http/1.1", "istio", "http/1.1"][..], Some("http/1.1")),
        (&["istio-h2", "istio", "h2"], Some("h2")),
        (&["istio-peer-exchange", "istio"], Some("istio")),
        (&["istio"], Some("istio")),
        (&["of-our-own"], None),
        (&[], None),
    ] {
        let mut pod = Pod::new(&lab, WEB);
        pod.config.alpn_protocols = offered.iter().map(|p| p.as_bytes().to_vec()).collect();
        let stream = pod.connect(at).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), agreed.map(str::as_bytes), "{offered:?}");
    }
    agent.stop().await;
}
