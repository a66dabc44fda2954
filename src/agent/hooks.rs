//! From the hooks that are configured to those that run.

use crate::{
    command::Commands,
    config::{HookAction, HookConfig, StartTlsConfig},
    files::Root,
    publish::{Action, Hook, StartTls, Verify},
};

/// Each hook with its name. Of several with the same program each has its place in the name.
pub(super) fn named(hooks: &[HookConfig]) -> impl Iterator<Item = (String, &HookConfig)> {
    hooks.iter().enumerate().map(|(i, hook)| {
        let name = match hooks[..i].iter().filter(|other| other.name() == hook.name()).count() {
            0 => hook.name().to_owned(),
            before => format!("{}#{}", hook.name(), before + 1),
        };
        (name, hook)
    })
}

/// What is done after a switch.
pub(super) fn hook(name: &str, hook: &HookConfig, root: &Root, commands: &Commands) -> Hook {
    let verify = hook.verify.clone().map(|verify| Verify {
        address: verify.address,
        sni: verify.sni,
        start_tls: verify.start_tls.map(|StartTlsConfig::Postgres| StartTls::Postgres),
        within: verify.within,
    });
    let action = match &hook.action {
        HookAction::Command(command) => Action::Command { commands: commands.clone(), command: command.clone() },
        HookAction::Unit(unit) => Action::Unit { root: root.clone(), unit: unit.clone() },
    };
    Hook { name: name.to_owned(), action, deadline: hook.deadline, verify }
}
