//! The WorkloadEntry that istiod makes for a workload: its name, and whether Kubernetes will take it. Everything is
//! checked before we connect: istiod would answer with a text of the API server, or not at all.

use std::{collections::BTreeMap, net::IpAddr};

/// The longest name of a Kubernetes object, in bytes.
const MAX_NAME: usize = 253;

/// Why Kubernetes would refuse the entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Group, address and network do not make an object name.
    #[error(
        "group {group:?}, address {ip} and network {network:?} make the entry name {name:?}, which Kubernetes refuses \
         (only a-z, 0-9, '-' and '.', and a letter or digit at both ends): change the network or the group"
    )]
    Name {
        /// The WorkloadGroup.
        group: String,
        /// Primary address.
        ip: IpAddr,
        /// Network id.
        network: String,
        /// What they make.
        name: String,
    },
    /// A label key is none.
    #[error(
        "label key {0:?} is not of the form [prefix/]name, where name has up to 63 of A-Z, a-z, 0-9, '-', '_', '.'"
    )]
    LabelKey(String),
    /// A label value is none.
    #[error(
        "label {key:?} has a value that Kubernetes refuses (up to 63 of A-Z, a-z, 0-9, '-', '_', '.', and a letter or digit at both ends): {value:?}"
    )]
    LabelValue {
        /// The label.
        key: String,
        /// Its value.
        value: String,
    },
}

/// The name istiod gives: `<group>-<ip>[-<network>]`, colons as hyphens, and of a long one the last 253 characters.
///
/// # Errors
/// When the result is no DNS-1123 subdomain, say for an IPv6 address that ends in `::`.
pub fn entry_name(group: &str, ip: IpAddr, network: &str) -> Result<String, EntryError> {
    let ip_text = ip.to_string().replace(':', "-"); // canonical (RFC 5952), lower case
    let mut name = format!("{group}-{ip_text}");
    if !network.is_empty() {
        name = format!("{name}-{network}");
    }
    if name.is_ascii() && name.len() > MAX_NAME {
        name = name.split_off(name.len() - MAX_NAME);
    }
    if is_dns_subdomain(&name) {
        return Ok(name);
    }
    Err(EntryError::Name { group: group.to_owned(), ip, network: network.to_owned(), name })
}

/// Checks every label as Kubernetes does. `istio-locality` may hold slashes: istiod takes it out.
///
/// # Errors
/// Each bad key and each bad value.
pub fn check_labels(labels: &BTreeMap<String, String>) -> Vec<EntryError> {
    let mut errors = Vec::new();
    for (key, value) in labels {
        if !is_label_key(key) {
            errors.push(EntryError::LabelKey(key.clone()));
        }
        if key != super::locality::OLD_LABEL && !value.is_empty() && !is_label_text(value) {
            errors.push(EntryError::LabelValue { key: key.clone(), value: value.clone() });
        }
    }
    errors
}

/// DNS-1123 label: the name of a namespace, and of a workload of ours.
pub fn is_dns_label(text: &str) -> bool {
    let end = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    match text.as_bytes() {
        [first, .., last] => text.len() <= 63 && end(*first) && end(*last) && text.bytes().all(|b| end(b) || b == b'-'),
        [only] => end(*only),
        [] => false,
    }
}

/// DNS-1123 subdomain: the name of most Kubernetes objects.
pub fn is_dns_subdomain(text: &str) -> bool {
    // Unlike a host name, the whole may be one label of more than 63 characters.
    let end = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let label = |l: &str| {
        l.bytes().all(|b| end(b) || b == b'-') && l.bytes().next().is_some_and(end) && l.bytes().last().is_some_and(end)
    };
    text.len() <= MAX_NAME && text.split('.').all(label)
}

fn is_label_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_dns_subdomain(prefix) && is_label_text(name),
        None => is_label_text(key),
    }
}

fn is_label_text(text: &str) -> bool {
    let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    text.len() <= 63
        && end(text.bytes().next())
        && end(text.bytes().last())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn name(group: &str, ip: &str, network: &str) -> Result<String, EntryError> {
        entry_name(group, ip.parse().unwrap(), network)
    }

    #[test]
    fn names_are_istiods() {
        assert_eq!(name("reviews", "10.0.0.5", "vm-network").unwrap(), "reviews-10.0.0.5-vm-network");
        assert_eq!(name("reviews", "10.0.0.5", "").unwrap(), "reviews-10.0.0.5");
        assert_eq!(name("rev.iews", "FD77::5", "").unwrap(), "rev.iews-fd77--5");
        let long = format!("{}ab", "a".repeat(260));
        let cut = name(&long, "10.0.0.5", "net").unwrap();
        assert_eq!((cut.len(), cut.ends_with("ab-10.0.0.5-net")), (253, true));
    }

    #[test]
    fn what_kubernetes_would_refuse_is_refused_here() {
        for (group, ip, network) in [
            ("reviews", "10.0.0.5", "Net"),
            ("reviews", "10.0.0.5", "net_1"),
            ("reviews", "10.0.0.5", "net/x"),
            ("reviews", "fd00::", ""),
            ("Reviews", "10.0.0.5", ""),
            ("", "10.0.0.5", ""),
            ("rev iews", "10.0.0.5", ""),
            (&format!("a.{}", "b".repeat(243)), "10.0.0.5", ""), // cut at the dot: a leading one is left
        ] {
            assert!(name(group, ip, network).is_err(), "{group} {ip} {network}");
        }
        assert!(name("reviews", "fd00::", "net").is_ok());
    }

    #[test]
    fn labels_are_kubernetes_labels() {
        let check = |key: &str, value: &str| check_labels(&BTreeMap::from([(key.to_owned(), value.to_owned())])).len();
        for (key, value) in [("app", "v-1.2_3"), ("example.com/Odd.Key_x", ""), ("istio-locality", "us/z1")] {
            assert_eq!(check(key, value), 0, "{key}={value}");
        }
        for (key, value) in
            [("app", "a b"), ("app", "-a"), ("app", "a/b"), ("a b", "x"), ("/a", "x"), ("a/b/c", "x"), ("Ex/a", "x")]
        {
            assert_eq!(check(key, value), 1, "{key}={value}");
        }
        assert_eq!(check(&"k".repeat(64), &"v".repeat(64)), 2);
    }

    proptest! {
        #[test]
        fn a_name_is_an_object_name(group in "[a-zA-Z0-9.-]{0,300}", ip: u128, v4: bool, network in "[a-zA-Z_0-9-]{0,20}") {
            let ip: IpAddr = if v4 { std::net::Ipv4Addr::from(ip as u32).into() } else { std::net::Ipv6Addr::from(ip).into() };
            if let Ok(name) = entry_name(&group, ip, &network) {
                prop_assert!(is_dns_subdomain(&name) && name.len() <= MAX_NAME);
            }
        }
    }
}
