//! `hooks`: what is done after a switch of the files.

use super::{Mistake, section::Section, value};
use crate::{
    files::Root,
    publish::{Action, HookSettings, StartTls, Verify},
    systemd::{consents_to_reload, reload_units},
};
use marked_yaml::{Node, types::MarkedMappingNode};
use std::time::Duration;

/// Reads one item of the list; none when it has a mistake.
pub(super) fn read(s: &mut Section<'_>) -> Option<HookSettings> {
    let (mut command, mut unit) = (Vec::new(), None);
    s.set_command("command", &mut command);
    let mut wrong_unit = false;
    let service = |text: &str| value::service_unit(text).inspect_err(|_| wrong_unit = true);
    s.set_some("unit", service, &mut unit);
    let mut deadline = Duration::from_secs(30);
    s.set("deadline", value::up_to(value::HOUR), &mut deadline);
    let mut verify = None;
    s.section("verify", |s| verify = self::verify(s));
    let action = match (command.first().is_some_and(|program| !program.is_empty()), unit) {
        (true, None) => Action::Command(command),
        (false, Some(unit)) => Action::Unit(unit),
        _ if wrong_unit => return None,
        _ => {
            s.mistake(
                "needs one of the two: command, a list of program and arguments, or unit, the systemd service to \
                 reload (with we-agent-reload@UNIT.path enabled)",
            );
            return None;
        }
    };
    Some(HookSettings { action, deadline, verify })
}

fn verify(s: &mut Section<'_>) -> Option<Verify> {
    let (mut address, mut sni, mut start_tls) = (None, None, None);
    let mut within = Duration::from_secs(15);
    s.set_some("address", value::host_port, &mut address);
    s.set_some("sni", value::dns_name, &mut sni);
    s.set_some("startTls", |text| value::one_of(text, &[("postgres", StartTls::Postgres)]), &mut start_tls);
    s.set("within", value::up_to(value::HOUR), &mut within);
    if address.is_none() {
        s.mistake("needs address, the host:port where the program serves the certificate");
    }
    Some(Verify { address: address?, sni, start_tls, within })
}

/// The units in `top` that shall be reloaded although this host has not agreed to that.
pub(super) fn without_consent(top: &MarkedMappingNode, root: &Root) -> Vec<Mistake> {
    let workloads = top.get_mapping("workloads").into_iter().flat_map(|all| all.values());
    let settings = top.get_node("defaults").into_iter().chain(workloads).filter_map(Node::as_mapping);
    let hooks = settings.filter_map(|one| one.get_sequence("hooks")).flat_map(|list| list.iter());
    let units = hooks.filter_map(|hook| hook.as_mapping()?.get_scalar("unit"));
    let refused = units.filter(|unit| value::service_unit(unit).is_ok() && !consents_to_reload(root, unit));
    let mistakes = refused.map(|unit| {
        let (path, service) = reload_units(unit);
        let message = format!(
            "unit: this host has not agreed that we-agent has {} reloaded: systemctl enable --now {path} does (it starts \
             {service} at our request); or use command",
            unit.as_str()
        );
        Mistake::at(unit.span().start(), message)
    });
    mistakes.collect()
}
