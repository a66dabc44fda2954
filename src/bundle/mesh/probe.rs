//! `readinessProbe`: istio/api's JSON becomes a probe that can be run, with istio-agent's defaults.

use super::{camel, integer};
use crate::{
    bundle::mistake::Problem,
    workload::{ProbeMethod, ReadinessProbe},
};
use serde_json::{Map, Value};
use std::time::Duration;

/// Mistakes by the field below `readinessProbe` (`.httpGet.port`).
type Mistakes = Vec<(String, Problem)>;

/// The probe, and the JSON to send on. None if no method is there: `{}` is what an unset probe becomes on its way.
pub(super) fn read(json: Value) -> Result<Option<(ReadinessProbe, Value)>, Mistakes> {
    let json = camel_all(json);
    let mut fields = Fields { mistakes: Vec::new() };
    let probe = fields.object(&json, "").and_then(|map| fields.probe(map));
    match fields.mistakes.is_empty() {
        true => Ok(probe.map(|probe| (probe, json))),
        false => Err(fields.mistakes),
    }
}

/// Keys in camelCase throughout.
fn camel_all(json: Value) -> Value {
    match json {
        Value::Object(map) => Value::Object(map.into_iter().map(|(k, v)| (camel(&k), camel_all(v))).collect()),
        Value::Array(values) => Value::Array(values.into_iter().map(camel_all).collect()),
        other => other,
    }
}

struct Fields {
    mistakes: Mistakes,
}

impl Fields {
    fn refuse(&mut self, field: impl Into<String>, expected: &'static str) {
        self.mistakes.push((field.into(), Problem::Type(expected)));
    }

    fn probe(&mut self, map: &Map<String, Value>) -> Option<ReadinessProbe> {
        const METHODS: [&str; 4] = ["httpGet", "tcpSocket", "exec", "grpc"];
        let mut present = METHODS.into_iter().filter(|m| map.get(*m).is_some_and(|v| !v.is_null()));
        let method = present.next()?;
        if let Some(second) = present.next() {
            self.mistakes.push((String::new(), Problem::TwoMethods(method, second)));
            return None;
        }
        let probe = ReadinessProbe {
            initial_delay: Duration::from_secs(self.count(map, "initialDelaySeconds", 0).into()),
            timeout: Duration::from_secs(self.count(map, "timeoutSeconds", 1).into()),
            period: Duration::from_secs(self.count(map, "periodSeconds", 10).into()),
            success_threshold: self.count(map, "successThreshold", 1),
            failure_threshold: self.count(map, "failureThreshold", 1),
            method: self.method(method, map.get(method)?)?,
        };
        Some(probe)
    }

    /// An int32 that is not negative; zero and absence mean the default.
    fn count(&mut self, map: &Map<String, Value>, field: &str, default: u32) -> u32 {
        let Some(value) = map.get(field).filter(|v| !v.is_null()) else { return default };
        match integer(value).and_then(|n| i32::try_from(n).ok()).and_then(|n| u32::try_from(n).ok()) {
            Some(0) => default,
            Some(n) => n,
            None => {
                self.refuse(format!(".{field}"), "a whole number from 0 to 2147483647");
                default
            }
        }
    }

    fn method(&mut self, method: &str, json: &Value) -> Option<ProbeMethod> {
        let at = |field: &str| format!(".{method}.{field}");
        let map = self.object(json, &format!(".{method}"))?;
        Some(match method {
            "httpGet" => ProbeMethod::Http {
                path: self.path(map.get("path"), at("path")),
                port: self.port(map.get("port"), at("port")),
                host: self.host(map.get("host"), at("host")),
                https: match self.text(map.get("scheme"), at("scheme"))?.to_ascii_uppercase().as_str() {
                    "" | "HTTP" => false,
                    "HTTPS" => true,
                    _ => {
                        self.refuse(at("scheme"), "HTTP or HTTPS");
                        false
                    }
                },
                headers: self.headers(map.get("httpHeaders"), &at("httpHeaders")),
            },
            "tcpSocket" => ProbeMethod::Tcp {
                host: self.host(map.get("host"), at("host")),
                port: self.port(map.get("port"), at("port")),
            },
            "exec" => ProbeMethod::Exec { command: self.command(map.get("command"), at("command")) },
            _ => ProbeMethod::Grpc {
                port: self.port(map.get("port"), at("port")),
                service: self.text(map.get("service"), at("service"))?,
            },
        })
    }

    fn object<'a>(&mut self, json: &'a Value, field: &str) -> Option<&'a Map<String, Value>> {
        let map = json.as_object();
        if map.is_none() && !json.is_null() {
            self.refuse(field, "a mapping (keys and values)");
        }
        map
    }

    /// A text, empty if absent.
    fn text(&mut self, json: Option<&Value>, field: String) -> Option<String> {
        match json {
            None | Some(Value::Null) => Some(String::new()),
            Some(Value::String(text)) => Some(text.clone()),
            Some(_) => {
                self.refuse(field, "a text: put it in quotes");
                None
            }
        }
    }

    fn port(&mut self, json: Option<&Value>, field: String) -> u16 {
        let port = json.and_then(integer).and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
        if port.is_none() {
            self.refuse(field, "a port from 1 to 65535");
        }
        port.unwrap_or_default()
    }

    fn host(&mut self, json: Option<&Value>, field: String) -> Option<String> {
        let host = self.text(json, field.clone()).filter(|h| !h.is_empty())?;
        if host.chars().any(|c| c.is_control() || c.is_whitespace() || "/@?#".contains(c)) {
            self.refuse(field, "a host name or an IP address");
        }
        Some(host)
    }

    fn path(&mut self, json: Option<&Value>, field: String) -> String {
        let path = self.text(json, field.clone()).unwrap_or_default();
        if path.chars().any(char::is_control) {
            self.refuse(field, "a path without control characters (a line feed in it would forge a header)");
        }
        if path.starts_with('/') { path } else { format!("/{path}") }
    }

    fn headers(&mut self, json: Option<&Value>, field: &str) -> Vec<(String, String)> {
        let list = match json {
            None | Some(Value::Null) => return Vec::new(),
            Some(Value::Array(list)) => list,
            Some(_) => {
                self.refuse(field, "a list of names and values");
                return Vec::new();
            }
        };
        let mut headers = Vec::new();
        for (i, header) in list.iter().enumerate() {
            let name = self.text(header.get("name"), format!("{field}[{i}].name")).unwrap_or_default();
            let value = self.text(header.get("value"), format!("{field}[{i}].value")).unwrap_or_default();
            if http::HeaderName::from_bytes(name.as_bytes()).is_err() {
                self.refuse(format!("{field}[{i}].name"), "the name of a header");
            }
            if http::HeaderValue::from_str(&value).is_err() {
                self.refuse(format!("{field}[{i}].value"), "the value of a header (no control characters)");
            }
            headers.push((name, value));
        }
        headers
    }

    fn command(&mut self, json: Option<&Value>, field: String) -> Vec<String> {
        let words: Option<Vec<_>> = json
            .and_then(Value::as_array)
            .and_then(|list| list.iter().map(|w| w.as_str().map(str::to_owned)).collect());
        match words {
            Some(words) if words.first().is_some_and(|w| !w.is_empty()) && !words.iter().any(|w| w.contains('\0')) => {
                words
            }
            _ => {
                self.refuse(field, "a list of texts, the program first");
                Vec::new()
            }
        }
    }
}
