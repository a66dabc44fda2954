//! From the hooks that are configured to those that run.

use crate::{
    command::Commands,
    config::{HookAction, HookConfig, StartTlsConfig},
    files::Root,
    publish::{Action, Hook, StartTls, Verify},
};

/// What is done after a switch. Of several hooks with the same program each has its place in the name.
pub(super) fn hooks(hooks: &[HookConfig], root: &Root, commands: &Commands) -> Vec<Hook> {
    let name = |i: usize, hook: &HookConfig| match hooks[..i].iter().filter(|other| other.name() == hook.name()).count()
    {
        0 => hook.name().to_owned(),
        before => format!("{}#{}", hook.name(), before + 1),
    };
    let verify = |hook: &HookConfig| {
        hook.verify.clone().map(|verify| Verify {
            address: verify.address,
            sni: verify.sni,
            start_tls: verify.start_tls.map(|StartTlsConfig::Postgres| StartTls::Postgres),
            within: verify.within,
        })
    };
    let action = |hook: &HookConfig| match &hook.action {
        HookAction::Command(command) => Action::Command { commands: commands.clone(), command: command.clone() },
        HookAction::Unit(unit) => Action::Unit { root: root.clone(), unit: unit.clone() },
    };
    let hooks = hooks.iter().enumerate();
    hooks
        .map(|(i, hook)| Hook {
            name: name(i, hook),
            action: action(hook),
            deadline: hook.deadline,
            verify: verify(hook),
        })
        .collect()
}
