//! How a stream ends.
use super::{
    bytes::{STREAM_SECRETS, ended, framed, speak},
    *,
};
use ::bytes::Bytes;
use http_body_util::{Full, StreamBody};
use hyper::body::Frame;

/// `grpcurl -d`, and whoever sends an iterator of one request.
#[tokio::test]
async fn who_ends_its_side_is_sent_what_it_waits_for_and_then_the_end() {
    let mut host = Host::serve();
    let mut grpc = host.connect().await;
    let mut sotw = Talk::<_, SecretResponse>::open(&mut grpc, "StreamSecrets", first("default")).await.unwrap();
    let ask = DeltaSecretRequest { resource_names_subscribe: vec!["default".to_owned()], ..Default::default() };
    let mut delta = Talk::<_, DeltaSecretResponse>::open(&mut grpc, "DeltaSecrets", ask).await.unwrap();
    let mut gone = Talk::<_, SecretResponse>::open(&mut grpc, "StreamSecrets", first("ROOTCA")).await.unwrap();
    for ask in [&mut sotw.ask, &mut gone.ask] {
        *ask = mpsc::channel(1).0;
    }
    delta.ask = mpsc::channel(1).0;
    host.until(|all| all.len() == 3).await;
    // Who has ended its side and then goes is not waited with.
    drop(gone);
    host.until(|all| all.len() == 2).await;

    let context = host.issue();
    assert_eq!(sotw.answer().await.unwrap().version_info, context.svid.serial());
    assert_eq!(delta.answer().await.unwrap().resources[0].version, context.svid.serial());
    assert!(timeout(SOON, sotw.answers.message()).await.unwrap().unwrap().is_none(), "OK");
    assert!(timeout(SOON, delta.answers.message()).await.unwrap().unwrap().is_none(), "OK");
    host.until(|all| all.is_empty()).await;

    let mut channel = host.channel().await;
    // All of it in one frame, as a client may do that knows it will not ask again.
    let (messages, end) = channel.call(STREAM_SECRETS, framed(&first("default"))).await;
    assert_eq!((messages, end), (1, Code::Ok));
    let (messages, end) = channel.call(STREAM_SECRETS, Vec::new()).await;
    assert_eq!((messages, end), (0, Code::Ok), "nothing was asked");
    let cut = framed(&first("default"));
    for length in [1, 5, cut.len() - 1] {
        assert_eq!(
            channel.call(STREAM_SECRETS, cut[..length].to_vec()).await,
            (0, Code::Internal),
            "cut off after {length}"
        );
    }
}

/// Waits for the end of the socket.
async fn stopped(mut host: Host) -> Duration {
    let start = tokio::time::Instant::now();
    host.stop.cancel();
    let end = timeout(SOON, async { while host.fact.changed().await.is_ok() {} }).await;
    assert!(end.is_ok(), "it serves on");
    start.elapsed()
}

#[tokio::test]
async fn who_listens_is_told_that_the_agent_stops() {
    let host = Host::serve();
    let (mut first_channel, mut second) = (host.channel().await, host.connect().await);
    let svid = first_channel.open("/SpiffeWorkloadAPI/FetchX509SVID", Full::new(Bytes::from_static(&[0; 5]))).await;
    let mut held = Talk::<_, SecretResponse>::open(&mut second, "StreamSecrets", first("default")).await.unwrap();
    let roots = DeltaSecretRequest { resource_names_subscribe: vec!["ROOTCA".to_owned()], ..Default::default() };
    let mut open = Talk::<_, DeltaSecretResponse>::open(&mut second, "DeltaSecrets", roots).await.unwrap();
    host.issue();
    open.answer().await.unwrap();
    held.answer().await.unwrap();
    let _silent = host.stream().await;
    assert!(stopped(host).await < FAREWELL, "nobody was waited for");
    assert_eq!(ended(svid).await, (1, Code::Unavailable));
    assert_eq!(held.answer().await.err().unwrap().code(), Code::Unavailable);
    assert_eq!(open.answer().await.err().unwrap().code(), Code::Unavailable);
}

#[tokio::test]
async fn who_does_not_read_does_not_hold_up_the_stop() {
    let mut host = Host::serve();
    host.issue();
    let mut channel = speak(host.stream().await, 1).await;
    let (ask, asked) = mpsc::channel(1);
    ask.send(Ok(Frame::data(framed(&first("default")).into()))).await.unwrap();
    let _answer = channel.open(STREAM_SECRETS, StreamBody::new(ReceiverStream::new(asked))).await;
    host.until(|all| all.values().any(|consumer| consumer.sent.is_some())).await;
    assert!(stopped(host).await >= FAREWELL, "it was waited for, and no longer");
}

#[tokio::test]
async fn a_name_that_is_not_here_ends_no_incremental_stream() {
    let mut host = Host::serve();
    let context = host.issue();
    let subscribe = |names: &[&str]| DeltaSecretRequest {
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        ..DeltaSecretRequest::default()
    };
    let mut grpc = host.connect().await;
    let first = subscribe(&["kubernetes://other", "default"]);
    let mut delta = Talk::<_, DeltaSecretResponse>::open(&mut grpc, "DeltaSecrets", first).await.unwrap();
    let answer = delta.answer().await.unwrap();
    assert_eq!(answer.removed_resources, ["kubernetes://other"]);
    assert_eq!((answer.resources.len(), answer.resources[0].version.as_str()), (1, context.svid.serial()));
    host.until(|all| all.keys().map(|(_, takes)| *takes).eq(["default"])).await;

    delta.ask.send(subscribe(&["file-root:/etc/root.pem"])).await.unwrap();
    let answer = delta.answer().await.unwrap();
    assert_eq!(
        (&answer.removed_resources[..], answer.resources.len()),
        (&["file-root:/etc/root.pem".to_owned()][..], 0)
    );
    let next = host.issue();
    assert_eq!(delta.answer().await.unwrap().resources[0].version, next.svid.serial());

    delta.ask.send(subscribe(&["x".repeat(2000).as_str()])).await.unwrap();
    assert_eq!(delta.answer().await.err().map(|status| status.code()), Some(Code::InvalidArgument));
}

#[tokio::test]
async fn a_call_that_cannot_be_is_answered_by_its_head_alone() {
    let host = Host::serve();
    let mut channel = host.channel().await;
    let mut refused = async |path: &str, name: &'static str, value: &'static str| {
        let request = http::Request::post(format!("http://localhost{path}")).header(name, value);
        let answer = channel.0.send_request(request.body(tonic::body::Body::empty()).unwrap()).await.unwrap();
        (Status::from_header_map(answer.headers()).map(|status| status.code()), answer.headers().clone())
    };
    for (path, code) in [
        ("/SpiffeWorkloadAPI/FetchX509SVID", Code::InvalidArgument),
        ("/SpiffeWorkloadAPI/FetchJWTSVID", Code::InvalidArgument),
        ("/grpc.health.v1.Health/Check", Code::Unimplemented),
        ("/", Code::Unimplemented),
    ] {
        assert_eq!(refused(path, "te", "trailers").await.0, Some(code), "{path}");
    }
    for path in ["/SpiffeWorkloadAPI/FetchJWTSVID", "/SpiffeWorkloadAPI/FetchWITSVID"] {
        assert_eq!(refused(path, "workload.spiffe.io", "true").await.0, Some(Code::Unimplemented), "{path}");
    }
    let (code, headers) = refused(STREAM_SECRETS, "grpc-encoding", "gzip").await;
    assert_eq!((code, headers["grpc-accept-encoding"].as_bytes()), (Some(Code::Unimplemented), &b"identity"[..]));
}
