#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

#[test]
fn the_good_one_first_and_families_in_turns() {
    let found = ["[2001:db8::1]:1", "[2001:db8::2]:1", "192.0.2.1:1", "192.0.2.2:1", "192.0.2.1:1"].map(at);
    let tried = |good: Option<&str>| -> Vec<_> {
        order(found.to_vec(), good.map(at)).iter().map(ToString::to_string).collect()
    };
    let plain = ["[2001:db8::1]:1", "192.0.2.1:1", "[2001:db8::2]:1", "192.0.2.2:1"];
    assert_eq!(tried(None), plain);
    assert_eq!(tried(Some("192.0.2.2:1")), ["192.0.2.2:1", plain[0], plain[1], plain[2]]);
    assert_eq!(tried(Some("198.51.100.9:1"))[..4], plain, "the name service is believed first");
    assert_eq!(tried(Some("198.51.100.9:1"))[4..], ["198.51.100.9:1"]);
}

proptest! {
    /// A name service may answer what it likes: each address once, not too many, and the good one among them.
    #[test]
    fn a_thousand_answers_are_bounded(found in prop::collection::vec(0u16..2000, 0..1000), good in prop::option::of(0u16..2000)) {
        let address = |n: u16| match n % 2 {
            0 => SocketAddr::from(([192, 0, (n >> 8) as u8, n as u8], 1)),
            _ => SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, n], 1)),
        };
        let found: Vec<_> = found.into_iter().map(address).collect();
        let good = good.map(address);
        let order = order(found.clone(), good);
        prop_assert!(order.len() <= MOST + 1);
        prop_assert!(order.len() == MOST + 1 || found.len() > MOST || found.iter().all(|at| order.contains(at)));
        prop_assert!(good.is_none_or(|good| order.contains(&good)));
        for (i, at) in order.iter().enumerate() {
            prop_assert!(!order[..i].contains(at));
        }
    }
}

/// A name service that fails is no reason to give up an address that was good.
#[tokio::test]
async fn the_last_good_address_stands_in_for_a_name_service() {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint {
        // No name service is asked for a name of this form.
        authority: crate::workload::Authority { host: "no..name".to_owned(), port: 15012 },
        server_name: "istiod.istio-system.svc".to_owned(),
        roots: "/nowhere".into(),
    };
    let roots = X509Bundle::from_pem(crate::authority::Authority::root("mesh").root_pem()).unwrap();
    let resolver = Resolver::default();
    let error = dial(&endpoint, &Rung::Token, &roots, &resolver, None).await.err().unwrap();
    assert!(matches!(error, Error::Resolve { .. }), "{error}");
    let good = server.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(dial(&endpoint, &Rung::Token, &roots, &resolver, Some(good)), async {
        drop(server.accept().await.unwrap())
    });
    let (error, ()) = (dialled.err().unwrap(), accepted);
    assert!(matches!(error, Error::Connect { .. }) && error.to_string().contains(&good.to_string()), "{error}");
}

/// Addresses of loopback that nobody answers: their backlog is full.
struct BlackHole(std::net::TcpListener, Vec<std::net::TcpStream>);

impl BlackHole {
    fn new() -> Self {
        let socket = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Inet,
            nix::sys::socket::SockType::Stream,
            nix::sys::socket::SockFlag::empty(),
            None,
        )
        .unwrap();
        let any = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 0);
        nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &any).unwrap();
        nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let listener = std::net::TcpListener::from(socket);
        let address = listener.local_addr().unwrap();
        let mut full = Vec::new();
        while let Ok(tcp) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
            full.push(tcp);
        }
        Self(listener, full)
    }

    fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }
}

#[tokio::test]
async fn who_does_not_answer_does_not_keep_others_from_being_tried() {
    let hole = BlackHole::new();
    let good = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let refused = closed.local_addr().unwrap();
    drop(closed);
    let good = good.local_addr().unwrap();
    let begin = Instant::now();
    let mut race = Race::new(vec![hole.address(), hole.address(), hole.address(), refused, good]);
    let (at, failed) = race.next().await.unwrap();
    assert!(at == refused && failed.is_err());
    let (at, connected) = race.next().await.unwrap();
    assert!(at == good && connected.is_ok());
    assert!(begin.elapsed() < DIAL, "{:?}", begin.elapsed());
    assert!(begin.elapsed() >= STAGGER * 3, "one after the other: {:?}", begin.elapsed());
    drop(hole.1);
}
