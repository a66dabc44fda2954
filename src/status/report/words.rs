//! A state is spelled once: its word in JSON, text and metrics, and how it is to be taken.

/// How a state is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mood {
    /// Something is wrong.
    Bad,
    /// Something is yet to come.
    Waits,
    /// As it should be.
    Good,
    /// Neither good nor bad.
    Plain,
}

/// One of the states of a fact.
pub trait State: Copy + PartialEq + 'static {
    /// Every one.
    const ALL: &'static [Self];

    /// Its word.
    fn as_str(self) -> &'static str;

    /// How it is to be taken.
    fn mood(self) -> Mood;
}

/// Words of an enum in JSON, text and metrics, from one list.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// Every one.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Its word.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }
    };
}

/// The same for a [`State`], with how each is to be taken.
macro_rules! states {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal: $mood:ident,)+ }) => {
        words! {
            $(#[$doc])* $name { $($(#[$vdoc])* $variant = $word,)+ }
        }

        impl $crate::status::State for $name {
            const ALL: &'static [Self] = Self::ALL;

            fn as_str(self) -> &'static str {
                self.as_str()
            }

            fn mood(self) -> $crate::status::Mood {
                match self { $(Self::$variant => $crate::status::Mood::$mood),+ }
            }
        }
    };
}
