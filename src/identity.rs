//! Keeps a workload's SVID.

mod store;

pub use store::{Loaded, PassedOver, Store, StoreError, Stored};
