//! The lab against recordings of the real thing: istioctl's bundles, istiod's answers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

#[path = "golden/bundle.rs"]
mod bundle;
#[path = "golden/ca.rs"]
mod ca;
#[path = "golden/xds.rs"]
mod xds;

use std::{collections::BTreeMap, fs, path::PathBuf};

use prost_types::{ListValue, Struct, Value as Proto, value::Kind};
use serde_json::Value;

/// A recording.
fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden").join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(golden(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The cases of a recording, without those that are left out.
fn cases(path: &str, key: &str, left_out: &[(&str, &str)]) -> Vec<Value> {
    let cases: Vec<Value> = serde_json::from_str(&read(path)).unwrap();
    let out = |case: &Value| left_out.iter().any(|(name, _)| case[key] == *name);
    for (name, _) in left_out {
        assert!(cases.iter().any(|c| c[key] == *name), "{path} has no case {name} to leave out");
    }
    cases.into_iter().filter(|c| !out(c)).collect()
}

/// JSON to Struct.
fn fields(value: &Value) -> BTreeMap<String, Proto> {
    value.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), proto(v))).collect()
}

fn proto(value: &Value) -> Proto {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(b) => Kind::BoolValue(*b),
        Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap()),
        Value::String(s) => Kind::StringValue(s.clone()),
        Value::Array(a) => Kind::ListValue(ListValue { values: a.iter().map(proto).collect() }),
        Value::Object(_) => Kind::StructValue(Struct { fields: fields(value) }),
    };
    Proto { kind: Some(kind) }
}
