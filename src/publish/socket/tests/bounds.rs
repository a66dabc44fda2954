//! What one user can take.
use super::{
    bytes::{STREAM_SECRETS, ended, framed, speak},
    *,
};
use ::bytes::Bytes;
use http_body_util::{Full, StreamBody};
use hyper::body::{Frame, Incoming};
use std::sync::atomic::{AtomicUsize, Ordering};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt as _},
};

/// Counts warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicUsize>);

impl<S: Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() == Level::WARN {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn services(offers: &watch::Sender<Offer>) -> Services {
    Services {
        policy: Arc::new(Policy::new("payments", Vec::new(), Units::new(&Root::new("/nowhere")))),
        offers: offers.subscribe(),
        consumers: Consumers::new(watch::channel(status::Consumers::default()).0),
        clock: Clock::Wall,
        shutdown: CancellationToken::new(),
    }
}

#[tokio::test]
async fn a_user_has_so_many_connections_and_no_more_until_one_has_ended() {
    let warnings = Warnings::default();
    let _heard = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let services = services(&watch::Sender::default());
    let mut crowd = Crowd::new(2, budget::OF_USER);
    let mut come = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        crowd.admit(ours, &services);
        (theirs, crowd.connections.len())
    };
    let ((first, one), (_second, two), (mut third, still)) = (come(), come(), come());
    assert_eq!((one, two, still), (1, 2, 2));
    let end = timeout(SOON, third.read_u8()).await.unwrap();
    assert!(end.is_err(), "it is closed");
    for _ in 0..100 {
        assert_eq!(come().1, 2);
    }
    assert_eq!(warnings.0.load(Ordering::Relaxed), 1, "the journal has one line");
    drop(first);
    timeout(SOON, crowd.left()).await.unwrap();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    crowd.admit(ours, &services);
    assert_eq!(crowd.connections.len(), 2);
}

#[tokio::test]
async fn many_of_whom_nothing_can_be_told_make_one_line() {
    let warnings = Warnings::default();
    let _heard = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let services = services(&watch::Sender::default());
    let mut crowd = Crowd::new(2, budget::OF_USER);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for _ in 0..100 {
        // The kernel does not know who is at the other end of TCP.
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_nonblocking(true).unwrap();
        let stream = StdStream::from(std::os::fd::OwnedFd::from(stream));
        crowd.admit(UnixStream::from_std(stream).unwrap(), &services);
    }
    assert_eq!((crowd.connections.len(), warnings.0.load(Ordering::Relaxed)), (0, 1));
}

#[test]
fn a_consumer_that_refuses_again_and_again_makes_one_line() {
    let warnings = Warnings::default();
    let (seen, fact) = watch::channel(status::Consumers::default());
    let consumers = Consumers::new(seen);
    tracing::subscriber::with_default(tracing_subscriber::registry().with(warnings.clone()), || {
        let mut seat = consumers.of(1000, None).seat("sds");
        seat.wants(&["default"]);
        for i in 0..100 {
            seat.refused("default", "1f", &format!("no {i}"));
        }
        assert_eq!(warnings.0.load(Ordering::Relaxed), 1);
        assert!(fact.borrow().values().all(|consumer| consumer.refusal.as_deref() == Some("no 99")));
        consumers.of(1001, None).seat("sds").refused("default", "1f", "nor I");
        assert_eq!(warnings.0.load(Ordering::Relaxed), 2, "another user is heard");
    });
}

/// Input that does not end.
type Input = mpsc::Sender<Result<Frame<Bytes>, std::convert::Infallible>>;

/// A call that begins with `bytes` and may go on.
async fn begin(channel: &mut Channel, path: &str, bytes: &[u8]) -> (Input, http::Response<Incoming>) {
    let (input, sent) = mpsc::channel(1);
    input.send(Ok(Frame::data(Bytes::copy_from_slice(bytes)))).await.unwrap();
    let answer = channel.open(path, StreamBody::new(ReceiverStream::new(sent))).await;
    (input, answer)
}

#[tokio::test]
async fn what_a_user_has_begun_is_bounded_and_others_do_not_notice() {
    let now = SystemTime::now();
    let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
    let answer = Authority::root("mesh").issue(key.pem(), &Leaf::new(&[ID], now));
    let context = X509Context::from_answer(&ID.parse().unwrap(), key, &answer, now).unwrap();
    let offers = watch::Sender::new(Offer::default());
    offers.send_modify(|offer| assert!(offer.follow(&Identity { current: Some(context), ..Identity::default() }, now)));
    let services = services(&offers);
    let most = 380 << 10;
    let mut crowd = Crowd::new(MAX_OF_USER, most);
    let come = async |crowd: &mut Crowd| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        crowd.admit(ours, &services);
        speak(theirs, 16 << 10).await
    };
    let (mut one, mut two) = (come(&mut crowd).await, come(&mut crowd).await);

    // The beginning of a message of 200 KiB, on two connections of one user.
    let large = [&[0, 0, 3, 32, 0][..], &[0; 10]].concat();
    let (first, held) = begin(&mut one, STREAM_SECRETS, &large).await;
    let (_second, refused) = begin(&mut two, STREAM_SECRETS, &large).await;
    assert_eq!(ended(refused).await, (0, Code::ResourceExhausted));
    let request = framed(&SecretRequest { node: None, ..super::first("default") });
    assert_eq!(two.call(STREAM_SECRETS, request.clone()).await, (1, Code::Ok), "what is whole needs no such room");

    // Calls that are open, of both services.
    let svid = "/SpiffeWorkloadAPI/FetchX509SVID";
    let first_svid = one.open(svid, Full::new(Bytes::from_static(&[0; 5]))).await;
    let mut open = Vec::new();
    while let (input, answer) = begin(&mut two, STREAM_SECRETS, &large[..1]).await
        && Status::from_header_map(answer.headers()).is_none()
    {
        open.push((input, answer));
        assert!(open.len() < 100);
    }
    assert_eq!(open.len(), 9, "that is what fits beside the large message and two calls");
    assert_eq!(two.call(STREAM_SECRETS, request.clone()).await, (0, Code::ResourceExhausted));
    assert_eq!(two.call(svid, vec![0; 5]).await, (0, Code::ResourceExhausted));

    // Somebody else.
    let user = crowd.of_user.remove(&nix::unistd::geteuid().as_raw()).unwrap();
    let mut other = come(&mut crowd).await;
    assert_eq!(other.call(STREAM_SECRETS, request).await, (1, Code::Ok));

    // All of it comes back.
    drop((first, held, first_svid, open));
    let end = tokio::time::Instant::now() + SOON;
    while user.budget.take(most).is_err() {
        assert!(tokio::time::Instant::now() < end, "something is still taken");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn who_goes_without_a_word_is_not_told_of() {
    let warnings = Warnings::default();
    let _heard = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let offers = watch::Sender::default();
    let services = services(&offers);
    let mut crowd = Crowd::new(MAX_OF_USER, budget::CALL);
    let (ours, theirs) = UnixStream::pair().unwrap();
    crowd.admit(ours, &services);
    let mut channel = speak(theirs, 16 << 10).await;
    for (path, bytes) in [("/SpiffeWorkloadAPI/FetchX509SVID", &[][..]), (STREAM_SECRETS, &[0, 0])] {
        let end = tokio::time::Instant::now() + SOON;
        let call = begin(&mut channel, path, bytes).await;
        let budget = &crowd.of_user[&nix::unistd::geteuid().as_raw()].budget;
        assert!(budget.take(1).is_err(), "it is held");
        drop(call);
        while budget.take(budget::CALL).is_err() {
            assert!(tokio::time::Instant::now() < end, "it is still there");
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(warnings.0.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_message_is_not_larger_than_real_ones() {
    let host = Host::serve();
    let mut channel = host.channel().await;
    for (path, length) in [(STREAM_SECRETS, (256 << 10) + 1), ("/SpiffeWorkloadAPI/FetchX509SVID", (8 << 10) + 1)] {
        let head = [&[0], &u32::to_be_bytes(length)[..]].concat();
        let (_input, answer) = begin(&mut channel, path, &head).await;
        assert_eq!(ended(answer).await, (0, Code::OutOfRange), "{path}");
    }
}

#[tokio::test]
async fn a_consumer_that_does_not_read_is_heard() {
    let mut host = Host::serve();
    host.issue();
    let mut channel = speak(host.stream().await, 1).await;
    let (input, _answer) = begin(&mut channel, STREAM_SECRETS, &framed(&first("default"))).await;
    host.until(|all| all.values().any(|consumer| consumer.sent.is_some())).await;
    for name in ["ROOTCA", "default", "ROOTCA"] {
        let request = framed(&SecretRequest { node: None, ..first(name) });
        input.send(Ok(Frame::data(request.into()))).await.unwrap();
        host.until(|all| all.keys().map(|(_, takes)| *takes).eq([name])).await;
    }
}
