//! Signals.

use std::io;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Each SIGHUP, which ends nothing from now on. To be called within the runtime.
///
/// # Errors
/// When the system does not let us handle signals.
pub fn hangups() -> io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// A token that SIGTERM and SIGINT cancel. A second one ends the process at once, with 128 and its number as the
/// status, as a shell would tell it, after `flush`. To be called within the runtime.
///
/// # Errors
/// When the system does not let us handle signals.
pub fn shutdown(flush: fn()) -> io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let stop = token.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => SignalKind::terminate(),
                _ = interrupt.recv() => SignalKind::interrupt(),
            }
        };
        let first = next().await;
        tracing::info!(signal = first.as_raw_value(), "stopping");
        stop.cancel();
        let second = next().await;
        tracing::warn!(signal = second.as_raw_value(), "a second signal: ending at once");
        flush();
        std::process::exit(128 + second.as_raw_value());
    });
    Ok(token)
}
