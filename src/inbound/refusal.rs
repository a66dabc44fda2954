//! Why a connection is refused, and saying it without filling the journal.

use crate::status::InboundRefusal;
use rustls::CertificateError;
use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use tracing::Span;

/// From one line to the next of the same kind.
const EVERY: Duration = Duration::from_secs(10);

/// Why, in one word for metrics and one line for people.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub(super) struct Refusal {
    pub(super) kind: InboundRefusal,
    text: String,
}

impl Refusal {
    pub(super) fn new(kind: InboundRefusal, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// What a handshake that failed was refused for.
    pub(super) fn of_tls(error: &rustls::Error) -> Self {
        if let rustls::Error::InvalidCertificate(CertificateError::Other(other)) = error
            && let Some(refusal) = other.0.downcast_ref::<Self>()
        {
            return refusal.clone();
        }
        match error {
            rustls::Error::NoCertificatesPresented => Self::new(
                InboundRefusal::NoCertificate,
                "it shows no certificate: a client outside of the mesh, or DestinationRule.tls is not ISTIO_MUTUAL",
            ),
            rustls::Error::AlertReceived(alert) => Self::new(
                InboundRefusal::Handshake,
                format!(
                    "it does not accept us (alert {alert:?}): it may expect another SPIFFE id (subjectAltNames of its \
                     DestinationRule or ServiceEntry), or not know our root"
                ),
            ),
            error => Self::new(InboundRefusal::Handshake, format!("the TLS handshake failed: {error}")),
        }
    }
}

/// The journal of one listener: for each reason a line at once, then one in ten seconds that counts the others.
#[derive(Debug)]
pub(super) struct Journal {
    span: Span,
    said: Mutex<[Throttle; InboundRefusal::ALL.len()]>,
}

/// What is said at once the first time, and then once in ten seconds at most.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Throttle {
    last: Option<Instant>,
    since: u64,
}

impl Throttle {
    /// Whether it is time for a line, and how many were left out since the last one.
    pub(super) fn due(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now < last + EVERY) {
            self.since += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.since))
    }
}

impl Journal {
    /// Writes in `span`.
    pub(super) fn new(span: Span) -> Self {
        Self { span, said: Mutex::default() }
    }

    pub(super) fn refused(&self, refusal: &Refusal, peer: SocketAddr) {
        let Some(more) = self.due(refusal.kind, Instant::now()) else { return };
        let (reason, cause) = (refusal.kind.as_str(), &refusal.text);
        self.span.in_scope(|| match refusal.kind {
            // Port scanners and load balancers do it all the time.
            InboundRefusal::Aborted => {
                tracing::debug!(%peer, reason, cause, more, "an inbound connection was not begun")
            }
            _ => tracing::warn!(%peer, reason, cause, more, "an inbound connection was refused"),
        });
    }

    fn due(&self, kind: InboundRefusal, now: Instant) -> Option<u64> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)[kind as usize].due(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_said_at_once_and_then_counted() {
        let journal = Journal::new(Span::none());
        let now = Instant::now();
        assert_eq!(journal.due(InboundRefusal::NotTls, now), Some(0));
        assert_eq!(journal.due(InboundRefusal::NotTls, now), None);
        assert_eq!(journal.due(InboundRefusal::NotTls, now + EVERY / 2), None);
        assert_eq!(journal.due(InboundRefusal::Timeout, now), Some(0));
        assert_eq!(journal.due(InboundRefusal::NotTls, now + EVERY), Some(2));
        assert_eq!(journal.due(InboundRefusal::NotTls, now + EVERY * 2), Some(0));
    }
}
