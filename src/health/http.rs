//! The HTTP probe: GET, one connection for each request, redirects followed, the body never read.

use super::{
    Unhealthy,
    dial::{Detour, Source, dial},
    tls::Tls,
};
use crate::command::words;
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri,
    header::{ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, COOKIE, HOST, LOCATION, REFERER},
};
use http_body_util::Empty;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::{error::Error, io};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    pin, select,
    time::{Instant, timeout_at},
};
use url::{Host, Position, Url};

/// What applications know probes of Istio by.
pub(super) const USER_AGENT: &str = "istio-probe/1.0";
/// Nine redirects are followed, so at most this many requests are made.
const REQUESTS: usize = 10;
/// An answer's headers may have this many bytes. (Go's client takes ten times as much.)
const HEADER_BYTES: usize = 1024 * 1024;
/// And so many fields: the parser wants to know, and the map that it fills holds no more than three times as many.
const HEADER_FIELDS: usize = 8 * 1024;

/// What is asked for.
pub(super) struct Get {
    pub(super) path: String,
    pub(super) port: u16,
    pub(super) host: Option<String>,
    pub(super) https: bool,
    pub(super) headers: Vec<(String, String)>,
    pub(super) detours: Vec<Detour>,
    /// For HTTPS, be it asked for or come to by a redirect.
    pub(super) tls: Tls,
}

/// Asks once; healthy if the last answer's status is 200–399. From connecting to that answer's headers it takes no
/// longer than `deadline`.
pub(super) async fn probe(get: &Get, default_host: &str, deadline: Instant) -> Result<(), Unhealthy> {
    let mut url = url_of(get, default_host).map_err(Unhealthy::new)?;
    let mut headers = headers_of(get).map_err(|cause| failed(url.as_str(), &cause))?;
    for request in 1..=REQUESTS {
        let exchange = timeout_at(deadline, exchange(&url, &headers, get));
        let answer = exchange
            .await
            .unwrap_or_else(|_| {
                Err("context deadline exceeded (Client.Timeout exceeded while awaiting headers)".to_owned())
            })
            .map_err(|cause| failed(url.as_str(), &cause))?;
        let Some(location) = redirect(&answer) else { return verdict(answer.status()) };
        if request == REQUESTS {
            return Err(failed(&location, "stopped after 10 redirects"));
        }
        url = follow(&url, &location, &mut headers)?;
    }
    Ok(())
}

fn failed(url: &str, cause: &str) -> Unhealthy {
    Unhealthy::new(format!("Get \"{url}\": {cause}"))
}

fn verdict(status: StatusCode) -> Result<(), Unhealthy> {
    match status.as_u16() {
        200..400 => Ok(()),
        code => Err(Unhealthy::new(format!("status code was not from [200,400), bad code {code}"))),
    }
}

/// The path may have a query; a scheme, a host and a fragment in it are dropped, a missing slash is added.
fn url_of(get: &Get, default_host: &str) -> Result<Url, String> {
    let scheme = if get.https { "https" } else { "http" };
    let host = get.host.as_deref().unwrap_or(default_host);
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let mut url = Url::parse(&format!("{scheme}://{host}:{}/", get.port)).map_err(|e| format!("host {host:?}: {e}"))?;
    let place = get.path.split(['?', '#']).next().unwrap_or_default();
    if let Some(escape) = bad_escape(place) {
        return Err(format!("parse {:?}: invalid URL escape {escape:?}", get.path));
    }
    let target = url.join(&get.path).map_err(|e| format!("parse {:?}: {e}", get.path))?;
    url.set_path(target.path());
    url.set_query(target.query());
    Ok(url)
}

fn bad_escape(path: &str) -> Option<String> {
    let escapes = path.split('%').skip(1);
    let digits = |rest: &str| rest.chars().take(2).collect::<String>();
    escapes.map(digits).find(|d| d.len() != 2 || !d.chars().all(|c| c.is_ascii_hexdigit())).map(|d| format!("%{d}"))
}

/// The headers of the probe, repetitions kept, and those that Istio's agent adds. `Host` names the host to ask for;
/// unlike there its spelling does not matter. An error names the header, never its value.
fn headers_of(get: &Get) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in &get.headers {
        let key: HeaderName = name.parse().map_err(|_| format!("invalid header field name {name:?}"))?;
        let value = value.parse().map_err(|_| format!("invalid header field value for {name:?}"))?;
        if key == HOST {
            headers.insert(key, value);
        } else {
            headers.append(key, value);
        }
    }
    headers.entry(http::header::USER_AGENT).or_insert(HeaderValue::from_static(USER_AGENT));
    headers.entry(ACCEPT_ENCODING).or_insert(HeaderValue::from_static("gzip"));
    headers.append(CONNECTION, HeaderValue::from_static("close"));
    Ok(headers)
}

pub(super) fn redirect(answer: &Response<Incoming>) -> Option<String> {
    let location = || Some(String::from_utf8_lossy(answer.headers().get(LOCATION)?.as_bytes()).into_owned());
    match answer.status().as_u16() {
        301 | 302 | 303 | 307 | 308 => location(),
        _ => None,
    }
}

/// Where a redirect leads. A Host header of our own goes along unless the location names a host; what authenticates us
/// to one host is not shown to another, nor in plaintext after TLS.
pub(super) fn follow(from: &Url, location: &str, headers: &mut HeaderMap) -> Result<Url, Unhealthy> {
    let mut to = from.join(location).map_err(|e| failed(location, &e.to_string()))?;
    if !matches!(to.scheme(), "http" | "https") {
        return Err(failed(location, &format!("unsupported protocol scheme {:?}", to.scheme())));
    }
    let _ = to.set_username("").and_then(|()| to.set_password(None));
    to.set_fragment(None);
    let downgrade = from.scheme() == "https" && to.scheme() == "http";
    if Url::parse(location).is_ok() {
        headers.remove(HOST);
    }
    if downgrade || from.host() != to.host() {
        headers.remove(AUTHORIZATION);
        headers.remove(COOKIE);
    }
    headers.remove(REFERER);
    if let (false, Ok(referer)) = (downgrade, from.as_str().parse()) {
        headers.insert(REFERER, referer);
    }
    Ok(to)
}

/// One request on a connection of its own.
async fn exchange(url: &Url, headers: &HeaderMap, get: &Get) -> Result<Response<Incoming>, String> {
    let host = match url.host() {
        Some(Host::Domain(name)) => name.to_owned(),
        Some(Host::Ipv4(ip)) => ip.to_string(),
        Some(Host::Ipv6(ip)) => ip.to_string(),
        None => return Err("no Host in request URL".to_owned()),
    };
    let mut request = Request::new(Empty::<Bytes>::new());
    let target: Uri = url[Position::BeforePath..Position::AfterQuery].parse().map_err(|e| format!("{e}"))?;
    *request.uri_mut() = target;
    // Host goes first, as RFC 9110 advises; one of our own takes its place.
    let named = url[Position::BeforeHost..Position::AfterPort].parse().map_err(|e| format!("{e}"))?;
    request.headers_mut().insert(HOST, named);
    request.headers_mut().extend(headers.clone());
    let port = url.port_or_known_default().unwrap_or(80);
    let stream = dial(&host, port, Source::Exempt, &get.detours).await?;
    if url.scheme() == "http" {
        return send(stream, request).await;
    }
    let name = ServerName::try_from(host).map_err(|e| format!("tls: {e}"))?;
    send(get.tls.connector()?.connect(name, stream).await.map_err(|e| broken(&e))?, request).await
}

/// Drives the connection just until the answer's headers are there.
pub(super) async fn send<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<Response<Incoming>, String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sender, connection) = http1::Builder::new()
        .title_case_headers(true)
        .max_headers(HEADER_FIELDS)
        .max_buf_size(HEADER_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| said(&e))?;
    let answer = sender.send_request(request);
    pin!(answer);
    let answer = select! {
        biased;
        answer = &mut answer => answer,
        _ = connection => answer.await,
    };
    answer.map_err(|e| said(&e))
}

fn said(error: &hyper::Error) -> String {
    if error.is_incomplete_message() {
        return "EOF".to_owned();
    }
    if error.is_parse_too_large() {
        return format!(
            "net/http: server response headers exceeded {HEADER_BYTES} bytes or {HEADER_FIELDS} fields; aborted"
        );
    }
    match error.source().and_then(|e| e.downcast_ref::<io::Error>()) {
        Some(error) => broken(error),
        None if error.is_parse() => format!("malformed HTTP response: {error}"),
        None => error.to_string(),
    }
}

fn broken(error: &io::Error) -> String {
    match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(cause)) => {
            format!("tls: failed to verify certificate: x509: {cause}")
        }
        Some(cause) => format!("tls: {cause}"),
        None if error.kind() == io::ErrorKind::UnexpectedEof => "EOF".to_owned(),
        None => format!("read: {}", words(error)),
    }
}

#[cfg(test)]
mod tests;
