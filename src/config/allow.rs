//! Who may use a workload's socket: `allow: [{user: envoy}, {group: 2000}, {unit: nginx.service}]`.

use super::section::Section;
use crate::host::{Account, Allow};
use std::cell::Cell;

/// What the kernel shows for users of other namespaces: to allow it would allow anybody.
const UNMAPPED: [&str; 3] = ["nobody", "nogroup", "65534"];
/// Kinds of units that processes are in.
const KINDS: [&str; 2] = [".service", ".scope"];

/// Reads `allow` of `s` into `target`.
pub(super) fn read(s: &mut Section<'_>, target: &mut Vec<Allow>) {
    let mut found = Vec::new();
    let given = s.list("allow", |s| {
        let (mut user, mut group, mut unit) = (None, None, None);
        let seen = Cell::new(0);
        s.set_some("user", |text| counted(&seen, account(text)), &mut user);
        s.set_some("group", |text| counted(&seen, account(text)), &mut group);
        s.set_some("unit", |text| counted(&seen, unit_name(text)), &mut unit);
        if seen.get() != 1 {
            s.mistake("must say one of user, group and unit; whoever else may connect has an entry of its own");
            return;
        }
        found.extend(user.map(Allow::User).or(group.map(Allow::Group)).or(unit.map(Allow::Unit)));
    });
    if given {
        *target = found;
    }
}

/// Counts the keys that are given, right or wrong.
pub(super) fn counted<T>(seen: &Cell<u32>, value: T) -> T {
    seen.set(seen.get() + 1);
    value
}

/// A user or a group, by name or number.
pub(super) fn account(text: &str) -> Result<Account, String> {
    if UNMAPPED.contains(&text) {
        return Err(
            "may be anybody: the kernel shows users of other namespaces as this one; name a real one".to_owned()
        );
    }
    if let Ok(id) = text.parse::<u32>() {
        return if id == u32::MAX {
            Err("is no id; the largest is 4294967294".to_owned())
        } else {
            Ok(Account::Id(id))
        };
    }
    let legal = |c: char| !c.is_whitespace() && !c.is_control() && c != ':' && c != '/';
    if text.is_empty() || !text.chars().all(legal) || text.starts_with(|c: char| c == '-' || c.is_ascii_digit()) {
        return Err("is neither a name nor an id; write for example envoy or 1337".to_owned());
    }
    Ok(Account::Name(text.to_owned()))
}

/// systemd.unit(5).
fn unit_name(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    let stem = KINDS.iter().find_map(|kind| text.strip_suffix(kind));
    match stem {
        Some(stem) if !stem.is_empty() && !stem.ends_with('@') && text.len() <= 255 && text.chars().all(legal) => {
            Ok(text.to_owned())
        }
        _ => Err("is no unit that processes are in; write its full name, for example nginx.service".to_owned()),
    }
}

#[cfg(test)]
mod tests;
