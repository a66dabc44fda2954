#![allow(clippy::unwrap_used)]
use super::*;

fn get(path: &str) -> Get {
    Get {
        path: path.to_owned(),
        port: 8080,
        host: None,
        https: false,
        headers: vec![],
        detours: vec![],
        tls: Tls::new(false),
    }
}

#[test]
fn paths_are_read_as_istio_reads_them() {
    for (path, url) in [
        ("/", "http://10.0.0.5:8080/"),
        ("", "http://10.0.0.5:8080/"),
        ("healthz", "http://10.0.0.5:8080/healthz"),
        ("/a b", "http://10.0.0.5:8080/a%20b"),
        ("/healthz?x=1%202&y", "http://10.0.0.5:8080/healthz?x=1%202&y"),
        ("/x#part", "http://10.0.0.5:8080/x"),
        ("http://elsewhere.example:99/x?y", "http://10.0.0.5:8080/x?y"),
        ("//elsewhere.example/x", "http://10.0.0.5:8080/x"),
        ("/redirq?u=http://127.0.0.1:8080/code/200", "http://10.0.0.5:8080/redirq?u=http://127.0.0.1:8080/code/200"),
    ] {
        assert_eq!(url_of(&get(path), "10.0.0.5").unwrap().as_str(), url, "{path:?}");
    }
    assert_eq!(url_of(&get("/"), "fd00::5").unwrap().as_str(), "http://[fd00::5]:8080/");
    for (path, escape) in [("/%zz", "%zz"), ("/a%4", "%4"), ("/%", "%"), ("/%4é", "%4é")] {
        let error = url_of(&get(path), "10.0.0.5").unwrap_err();
        assert!(error.ends_with(&format!("invalid URL escape {escape:?}")), "{error}");
    }
    assert!(url_of(&Get { host: Some("a b".to_owned()), ..get("/") }, "10.0.0.5").is_err());
}

#[test]
fn a_bad_header_is_named_but_not_shown() {
    let with =
        |name: &str, value: &str| headers_of(&Get { headers: vec![(name.to_owned(), value.to_owned())], ..get("/") });
    assert_eq!(with("X Y", "secret").unwrap_err(), "invalid header field name \"X Y\"");
    assert_eq!(with("X-Y", "sec\nret").unwrap_err(), "invalid header field value for \"X-Y\"");
    assert_eq!(with("hOsT", "virtual").unwrap().get_all(HOST).iter().count(), 1);
}

#[test]
fn credentials_stay_with_their_host() {
    let from = Url::parse("https://app.example:8443/a").unwrap();
    let ours = || {
        HeaderMap::from_iter(
            [(AUTHORIZATION, "Bearer x"), (COOKIE, "c"), (HOST, "virtual")].map(|(n, v)| (n, v.parse().unwrap())),
        )
    };
    let mut headers = ours();
    assert_eq!(follow(&from, "../b?c#d", &mut headers).unwrap().as_str(), "https://app.example:8443/b?c");
    assert_eq!(headers.len(), 4, "{headers:?}");
    assert_eq!(headers[REFERER], "https://app.example:8443/a");
    for elsewhere in ["https://other.example/", "//other.example/", "http://app.example:8443/"] {
        let mut headers = ours();
        follow(&from, elsewhere, &mut headers).unwrap();
        assert!(!headers.contains_key(AUTHORIZATION) && !headers.contains_key(COOKIE), "{elsewhere}");
    }
    let mut headers = ours();
    assert_eq!(follow(&from, "http://user:pass@app.example/x", &mut headers).unwrap().as_str(), "http://app.example/x");
    assert!(!headers.contains_key(HOST) && !headers.contains_key(REFERER), "{headers:?}");
    assert!(follow(&from, "file:///etc/passwd", &mut headers).is_err());
}

use rustls::{ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer};
use std::{env, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

/// Probes `host` at a port of `listener`, whose one connection `serve` answers.
async fn ask<F: Future>(
    get: Get,
    host: &str,
    listener: TcpListener,
    serve: impl FnOnce(tokio::net::TcpStream) -> F,
) -> Result<(), String> {
    let get = Get { port: listener.local_addr().unwrap().port(), ..get };
    let served = async { serve(listener.accept().await.unwrap().0).await };
    let deadline = Instant::now() + Duration::from_secs(20);
    select! {
        outcome = probe(&get, host, deadline) => outcome.map_err(|e| e.to_string()),
        _ = async { served.await; std::future::pending::<()>().await } => unreachable!(),
    }
}

async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn an_endless_head_is_cut_off() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endless = |mut stream: tokio::net::TcpStream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\nX: ").await.unwrap();
        while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    };
    let error = ask(get("/"), "127.0.0.1", listener, endless).await.unwrap_err();
    assert!(error.ends_with("server response headers exceeded 1048576 bytes or 8192 fields; aborted"), "{error}");
}

/// Each byte in time, and never the last one.
#[tokio::test]
async fn a_head_that_drips_is_over_at_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let get = Get { port: listener.local_addr().unwrap().port(), ..get("/") };
    let drips = async {
        let mut stream = listener.accept().await.unwrap().0;
        read_head(&mut stream).await;
        for byte in b"HTTP/1.1 200 OK\r\nX: ".iter().chain(std::iter::repeat(&b'x')) {
            stream.write_all(&[*byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let deadline = Instant::now() + Duration::from_secs(1);
    let error = select! {
        outcome = probe(&get, "127.0.0.1", deadline) => outcome.unwrap_err().to_string(),
        () = drips => unreachable!(),
    };
    assert!(error.ends_with("context deadline exceeded (Client.Timeout exceeded while awaiting headers)"), "{error}");
}

#[tokio::test]
async fn an_endless_body_is_not_read() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endless = |mut stream: tokio::net::TcpStream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    };
    ask(get("/"), "127.0.0.1", listener, endless).await.unwrap();
}

#[tokio::test]
async fn many_header_fields_are_no_failure() {
    for fields in [257, 5000] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let talkative = |mut stream: tokio::net::TcpStream| async move {
            read_head(&mut stream).await;
            let fields: String = (0..fields).map(|n| format!("X-Field-{n}: {n}\r\n")).collect();
            stream.write_all(format!("HTTP/1.1 200 OK\r\n{fields}\r\n").as_bytes()).await.unwrap();
        };
        ask(get("/"), "127.0.0.1", listener, talkative).await.unwrap();
    }
}

#[tokio::test]
async fn an_ipv6_address_is_probed_like_any_other() {
    let Ok(listener) = TcpListener::bind("[::1]:0").await else { return };
    let port = listener.local_addr().unwrap().port();
    let (said, heard) = tokio::sync::oneshot::channel();
    let serve = |mut stream: tokio::net::TcpStream| async move {
        said.send(read_head(&mut stream).await).unwrap();
        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
    };
    ask(get("/ready"), "::1", listener, serve).await.unwrap();
    let head = heard.await.unwrap();
    assert!(head.starts_with("GET /ready HTTP/1.1\r\n") && head.contains(&format!("Host: [::1]:{port}\r\n")), "{head}");
}

/// Verification is on request; then the roots are the operating system's, which for this test a file stands for: the
/// test runs itself once more, with `SSL_CERT_FILE`.
#[tokio::test]
async fn certificates_are_verified_on_request() {
    let Some(roots) = env::var_os("WE_AGENT_TEST_ROOTS") else {
        let dir = tempfile::tempdir().unwrap();
        let roots = dir.path().join("roots.pem");
        let name = "health::http::tests::certificates_are_verified_on_request";
        let mut again = std::process::Command::new(env::current_exe().unwrap());
        again
            .args([name, "--exact"])
            .env("WE_AGENT_TEST_ROOTS", &roots)
            .env("SSL_CERT_FILE", &roots)
            .env_remove("SSL_CERT_DIR");
        let output = again.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    };
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(["app.localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    std::fs::write(roots, certificate.pem()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    for (verify, host, healthy) in
        [(true, "app.localhost", true), (true, "other.localhost", false), (false, "other.localhost", true)]
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let get = Get { https: true, tls: Tls::new(verify), ..get("/") };
        let serve = |stream| async {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                read_head(&mut stream).await;
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            }
        };
        let outcome = ask(get, host, listener, serve).await;
        assert_eq!(outcome.is_ok(), healthy, "{verify} {host}: {outcome:?}");
        if let Err(error) = outcome {
            assert!(error.contains(": tls: failed to verify certificate: x509: "), "{error}");
        }
    }
}
