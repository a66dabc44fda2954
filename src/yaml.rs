//! YAML as far as it is read here, ours and that of a bundle: what can grow (anchors), hide something (a key twice) or cost a
//! parser more than its length (deep nesting) is refused, with its place.

use marked_yaml::{LoadError, LoaderOptions, Marker, Node, types::MarkedScalarNode};
use serde_json::{Number, Value};
use std::fmt;

/// The deepest nesting. Real files have some six levels; a parser takes quadratic time in it, and a stack frame for each.
pub(crate) const MAX_DEPTH: usize = 64;

/// Where a text stops being the YAML that is read here. Prints as `LINE:COL: message; fix`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct YamlError {
    /// Counted from 1.
    pub(crate) line: usize,
    /// Counted from 1, in characters.
    pub(crate) column: usize,
    /// What is wrong and how to put it right.
    pub(crate) message: String,
}

impl fmt::Display for YamlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

/// Reads one document, a mapping; nothing at all is an empty one.
///
/// # Errors
/// The first place that is no YAML, or none that is read here.
pub(crate) fn parse(text: &str) -> Result<Node, YamlError> {
    if let Some(line) = too_deep(text) {
        let message = format!("nested deeper than {MAX_DEPTH} levels; no file of this kind is");
        return Err(YamlError { line, column: 1, message });
    }
    let options = LoaderOptions::default().error_on_duplicate_keys(true).prevent_coercion(true);
    marked_yaml::parse_yaml_with_options(0, text, options).map_err(|error| told(&error))
}

fn told(error: &LoadError) -> YamlError {
    let at = |mark: Option<&Marker>, message: String| YamlError {
        line: mark.map_or(1, Marker::line),
        column: mark.map_or(1, Marker::column),
        message,
    };
    let (mark, message) = match error {
        LoadError::TopLevelMustBeMapping(mark) | LoadError::TopLevelMustBeSequence(mark) => {
            (mark, "the file is no mapping; begin with a key, for example \"defaults:\"".to_owned())
        }
        LoadError::UnexpectedAnchor(mark) => {
            (mark, "anchors (&name) are not read here; write the value where it is needed".to_owned())
        }
        LoadError::UnexpectedTag(mark) => (mark, "tags (!name) are not read here; remove it".to_owned()),
        LoadError::MappingKeyMustBeScalar(mark) => (mark, "a key must be a plain word".to_owned()),
        LoadError::ScanError(mark, error) => {
            (mark, format!("no YAML: {}; check indentation, colons and quotes", error.info()))
        }
        LoadError::DuplicateKey(pair) => {
            let first = pair.prev_key.span().start().map_or(1, Marker::line);
            let message = format!("key \"{}\" stands already in line {first}; keep one", pair.key.as_str());
            return at(pair.key.span().start(), message);
        }
    };
    at(Some(mark), message)
}

/// The line, if any, where more is open than [`MAX_DEPTH`]: an upper bound, of brackets, of markers of sequences and keys on
/// one line, and of indentations.
fn too_deep(text: &str) -> Option<usize> {
    let (mut open, mut indents) = (0usize, Vec::new());
    for (number, line) in (1..).zip(text.lines()) {
        let words = line.trim_start_matches([' ', '\t']);
        if words.is_empty() || words.starts_with('#') {
            continue;
        }
        let indent = line.len() - words.len();
        indents.truncate(indents.partition_point(|outer| *outer < indent));
        indents.push(indent);
        let markers = words.split([' ', '\t']).filter(|w| !w.is_empty()).take_while(|w| matches!(*w, "-" | "?" | ":"));
        if indents.len() + markers.count() > MAX_DEPTH {
            return Some(number);
        }
        for byte in words.bytes() {
            match byte {
                b'[' | b'{' => open += 1,
                b']' | b'}' => open = open.saturating_sub(1),
                _ => continue,
            }
            if open > MAX_DEPTH {
                return Some(number);
            }
        }
    }
    None
}

/// What a scalar means (YAML 1.2, core schema): what is not quoted may be null, a truth value or a number.
pub(crate) fn value(scalar: &MarkedScalarNode) -> Value {
    let text = scalar.as_str();
    match text {
        _ if !scalar.may_coerce() => text.into(),
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => true.into(),
        "false" | "False" | "FALSE" => false.into(),
        _ => number(text).map_or_else(|| text.into(), Value::Number),
    }
}

fn number(text: &str) -> Option<Number> {
    let positive = text.strip_prefix('+').unwrap_or(text);
    for (prefix, radix) in [("0x", 16), ("0o", 8)] {
        if let Some(digits) = positive.strip_prefix(prefix).filter(|digits| !digits.starts_with('+')) {
            return u64::from_str_radix(digits, radix).ok().map(Number::from);
        }
    }
    let digits = positive.strip_prefix('-').unwrap_or(positive);
    let padded = digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
    if padded || !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let whole = positive.parse::<u64>().map(Number::from).or_else(|_| positive.parse::<i64>().map(Number::from));
    whole.ok().or_else(|| Number::from_f64(positive.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn refusal(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_read_names_its_place() {
        for (text, said) in [
            ("a: [1\n", "2:1: no YAML: "),
            ("a: &x {}\n", "1:7: anchors (&name) are not read here"),
            ("a: &x 1\nb: *x\n", "1:7: anchors"),
            ("a: *x\n", "1:4: no YAML"),
            ("a: !!str 1\n", "1:10: tags"),
            ("a: {}\nb: 1\na: {}\n", "3:1: key \"a\" stands already in line 1; keep one"),
            ("a: {b: 1, b: 2}\n", "1:11: key \"b\" stands already in line 1"),
            ("- a\n", "1:1: the file is no mapping"),
        ] {
            assert!(refusal(text).starts_with(said), "{text:?}: {}", refusal(text));
        }
        assert!(parse("").unwrap().as_mapping().unwrap().is_empty());
    }

    #[test]
    fn a_bomb_of_aliases_ends_at_its_first_anchor() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..12 {
            let aliases = vec![format!("*a{}", i - 1); 9].join(", ");
            text.push_str(&format!("a{i}: &a{i} [{aliases}]\n"));
        }
        assert!(refusal(&text).starts_with("1:9: anchors"), "{}", refusal(&text));
    }

    #[test]
    fn nesting_is_bounded_before_the_parser_sees_it() {
        let steps = |n: usize| (0..n).map(|i| format!("{}a:\n", " ".repeat(i))).collect::<String>();
        for (text, line) in [
            ("[".repeat(100_000), 1),
            ("- ".repeat(100_000), 1),
            ("{a: ".repeat(50_000), 1),
            (format!("a: {}", "[\n".repeat(60_000)), 65),
            (steps(300), 65),
        ] {
            assert!(
                refusal(&text).starts_with(&format!("{line}:1: nested deeper than 64 levels")),
                "{}",
                refusal(&text)
            );
        }
        assert!(parse("a: {b: '[{[{[]}]}]', c: 'x'}").is_ok());
        assert!(parse(&format!("{}a: 1\n", "# [[[ {{{\n".repeat(50))).is_ok(), "a comment opens nothing");
        assert!(parse(&steps(60)).is_ok());
    }

    #[test]
    fn scalars_mean_what_they_look_like_unless_quoted() {
        let node = parse(
            "a: [~, null, true, 15012, -7, 1.5, 1e3, 0x1F, 0o17, +5, .5]\nb: ['true', \"1\", yes, 010, 10.0.0.1, 1_000, -x, +x, 1e999, .inf, 0x, -.]\n",
        )
        .unwrap();
        let list = |key: &str| {
            let list = node.as_mapping().unwrap().get_sequence(key).unwrap();
            Value::from_iter(list.iter().map(|node| value(node.as_scalar().unwrap())))
        };
        assert_eq!(list("a"), json!([null, null, true, 15012, -7, 1.5, 1000.0, 31, 15, 5, 0.5]));
        let texts = ["true", "1", "yes", "010", "10.0.0.1", "1_000", "-x", "+x", "1e999", ".inf", "0x", "-."];
        assert_eq!(list("b"), json!(texts));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(a|bc|[:\\n {}\\[\\],\"'&*!|>%@#?0-9.~-]){0,60}|\\PC{0,40}") {
            let _ = parse(&text);
        }
    }
}
