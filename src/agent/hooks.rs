//! How hooks are called.

use crate::publish::HookSettings;

/// Each hook with its name. Of several with the same program each has its place in the name.
pub(super) fn named(hooks: &[HookSettings]) -> impl Iterator<Item = (String, &HookSettings)> {
    hooks.iter().enumerate().map(|(i, hook)| {
        let name = match hooks[..i].iter().filter(|other| other.name() == hook.name()).count() {
            0 => hook.name().to_owned(),
            before => format!("{}#{}", hook.name(), before + 1),
        };
        (name, hook)
    })
}
