//! Faults on request, and those that a client causes.

use super::*;

#[tokio::test]
async fn faults_of_the_ca() {
    let lab = lab().await;
    let client = connect(&lab).await;
    let sign = async || client.sign(Some(&token(&lab)), &csr("spiffe://x/y").1, 0).await;
    lab.inject(Fault::CaDown);
    assert_eq!(sign().await.unwrap_err().code, 14);
    lab.inject(Fault::ApiServerDown(Duration::ZERO));
    lab.heal(Fault::CaDown);
    let refused = sign().await.unwrap_err();
    assert_eq!(
        (refused.code, refused.message.as_str(), refused.trailers_only),
        (16, "request authenticate failure", true)
    );
    lab.heal_all();
    lab.inject(Fault::ShortChain);
    assert_eq!(sign().await.unwrap().len(), 1);
    lab.heal_all();
    lab.inject(Fault::Chain(Shape::RootTwice));
    let chain = sign().await.unwrap();
    assert!(chain.len() == 4 && chain[2] == chain[3]);
    lab.heal_all();
    let mut call: Call = client.call(support::CREATE, &[]).await;
    lab.inject(Fault::CaHangs);
    call.send_bytes(&[]);
    lab.until(LIMIT, |e| matches!(&e.what, What::Csr { outcome: Outcome::Hung, .. })).await.unwrap();
    lab.heal_all();
    lab.ca().rotate_root(true).unwrap();
    assert_eq!(sign().await.unwrap()[2].matches("BEGIN").count(), 2);
    lab.inject(Fault::Chain(Shape::SplitRoots));
    assert_eq!(sign().await.unwrap().len(), 4);
    assert_eq!(lab.ca().root_pem().matches("BEGIN").count(), 2);
}

#[tokio::test]
async fn faults_of_streams() {
    let lab = lab().await;
    let client = connect(&lab).await;
    let open = async || client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    lab.inject(Fault::Conflict(1));
    let refused = open().await.end().await;
    assert!(refused.code == 2 && refused.message.contains("the object has been modified"), "{refused:?}");
    lab.inject(Fault::NoGroup);
    assert_eq!(open().await.end().await.code, 9);
    lab.heal(Fault::NoGroup);
    lab.inject(Fault::Silent);
    assert_eq!(open().await.ends_within(Duration::from_millis(100)).await, None);
    lab.heal(Fault::Silent);
    let mut stream = open().await;
    stream.next_delta().await;
    lab.inject(Fault::DropStreams);
    assert_eq!(stream.end().await.code, -1);
    lab.inject(Fault::Admission(0.5));
    open().await.next_delta().await;
    assert_eq!(open().await.end().await.code, 8);
    lab.heal_all();
    lab.inject(Fault::Down);
    lab.until(LIMIT, |e| matches!(e.what, What::Down)).await.unwrap();
    let mark = lab.mark();
    lab.heal(Fault::Down);
    lab.until_since(mark, LIMIT, |e| matches!(e.what, What::Listening { .. })).await.unwrap();
    connect(&lab).await;
}

#[tokio::test]
async fn an_error_detail_without_subscription_takes_istiod_down() {
    let lab = lab().await;
    let client = connect(&lab).await;
    let mut stream = client.register(&token(&lab), &first("127.0.0.1", &NODE, &["x"])).await;
    stream.next_delta().await;
    stream.send(&DeltaDiscoveryRequest {
        type_url: CDS.to_owned(),
        error_detail: health(Some("x")).error_detail,
        ..Default::default()
    });
    assert_eq!(stream.end().await.code, -1);
    lab.until(LIMIT, |e| matches!(e.what, What::Crashed { .. })).await.unwrap();
    lab.restart().await;
}

#[tokio::test]
async fn who_pings_too_much_is_sent_away() {
    let lab = lab().await;
    let mut client = connect(&lab).await;
    for _ in 0..4 {
        assert!(lab.events().iter().all(|e| !matches!(e.what, What::Goaway { .. })));
        client.pings.ping(h2::Ping::opaque()).await.unwrap();
    }
    lab.until(LIMIT, |e| matches!(&e.what, What::Goaway { reason, .. } if reason == "too_many_pings"))
        .await
        .expect("no stream is open");
    let error = tokio::time::timeout(LIMIT, client.closed).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM));
}
