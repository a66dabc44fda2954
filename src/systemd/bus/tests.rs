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

const GREETING: Method = Method {
    service: "org.freedesktop.DBus",
    path: "/org/freedesktop/DBus",
    interface: "org.freedesktop.DBus",
    member: "Hello",
};
const QUESTION: Method = Method {
    service: "org.freedesktop.systemd1",
    path: "/org/freedesktop/systemd1",
    interface: "org.freedesktop.systemd1.Manager",
    member: "GetUnitByPID",
};

/// What [`decode`] makes of one whole message.
fn read(message: &[u8], serial: u32) -> io::Result<Option<Answer>> {
    let order = Order::of(*message.first().ok_or_else(short)?)?;
    let fields = order.number(message, 12)? as usize;
    if fields > MAX_MESSAGE {
        return Err(short());
    }
    decode(order, message, fields, (16 + fields).next_multiple_of(8), serial)
}

#[test]
fn our_calls_are_those_of_systemd_s_library() {
    assert_eq!(encode(1, GREETING, Argument::None), HELLO);
    // busctl lets systemd ask a person for a password (flag 4). We do not.
    let mut without = CALL.to_vec();
    without[2] = 0;
    assert_eq!(encode(2, QUESTION, Argument::Number(42)), without);
}

#[test]
fn a_descriptor_is_named_beside_the_signature() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let with = encode(2, QUESTION, Argument::Descriptor(std::os::fd::AsFd::as_fd(&null)));
    let number = encode(2, QUESTION, Argument::Number(0));
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
    assert_eq!(read(HELLO_ANSWER, 1).unwrap(), Some(Answer::Strings(vec![":1.0".to_owned()])));
    assert_eq!(read(HELLO_ANSWER, 2).unwrap(), None);
    assert_eq!(read(SIGNAL, 1).unwrap(), None);
    let Some(Answer::Error(name, text)) = read(ERROR, 2).unwrap() else { panic!("no error") };
    assert_eq!(name, "org.freedesktop.DBus.Error.ServiceUnknown");
    assert!(text.starts_with("The name org.freedesktop.systemd1 was not provided"), "{text}");
}

#[test]
fn a_call_is_no_answer() {
    assert_eq!(read(CALL, 2).unwrap(), None);
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
                let _ = read(&message, serial);
            }
        }
    }
}
