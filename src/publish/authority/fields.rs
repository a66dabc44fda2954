//! The fields of a header block, as far as they must be understood to find the value of an `:authority` (RFC 7541
//! sections 5 and 6): where a name or a value begins and ends, never what the tables hold.

const NAME: &[u8] = b":authority";
/// The same in the Huffman code of HPACK.
const NAME_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// Where the static table has the name (RFC 7541 appendix A).
const NAME_INDEX: u32 = 1;
/// No number in a header block is longer: `h2` takes far less.
const MAX_SHIFT: u32 = 21;

/// Where in a header block we are; it goes from fragment to fragment, and from block to block.
#[derive(Debug, Default)]
pub(super) struct Fields {
    next: Next,
    /// Whether the field has a value of its own and is not only a number.
    literal: bool,
    /// Whether the field is an `:authority`, as far as its name is known.
    authority: bool,
    huffman: bool,
    number: u32,
    shift: u32,
    /// Bytes of the string that are still to come.
    left: u32,
    /// Bytes of the string that are gone by.
    gone: usize,
    symbol: Symbol,
}

/// What the next byte is.
#[derive(Debug, Clone, Copy, Default)]
enum Next {
    /// The first of a field.
    #[default]
    Field,
    /// The first of a length.
    Length(Number),
    /// Another one of a number.
    More(Number),
    /// One of a string.
    Text(Text),
}

/// What a number says.
#[derive(Debug, Clone, Copy)]
enum Number {
    Index,
    Length(Text),
}

#[derive(Debug, Clone, Copy)]
enum Text {
    Name,
    Value,
}

impl Fields {
    /// Looks at the next byte of the header block and mends it. False if this is no header block.
    pub(super) fn pass(&mut self, byte: &mut u8) -> bool {
        match self.next {
            Next::Field => {
                // Indexed; literal that is indexed; size of the table; literal that is not indexed, or never.
                let (prefix, literal) = match *byte {
                    0x80.. => (7, false),
                    0x40.. => (6, true),
                    0x20.. => (5, false),
                    _ => (4, true),
                };
                self.literal = literal;
                self.begin(*byte, prefix, Number::Index);
            }
            Next::Length(of) => {
                self.huffman = *byte & 0x80 != 0;
                self.begin(*byte, 7, of);
            }
            Next::More(of) => {
                if self.shift > MAX_SHIFT {
                    return false;
                }
                self.number += u32::from(*byte & 0x7f) << self.shift;
                self.shift += 7;
                if *byte & 0x80 == 0 {
                    self.number_is_complete(of);
                }
            }
            Next::Text(text) => {
                match text {
                    Text::Name => {
                        let name = if self.huffman { NAME_HUFFMAN } else { NAME };
                        self.authority &= name.get(self.gone) == Some(byte);
                    }
                    Text::Value if !self.authority => {}
                    Text::Value if self.huffman => self.symbol.pass(byte),
                    Text::Value if *byte == b'%' => *byte = b'.',
                    Text::Value => {}
                }
                self.gone += 1;
                self.left -= 1;
                if self.left == 0 {
                    self.text_is_complete(text);
                }
            }
        }
        true
    }

    /// The first byte of a number, which is in the lowest `prefix` bits (RFC 7541 section 5.1).
    fn begin(&mut self, byte: u8, prefix: u32, of: Number) {
        let mask = (1 << prefix) - 1;
        self.number = u32::from(byte) & mask;
        self.shift = 0;
        if self.number < mask { self.number_is_complete(of) } else { self.next = Next::More(of) }
    }

    fn number_is_complete(&mut self, of: Number) {
        self.next = match of {
            Number::Index if !self.literal => Next::Field,
            // The name follows.
            Number::Index if self.number == 0 => Next::Length(Number::Length(Text::Name)),
            Number::Index => {
                self.authority = self.number == NAME_INDEX;
                Next::Length(Number::Length(Text::Value))
            }
            Number::Length(text) => {
                (self.left, self.gone, self.symbol) = (self.number, 0, Symbol::default());
                if let Text::Name = text {
                    let name = if self.huffman { NAME_HUFFMAN } else { NAME };
                    self.authority = self.number as usize == name.len();
                }
                match self.left {
                    0 => return self.text_is_complete(text),
                    _ => Next::Text(text),
                }
            }
        };
    }

    fn text_is_complete(&mut self, text: Text) {
        self.next = match text {
            Text::Name => Next::Length(Number::Length(Text::Value)),
            Text::Value => Next::Field,
        };
    }
}

/// A symbol of the Huffman code (RFC 7541 appendix B), bit by bit.
#[derive(Debug, Default)]
struct Symbol {
    code: u16,
    bits: u8,
}

impl Symbol {
    /// Looks at eight more bits. `%` is `010101` and `.` is `010111`: of the six symbols' bits the fifth is set, as soon
    /// as it comes, for the others are the same. The only other symbol that begins like this is the space, `010100`,
    /// which no authority has; it becomes `-`.
    fn pass(&mut self, byte: &mut u8) {
        for bit in (0..8).rev() {
            self.code = self.code << 1 | u16::from(*byte >> bit & 1);
            self.bits += 1;
            if (self.bits, self.code) == (5, 0b01010) {
                *byte |= 1 << bit;
                self.code |= 1;
            }
            // The code is canonical: below these bounds symbols of each length end. The longest that an authority can
            // have take 13 bits; behind a longer one, or the padding, nothing is looked at.
            if let (5, ..0xa)
            | (6, ..0x2e)
            | (7, ..0x7c)
            | (8, ..0xfe)
            | (10, ..0x3fd)
            | (11, ..0x7fd)
            | (12, ..0xffc)
            | (13, ..0x1ffe) = (self.bits, self.code)
            {
                *self = Self::default();
            }
            self.bits = self.bits.min(14);
        }
    }
}
