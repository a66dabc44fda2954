//! What can go wrong with a control plane, and what happens next.

use std::time::Duration;

/// What a loop does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Try again with growing waits.
    Retry,
    /// The credential was not accepted: try again with growing waits, and at once when the token file changes.
    Reauthenticate,
    /// An answer that will not change by itself: try again rarely, and at once when a local file changes.
    Park,
}

/// What a failure has cost the control plane, which decides how soon it is bothered again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// Nothing: it is not there, or not known where.
    Nothing,
    /// A stream on a connection that stays: it has no time for it at present.
    Stream,
    /// A handshake, or more.
    Handshake,
    /// More than it has: it asks for patience.
    PushBack,
    /// An answer that will not change by itself.
    Final,
}

/// An error of the control plane.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No address for the control plane's name.
    #[error("{host} cannot be resolved: {cause}; add it to the bundle's hosts file or to DNS")]
    Resolve {
        /// The name that was looked up.
        host: String,
        /// What the resolver said.
        cause: String,
    },
    /// Nothing answers there.
    #[error("{address} cannot be reached: {cause}")]
    Connect {
        /// `host:port`, with the address that was tried.
        address: String,
        /// What the system said.
        cause: String,
    },
    /// A root file cannot be used.
    #[error("{file}: {cause}; copy the mesh's root certificate there (root-cert.pem of the bundle)")]
    Roots {
        /// The file.
        file: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The server's certificate does not verify. No credential was sent.
    #[error("{address} is not trusted: {cause}; {fix}")]
    Untrusted {
        /// `host:port`.
        address: String,
        /// What the verification said.
        cause: String,
        /// What to do.
        fix: &'static str,
    },
    /// The connection broke before the first answer, as istiod does with a client certificate that it does not accept.
    #[error("{address} closed the connection on {credential}: {cause}")]
    Dropped {
        /// `host:port`.
        address: String,
        /// What was presented.
        credential: String,
        /// An alert, or what the transport said.
        cause: String,
    },
    /// The connection broke before the first answer, and that says nothing about a credential.
    #[error("the connection to {address} broke: {cause}")]
    Broken {
        /// `host:port`.
        address: String,
        /// An alert, or what the transport said.
        cause: String,
    },
    /// There is nothing to authenticate with. Says the fix, too.
    #[error("no credential is left: {0}")]
    Dead(String),
    /// An answer with a gRPC status.
    #[error("{call}: {meaning}{}{message:?} (code {code}); {fix}", if .meaning.is_empty() { "" } else { ": " })]
    Refused {
        /// The call that was refused.
        call: &'static str,
        /// gRPC status code.
        code: i32,
        /// The control plane's own text.
        message: String,
        /// What it means.
        meaning: &'static str,
        /// What to do.
        fix: &'static str,
        /// What happens next.
        disposition: Disposition,
        /// Stable word.
        kind: &'static str,
    },
    /// An answer about the token, which was looked at since.
    #[error("{call}: the credential was not accepted ({message:?}, code {code}); {cause}")]
    Token {
        /// The call that was refused.
        call: &'static str,
        /// gRPC status code.
        code: i32,
        /// The control plane's own text.
        message: String,
        /// What is wrong, and what to do.
        cause: String,
    },
    /// No answer in time.
    #[error("{call}: no answer from {address} within {}", humantime::format_duration(*.within))]
    Timeout {
        /// The call that was made.
        call: &'static str,
        /// `host:port`.
        address: String,
        /// How long was waited.
        within: Duration,
    },
    /// A session that lived has ended.
    #[error("the session with {address} ended: {cause}")]
    Ended {
        /// `host:port`.
        address: String,
        /// Why, as far as known.
        cause: String,
    },
    /// What we would ask is wrong; nothing was sent.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// What happens next.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Refused { disposition, .. } => *disposition,
            Self::Dropped { .. } | Self::Token { .. } | Self::Dead(_) => Disposition::Reauthenticate,
            Self::Roots { .. } | Self::Invalid(_) => Disposition::Park,
            Self::Resolve { .. } | Self::Connect { .. } | Self::Untrusted { .. } => Disposition::Retry,
            Self::Broken { .. } | Self::Timeout { .. } | Self::Ended { .. } => Disposition::Retry,
        }
    }

    /// What it has cost the control plane.
    pub fn cost(&self) -> Cost {
        match self {
            Self::Resolve { .. } | Self::Connect { .. } => Cost::Nothing,
            // A moment later they do not meet, and the connection stays.
            error if error.is_conflict() => Cost::Nothing,
            Self::Refused { kind: "admission", call, .. } if *call == Self::REGISTRATION => Cost::Stream,
            Self::Refused { kind: "admission", .. } => Cost::PushBack,
            error if error.disposition() == Disposition::Park => Cost::Final,
            _ => Cost::Handshake,
        }
    }

    /// The call that registers.
    pub(crate) const REGISTRATION: &str = "registration";

    /// This refusal of a token, with what is wrong with it.
    pub(crate) fn because(self, cause: String) -> Self {
        match self {
            Self::Refused { call, code, message, kind: "unauthenticated", .. } => {
                Self::Token { call, code, message, cause }
            }
            error => error,
        }
    }

    /// This error of a session that istiod had answered: a connection that breaks then says nothing about the credential.
    pub(crate) fn after_an_answer(self) -> Self {
        match self {
            Self::Dropped { address, cause, .. } | Self::Broken { address, cause } => Self::Ended { address, cause },
            error => error,
        }
    }

    /// A stable word, for metrics and for telling a repetition from news.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "resolve",
            Self::Connect { .. } => "connect",
            Self::Roots { .. } => "roots",
            Self::Untrusted { .. } => "untrusted",
            Self::Dropped { .. } => "dropped",
            Self::Broken { .. } => "broken",
            Self::Dead(_) => "credentials_dead",
            Self::Refused { kind, .. } => kind,
            Self::Token { .. } => "unauthenticated",
            Self::Timeout { .. } => "timeout",
            Self::Ended { .. } => "ended",
            Self::Invalid(_) => "invalid",
        }
    }

    /// Whether another credential may fare better: the connection broke on this one, or the answer was about it.
    pub fn is_about_credential(&self) -> bool {
        matches!(self, Self::Dropped { .. }) || matches!(self.kind(), "unauthenticated" | "identity_mismatch")
    }

    /// Whether it is istiod's own write conflict, which a second try 100 ms later does not meet.
    pub fn is_conflict(&self) -> bool {
        self.kind() == "conflict"
    }
}

/// An error with its causes on one line, without the pointers to documentation that the TLS library adds.
pub(crate) fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    // rustls ends some of its texts with a link for programmers.
    if let Some(at) = text.find(": https://docs.rs/") {
        text.truncate(at);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn a_text_is_for_operators() {
        let eof = "peer closed connection without sending TLS close_notify";
        let error = io::Error::new(io::ErrorKind::UnexpectedEof, format!("{eof}: https://docs.rs/rustls/latest/x#eof"));
        assert_eq!(text(&error), eof);
        assert_eq!(text(&io::Error::other("no such thing")), "no such thing");
    }
}
