//! The messages of the wire: generated from the `.proto` files beside this one, committed, kept fresh by a test.

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod generated {
    include!("proto/gen/mod.rs");
}

pub(crate) use generated::*;
