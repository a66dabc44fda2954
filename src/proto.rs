//! Messages and stubs of the protocols we speak, generated from the `.proto` files beside them and committed. The
//! names and numbers are the wire's; only the messages and fields that we use are there.

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
mod generated {
    include!("proto/gen/mod.rs");
}

pub(crate) use generated::*;
