//! Three plain files in somebody else's directory.

use super::{Access, Dir, DirError, Outcome, contents, says};
use crate::spiffe::X509Context;

/// Our unfinished files. Istio's agent leaves `<name>.tmp.*` behind: those are not ours to remove.
const UNFINISHED: &str = ".we-agent-unfinished-";

pub(super) fn publish(dir: &Dir, context: &X509Context, access: Access) -> Result<Outcome, DirError> {
    let contents = contents(context);
    for (name, _) in &contents {
        dir.remove(&unfinished(name))?;
    }
    if says(dir, context, access) {
        return Ok(Outcome::Unchanged);
    }
    for (name, _) in &contents {
        if !dir.is_free_or_file(name) {
            return Err(DirError::InTheWay(dir.path().join(name)));
        }
    }
    // First all three are on the disk, so that a full disk changes nothing; then they are renamed in one breath, so
    // that the time in which they do not match is as short as it can be. A kill in it is repaired by the next run,
    // which has the pair in its store and does not depend on these files.
    for (name, content) in &contents {
        dir.write(&unfinished(name), content.as_bytes(), access)?;
    }
    for (name, _) in &contents {
        dir.rename(&unfinished(name), name)?;
    }
    dir.sync()?;
    Ok(Outcome::Written)
}

fn unfinished(name: &str) -> String {
    format!("{UNFINISHED}{name}")
}
