//! Whoever reaches the socket of `we-agent status`.

use super::{Face, connection};
use crate::status::{Status, Workloads};
use std::io;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::{mpsc, watch},
};
use tokio_util::either::Either;

/// A connection on which `bytes` are sent, and no more.
pub(crate) async fn requests(bytes: &[u8]) -> io::Result<()> {
    let status = Status::new(watch::Sender::new(Workloads::default()).subscribe());
    let face = Face { status, reload: Some(mpsc::channel(1).0), owners: true };
    let (ours, mut theirs) = UnixStream::pair()?;
    let client = async {
        theirs.write_all(bytes).await?;
        theirs.shutdown().await?;
        theirs.read_to_end(&mut Vec::new()).await
    };
    let _ = tokio::join!(connection(Either::Left(ours), face), client);
    Ok(())
}
