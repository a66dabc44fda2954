//! Clients that others have written.

use super::*;

/// The socket, as small as it can be; dropping it ends every connection, as a crash does.
struct Server(JoinHandle<()>);

impl Server {
    fn start(path: &Path, story: &Story) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let services = Services {
            policy: Arc::new(Policy::new("payments", Vec::new(), Units::new(&Root::new("/nowhere")))),
            offers: story.offers.subscribe(),
            consumers: Consumers::new(story.consumers.clone()),
            clock: story.clock,
            shutdown: CancellationToken::new(),
        };
        Self(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let peer = Peer::of(&stream).unwrap();
                connections.spawn(Connection::new(stream, peer, Budget::new(1 << 20), &services).run());
            }
        }))
    }

    async fn crash(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[tokio::test]
async fn the_spiffe_crate_follows_rotations_and_a_restart() {
    let mut story = Story::new();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let server = Server::start(&socket, &story);
    let endpoint = format!("unix:{}", socket.display());
    let build = spiffe::X509Source::builder().endpoint(endpoint.clone()).build();
    let (first, source) = timeout(SOON, async { tokio::join!(async { story.rotate() }, build) }).await.unwrap();
    let source = source.unwrap();
    let mut updates = source.updated();
    let has = |context: &X509Context| {
        let leaf = source.svid().is_ok_and(|svid| svid.leaf().as_bytes() == context.svid.chain()[0].as_ref());
        let roots = source.bundle_for_trust_domain(&"cluster.local".parse().unwrap());
        leaf && roots.is_ok_and(|roots| roots.is_some_and(|r| r.authorities().len() == context.bundle.roots().count()))
    };
    assert!(has(&first));
    let next_mesh = Authority::root("next");
    let mut rotations = vec![story.issue(&[]), story.issue(&[]), story.issue(&[&next_mesh]), story.issue(&[])];
    let last = rotations.pop().unwrap();
    for context in rotations {
        story.publish(Arc::clone(&context));
        timeout(SOON, async {
            while !has(&context) {
                updates.changed().await.unwrap();
            }
        })
        .await
        .unwrap();
    }
    server.crash().await;
    story.publish(Arc::clone(&last));
    let _server = Server::start(&socket, &story);
    timeout(SOON, async {
        while !has(&last) {
            updates.changed().await.unwrap();
        }
    })
    .await
    .unwrap();

    let client = spiffe::WorkloadApiClient::connect_to(&endpoint).await.unwrap();
    let bundles = client.fetch_x509_bundles().await.unwrap();
    assert_eq!(bundles.iter().map(|(domain, _)| domain.to_string()).collect::<Vec<_>>(), ["cluster.local"]);
    let refusal = format!("{:?}", client.fetch_jwt_bundles().await.unwrap_err());
    assert!(refusal.contains("JWT-SVIDs are not offered"), "{refusal}");
    source.shutdown().await;
}

/// The Python library, if it is installed.
fn python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/venv/bin/python");
    let there = std::process::Command::new(&python).args(["-c", "import spiffe"]).stderr(Stdio::null()).status();
    there.is_ok_and(|status| status.success()).then_some(python)
}

/// Waits for a line of the client that is as `wanted`.
async fn told(lines: &mut Lines<BufReader<ChildStdout>>, wanted: impl Fn(&serde_json::Value) -> bool) -> Duration {
    let start = Instant::now();
    loop {
        let line = timeout(SOON, lines.next_line()).await.expect("the client says nothing").unwrap();
        let line = serde_json::from_str(&line.expect("the client has ended")).unwrap();
        if wanted(&line) {
            return start.elapsed();
        }
    }
}

fn is(context: &X509Context) -> impl Fn(&serde_json::Value) -> bool {
    let serial = context.svid.serial().trim_start_matches('0').to_owned();
    let roots = context.bundle.roots().count();
    move |line| line["serial"] == serial.as_str() && line["roots"] == roots
}

#[tokio::test]
#[allow(clippy::print_stdout)]
async fn a_client_on_the_c_core_of_grpc_follows_rotations_and_a_restart() {
    let Some(python) = python() else {
        return println!("skipped: no PyPI spiffe; tests/peers/setup installs it");
    };
    let mut story = Story::new();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let server = Server::start(&socket, &story);
    let mut client: Child = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers/spiffe_client.py"))
        .args([format!("unix:{}", socket.display()).as_str(), "cluster.local"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    let first = story.rotate();
    told(&mut lines, |line| {
        assert_eq!((&line["id"], &line["chain"], &line["calls"]), (&ID.into(), &2.into(), &300.into()), "{line}");
        assert_eq!(line["bundles"], serde_json::json!(["cluster.local"]), "{line}");
        for call in ["jwt_svid", "jwt_bundles", "jwt_validate"] {
            assert!(line[call].as_str().unwrap().contains("JWT-SVIDs are not offered"), "{line}");
        }
        true
    })
    .await;
    told(&mut lines, is(&first)).await;
    let next_mesh = Authority::root("next");
    for context in [story.issue(&[]), story.issue(&[]), story.issue(&[&next_mesh])] {
        story.publish(Arc::clone(&context));
        println!("rotation seen after {:?}", told(&mut lines, is(&context)).await);
    }
    server.crash().await;
    let context = story.rotate();
    let _server = Server::start(&socket, &story);
    println!("restart and rotation seen after {:?}", told(&mut lines, is(&context)).await);
    drop(client.stdin.take());
    assert!(timeout(SOON, client.wait()).await.unwrap().unwrap().success());
}
