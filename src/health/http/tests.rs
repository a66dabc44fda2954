#![allow(clippy::unwrap_used)]
use super::*;

fn get(path: &str) -> Get {
    Get { path: path.to_owned(), port: 8080, host: None, https: false, headers: vec![], tls: Tls::new(false) }
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
