//! YAML as Go writes it: block style, keys in natural order, strings quoted only where a reader could err.
//! istioctl and kubectl print with that library, and the lab's files are to be theirs byte for byte.

use std::{cmp::Ordering, fmt::Write};

use serde_json::Value;

/// The document for `value`, with its final line feed.
pub(crate) fn document(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => mapping(&mut out, map, 0, false),
        Value::Array(list) if !list.is_empty() => sequence(&mut out, list, 0),
        scalar => {
            flow(&mut out, scalar, 0);
            out.push('\n');
        }
    }
    out
}

fn mapping(out: &mut String, map: &serde_json::Map<String, Value>, indent: usize, mut inline: bool) {
    let mut keys: Vec<&String> = map.keys().collect();
    keys.sort_by(|a, b| natural(a, b));
    for key in keys {
        if !inline {
            out.extend(std::iter::repeat_n(' ', indent));
        }
        inline = false;
        flow(out, &Value::String(key.clone()), indent);
        out.push(':');
        match &map[key] {
            Value::Object(inner) if !inner.is_empty() => {
                out.push('\n');
                mapping(out, inner, indent + 2, false);
            }
            Value::Array(inner) if !inner.is_empty() => {
                out.push('\n');
                sequence(out, inner, indent);
            }
            scalar => {
                out.push(' ');
                flow(out, scalar, indent + 2);
                out.push('\n');
            }
        }
    }
}

fn sequence(out: &mut String, list: &[Value], indent: usize) {
    for item in list {
        out.extend(std::iter::repeat_n(' ', indent));
        out.push_str("- ");
        match item {
            Value::Object(inner) if !inner.is_empty() => mapping(out, inner, indent + 2, true),
            scalar => {
                flow(out, scalar, indent + 2);
                out.push('\n');
            }
        }
    }
}

fn flow(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::String(text) => string(out, text, indent),
        Value::Object(_) => out.push_str("{}"),
        Value::Array(_) => out.push_str("[]"),
        other => _ = write!(out, "{other}"),
    }
}

/// The order of keys: runs of digits count as numbers, a letter comes after anything that is none.
fn natural(a: &str, b: &str) -> Ordering {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let Some(i) = a.iter().zip(&b).position(|(x, y)| x != y) else { return a.len().cmp(&b.len()) };
    let (x, y) = (a[i], b[i]);
    let after_digit = i > 0 && a[i - 1].is_numeric();
    match (x.is_alphabetic(), y.is_alphabetic()) {
        (true, true) => x.cmp(&y),
        (true, false) => {
            if after_digit {
                Ordering::Less
            } else {
                Ordering::Greater
            }
        }
        (false, true) => {
            if after_digit {
                Ordering::Greater
            } else {
                Ordering::Less
            }
        }
        (false, false) => {
            let number = |text: &[char]| {
                text.iter()
                    .take_while(|c| c.is_ascii_digit())
                    .fold(0u64, |n, c| n.wrapping_mul(10) + u64::from(*c) - 48)
            };
            let digits = |text: &[char]| text.iter().take_while(|c| c.is_ascii_digit()).count();
            number(&a[i..]).cmp(&number(&b[i..])).then(digits(&a[i..]).cmp(&digits(&b[i..]))).then(x.cmp(&y))
        }
    }
}

fn string(out: &mut String, text: &str, indent: usize) {
    let special = text.chars().any(|c| !printable(c));
    if text.is_empty() || looks_like_another_type(text) {
        double(out, text);
    } else if text.contains('\n') && !special {
        literal(out, text, indent);
    } else if special || text.contains('\n') {
        double(out, text);
    } else if plain_allowed(text) {
        out.push_str(text);
    } else {
        _ = write!(out, "'{}'", text.replace('\'', "''"));
    }
}

/// What the library prints as it is; a tab or a carriage return it does not, nor what is beyond the first plane.
fn printable(c: char) -> bool {
    matches!(c, '\n' | ' '..='~' | '\u{a0}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}') && c != '\u{feff}'
}

fn double(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\0' => out.push_str("\\0"),
            c if printable(c) => out.push(c),
            c if (c as u32) < 0x100 => _ = write!(out, "\\x{:02X}", c as u32),
            c if (c as u32) < 0x1_0000 => _ = write!(out, "\\u{:04X}", c as u32),
            c => _ = write!(out, "\\U{:08X}", c as u32),
        }
    }
    out.push('"');
}

/// A block scalar: `|-` without a final line feed, `|+` with more than one, and the indent said if a blank comes first.
fn literal(out: &mut String, text: &str, indent: usize) {
    out.push('|');
    if text.starts_with([' ', '\n']) {
        out.push('2');
    }
    let body = text.strip_suffix('\n');
    match body {
        None => out.push('-'),
        Some(body) if body.is_empty() || body.ends_with('\n') => out.push('+'),
        Some(_) => {}
    }
    for line in body.unwrap_or(text).split('\n') {
        out.push('\n');
        if !line.is_empty() {
            out.extend(std::iter::repeat_n(' ', indent));
            out.push_str(line);
        }
    }
}

fn looks_like_another_type(text: &str) -> bool {
    let words = [
        "y", "Y", "yes", "Yes", "YES", "on", "On", "ON", "n", "N", "no", "No", "NO", "off", "Off", "OFF", "true",
        "True", "TRUE", "false", "False", "FALSE", "~", "null", "Null", "NULL", ".nan", ".NaN", ".NAN", ".inf", ".Inf",
        ".INF", "<<",
    ];
    words.contains(&text) || is_number(text) || is_date(text)
}

fn is_number(text: &str) -> bool {
    let body = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits = body.replace('_', "");
    let radix =
        |prefix: &str, radix| digits.strip_prefix(prefix).is_some_and(|d| u64::from_str_radix(d, radix).is_ok());
    body.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && (radix("0x", 16)
            || radix("0b", 2)
            || radix("0o", 8)
            || (digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
                && digits.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b))
                && digits.parse::<f64>().is_ok()))
}

fn is_date(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() >= 8 && bytes[..4].iter().all(u8::is_ascii_digit) && bytes[4] == b'-' && {
        let mut parts = text.splitn(3, '-').skip(1);
        let month = parts.next().is_some_and(|m| (1..=2).contains(&m.len()) && m.bytes().all(|b| b.is_ascii_digit()));
        month
            && parts.next().is_some_and(|rest| {
                let day = rest.bytes().take_while(u8::is_ascii_digit).count();
                (1..=2).contains(&day) && (rest.len() == day || rest[day..].starts_with(['T', 't', ' ']))
            })
    }
}

fn plain_allowed(text: &str) -> bool {
    let first_bad = |c: char| "#,[]{}&*!|>'\"%@`=".contains(c);
    let mut chars = text.chars();
    let (first, second) = (chars.next(), chars.next());
    let blank_next = second.is_none_or(|c| c == ' ');
    let starts_well = match first {
        Some('-' | '?' | ':') => !blank_next,
        Some(c) => !first_bad(c) || (c == '=' && text == "="),
        None => false,
    };
    starts_well
        && !text.starts_with(' ')
        && !text.ends_with(' ')
        && !text.starts_with("---")
        && !text.starts_with("...")
        && !text.contains(": ")
        && !text.ends_with(':')
        && !text.contains(" #")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_are_in_natural_order() {
        let mut keys = ["BS2", "BS", "ISTIO_META_X", "ISTIO_METAJSON_X", "p10", "p9", "a"];
        keys.sort_by(|a, b| natural(a, b));
        assert_eq!(keys, ["BS", "BS2", "ISTIO_META_X", "ISTIO_METAJSON_X", "a", "p9", "p10"]);
    }

    #[test]
    fn strings_are_quoted_only_where_needed() {
        for (text, yaml) in [
            ("plain", "plain"),
            ("true", "\"true\""),
            ("1.0", "\"1.0\""),
            ("0123", "\"0123\""),
            ("2026-01-01", "\"2026-01-01\""),
            ("a: b", "'a: b'"),
            ("it's", "it's"),
            ("!x!", "'!x!'"),
            ("*", "'*'"),
            ("=", "="),
            ("a\tb", "\"a\\tb\""),
            ("", "\"\""),
        ] {
            assert_eq!(document(&json!(text)), format!("{yaml}\n"));
        }
        assert_eq!(document(&json!({"k": "a\nb\n", "l": ["x"], "m": {}})), "k: |\n  a\n  b\nl:\n- x\nm: {}\n");
    }

    #[test]
    fn a_yaml_reader_reads_the_same_back() {
        let value = json!({"a": {"b": ["1", 2, {"c": "x\n\ny", "d": null}], "yes": "~/x"}, "z": " lead", "t": "a\r\nb", "u": "日本 😀", "n": "\n"});
        assert_eq!(serde_yaml::from_str::<Value>(&document(&value)).expect("readable"), value);
    }
}
