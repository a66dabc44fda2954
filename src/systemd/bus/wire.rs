//! The wire form of D-Bus messages: one call, and the answers to it.

use super::{Answer, Argument, Method, wrong};
use std::io;

/// The bus itself: what it says of a call that it does not pass on comes from this name.
pub(super) const BUS: &str = "org.freedesktop.DBus";

/// Bytes of a message before its fields.
pub(super) const HEAD: usize = 16;
/// What a message can have at most, in bytes.
const MAX: u64 = 128 << 20;

/// What a message begins with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    order: Order,
    kind: u8,
    /// Without the padding.
    fields: usize,
    body: usize,
}

/// The byte order of a message: the bus passes on what the sender chose.
#[derive(Debug, Clone, Copy)]
enum Order {
    Little,
    Big,
}

impl Head {
    /// # Errors
    /// When this is no D-Bus.
    pub(super) fn of(bytes: &[u8; HEAD]) -> io::Result<Self> {
        let order = match bytes[0] {
            b'l' => Order::Little,
            b'B' => Order::Big,
            _ => return Err(wrong("the other side does not speak D-Bus")),
        };
        let mut at = Cursor { bytes, at: 4, order };
        let (body, _serial, fields) = (at.number(), at.number(), at.number());
        let (Some(body), Some(fields)) = (body, fields) else { return Err(short()) };
        if u64::from(body) + u64::from(fields) > MAX {
            return Err(wrong("a message of the bus is longer than any can be"));
        }
        Ok(Self { order, kind: bytes[1], fields: fields as usize, body: body as usize })
    }

    /// Bytes of the message after this.
    pub(super) fn rest(self) -> usize {
        self.fields.next_multiple_of(8) + self.body
    }

    /// Whether it answers some call: with what is asked for, or an error.
    pub(super) fn is_answer(self) -> bool {
        matches!(self.kind, 2 | 3)
    }

    /// What the message says, of which `rest` comes after this; none when it does not answer the call `serial` of `from`.
    ///
    /// # Errors
    /// When it does, and cannot be read.
    pub(super) fn answer(self, rest: &[u8], serial: u32, from: &str) -> io::Result<Option<Answer>> {
        let (Some(fields), Some(body)) = (rest.get(..self.fields), rest.get(self.fields.next_multiple_of(8)..)) else {
            return Err(short());
        };
        let fields = Fields::of(Cursor { bytes: fields, at: 0, order: self.order });
        // The bus writes the sender, whatever the sender writes.
        let theirs = fields.sender == Some(from) || (self.kind == 3 && fields.sender == Some(BUS));
        if fields.to != Some(serial) || !theirs {
            return Ok(None);
        }
        let mut body = Cursor { bytes: body, at: 0, order: self.order };
        let strings = fields.signature.bytes().take_while(|kind| matches!(kind, b's' | b'o'));
        let strings = strings.map(|_| body.text().map(str::to_owned)).collect::<Option<Vec<_>>>().ok_or_else(short)?;
        match (self.kind, fields.error) {
            (2, _) => Ok(Some(Answer::Strings(strings))),
            (3, Some(name)) => Ok(Some(Answer::Error(name.to_owned(), strings.into_iter().next().unwrap_or_default()))),
            _ => Err(wrong("an answer of the bus is neither a return nor an error")),
        }
    }
}

/// The fields that matter here.
#[derive(Debug, Default)]
struct Fields<'a> {
    error: Option<&'a str>,
    to: Option<u32>,
    sender: Option<&'a str>,
    signature: &'a str,
}

impl<'a> Fields<'a> {
    /// As far as they can be read; what is behind is missing.
    fn of(mut at: Cursor<'a>) -> Self {
        let mut fields = Self::default();
        while fields.next(&mut at).is_some() {}
        fields
    }

    /// Each is a code, and a value with its type before it.
    fn next(&mut self, at: &mut Cursor<'a>) -> Option<()> {
        at.align(8);
        let code = at.byte()?;
        match (code, at.signature()?) {
            (4, "s") => self.error = Some(at.text()?),
            (5, "u") => self.to = Some(at.number()?),
            (7, "s") => self.sender = Some(at.text()?),
            (8, "g") => self.signature = at.signature()?,
            (_, "s" | "o") => drop(at.text()?),
            (_, "u") => drop(at.number()?),
            (_, "g") => drop(at.signature()?),
            _ => return None,
        }
        Some(())
    }
}

/// Reads on, one value after the other, each at its place; none where there is none.
#[derive(Debug)]
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    order: Order,
}

impl<'a> Cursor<'a> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, size: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..)?.get(..size)?;
        self.at += size;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|byte| byte[0])
    }

    fn number(&mut self) -> Option<u32> {
        self.align(4);
        let bytes = *self.take(4)?.first_chunk()?;
        Some(match self.order {
            Order::Little => u32::from_le_bytes(bytes),
            Order::Big => u32::from_be_bytes(bytes),
        })
    }

    /// A string or an object path, and the zero after it.
    fn text(&mut self) -> Option<&'a str> {
        let size = self.number()? as usize;
        let text = self.take(size)?;
        self.byte()?;
        std::str::from_utf8(text).ok()
    }

    fn signature(&mut self) -> Option<&'a str> {
        let size = usize::from(self.byte()?);
        let text = self.take(size)?;
        self.byte()?;
        std::str::from_utf8(text).ok()
    }
}

/// A method call, little-endian.
pub(super) fn call(serial: u32, method: Method<'_>, argument: Argument<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    let signature = match argument {
        Argument::None => None,
        Argument::Number(number) => {
            body.extend(number.to_le_bytes());
            Some("u")
        }
        Argument::Text(text) => {
            put(&mut body, text);
            Some("s")
        }
        // A descriptor is the index of one that travels beside.
        Argument::Descriptor(_) => {
            body.extend([0; 4]);
            Some("h")
        }
    };
    // Call, no flags, version 1.
    let mut out = vec![b'l', 1, 0, 1];
    out.extend(size(&body));
    out.extend(serial.to_le_bytes());
    out.extend([0; 4]);
    let field = |out: &mut Vec<u8>, code: u8, kind: u8| {
        out.resize(out.len().next_multiple_of(8), 0);
        out.extend([code, 1, kind, 0]);
    };
    for (code, kind, text) in
        [(1, b'o', method.path), (3, b's', method.member), (2, b's', method.interface), (6, b's', method.of)]
    {
        field(&mut out, code, kind);
        put(&mut out, text);
    }
    if let Some(signature) = signature {
        field(&mut out, 8, b'g');
        out.push(1);
        out.extend(signature.bytes());
        out.push(0);
    }
    if matches!(argument, Argument::Descriptor(_)) {
        field(&mut out, 9, b'u');
        out.extend(1u32.to_le_bytes());
    }
    let fields = size(&out[HEAD..]);
    out[12..HEAD].copy_from_slice(&fields);
    out.resize(out.len().next_multiple_of(8), 0);
    out.extend(body);
    out
}

/// A text, where a number can begin.
fn put(out: &mut Vec<u8>, text: &str) {
    out.extend(size(text.as_bytes()));
    out.extend(text.bytes());
    out.push(0);
}

fn size(of: &[u8]) -> [u8; 4] {
    u32::try_from(of.len()).unwrap_or(0).to_le_bytes()
}

fn short() -> io::Error {
    wrong("a message of the bus ends too early")
}
