//! How a stream ends.
use super::*;

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
