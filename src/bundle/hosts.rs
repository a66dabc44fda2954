//! `hosts`: addresses of the control plane's names. Docs append it to `/etc/hosts`; here it stays inside the agent.

use super::mistake::{Mistake, Problem};
use crate::workload::Hosts;
use std::net::IpAddr;

/// Reads lines of an address and its names; `#` begins a comment (hosts(5)).
pub(super) fn parse(place: &str, text: &str) -> Result<Hosts, Vec<Mistake>> {
    let (mut hosts, mut mistakes) = (Hosts::new(), Vec::new());
    for (i, line) in text.lines().enumerate() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(address) = words.next() else { continue };
        let names: Vec<_> = words.collect();
        let problem = match address.parse::<IpAddr>() {
            Err(_) => Problem::HostAddress(address.chars().take(64).collect()),
            Ok(_) if names.is_empty() => Problem::HostName,
            Ok(ip) => {
                for name in names {
                    let ips = hosts.entry(name.trim_end_matches('.').to_ascii_lowercase()).or_default();
                    if !ips.contains(&ip) {
                        ips.push(ip);
                    }
                }
                continue;
            }
        };
        mistakes.push(Mistake { place: format!("{place}:{}", i + 1), problem });
    }
    if mistakes.is_empty() { Ok(hosts) } else { Err(mistakes) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_comments_and_both_families() {
        let hosts =
            parse("h", "# c\n10.0.0.1 A b.c. # x\r\n\n2001:db8::9\tistiod.istio-system.svc\n10.0.0.2 a\n10.0.0.1 a\n")
                .unwrap();
        let of = |name: &str| hosts[name].iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(of("a"), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(of("b.c"), ["10.0.0.1"]);
        assert_eq!(of("istiod.istio-system.svc"), ["2001:db8::9"]);
        assert_eq!(parse("h", "").unwrap(), Hosts::new());
    }

    #[test]
    fn bad_lines_are_all_told() {
        let told: Vec<_> =
            parse("h", "10.0.0.1 a\nnope b\n10.0.0.2\n").unwrap_err().iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 2);
        assert!(told[0].starts_with("h:2: \"nope\" is no IP address") && told[1].starts_with("h:3: "), "{told:?}");
    }
}
