//! `config/we-agent.yaml` shows every key, commented out, at its default.

#![allow(clippy::unwrap_used)]
use std::{collections::BTreeSet, path::Path};
use we_agent::config::Config;

const EXAMPLE: &str = include_str!("../../config/we-agent.yaml");

/// The example with its settings switched on: `#key` and `#  key` are settings, `# Words` are prose.
fn uncommented() -> String {
    let setting = |line: &'static str| {
        let rest = line.strip_prefix('#')?;
        (!rest.is_empty() && (!rest.starts_with(' ') || rest.starts_with("  "))).then_some(rest)
    };
    EXAMPLE.lines().filter_map(setting).map(|line| format!("{line}\n")).collect()
}

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(Path::new("config/we-agent.yaml"), text).map_err(|error| error.to_string())
}

#[test]
fn the_example_is_the_default() {
    assert_eq!(parse(EXAMPLE).unwrap(), Config::default());
    assert!(uncommented().lines().count() > 30, "the example is not read: {}", uncommented());
    assert_eq!(parse(&uncommented()).unwrap(), Config::default());
}

/// Puts an unknown key into each section of the example: the complaint lists the keys that the code knows there.
#[test]
fn the_example_has_every_key() {
    let lines: Vec<_> = uncommented().lines().map(str::to_owned).collect();
    // The first key of an item stands behind its dash, as deep as the others.
    let body = |line: &str| line.trim_start().trim_start_matches("- ").to_owned();
    let indent = |line: &str| line.len() - body(line).len();
    let key = |line: &str| body(line).split(':').next().unwrap_or_default().to_owned();
    let mut sections = 0;
    // The top level, then each line that has deeper lines below it.
    for head in std::iter::once(None).chain((0..lines.len()).map(Some)) {
        let (first, depth) = match head {
            None => (0, 0),
            Some(i) => match lines.get(i + 1) {
                Some(next) if indent(next) > indent(&lines[i]) => (i + 1, indent(next)),
                _ => continue,
            },
        };
        sections += 1;
        let inside = lines[first..].iter().take_while(|line| indent(line) >= depth);
        let shown: BTreeSet<_> = inside.filter(|line| indent(line) == depth).map(|line| key(line)).collect();
        let mut with_unknown = lines.clone();
        let item = lines[first].trim_start().starts_with("- ");
        with_unknown.insert(first + usize::from(item), format!("{}zzz: 1", " ".repeat(depth)));
        let error = parse(&with_unknown.join("\n")).unwrap_err();
        let (_, known) = error.split_once("known are: ").unwrap();
        let known: BTreeSet<_> = known.split(", ").map(str::to_owned).collect();
        assert_eq!(shown, known, "config/we-agent.yaml and the code differ, line {first}");
    }
    assert_eq!(sections, 13, "{lines:#?}");
}

/// The example for inbound listeners has every key, and what it calls a default is one.
#[test]
fn the_inbound_example_is_what_it_says() {
    const INBOUND: &str = include_str!("../../config/inbound.yaml");
    let of = |text: &str| parse(text).unwrap().workload("payments").inbound.remove(0);
    let mut shown = of(INBOUND);
    assert_eq!((shown.allow.len(), shown.max_age.is_some()), (3, true));
    (shown.allow, shown.max_age) = (Vec::new(), None);
    assert_eq!(shown, of("workloads: {payments: {inbound: [{listen: 8080, forward: 8081}]}}"));
    let error = parse(&INBOUND.replace("mode: strict", "mode: strict\n        zzz: 1")).unwrap_err();
    let (_, known) = error.split_once("known are: ").unwrap();
    for key in known.split(", ") {
        assert!(INBOUND.contains(&format!(" {key}:")), "{key} is not shown");
    }
}
