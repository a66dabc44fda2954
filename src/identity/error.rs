//! Why there is no new certificate.

use crate::{
    control::{self, Cost},
    spiffe::{KeyError, SvidError},
};
use std::time::Duration;
use tokio::task::JoinError;

#[derive(Debug, thiserror::Error)]
pub(super) enum RenewalError {
    #[error(transparent)]
    Control(#[from] control::Error),
    #[error("the control plane's answer is not used: {cause}{fix}", cause = .0, fix = fix(.0))]
    Answer(#[from] SvidError),
    #[error(
        "the control plane's answer is not used: the certificate ends {} after it was received, too soon to be renewed in \
         time; let the mesh's CA give longer ones, or ask for longer ones (SECRET_TTL, identity.ttl)",
        humantime::format_duration(Duration::from_millis(u64::try_from(.0.as_millis()).unwrap_or_default()))
    )]
    ShortLived(Duration),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("key generation was interrupted: {0}")]
    Interrupted(#[from] JoinError),
}

/// What to do about an answer that is not used, where there is something to do.
fn fix(error: &SvidError) -> &'static str {
    match error {
        SvidError::WrongIdentity { .. } => {
            "; the token belongs to another serviceAccount or the trust domain is another: make the bundle again from the \
             WorkloadGroup"
        }
        _ => "",
    }
}

impl RenewalError {
    /// A stable word, for metrics and for telling a repetition from news.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Control(error) => error.kind(),
            Self::Answer(SvidError::WrongIdentity { .. }) => "wrong_identity",
            Self::Answer(SvidError::WrongKey) => "wrong_key",
            Self::Answer(SvidError::ShortChain(_)) => "short_chain",
            Self::Answer(SvidError::Validity { .. }) => "validity",
            Self::Answer(_) => "bad_answer",
            Self::ShortLived(_) => "short_lived",
            Self::Key(_) | Self::Interrupted(_) => "key",
        }
    }

    /// What it has cost the control plane. An answer that is not used has cost a signature.
    pub(super) fn cost(&self) -> Cost {
        match self {
            Self::Control(error) => error.cost(),
            Self::Answer(_) | Self::ShortLived(_) | Self::Key(_) | Self::Interrupted(_) => Cost::Handshake,
        }
    }

    /// Whether a certificate was issued that is good for no time, or too little.
    pub(super) fn is_about_life(&self) -> bool {
        matches!(self, Self::ShortLived(_) | Self::Answer(SvidError::Validity { .. }))
    }
}
