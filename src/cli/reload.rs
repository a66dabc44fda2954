//! `we-agent reload`: has the daemon read its configuration again.

use super::status::{Unreachable, ask};
use crate::{admin, files::Root};
use http::{Method, StatusCode};

/// The daemon does not take it: every mistake, as at a start.
#[derive(Debug, thiserror::Error)]
#[error("{0}\nthe configuration of before stays in force")]
pub(super) struct Refused(String);

/// What is in force now.
///
/// # Errors
/// [`Refused`] when there is a mistake in the file, [`Unreachable`] when the daemon does not answer.
pub(super) async fn reload(root: &Root) -> anyhow::Result<String> {
    let (code, said) = ask(root, Method::POST, admin::RELOAD).await?;
    let said = String::from_utf8_lossy(&said).into_owned();
    match code {
        StatusCode::OK => Ok(said),
        StatusCode::UNPROCESSABLE_ENTITY => Err(Refused(said).into()),
        code => Err(Unreachable::answered(root, code).into()),
    }
}
