//! What others sent us, as far as it may be part of a line of ours.

use std::fmt::{self, Write};

/// Bytes of one text, and of the words of a record: a datagram of the journal has to fit into a socket buffer.
const MAX: usize = 8 * 1024;

/// A value on one line, whatever it holds, and the beginning of it if it is long.
pub(crate) fn line(value: impl fmt::Display) -> String {
    let mut line = Line(String::new());
    // It ends early when nothing more fits.
    let _ = write!(line, "{value}");
    line.0
}

/// At most so many characters of a text, on one line.
pub(crate) fn one_line(text: &str, most: usize) -> String {
    text.chars().take(most).map(|c| if c.is_control() { ' ' } else { c }).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_say_is_one_line_and_bounded() {
        assert_eq!(one_line("a\nb\u{1b}[0m", 9), "a b [0m");
        assert_eq!(one_line("ääää", 2), "ää");
        assert_eq!(line("a\r\n\u{202e}b"), "a   b");
        assert_eq!(line("x".repeat(2 * MAX)).len(), MAX + '…'.len_utf8());
    }
}
