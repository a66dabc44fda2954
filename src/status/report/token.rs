//! What has become of the bundle's token.

use crate::status::Token;
use serde::{Deserialize, Serialize};

states! {
    /// The state of a token.
    TokenState {
        /// It stays where it was put, or has not served yet.
        #[default]
        Kept = "kept": Plain,
        /// It has served and was removed, as configured.
        Removed = "removed": Plain,
        /// It has served and was to be removed, but could not be.
        Stays = "stays": Bad,
    }
}

/// The token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenReport {
    /// One of [`TokenState`].
    pub state: TokenState,
    /// Why it stays although it was to be removed, and the fix.
    pub cause: Option<String>,
}

impl TokenReport {
    pub(super) fn of(token: &Token) -> Self {
        match token {
            Token::Kept => Self::default(),
            Token::Removed => Self { state: TokenState::Removed, cause: None },
            Token::Stays { cause } => Self { state: TokenState::Stays, cause: Some(cause.clone()) },
        }
    }
}
