//! The durable store: what survives a restart, a `kill -9` and a power cut.
//!
//! One generation is one file, so key and certificate cannot be of different generations. A file gets its name only
//! when it is complete and synced. The text is JSON, and PEM stands in it as lists of lines: a person can read it, and
//! reading it back makes no copy of the key outside of buffers that are wiped.

use crate::{
    files::{Access, Dir, DirError, Root},
    spiffe::{BundleError, PrivateKey, SpiffeId, SvidError, X509Bundle, X509Context},
};
use serde::{Deserialize, Serialize};
use std::{path::Path, sync::Arc, time::SystemTime};
use zeroize::Zeroizing;

/// The format that this version writes. A file with a greater one is a newer agent's: it is left alone.
const FORMAT: u32 = 1;
/// No generation is nearly as long.
const MAX_FILE: usize = 1 << 20;
/// How many unusable files are kept for a person to look at.
const MAX_ASIDE: usize = 3;
const UNFINISHED: &str = ".unfinished";
const ASIDE: &str = ".unusable";

/// Why a generation could not be written, or is not used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The text is not what this agent writes. It is not quoted: a key is in it.
    #[error("it is cut off or damaged at line {line} column {column}")]
    Damaged {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// Written by a newer agent.
    #[error("its format is {0}, this agent knows {FORMAT}: it is left to the newer agent")]
    Newer(u32),
    /// The bundle names another identity by now.
    #[error("it is for {got}, not for {expected}")]
    OtherIdentity {
        /// Who this workload is.
        expected: SpiffeId,
        /// Whose it is.
        got: String,
    },
    /// The time of receipt cannot be read.
    #[error("`received` is no time (RFC 3339)")]
    Received,
    /// The operator's roots cannot be read.
    #[error("`anchors`: {0}")]
    Anchors(BundleError),
    /// It does not pass the checks that it passed when it was received.
    #[error(transparent)]
    Svid(#[from] SvidError),
}

impl StoreError {
    /// Whether the file itself is at fault, for ever. Clocks are set, bundles are changed back and newer agents
    /// return, so everything else keeps its name.
    pub(super) fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::Received | Self::Anchors(_) => true,
            Self::Dir(e) => matches!(e, DirError::InTheWay(_) | DirError::TooLong { .. }),
            Self::Newer(_) | Self::OtherIdentity { .. } => false,
            Self::Svid(e) => match e {
                SvidError::Validity { .. } | SvidError::Chain(_) | SvidError::WrongIdentity { .. } => false,
                SvidError::ShortChain(_)
                | SvidError::Unreadable(_)
                | SvidError::Roots(_)
                | SvidError::WrongKey
                | SvidError::Authority
                | SvidError::Key(_) => true,
            },
        }
    }
}

/// One generation that passed all checks again.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The SVID and its roots.
    pub context: Arc<X509Context>,
    /// The operator's roots that were in force when it was received. Where they are others by now, they win over the
    /// roots that came with the SVID.
    pub anchors: X509Bundle,
}

/// A generation that is not used.
#[derive(Debug)]
pub struct PassedOver {
    /// The file's name at present.
    pub file: String,
    /// Why.
    pub reason: StoreError,
}

/// What a start finds.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The newest generation that is valid now.
    pub current: Option<Stored>,
    /// The one before it, if that is valid, too.
    pub previous: Option<Stored>,
    /// The others, newest first.
    pub passed_over: Vec<PassedOver>,
}

#[derive(Deserialize)]
struct Header {
    format: u32,
}

#[derive(Serialize, Deserialize)]
struct Generation<'a> {
    format: u32,
    id: &'a str,
    received: String,
    #[serde(borrow)]
    key: Vec<&'a str>,
    chain: Vec<&'a str>,
    roots: Vec<&'a str>,
    anchors: Vec<&'a str>,
}

/// The store of one workload: a directory with mode 0700, files with mode 0600.
#[derive(Debug)]
pub struct Store {
    dir: Dir,
}

impl Store {
    /// Opens `dir` (looked up below `root`), makes it if need be, and removes what a killed run left half written.
    ///
    /// # Errors
    /// When the directory cannot be made, or is not safe.
    pub fn open(root: &Root, dir: impl AsRef<Path>) -> Result<Self, DirError> {
        let store = Self { dir: Dir::create(root, dir.as_ref(), Access::OWNER)? };
        for name in store.dir.names()? {
            if name.ends_with(UNFINISHED) {
                store.dir.remove(&name)?;
            }
        }
        Ok(store)
    }

    /// Makes `current` durable before it returns. Of the others only `previous` is kept, if the store has it.
    ///
    /// # Errors
    /// When it could not be made durable; what was stored before is still there then.
    pub fn save(
        &self,
        current: &X509Context,
        previous: Option<&X509Context>,
        anchors: &X509Bundle,
    ) -> Result<(), DirError> {
        let names = self.dir.names()?;
        let last = names.iter().filter_map(|name| sequence(name)).max().unwrap_or(0);
        let name = file_name(last + 1, current);
        let unfinished = format!("{name}{UNFINISHED}");
        self.dir.remove(&unfinished)?;
        let written = self.dir.write(&unfinished, &serialise(current, anchors), Access::OWNER);
        if let Err(error) = written.and_then(|()| self.dir.rename(&unfinished, &name)) {
            let _ = self.dir.remove(&unfinished); // the first error is the one to tell
            return Err(error);
        }
        self.dir.sync()?;
        self.prune(&names, previous);
        Ok(())
    }

    /// The name of the newest file of `current`, if there is one.
    pub fn file_of(&self, current: &X509Context) -> Option<String> {
        let suffix = serial_suffix(current);
        self.dir.names().ok()?.into_iter().rev().find(|name| name.ends_with(&suffix))
    }

    /// Whether a restart would find `current`: its file is there and says what a save would write.
    pub fn holds(&self, current: &X509Context, anchors: &X509Bundle) -> bool {
        let text = self.file_of(current).and_then(|name| self.dir.read(&name, MAX_FILE).ok()?);
        text.is_some_and(|text| *text == *serialise(current, anchors))
    }

    /// Removes what `names` holds beside the newest generation. The save has succeeded by now: what cannot be removed
    /// is tried again at the next one.
    fn prune(&self, names: &[String], previous: Option<&X509Context>) {
        let previous = previous.map(serial_suffix);
        let mut aside = 0;
        for name in names.iter().rev() {
            let stays = if name.ends_with(ASIDE) {
                aside += 1;
                aside <= MAX_ASIDE
            } else {
                sequence(name).is_none()
                    || previous.as_ref().is_some_and(|serial| name.ends_with(serial))
                    || matches!(self.format(name), Ok(Some(format)) if format > FORMAT)
            };
            if !stays {
                let _ = self.dir.remove(name);
            }
        }
    }

    fn format(&self, name: &str) -> Result<Option<u32>, DirError> {
        let text = self.dir.read(name, MAX_FILE)?;
        Ok(text.and_then(|text| serde_json::from_slice::<Header>(&text).ok()).map(|header| header.format))
    }

    /// Reads the generations, newest first, with all checks at `now`, until two are found that can be used. A damaged
    /// file gets another name, so that a person can look at it; nothing is deleted.
    ///
    /// # Errors
    /// When the directory cannot be listed. No content of a file is an error.
    pub fn load(&self, id: &SpiffeId, now: SystemTime) -> Result<Loaded, DirError> {
        let mut loaded = Loaded::default();
        let mut names: Vec<_> = self.dir.names()?;
        names.retain(|name| sequence(name).is_some() && name.ends_with(".json"));
        for name in names.into_iter().rev() {
            match self.read(&name, id, now) {
                Ok(stored) if loaded.current.is_none() => loaded.current = Some(stored),
                Ok(stored) => {
                    loaded.previous = Some(stored);
                    break;
                }
                Err(reason) => {
                    let aside = format!("{name}{ASIDE}");
                    let moved = reason.is_damage() && self.dir.rename(&name, &aside).is_ok();
                    loaded.passed_over.push(PassedOver { file: if moved { aside } else { name }, reason });
                }
            }
        }
        Ok(loaded)
    }

    fn read(&self, name: &str, id: &SpiffeId, now: SystemTime) -> Result<Stored, StoreError> {
        let text = self.dir.read(name, MAX_FILE)?.unwrap_or_default();
        parse(&text, id, now)
    }
}

/// `svid-<sequence>-<serial>.json`: the sequence grows by one with each save, whatever the clock does.
fn file_name(sequence: u64, context: &X509Context) -> String {
    format!("svid-{sequence:012}{}", serial_suffix(context))
}

fn serial_suffix(context: &X509Context) -> String {
    format!("-{}.json", context.svid.serial())
}

/// The sequence number of a generation, also of one that was set aside.
fn sequence(name: &str) -> Option<u64> {
    name.strip_prefix("svid-")?.split('-').next()?.parse().ok()
}

fn serialise(context: &X509Context, anchors: &X509Bundle) -> Zeroizing<Vec<u8>> {
    let (chain, roots, anchors) = (context.svid.chain_pem(), context.bundle.pem(), anchors.pem());
    let key = context.svid.key().pem();
    let generation = Generation {
        format: FORMAT,
        id: context.svid.id().as_str(),
        received: humantime::format_rfc3339_nanos(context.received).to_string(),
        key: key.lines().collect(),
        chain: chain.lines().collect(),
        roots: roots.lines().collect(),
        anchors: anchors.lines().collect(),
    };
    // Large enough at once: a buffer that grows leaves copies of the key behind.
    let room = 2 * (key.len() + chain.len() + roots.len() + anchors.len()) + 4096;
    let mut text = Zeroizing::new(Vec::with_capacity(room));
    // Strings and numbers into memory: there is nothing that could fail.
    let _ = serde_json::to_writer_pretty(&mut *text, &generation);
    text.push(b'\n');
    text
}

pub(super) fn parse(text: &[u8], id: &SpiffeId, now: SystemTime) -> Result<Stored, StoreError> {
    let damaged = |e: serde_json::Error| StoreError::Damaged { line: e.line(), column: e.column() };
    let Header { format } = serde_json::from_slice(text).map_err(damaged)?;
    if format > FORMAT {
        return Err(StoreError::Newer(format));
    }
    let generation: Generation<'_> = serde_json::from_slice(text).map_err(damaged)?;
    if generation.id != id.as_str() {
        return Err(StoreError::OtherIdentity { expected: id.clone(), got: generation.id.to_owned() });
    }
    let received = humantime::parse_rfc3339(&generation.received).map_err(|_| StoreError::Received)?;
    let anchors = X509Bundle::from_pem(&generation.anchors.join("\n")).map_err(StoreError::Anchors)?;
    let mut key = Zeroizing::new(String::with_capacity(text.len()));
    for line in &generation.key {
        key.push_str(line);
        key.push('\n');
    }
    let key = PrivateKey::from_pem(&key).map_err(SvidError::Key)?;
    let (chain, roots) = (generation.chain.join("\n"), generation.roots.join("\n"));
    let context = X509Context::from_pem(id, key, &chain, &roots, received, now)?;
    Ok(Stored { context, anchors })
}

#[cfg(test)]
mod tests;
