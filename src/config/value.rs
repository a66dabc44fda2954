//! From the text of a value to the value. Each error reads on after the text: `"60x" is no duration; …`.

use crate::{
    locality::Platform,
    spiffe::{KeyKind, TrustDomain},
    telemetry::LogFilter,
    workload::{
        Authority, AuthorityError, EntryError, Locality, MAX_TTL, Xds, check_labels, entry_name, host_address,
        is_dns_label, is_host,
    },
};
use humantime::format_duration;
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Component, Path, PathBuf},
    time::Duration,
};

/// Below TimeoutStartSec= of we-agent.service (10 min), with time for a host that is slow at boot.
const MAX_READY_TIMEOUT: Duration = Duration::from_secs(9 * 60);
/// The longest time that something may take for which somebody waits.
pub(super) const HOUR: Duration = Duration::from_secs(3600);
/// The longest time for anything else; of 365 days and a quarter, as humantime counts.
pub(super) const YEAR: Duration = Duration::from_secs(31_557_600);
/// Directories in which nobody configures anything: bundles, certificates that are kept, and outputs by default.
const OURS: [&str; 3] = ["/etc/we-agent", "/var/lib/we-agent", "/run/we-agent"];

pub(super) fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "is neither true nor false".to_owned())
}

/// A duration from a millisecond to `most`: each has an end, for clocks have.
pub(super) fn up_to(most: Duration) -> impl Fn(&str) -> Result<Duration, String> {
    move |text| match humantime::parse_duration(text) {
        Ok(time) if time < Duration::from_millis(1) => Err("is no time at all; at least 1ms".to_owned()),
        Ok(time) if time > most => Err(format!("is longer than {}", format_duration(most))),
        Ok(time) => Ok(time),
        Err(_) => Err("is no duration; write for example 10s, 5m or 1h 30m".to_owned()),
    }
}

pub(super) fn ready_timeout(text: &str) -> Result<Duration, String> {
    match up_to(YEAR)(text)? {
        time if time > MAX_READY_TIMEOUT => {
            Err("is longer than 9m; who has not said READY after 10 minutes is killed by \
            systemd (TimeoutStartSec= of we-agent.service), again and again"
                .to_owned())
        }
        time => Ok(time),
    }
}

pub(super) fn ttl(text: &str) -> Result<Duration, String> {
    let time = up_to(YEAR)(text)?;
    if time > MAX_TTL {
        return Err("is longer than 90 days; istiod signs for 90 days at most".to_owned());
    } else if time < Duration::from_secs(1) {
        return Err("is shorter than a second; the request counts whole seconds".to_owned());
    }
    Ok(time)
}

pub(super) fn bytes(text: &str) -> Result<usize, String> {
    let wrong = || "is no size; write for example 8MiB, 512KiB or a number of bytes".to_owned();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim_start() {
        "" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(wrong()),
    };
    digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit)).filter(|&n| n > 0).ok_or_else(wrong)
}

pub(super) fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode & 0o400 == 0 || mode & !0o660 != 0 => {
            Err("must let the owner read, nobody execute, and others nothing; write 0600, 0640 or 0660".to_owned())
        }
        Ok(mode) => Ok(mode),
        Err(_) => Err("is no file mode; write it in octal, for example \"0640\"".to_owned()),
    }
}

/// As [`mode`], for a file without secrets.
pub(super) fn public_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode & 0o400 == 0 || mode & !0o664 != 0 => {
            Err("must let the owner read, nobody execute, and others not write; write 0644, 0640 or 0600".to_owned())
        }
        Ok(mode) => Ok(mode),
        Err(_) => Err("is no file mode; write it in octal, for example \"0644\"".to_owned()),
    }
}

/// Name or number of a user or a group; whether there is one shows when it is needed.
pub(super) fn account(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_graphic() && !matches!(c, ':' | '/' | ',');
    let number = text.bytes().all(|b| b.is_ascii_digit());
    // The largest number means "leave it as it is" to the kernel.
    if text.is_empty() || text.starts_with('-') || !text.chars().all(legal) {
        return Err("is no name or number of an account".to_owned());
    } else if number && text.parse::<u32>().map_or(true, |number| number == u32::MAX) {
        return Err("is no number of an account; the largest is 4294967294".to_owned());
    }
    Ok(text.to_owned())
}

/// An account that files are given to.
pub(super) fn owner(text: &str) -> Result<String, String> {
    owner_as(text, nix::unistd::geteuid().is_root())
}

pub(super) fn owner_as(text: &str, root: bool) -> Result<String, String> {
    if !root {
        return Err("cannot be the owner: we-agent does not run as root here, and nobody else may give files away; \
                    use group and mode"
            .to_owned());
    }
    account(text)
}

pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.is_absolute()
        || !path.components().all(plain)
        || path.parent().is_none()
        || text.contains(char::is_control)
    {
        return Err("is no path that can be used here; write an absolute one without \"..\"".to_owned());
    }
    Ok(path.components().collect())
}

/// A directory that outputs go to.
pub(super) fn output_dir(text: &str) -> Result<PathBuf, String> {
    let path = path(text)?;
    if OURS.iter().any(|ours| path.starts_with(ours)) {
        return Err(format!(
            "is of we-agent itself; leave dir out for /run/we-agent/<workload>, or use a directory \
                            outside of {}",
            OURS.join(", ")
        ));
    }
    Ok(path)
}

/// Where a socket is, beside the directory of its workload. The kernel takes 107 bytes, of which we need four more than
/// the path has.
pub(super) fn socket_path(text: &str) -> Result<PathBuf, String> {
    let path = path(text)?;
    match text.len() {
        _ if OURS.iter().any(|ours| path.starts_with(ours)) => Err(format!(
            "is of we-agent itself, and agent.sock is there anyway; use a path outside of {}",
            OURS.join(", ")
        )),
        0..=103 => Ok(path),
        _ => Err("is longer than the 103 bytes that a socket's path can have here; use a shorter one".to_owned()),
    }
}

/// The name of one file in a directory of ours or somebody else's.
pub(super) fn file_name(text: &str) -> Result<String, String> {
    if text.is_empty()
        || text.starts_with('.')
        || text.len() > 200
        || text.contains(|c: char| c == '/' || c.is_control())
    {
        return Err("is no name for a file; leave out '/' and a dot at the beginning".to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn text(text: &str) -> Result<String, String> {
    if text.chars().any(char::is_control) {
        return Err("has a control character; remove it".to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn trust_domain(text: &str) -> Result<TrustDomain, String> {
    text.parse().map_err(|error| format!("is no trust domain: {error}"))
}

pub(super) fn ip(text: &str) -> Result<IpAddr, String> {
    let ip = text.parse().map_err(|_| "is no IP address; write for example 10.0.0.7 or fd00::7, without zone")?;
    host_address(ip).ok_or_else(|| "is no address that one host can have".to_owned())
}

pub(super) fn locality(text: &str) -> Result<Locality, String> {
    let parts: Vec<_> = text.split('/').collect();
    if parts.len() > 3 || parts.iter().any(|part| part.is_empty()) || text.chars().any(char::is_whitespace) {
        return Err("is no locality; write region, region/zone or region/zone/subzone".to_owned());
    }
    let part = |i: usize| parts.get(i).copied().unwrap_or_default().to_owned();
    Ok(Locality { region: part(0), zone: part(1), subzone: part(2) })
}

/// A label of the entry.
pub(super) fn label(key: &str, value: &str) -> Result<(), String> {
    let wrong = check_labels(&BTreeMap::from([(key.to_owned(), value.to_owned())]));
    match wrong.into_iter().next() {
        None => Ok(()),
        Some(EntryError::LabelKey(_)) => Err("is no label key; write for example app or example.com/tier".to_owned()),
        Some(_) => Err(format!(
            "has the value {value:?}, which Kubernetes refuses; up to 63 of A-Z, a-z, 0-9, '-', '_' and '.', a letter or digit \
             at both ends"
        )),
    }
}

/// The entry's name ends in it.
pub(super) fn network(text: &str) -> Result<String, String> {
    match entry_name("group", IpAddr::V4(Ipv4Addr::LOCALHOST), text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("is no network id here, for the entry's name ends in it; write a-z, 0-9, '-' and '.', a letter \
                       or digit at the end"
            .to_owned()),
    }
}

/// What is sent as a header.
pub(super) fn cluster_id(text: &str) -> Result<String, String> {
    match text.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        true => Ok(text.to_owned()),
        false => Err("cannot be sent as a header; write ASCII characters".to_owned()),
    }
}

/// `host:port` of a control plane; an IPv6 address stands in brackets.
pub(super) fn authority(text: &str) -> Result<Authority, String> {
    text.parse().map_err(|error: AuthorityError| error.to_string())
}

/// `host:port` of a program: any port will do.
pub(super) fn host_port(text: &str) -> Result<String, String> {
    match text.parse::<Authority>() {
        Ok(_) | Err(AuthorityError::Plaintext) => Ok(text.to_owned()),
        Err(_) => Err("is no host:port; write for example localhost:8443 or [::1]:8443".to_owned()),
    }
}

/// What a certificate can be for.
pub(super) fn server_name(text: &str) -> Result<String, String> {
    if is_host(text) { Ok(text.to_owned()) } else { Err("is no DNS name and no IP address".to_owned()) }
}

/// What can be asked for in a TLS handshake.
pub(super) fn dns_name(text: &str) -> Result<String, String> {
    match is_host(text) && text.parse::<IpAddr>().is_err() {
        true => Ok(text.to_owned()),
        false => Err("is no DNS name".to_owned()),
    }
}

/// A workload is a directory, and its name appears in logs, paths and metrics: one lower-case DNS label (RFC 1123).
pub(super) fn workload_name(text: &str) -> Result<(), String> {
    if is_dns_label(text) {
        return Ok(());
    }
    Err("is no name of a workload; use the name of its directory: a-z, 0-9 and '-', at most 63".to_owned())
}

pub(super) fn admin_address(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(Some(address)),
        Ok(_) => Err("is not a loopback address; nothing authenticates there, so use 127.0.0.1 or [::1], \
                      and put a proxy in front to reach it from elsewhere"
            .to_owned()),
        Err(_) => Err("is no address; write IP:PORT, for example 127.0.0.1:15020, or off".to_owned()),
    }
}

pub(super) fn log_level(text: &str) -> Result<LogFilter, String> {
    text.parse().map_err(|fix| format!("is no log level; {fix}"))
}

pub(super) fn key_kind(text: &str) -> Result<KeyKind, String> {
    one_of(
        text,
        &[
            ("ecdsa-p256", KeyKind::EcP256),
            ("ecdsa-p384", KeyKind::EcP384),
            ("rsa-2048", KeyKind::Rsa2048),
            ("rsa-3072", KeyKind::Rsa3072),
            ("rsa-4096", KeyKind::Rsa4096),
        ],
    )
}

pub(super) fn xds(text: &str) -> Result<Xds, String> {
    one_of(text, &[("delta", Xds::Delta), ("sotw", Xds::Sotw)])
}

/// The name of a service (systemd.unit(5)). It becomes the instance of another unit, whose name may have 255 characters.
pub(super) fn service_unit(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    let name = text.strip_suffix(".service").unwrap_or_default();
    if name.is_empty() || name.starts_with(['-', '.', '@']) || text.len() > 230 || !text.chars().all(legal) {
        return Err("is no name of a service; write for example nginx.service".to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn platform(text: &str) -> Result<Platform, String> {
    one_of(
        text,
        &[
            ("auto", Platform::Auto),
            ("off", Platform::Off),
            ("aws", Platform::Aws),
            ("gcp", Platform::Gcp),
            ("azure", Platform::Azure),
        ],
    )
}

pub(super) fn one_of<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        format!("is none of {}", words.join(", "))
    })
}
