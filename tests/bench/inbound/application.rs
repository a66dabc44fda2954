//! The application behind every contestant. It answers as the client says, so that there is only one.

use std::net::SocketAddr;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// One request and its answer, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exchange {
    pub(crate) request: u32,
    pub(crate) answer: u32,
}

/// Each request begins with two numbers: its length after them, and the length of the answer.
pub(crate) const HEADER: usize = 8;

impl Exchange {
    /// The whole request.
    pub(crate) fn bytes(self) -> Vec<u8> {
        let mut bytes = [self.request.to_be_bytes(), self.answer.to_be_bytes()].concat();
        bytes.resize(HEADER + self.request as usize, b'q');
        bytes
    }
}

/// Serves in a thread of its own, for as long as the process lives.
pub(crate) fn start() -> anyhow::Result<SocketAddr> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            // An error of one connection is its end: the client sees it.
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream));
            }
        });
    });
    Ok(address)
}

async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![b'a'; 1 << 16];
    loop {
        let (mut request, answer) = (stream.read_u32().await?, stream.read_u32().await?);
        while request > 0 {
            let most = buffer.len().min(request as usize);
            let read = stream.read(&mut buffer[..most]).await?;
            if read == 0 {
                return Ok(());
            }
            request -= read as u32;
        }
        let mut left = answer as usize;
        while left > 0 {
            let piece = buffer.len().min(left);
            stream.write_all(&buffer[..piece]).await?;
            left -= piece;
        }
    }
}
