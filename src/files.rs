//! The files of this host: where they are, directories that are switched at once, who may read what is written, and
//! noticing that a file was replaced.

mod access;
mod dir;
mod root;
mod watch;

pub use access::{Access, Grant, group_number};
pub(crate) use dir::beside;
pub use dir::{Dir, DirError, Removal, SocketId};
pub use root::Root;
pub use watch::{FileWatch, Stamp};
