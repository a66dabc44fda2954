//! What others sent us, as far as it may be part of a line.

use std::fmt::{self, Write};

/// Bytes of one text, and of the words of a record: a datagram of the journal has to fit into a socket buffer.
pub(super) const MAX: usize = 8 * 1024;

/// A value on one line, whatever it holds, and the beginning of it if it is long.
pub(super) fn line(value: impl fmt::Display) -> String {
    let mut line = Line(String::new());
    // It ends early when nothing more fits.
    let _ = write!(line, "{value}");
    line.0
}

struct Line(String);

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if self.0.len() + c.len_utf8() > MAX {
                self.0.push('…');
                return Err(fmt::Error);
            }
            self.0.push(if breaks(c) { ' ' } else { c });
        }
        Ok(())
    }
}

/// What would end the line, rule the terminal, or turn the direction of what follows.
fn breaks(c: char) -> bool {
    let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || turns || matches!(c, '\u{2028}' | '\u{2029}')
}
