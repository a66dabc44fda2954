//! Where records go, and as what.

use super::{
    journal::Journal,
    record::Record,
    stderr::{Patience, Stderr},
};
use std::io;

/// Where records go.
pub(super) struct Sink {
    pub(super) form: Form,
    pub(super) coloured: bool,
    /// Also for what the journal does not take: better a plain line than none.
    pub(super) stderr: Stderr,
}

pub(super) enum Form {
    Text,
    Json,
    Journal(Journal),
}

/// A record, or what is left to write of it.
pub(super) enum Line {
    New(Box<Record>),
    Begun(Vec<u8>),
}

impl Sink {
    /// Writes on; whether the line is done with.
    pub(super) fn write(&self, line: &mut Line, patience: Patience) -> bool {
        let record = match line {
            Line::New(record) => record,
            Line::Begun(rest) => return self.stderr.write(rest, patience),
        };
        let text = match &self.form {
            Form::Text => record.text(self.coloured),
            Form::Json => record.json(),
            Form::Journal(journal) => match journal.send(record, patience) {
                Ok(()) => return true,
                Err(error) if patience == Patience::None && error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(_) => record.text(self.coloured),
            },
        };
        *line = Line::Begun(text.into_bytes());
        self.write(line, patience)
    }
}
