//! The keys of `cluster.env` that are obeyed, and what they mean: as Istio's start script and agent read them.

use super::{
    env::Env,
    mistake::{Mistake, Problem},
};
use crate::{
    spiffe::{KeyKind, TrustDomain},
    workload::{Authority, MAX_TTL, host_address, is_host},
};
use std::{net::IpAddr, time::Duration};

/// Keys with a meaning here, besides `ISTIO_META_*` and `ISTIO_METAJSON_*`.
const OBEYED: [&str; 20] = [
    "CA_ADDR",
    "PILOT_ADDRESS",
    "ISTIO_PILOT_PORT",
    "ISTIO_SYSTEM_NAMESPACE",
    "PROXY_CONFIG",
    "ISTIO_SERVICE",
    "ISTIO_CP_AUTH",
    "ISTIOD_SAN",
    "CA_ROOT_CA",
    "XDS_ROOT_CA",
    "OUTPUT_CERTS",
    "SECRET_TTL",
    "ECC_SIGNATURE_ALGORITHM",
    "ECC_CURVE",
    "TRUST_DOMAIN",
    "SERVICE_ACCOUNT",
    "ISTIO_NAMESPACE",
    "POD_NAMESPACE",
    "POD_NAME",
    "REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION",
];
/// Spelled apart: the address has three names, the first of which wins.
const ADDRESSES: [&str; 3] = ["ISTIO_SVC_IP", "INSTANCE_IP", "INSTANCE_IPS"];

/// Reads keys and collects mistakes.
pub(super) struct Keys<'a> {
    pub(super) env: &'a Env,
    /// Place of a key that is nowhere.
    pub(super) file: String,
    pub(super) mistakes: Vec<Mistake>,
}

impl<'a> Keys<'a> {
    /// Where a key was set, for messages.
    pub(super) fn place(&self, key: &str) -> String {
        match self.env.variable(key) {
            Some(variable) => format!("{}:{}: {key}", variable.file.display(), variable.line),
            None => format!("{}: {key}", self.file),
        }
    }

    pub(super) fn mistake(&mut self, key: &str, problem: Problem) {
        self.mistakes.push(Mistake { place: self.place(key), problem });
    }

    fn refuse(&mut self, key: &str, got: &str, expected: &'static str) {
        self.mistake(key, Problem::Value { got: got.chars().take(64).collect(), expected });
    }

    /// The first of `keys` that is set and not empty; a mistake of the first one if none is.
    fn required(&mut self, keys: &[&'static str]) -> Option<&'a str> {
        let found = keys.iter().find_map(|key| self.env.filled(key));
        if found.is_none() {
            self.mistake(keys[0], Problem::Unset);
        }
        found
    }

    /// A required name of a Kubernetes object.
    pub(super) fn name(&mut self, keys: &[&'static str], legal: fn(&str) -> bool) -> Option<&'a str> {
        let name = self.required(keys)?;
        if legal(name) {
            return Some(name);
        }
        let key = keys.iter().find(|key| self.env.filled(key).is_some()).unwrap_or(&keys[0]);
        self.refuse(key, name, "a Kubernetes name (a-z, 0-9 and '-', a letter or digit at both ends)");
        None
    }

    /// The name to verify instead of the address's host.
    pub(super) fn server_name(&mut self) -> Option<&'a str> {
        let name = self.env.filled("ISTIOD_SAN")?;
        if !is_host(name) {
            self.refuse("ISTIOD_SAN", name, "a DNS name or an IP address");
        }
        Some(name)
    }

    /// istioctl writes an empty one when the mesh names none; istiod's own default is meant then. (istio-agent asks
    /// for `spiffe:///ns/…`, which a strict certificate authority refuses.)
    pub(super) fn trust_domain(&mut self) -> Option<TrustDomain> {
        let parsed = self.env.filled("TRUST_DOMAIN").unwrap_or("cluster.local").parse();
        parsed.map_err(|e| self.mistake("TRUST_DOMAIN", Problem::Identity(e))).ok()
    }

    /// `CA_ADDR`; without it the certificate authority is where the discovery service is.
    pub(super) fn ca(&mut self) -> Option<Authority> {
        self.authority("CA_ADDR", self.env.filled("CA_ADDR")?)
    }

    /// What the start script puts over the discovery address of all files, if it does.
    pub(super) fn pilot(&mut self) -> Option<(&'static str, String)> {
        if let Some(address) = self.env.filled("PILOT_ADDRESS") {
            return Some(("PILOT_ADDRESS", address.to_owned()));
        }
        let port = self.env.filled("ISTIO_PILOT_PORT")?;
        let namespace = self.env.filled("ISTIO_SYSTEM_NAMESPACE").unwrap_or("istio-system");
        Some(("ISTIO_PILOT_PORT", format!("istiod.{namespace}.svc:{port}")))
    }

    fn authority(&mut self, key: &str, text: &str) -> Option<Authority> {
        text.parse().map_err(|e| self.mistake(key, Problem::Authority(text.to_owned(), e))).ok()
    }

    pub(super) fn ttl(&mut self) -> Duration {
        let day = Duration::from_secs(24 * 3600);
        let Some(text) = self.env.get("SECRET_TTL") else { return day };
        match go_duration(text) {
            Some(ttl) if (Duration::from_secs(1)..=MAX_TTL).contains(&ttl) => return ttl,
            Some(_) => self.refuse("SECRET_TTL", text, "from 1s to 2160h (90 days, the most that istiod grants)"),
            None => self.refuse("SECRET_TTL", text, "a duration like 24h or 1h30m"),
        }
        day
    }

    /// P-256 unless asked otherwise: a bundle that says nothing means RSA to istio-agent, out of habit alone.
    pub(super) fn key_kind(&mut self) -> KeyKind {
        let algorithm = self.env.get("ECC_SIGNATURE_ALGORITHM").unwrap_or_default();
        if !matches!(algorithm, "" | "ECDSA") {
            self.refuse("ECC_SIGNATURE_ALGORITHM", algorithm, "ECDSA");
        }
        match self.env.get("ECC_CURVE").unwrap_or_default() {
            "" | "P256" => KeyKind::EcP256,
            "P384" => KeyKind::EcP384,
            other => {
                self.refuse("ECC_CURVE", other, "P256 or P384");
                KeyKind::EcP256
            }
        }
    }

    pub(super) fn addresses(&mut self) -> Vec<IpAddr> {
        let Some(key) = ADDRESSES.into_iter().find(|key| self.env.filled(key).is_some()) else { return Vec::new() };
        let mut ips = Vec::new();
        for text in self.env.get(key).unwrap_or_default().split(',').map(str::trim) {
            match text.parse().map(host_address) {
                Ok(None) => self.refuse(key, text, "an address of one host"),
                Ok(Some(ip)) if ips.contains(&ip) => {}
                Ok(Some(ip)) => ips.push(ip),
                Err(_) => self.refuse(key, text, "an IP address (no host name, no zone)"),
            }
        }
        ips
    }

    pub(super) fn flag(&mut self, key: &'static str) -> bool {
        let text = self.env.get(key).unwrap_or_default();
        let flag = if text.is_empty() { Some(false) } else { go_bool(text) };
        if flag.is_none() {
            self.refuse(key, text, "true or false");
        }
        flag.unwrap_or_default()
    }

    /// A root file that a key names.
    pub(super) fn root_file(&mut self, key: &'static str) -> Option<&'a str> {
        let path = self.env.filled(key)?;
        if path == "SYSTEM" {
            self.mistake(key, Problem::Refused(
                "the system's public certificate authorities are not used to know istiod: give the file of its root",
            ));
            return None;
        }
        Some(path)
    }

    /// Istio's ways to speak without TLS.
    pub(super) fn refuse_plaintext(&mut self) {
        if self.env.filled("ISTIO_CP_AUTH").is_some_and(|policy| policy != "MUTUAL_TLS") {
            self.mistake(
                "ISTIO_CP_AUTH",
                Problem::Refused(
                    "the control plane is only spoken to over TLS, anything else would show the token: remove the line",
                ),
            );
        }
    }

    /// What is obeyed must not be made of variables that nobody sets here: the shell would leave it empty, and another
    /// address or name would be used silently.
    pub(super) fn refuse_unset(&mut self) {
        for (key, variable) in self.env.iter() {
            if let Some(name) = variable.unset.first().filter(|_| OBEYED.contains(&key) || ADDRESSES.contains(&key)) {
                self.mistake(key, Problem::UnsetVariable(name.clone()));
            }
        }
    }

    /// Every key without effect here. `PROV_CERT` finds the root in Istio's own layout and nowhere else.
    pub(super) fn ignored(&self, prov_cert: bool) -> Vec<String> {
        let obeyed = |key: &str| {
            OBEYED.contains(&key) || ADDRESSES.contains(&key) || is_metadata(key) || prov_cert && key == "PROV_CERT"
        };
        // istiod is told of a DNS capture, but nothing is captured here.
        let capture = |key: &str| key == "ISTIO_META_DNS_CAPTURE" && self.env.get(key).and_then(go_bool) == Some(true);
        self.env.iter().map(|(key, _)| key).filter(|key| !obeyed(key) || capture(key)).map(str::to_owned).collect()
    }
}

/// Whether the variable is node metadata. A bare prefix is not: it names no key.
fn is_metadata(key: &str) -> bool {
    ["ISTIO_META_", "ISTIO_METAJSON_"].iter().any(|prefix| key.strip_prefix(prefix).is_some_and(|k| !k.is_empty()))
}

/// Go's `strconv.ParseBool`.
pub(super) fn go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// Go's `time.ParseDuration`, for durations that are not negative.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit = rest[number..].find(|c: char| c.is_ascii_digit() || c == '.').map_or(rest.len(), |n| number + n);
        let factor = match &rest[number..unit] {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += rest[..number].parse::<f64>().ok()? * factor;
        rest = &rest[unit..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_spellings() {
        for (text, seconds) in [
            ("24h", 86400.0),
            ("1h30m", 5400.0),
            ("1.5h", 5400.0),
            ("300ms", 0.3),
            ("+2s", 2.0),
            ("0", 0.0),
            (".5s", 0.5),
        ] {
            assert_eq!(go_duration(text).map(|d| d.as_secs_f64()), Some(seconds), "{text}");
        }
        for text in ["", "24", "1d", "-1h", "h", "1h ", "1..5h", "+", "1e9h"] {
            assert_eq!(go_duration(text), None, "{text}");
        }
        assert_eq!(
            (go_bool("T"), go_bool("FALSE"), go_bool("yes"), go_bool("")),
            (Some(true), Some(false), None, None)
        );
    }
}
