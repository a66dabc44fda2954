//! The table of rooms in `src/lib.rs` is the law: who may import whom. The code is held to it here.

#![allow(clippy::unwrap_used)]
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

const LIB: &str = include_str!("../../src/lib.rs");

/// Room → rooms it may import, in the order of the table.
fn table() -> Vec<(String, BTreeSet<String>)> {
    let rows = LIB.lines().filter_map(|line| line.strip_prefix("//! | `"));
    rows.map(|row| {
        let cells: Vec<_> = row.trim_end_matches('|').split(" | ").map(str::trim).collect();
        let [room, _, imports] = cells[..] else { panic!("a row of the table has {} cells: {row}", cells.len()) };
        let imports = imports.split(", ").filter(|word| *word != "–").map(str::to_owned).collect();
        (room.trim_end_matches('`').to_owned(), imports)
    })
    .collect()
}

/// The first words after each `prefix` in `code`, groups taken apart.
fn words_after(prefix: &str, code: &str) -> BTreeSet<String> {
    let word =
        |text: &str| text.trim_start().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_owned();
    let mut found = BTreeSet::new();
    for rest in code.split(prefix).skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(word(rest));
            continue;
        };
        let mut depth = 0;
        let mut item = 0;
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                ',' | '}' if depth == 0 => {
                    found.insert(word(&group[item..i]));
                    item = i + 1;
                    if c == '}' {
                        break;
                    }
                }
                '}' => depth -= 1,
                _ => {}
            }
        }
    }
    found.remove("");
    found
}

/// The rooms that `code` imports.
fn imports(code: &str) -> BTreeSet<String> {
    words_after("crate::", code)
}

/// The code without comments and tests: those may look at everything.
fn production(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect()
}

/// Every source file with the room that it belongs to; the shell's two entries belong to none.
fn files() -> Vec<(String, PathBuf)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut open = vec![src.clone()];
    let mut files = Vec::new();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let inside = path.strip_prefix(&src).unwrap();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|x| x == "rs") && !inside.ends_with("tests.rs") {
                let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
                files.push((first.trim_end_matches(".rs").to_owned(), path));
            }
        }
    }
    files.retain(|(room, path)| !matches!(room.as_str(), "lib" | "main") && !path.starts_with(src.join("proto/gen")));
    files
}

#[test]
fn every_room_is_in_the_table() {
    let rooms: BTreeSet<_> = table().into_iter().map(|(room, _)| room).collect();
    let there: BTreeSet<_> = files().into_iter().map(|(room, _)| room).collect();
    assert!(there.len() > 5, "rooms are not found: {there:?}");
    let missing: Vec<_> = there.difference(&rooms).collect();
    assert!(missing.is_empty(), "rooms without a row in the table of src/lib.rs: {missing:?}");
}

#[test]
fn arrows_point_up() {
    let mut above = BTreeSet::new();
    for (room, imports) in table() {
        for import in imports {
            assert!(above.contains(&import), "`{room}` may not import `{import}`, which does not stand above it");
        }
        above.insert(room);
    }
}

#[test]
fn rooms_import_what_the_table_allows() {
    let allowed: BTreeMap<_, _> = table().into_iter().collect();
    let mut wrong = Vec::new();
    for (room, path) in files() {
        let Some(allowed) = allowed.get(&room) else { continue };
        for import in imports(&production(&fs::read_to_string(&path).unwrap())) {
            if import != room && !allowed.contains(&import) {
                wrong.push(format!("{}: `{room}` imports `{import}`", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "the table in src/lib.rs does not allow:\n{}", wrong.join("\n"));
}

#[test]
fn imports_are_seen_in_every_form() {
    let code = "use crate::{\n    a::{B, c::D},\n    e, f as g,\n};\nfn x() { crate::h::i() }\nuse crate::j::K;\n// crate::no\n";
    let seen: Vec<_> = imports(&production(code)).into_iter().collect();
    assert_eq!(seen, ["a", "e", "f", "h", "j"]);
    assert_eq!(production("a\n#[cfg(test)]\nmod tests {\n crate::b }"), "a\n");
}

/// A file as a module: `src/a/b.rs` is `a`, `b`.
fn module(path: &Path) -> Vec<String> {
    let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap().with_extension("");
    inside.iter().map(|part| part.to_str().unwrap().to_owned()).collect()
}

/// For each module its siblings that it names, itself or anywhere below it. What it gets by way of its parent is not seen.
fn siblings() -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let files: Vec<_> = files().into_iter().map(|(_, path)| (module(&path), path)).collect();
    let mut named: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (module, path) in &files {
        let code = production(&fs::read_to_string(path).unwrap());
        // Of the module itself, and of each that it is below of.
        for depth in 2..=module.len() {
            let (one, parent) = (&module[..depth], &module[..depth - 1]);
            let up = "super::".repeat(module.len() - depth + 1);
            // `super::super::a` is no `super::a`.
            let code = code.replace(&format!("super::{up}"), "");
            let words =
                [up, format!("crate::{}::", parent.join("::"))].into_iter().flat_map(|p| words_after(&p, &code));
            let others = words.map(|word| [parent, &[word]].concat());
            let others = others.filter(|other| other != one && files.iter().any(|(module, _)| module == other));
            named.entry(one.to_vec()).or_default().extend(others.collect::<Vec<_>>());
        }
    }
    named
}

#[test]
fn nothing_imports_in_a_circle_inside_a_room() {
    let named = siblings();
    let known = named.get(&["inbound", "accept"].map(str::to_owned)[..]);
    assert!(known.is_some_and(|names| !names.is_empty()), "imports are not seen: {known:?}");
    let mut circles = Vec::new();
    for start in named.keys() {
        let (mut open, mut seen) = (vec![start], BTreeSet::new());
        while let Some(module) = open.pop() {
            for next in &named[module] {
                if next == start {
                    circles.push(format!("{} comes back to itself by {}", start.join("::"), module.join("::")));
                } else if seen.insert(next) {
                    open.push(next);
                }
            }
        }
    }
    assert!(circles.is_empty(), "modules that import in a circle:\n{}", circles.join("\n"));
}
