#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

// Recorded between systemd's own library and dbus-daemon 1.14: `busctl call org.freedesktop.systemd1 … GetUnitByPID u 42`,
// asked of a bus without systemd. Serials 1 (greeting) and 2 (question).
const HELLO: &[u8] = include_bytes!("../../../tests/golden/dbus/hello.bin");
const HELLO_ANSWER: &[u8] = include_bytes!("../../../tests/golden/dbus/hello-answer.bin");
const SIGNAL: &[u8] = include_bytes!("../../../tests/golden/dbus/signal.bin");
const CALL: &[u8] = include_bytes!("../../../tests/golden/dbus/call.bin");
const ERROR: &[u8] = include_bytes!("../../../tests/golden/dbus/error.bin");

const SYSTEMD: &str = "org.freedesktop.systemd1";

const fn question(of: &str) -> Method<'_> {
    let interface = "org.freedesktop.systemd1.Manager";
    Method { of, path: "/org/freedesktop/systemd1", interface, member: "GetUnitByPID" }
}

/// What is made of one whole message.
fn read(message: &[u8], serial: u32, from: &str) -> io::Result<Option<Answer>> {
    let (head, rest) = message.split_first_chunk().ok_or_else(|| wrong("short"))?;
    let head = Head::of(head)?;
    if head.is_answer() { head.answer(rest, serial, from) } else { Ok(None) }
}

#[test]
fn our_calls_are_those_of_systemd_s_library() {
    let (interface, path) = (wire::BUS, "/org/freedesktop/DBus");
    assert_eq!(wire::call(1, Method { of: wire::BUS, path, interface, member: "Hello" }, Argument::None), HELLO);
    // busctl lets systemd ask a person for a password (flag 4). We do not.
    let mut without = CALL.to_vec();
    without[2] = 0;
    assert_eq!(wire::call(2, question(SYSTEMD), Argument::Number(42)), without);
}

#[test]
fn a_descriptor_is_named_beside_the_signature() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let with = wire::call(2, question(SYSTEMD), Argument::Descriptor(std::os::fd::AsFd::as_fd(&null)));
    let number = wire::call(2, question(SYSTEMD), Argument::Number(0));
    // Signature "h" for "u", and one field more: UNIX_FDS, 1. The body is the index 0.
    let (head, body) = number.split_at(number.len() - 4);
    let mut expected = head.to_vec();
    let signature = expected.iter().rposition(|byte| *byte == b'u').unwrap();
    expected[signature] = b'h';
    expected.extend([9, 1, b'u', 0, 1, 0, 0, 0]);
    expected.extend(body);
    assert_eq!(with[16..], expected[16..]);
    assert_eq!(with[12], number[12] + 9);
}

#[test]
fn answers_are_read_and_everything_else_is_skipped() {
    assert_eq!(read(HELLO_ANSWER, 1, wire::BUS).unwrap(), Some(Answer::Strings(vec![":1.0".to_owned()])));
    assert_eq!(read(HELLO_ANSWER, 2, wire::BUS).unwrap(), None);
    assert_eq!(read(SIGNAL, 1, wire::BUS).unwrap(), None);
    assert_eq!(read(CALL, 2, wire::BUS).unwrap(), None);
    // What the bus does not pass on, it answers itself.
    let Some(Answer::Error(name, text)) = read(ERROR, 2, ":1.2").unwrap() else { panic!("no error") };
    assert_eq!(name, "org.freedesktop.DBus.Error.ServiceUnknown");
    assert!(text.starts_with("The name org.freedesktop.systemd1 was not provided"), "{text}");
}

#[test]
fn nobody_answers_for_another() {
    // The greeting is answered by the bus alone; it does not answer for others, except with an error.
    for from in [":1.2", "org.freedesktop.systemd1", ""] {
        assert_eq!(read(HELLO_ANSWER, 1, from).unwrap(), None, "{from}");
    }
    // The same error from somebody else: the bus writes another sender.
    let at = ERROR.windows(wire::BUS.len() + 1).rposition(|bytes| bytes == [wire::BUS.as_bytes(), b"\0"].concat());
    let mut forged = ERROR.to_vec();
    forged[at.unwrap()] = b'x';
    assert_eq!(read(&forged, 2, ":1.2").unwrap(), None);
}

#[test]
fn a_length_that_cannot_be_is_no_d_bus() {
    for at in [4, 12] {
        let mut long = SIGNAL.to_vec();
        long[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(read(&long, 1, wire::BUS).is_err());
    }
}

proptest! {
    #[test]
    fn no_message_makes_it_panic(at in 0usize..213, with in prop::collection::vec(any::<u8>(), 0..6), cut in 0usize..220) {
        for message in [HELLO_ANSWER, SIGNAL, ERROR] {
            let mut message = message.to_vec();
            for (i, byte) in with.iter().enumerate() {
                if let Some(place) = message.get_mut(at + i) {
                    *place = *byte;
                }
            }
            message.truncate(cut);
            for serial in 1..3 {
                let _ = read(&message, serial, wire::BUS);
            }
        }
    }
}
