//! `tests/FAULTS.md` names a test for each fault, or the reason why there is none. It is held to that here.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const MATRIX: &str = include_str!("../FAULTS.md");

/// The rows: number, fault, what shows it.
fn rows() -> Vec<[&'static str; 3]> {
    let rows = MATRIX.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    let cells = rows.map(|row| row.splitn(3, " | ").collect::<Vec<_>>());
    cells
        .filter(|cells| cells[0].len() <= 3 && cells[0].ends_with(|c: char| c.is_ascii_digit()))
        .map(|cells| cells.try_into().unwrap())
        .collect()
}

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Every test of this package, of the fuzzer and of the lab, by its path; and the checks of the packages, by their files.
fn tests() -> BTreeSet<String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut open: Vec<PathBuf> =
        ["src", "tests/fuzz", "tests/it", "tests/lab"].iter().map(|dir| here.join(dir)).collect();
    let mut found = BTreeSet::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let inside = path.strip_prefix(here).unwrap().with_extension("");
            let room = inside.to_str().unwrap().trim_end_matches("/tests").replace('/', "::");
            let text = fs::read_to_string(&path).unwrap();
            let mut marked = false;
            for line in text.lines().map(str::trim) {
                marked |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
                let name = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
                if let Some(name) = name.and_then(|rest| rest.split(['(', '<']).next()).filter(|_| marked) {
                    found.insert(format!("{room}::{name}"));
                    marked = false;
                }
            }
        }
    }
    let checks = fs::read_dir(here.join("tests/package/checks")).unwrap();
    found.extend(checks.map(|entry| format!("package/{}", entry.unwrap().file_name().to_str().unwrap())));
    found
}

#[test]
fn every_row_has_its_test_or_the_reason_why_not() {
    let (rows, tests) = (rows(), tests());
    let numbers: BTreeSet<_> = rows.iter().map(|[number, ..]| *number).collect();
    assert_eq!((rows.len(), numbers.len()), (63, 63), "{numbers:?}");
    let mut missing = Vec::new();
    for [number, _, shown] in rows {
        let names: Vec<_> = quoted(shown).collect();
        assert!(!names.is_empty() || shown.starts_with("None: "), "{number}: {shown}");
        for name in names {
            let suffix = format!("::{}", name);
            if !tests.contains(name) && !tests.iter().any(|test| test.ends_with(&suffix)) {
                missing.push(format!("{number}: {name}"));
            }
        }
    }
    assert!(missing.is_empty(), "tests/FAULTS.md names what there is not:\n{}", missing.join("\n"));
}
