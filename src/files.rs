//! The files of this host: where they are, the one door for those that others write, directories that are switched at
//! once, who may read what is written, and noticing that a file was replaced.

mod access;
mod ask;
mod dir;
mod foreign;
mod root;
mod watch;

pub use access::{Access, Grant, group_number, group_number_aside};
pub use ask::{ask_no_more, ask_removal, ask_root, asked_removal, is_root_asked};
pub(crate) use dir::beside;
pub use dir::{Dir, DirError, Removal, SocketId};
pub use foreign::{Foreign, MAX_FILE, MAX_ROOTS, ReadError, is_denied, read, read_aside, read_text};
pub use root::Root;
pub use watch::{Stamp, Versions};
