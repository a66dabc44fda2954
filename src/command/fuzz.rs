//! Both ends of the connection to a runner.

use super::{runner, serve};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
};

/// What the runner is asked.
pub(crate) async fn request(bytes: &[u8]) -> io::Result<()> {
    let (ours, mut theirs) = UnixStream::pair()?;
    let asking = async {
        let _ = theirs.write_all(bytes).await; // the reader may have had enough
        theirs.shutdown().await
    };
    let mut stream = BufReader::new(ours);
    let (read, _) = tokio::join!(serve::request(&mut stream), asking);
    read.map(drop).unwrap_or_else(|error| drop(error.to_string()));
    Ok(())
}

/// What a runner answers.
pub(crate) async fn answer(bytes: &[u8]) -> io::Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket)?;
    let runner = async {
        let mut stream = listener.accept().await?.0;
        stream.write_all(bytes).await?;
        stream.shutdown().await
    };
    let command = ["true".to_owned()];
    let (answer, _) = tokio::join!(runner::ask(&socket, &command, Duration::from_secs(1)), runner);
    answer.unwrap_or_else(|error| drop(error.to_string()));
    Ok(())
}
