//! A real bus (dbus-daemon) between the agent, somebody who plays systemd, and somebody who would like to.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use crate::{
    allowed::{Door, unit},
    support::SOON,
    system_bus::{FORGED, Field, Put, length, message, path},
};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};
use tokio::time::Instant;

/// A system bus that passes on whatever is sent, answers that nobody asked for included.
const LOOSE: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><auth>EXTERNAL</auth><listen>unix:path=SOCKET</listen><policy context="default">
<allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_type="signal"/>
<allow send_requested_reply="false" send_type="method_return"/><allow send_requested_reply="false" send_type="error"/>
<allow receive_type="method_call"/><allow receive_type="signal"/><allow send_type="method_return"/><allow send_type="error"/>
<allow receive_type="method_return"/><allow receive_type="error"/>
<allow receive_requested_reply="false" receive_type="method_return"/>
<allow receive_requested_reply="false" receive_type="error"/></policy></busconfig>"#;

struct RealBus(Child);

impl RealBus {
    /// None, said aloud, where there is no dbus-daemon.
    fn start(root: &Path) -> Option<Self> {
        let (dir, config) = (root.join("run/dbus"), root.join("bus.conf"));
        std::fs::create_dir_all(&dir).unwrap();
        let socket = dir.join("system_bus_socket");
        std::fs::write(&config, LOOSE.replace("SOCKET", socket.to_str().unwrap())).unwrap();
        let mut command = Command::new("dbus-daemon");
        command.arg(format!("--config-file={}", config.display())).args(["--nofork", "--print-address"]);
        let Ok(mut child) = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn() else {
            println!("skipped: there is no dbus-daemon");
            return None;
        };
        // It says where it listens when it does.
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        assert!(address.starts_with("unix:path="), "{address}");
        Some(Self(child))
    }
}

impl Drop for RealBus {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Somebody on the bus.
struct Member {
    stream: UnixStream,
    serial: u32,
}

impl Member {
    fn join(root: &Path) -> Self {
        let mut stream = UnixStream::connect(root.join("run/dbus/system_bus_socket")).unwrap();
        stream.write_all(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n").unwrap();
        let mut said = Vec::new();
        while said.iter().filter(|byte| **byte == b'\n').count() < 3 {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            said.push(byte[0]);
        }
        let mut member = Self { stream, serial: 0 };
        member.ask_bus("Hello", "", |_| {});
        member
    }

    /// Returns when the bus has done all that was sent before.
    fn ask_bus(&mut self, member: &str, signature: &str, body: impl FnOnce(&mut Put)) {
        let bus = "org.freedesktop.DBus";
        let fields = [
            (1, Field::Path("/org/freedesktop/DBus")),
            (2, Field::Text(bus)),
            (3, Field::Text(member)),
            (6, Field::Text(bus)),
        ];
        self.send(1, &fields, signature, body);
        let asked = self.serial.to_string();
        while self.receive().unwrap().1.get(&5) != Some(&asked) {}
    }

    fn send(&mut self, kind: u8, fields: &[(u8, Field<'_>)], signature: &str, body: impl FnOnce(&mut Put)) {
        self.serial += 1;
        self.stream.write_all(&message(false, kind, self.serial, fields, signature, body)).unwrap();
    }

    /// The serial of the next message, and its fields; none at the end of the bus.
    fn receive(&mut self) -> Option<(u32, BTreeMap<u8, String>)> {
        let mut bytes = vec![0; 16];
        self.stream.read_exact(&mut bytes).ok()?;
        let number = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let (whole, header) = (length(&bytes).unwrap(), 16 + number(&bytes, 12) as usize);
        bytes.resize(whole, 0);
        self.stream.read_exact(&mut bytes[16..]).unwrap();
        let (mut fields, mut at) = (BTreeMap::new(), 16);
        while at < header {
            let (code, kind) = (bytes[at], bytes[at + 2]);
            at += 4;
            let mut text = |size: usize, at: usize| {
                fields.insert(code, String::from_utf8(bytes[at..at + size].to_vec()).unwrap());
                at + size + 1
            };
            at = match kind {
                b'u' => {
                    let end = number(&bytes, at);
                    fields.insert(code, end.to_string());
                    at + 4
                }
                b'g' => text(bytes[at] as usize, at + 1),
                _ => text(number(&bytes, at) as usize, at + 4),
            };
            at = at.next_multiple_of(8);
        }
        Some((number(&bytes, 8), fields))
    }
}

/// Answers that everybody is in this unit.
fn be_systemd(mut member: Member, unit: &str) {
    while let Some((serial, fields)) = member.receive() {
        if fields.get(&3).is_some_and(|member| member == "GetUnitByPIDFD") {
            let to = [(5, Field::Number(serial)), (6, Field::Text(&fields[&7]))];
            member.send(2, &to, "os", |body| {
                body.text(&path(unit));
                body.text(unit);
            });
        }
    }
}

/// Sends signals, returns and errors to each name that the agent may have.
fn pester(mut member: Member, stop: &AtomicBool) {
    for first in (0..).step_by(2) {
        for name in (first..first + 8).map(|n| format!(":1.{n}")) {
            for _ in 0..64 {
                let signal = [
                    (1, Field::Path("/")),
                    (2, Field::Text("a.b")),
                    (3, Field::Text("Noise")),
                    (6, Field::Text(&name)),
                ];
                member.send(4, &signal, "", |_| {});
            }
            for serial in 1..6 {
                let to = [(5, Field::Number(serial)), (6, Field::Text(&name))];
                member.send(2, &to, "os", |body| {
                    body.text(&path(FORGED));
                    body.text(FORGED);
                });
                let denied = (4, Field::Text("org.freedesktop.DBus.Error.AccessDenied"));
                let [serial, name] = to;
                member.send(3, &[denied, serial, name], "", |_| {});
            }
        }
        if stop.load(Ordering::Relaxed) {
            return;
        }
        member.ask_bus("GetId", "", |_| {});
    }
}

#[tokio::test]
async fn on_a_real_bus_nobody_but_systemd_says_who_is_in_a_unit() {
    let Some(door) = Door::open() else { return };
    let root = door.dir.path();
    let Some(_bus) = RealBus::start(root) else { return };
    let caller = door.knock().await;
    let (entitled, forged) = (door.policy(&[unit("nginx.service")]), door.policy(&[unit(FORGED)]));
    let nobody = entitled.admit(&caller.peer).await.unwrap_err().to_string();
    assert!(nobody.contains("Could not get owner of name 'org.freedesktop.systemd1'"), "{nobody}");

    let mut systemd = Member::join(root);
    systemd.ask_bus("RequestName", "su", |body| {
        body.text("org.freedesktop.systemd1");
        body.number(0);
    });
    thread::spawn(|| be_systemd(systemd, "nginx.service"));
    let (stop, mallory) = (Arc::<AtomicBool>::default(), Member::join(root));
    let told = stop.clone();
    let pester = thread::spawn(move || pester(mallory, &told));
    let end = Instant::now() + SOON;
    let mut answered = 0;
    while answered < 10 {
        assert!(Instant::now() < end, "{answered} answers");
        let told = [entitled.admit(&caller.peer).await, forged.admit(&caller.peer).await];
        let told = told.map(|admitted| admitted.map_err(|denied| denied.to_string()));
        match told {
            [Ok(()), Err(denied)] if denied.contains(", unit nginx.service: no entry") => answered += 1,
            // The machine is busy; that is said of nobody wrongly.
            [Err(denied), _] | [_, Err(denied)] if denied.contains("did not answer in time") => {}
            other => panic!("{other:?}"),
        }
    }
    stop.store(true, Ordering::Relaxed);
    pester.join().unwrap();
}
